"""The study of longer video, used by scripts/length_study.py."""
