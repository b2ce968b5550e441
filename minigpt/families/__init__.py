"""The model families (GPT-2 and Qwen3), and all code that differs between families.

Modules in this folder may import only these parts of minigpt: errors, console, storage, devices and model. In
reading order:

    checks.py           checks of settings and weight names in other tools' files; no torch
    strict_loading.py   checks for NaN, models on "meta", loading a state_dict
    family.py           Family: the description of a family, and the functions that use it
    gpt2/               GPT-2; its model is minigpt/model.py
    qwen3/              the dense Qwen3 models
    registry.py         the families by name; the family of a configuration
    options.py          the flags of `minigpt train` for each family; no torch

To add a family, add a folder with `model.py`, `family.py` (a `Family`: weight names, config.json, FLOPs,
GGUF), `native.py` (its operations for the C code) and `options.py`. Then add the family to registry.py
(FAMILIES, and the unions LanguageModel and ModelConfig) and to options.py. No other file names a family.
"""
