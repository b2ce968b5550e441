"""The Qwen3 family: model, published sizes, and the names of weights and settings at Hugging Face.

Only dense models are supported. The mixtures of experts (Qwen3-30B-A3B and -235B-A22B) are another
architecture.
"""
