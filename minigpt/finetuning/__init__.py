"""Fine-tuning: from existing weights to one's own model.

It may import errors, storage and families. In reading order:

    lora.py         low-rank adapters beside the weights (LoRA, rsLoRA, DoRA): apply, switch, weigh, merge
    adapters.py     PEFT's adapter folders, read and written
"""
