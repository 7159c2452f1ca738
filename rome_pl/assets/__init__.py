"""Shipped data: sample records and held-out text of our own writing, and key statistics of the default model."""
