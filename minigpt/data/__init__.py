"""Reads, splits, counts and encodes the data, and makes batches of it for training."""
