"""GPT-2, the family: how its weights and its configuration are called elsewhere.

The model itself is `minigpt.model` with `bias=True, gelu="tanh"`; there is no second one here.
"""
