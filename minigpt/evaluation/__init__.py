"""Measures a model: loss on all tokens and on answers only, exact match, character F1, bits per byte."""
