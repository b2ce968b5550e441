"""Byte-level BPE, and the chat templates that come with published models.

May import errors, console and storage. In reading order:

    bpe.py               text <-> ids
    bpe_files.py         the files of such a tokenizer: read, checked, written
    bpe_library.py       the `tokenizers` library's object, and its errors
    bpe_training.py      learns a vocabulary
    chat_template.py     a conversation as one prompt
    template_sandbox.py  runs the template, within limits

The character tokenizer is minigpt/tokenizer.py; minigpt/reference/bpe.py is BPE in plain Python.
"""
