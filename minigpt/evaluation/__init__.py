"""Measures a model: loss, answers, bits per byte; tasks with intervals; two models compared; a report."""
