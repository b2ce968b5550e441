"""Files on disk: atomic writing, size limits when reading, checksums.

Modules in this folder may import only `errors` from minigpt. In reading order:

    regular_files.py        opens files for reading, but only regular files
    files.py                atomic writing, checksums, a folder's manifest
    json_files.py           reads JSON files, with limits
    safetensors_header.py   the header of a safetensors file
    safetensors_files.py    weights in one safetensors file or several
    large_pages.py          copies weights to large memory pages (2 MiB), which are faster to read
    read_ahead.py           reads weights in a thread while Python imports torch
"""
