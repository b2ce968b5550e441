"""Byte-level BPE and chat templates."""
