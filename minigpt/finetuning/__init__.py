"""Fine-tuning: from existing weights to one's own model.

It imports families and storage. No command uses it yet. In reading order:

    lora.py         low-rank adapters beside the weights (LoRA, rsLoRA, DoRA): apply, merge
    adapters.py     PEFT's adapter folders, read and written
    classification.py  a classifier: a body and a head
"""
