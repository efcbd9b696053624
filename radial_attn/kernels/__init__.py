"""One file a backend; each has `attention(query, key, value, mask, text_lengths, scale)`."""
