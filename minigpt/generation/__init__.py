"""Answers: the key/value cache, sampling, and the loop that joins them."""
