"""Files on disk: written as a whole or not at all, read with bounds, verified.

It may import errors. In reading order:

    files.py                atomic writing, SHA-256, a folder's manifest
    json_files.py           the one way in for JSON
    safetensors_header.py   the header of a safetensors file
    safetensors_files.py    tensors in safetensors, one file or several
    large_pages.py          copies of weights in memory that is read faster
    read_ahead.py           a directory's weights, read while Python imports torch
"""
