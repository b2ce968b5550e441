"""Qwen3, the family: its model, its published sizes, and the names that others have for them.

Only the dense models; the mixtures of experts (Qwen3-30B-A3B and -235B-A22B) are another architecture.
"""
