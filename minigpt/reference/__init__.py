"""GPT-2, Qwen3 and BPE as pure functions, for NumPy and JAX, without torch. The code is written for reading.

Modules in this folder may import only these parts of minigpt: `minigpt.errors`, `minigpt.console` and
`minigpt.storage`; of other packages, only NumPy and JAX. In reading order:

    bpe.py          text <-> ids
    attention.py    shared by GPT-2 and Qwen3: softmax, attention, the cache of keys and values
    gpt2.py         GPT-2
    qwen3.py        Qwen3
    sampling.py     from logits to the next token
    generation.py   the generation loop
    names.py        converts weights by name to a tree of arrays, and back
    weights.py      reads a Hugging Face folder
    loss.py         the loss
    backward.py     GPT-2's gradients, written by hand
    adam.py         Adam
    train_numpy.py  trains a tiny GPT with NumPy
    transforms.py   the models' functions, compiled, batched and differentiated by JAX
    train_jax.py    trains the same tiny GPT with JAX
"""
