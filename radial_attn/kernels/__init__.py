"""Holds a file or folder per backend, with `attention(query, key, value, mask, text_lengths, scale)`."""
