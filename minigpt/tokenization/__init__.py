"""Byte-level BPE, WordPiece, and the chat templates that come with published models.

May import errors, console and storage. In reading order:

    definition.py        what decides a tokenizer's ids: roles, added tokens, what stands around a text
    library.py           the `tokenizers` library's object, and its errors
    subword.py           text <-> ids, as all of these tokenizers do it
    bpe.py               byte-level BPE
    bpe_files.py         its files
    bpe_training.py      learns a vocabulary
    wordpiece.py         WordPiece, BERT's tokenizer
    wordpiece_files.py   its files
    chat_template.py     a conversation as one prompt
    template_sandbox.py  runs the template, within limits

The character tokenizer is minigpt/tokenizer.py; minigpt/reference/bpe.py is BPE in plain Python.
"""
