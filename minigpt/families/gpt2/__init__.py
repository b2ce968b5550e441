"""The GPT-2 family: the names of weights and settings at Hugging Face and OpenAI, and published sizes.

The model itself is in minigpt/model.py; it is GPT-2 with `bias=True, gelu="tanh"` in its configuration.
"""
