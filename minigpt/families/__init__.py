"""The model families behind one registry, and strict loading of their weights."""
