"""Plans, scores and reports the study of longer video, for scripts/length_study.py."""
