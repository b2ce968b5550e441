"""Weights from and to files, and weights in fewer bits.

It may import errors, console, storage, tokenization, tokenizer, model, families, data
and finetuning. In reading order:

    pretrained.py           directories as Hugging Face's libraries write and read them
    classifiers.py          directories of classifiers
    quantized.py            linear layers in 16, 8 and 4 bits; set_precision
    quantized_folders.py    directories of int8 and int4 weights
    gguf_file.py            GGUF files, for llama.cpp
    download.py             a published model's files
"""
