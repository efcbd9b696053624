"""Holds a file or folder a backend, each with `attention(query, key, value, mask, text_lengths, scale)`."""
