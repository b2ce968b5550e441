"""Fine-tuning: from existing weights to one's own model.

It may import everything below training, and training. In reading order:

    lora.py         low-rank adapters beside the weights (LoRA, rsLoRA, DoRA): apply, merge
    adapters.py     PEFT's adapter folders, read and written
"""
