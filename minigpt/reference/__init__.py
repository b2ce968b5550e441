"""GPT-2 and Qwen3 as pure functions over a tree of arrays, for NumPy and JAX: made to be read."""
