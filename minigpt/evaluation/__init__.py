"""Measures a model: its loss, its answers, and its results on tasks. Compares models, and writes reports."""
