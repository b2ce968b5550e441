"""GPT-2, Qwen3 and BPE as pure functions, for NumPy and JAX, without torch: made to be read.

May import NumPy, JAX, errors, console and storage. In reading order:

    bpe.py          text <-> ids
    attention.py    what both models share: softmax, attention, the cache of keys and values
    gpt2.py         GPT-2 on a page
    qwen3.py        Qwen3 on a page
    sampling.py     from logits to the next token
    generation.py   the loop that generates
    names.py        the names of weights as a tree of arrays
    weights.py      reads a Hugging Face folder
    loss.py         the loss
    backward.py     GPT-2's gradients, written out
    adam.py         Adam
    train_numpy.py  trains a tiny GPT with NumPy
    transforms.py   what JAX makes of the functions: compiled, batched, differentiated
    train_jax.py    the same training with JAX
"""
