"""Fine-tuning: from existing weights to one's own model.

It imports families and storage. In reading order:

    lora.py         low-rank adapters beside the weights (LoRA, rsLoRA, DoRA): apply, merge
    adapters.py     PEFT's adapter folders, read and written
    preferences.py  the losses of DPO and its kin
    masked_lm.py    hiding tokens, and naming them
"""
