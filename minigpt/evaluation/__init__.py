"""Measures a model: loss, answers, bits per byte, tasks with intervals. Compares models, writes reports."""
