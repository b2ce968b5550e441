"""Files: atomic writes, manifests, safetensors."""
