"""Fine-tuning: chooses which weights of a given model are trained, and adds adapters or new embedding rows.

Modules in this folder may import only these parts of minigpt: errors, storage, data and families. In reading
order:

    freezing.py     trains some parameters and freezes the other parameters
    layers.py       adds, activates and merges adapters of all kinds; several adapters in one batch
    lora.py         low-rank adapters beside the weights (LoRA, rsLoRA, DoRA)
    bottleneck.py   small modules after attention and MLP (bottleneck adapters)
    ia3.py          learned factors for the channels of some layers (IA3)
    adapters.py     reads and writes PEFT's adapter folders
    embeddings.py   more rows in embedding and head, for new tokens
    classification.py  a classifier: the body of a language model with another head; its loss
    preferences.py  the losses of DPO, IPO, SimPO and ORPO
    grpo.py         GRPO: advantages within groups of answers, and the loss of their tokens
    masked_lm.py    hides tokens of a text, and predicts hidden tokens
"""
