"""Weights from and to files: Hugging Face folders, quantised folders, GGUF, OpenAI's release, .pth."""
