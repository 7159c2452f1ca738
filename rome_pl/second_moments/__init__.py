"""The second moment of keys: text, sums, files."""
