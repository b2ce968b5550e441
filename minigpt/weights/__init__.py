"""Reads and writes model files, and stores weights in fewer bits.

Modules in this folder may import only these parts of minigpt: errors, console, storage, tokenization,
tokenizer, model, families, data and finetuning. In reading order:

    pretrained.py           model folders in Hugging Face's format
    classifiers.py          folders of classifiers
    derived_folders.py      writes a copy of a model folder with new weights
    quantized.py            linear layers in 16, 8 and 4 bits; set_precision
    quantized_folders.py    folders of int8 and int4 weights
    gguf_file.py            GGUF files, for llama.cpp
    onnx_file.py            ONNX files, for onnxruntime
    html_file.py            a model as one HTML file
    html_tokenizer.py       describes the tokenizer for the HTML file
    html_prompt.py          describes the prompt format for the HTML file
    download.py             downloads a published model
"""
