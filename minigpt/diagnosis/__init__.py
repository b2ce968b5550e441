"""Finds problems of a training run in the files that it wrote, and says what to try."""
