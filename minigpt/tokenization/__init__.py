"""Byte-level BPE tokenizers, and chat templates.

This folder may import errors, console and storage. In reading order:

    bpe.py               text <-> ids
    bpe_files.py         the files of a tokenizer: reading, checks, writing
    bpe_library.py       builds the `tokenizers` library's object; its errors in one line
    bpe_training.py      learns a vocabulary
    chat_template.py     turns a conversation into one prompt
    template_sandbox.py  runs a chat template, within limits

The character tokenizer is minigpt/tokenizer.py; minigpt/reference/bpe.py is BPE in plain Python.
"""
