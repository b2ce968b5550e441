"""The model families (GPT-2 and Qwen3), and what the rest of minigpt asks of any of them.

It may import errors, console, storage, devices and model. In reading order:

    checks.py           checks of settings and names of weights that others wrote; no torch
    strict_loading.py   finite weights, models on "meta", loading a state_dict
    family.py           Family: all that differs between families, and what is done with it alike
    gpt2/               GPT-2; its model is minigpt/model.py
    qwen3/              Qwen3, the dense models
    registry.py         the families by name, and a model from a configuration
    options.py          what training's flags mean for each family; no torch

A further family is a folder with a `model.py`, a `family.py` (a `Family`: names of weights, config.json,
FLOPs, GGUF), a `native.py` (its operations for C) and an `options.py`; and its entries in registry.py
(FAMILIES and the two unions) and in options.py. No other file names a family.
"""
