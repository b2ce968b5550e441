"""Byte-level BPE and WordPiece tokenizers, and chat templates.

Modules in this folder may import only these parts of minigpt: `minigpt.errors`, `minigpt.console` and
`minigpt.storage`. In reading order:

    definition.py        the dataclass Definition: everything that decides which ids a text gets
    library.py           builds the `tokenizers` library's object from a Definition
    subword.py           text <-> ids: the part that BPE and WordPiece share
    bpe.py               byte-level BPE
    bpe_files.py         the files of a byte-level BPE tokenizer
    bpe_training.py      learns a vocabulary
    wordpiece.py         WordPiece, BERT's tokenizer
    wordpiece_files.py   the files of a WordPiece tokenizer
    chat_template.py     turns a conversation into one prompt
    template_sandbox.py  runs a chat template, within limits

The character tokenizer is minigpt/tokenizer.py; minigpt/reference/bpe.py is BPE in plain Python.
"""
