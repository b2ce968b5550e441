"""Code that all commands share.

Modules in this folder may import only `errors` from minigpt.

flags.py         makes flags from a dataclass: parsing and --help
command_line.py  runs a command: errors in one line, exit codes, signals, streams
terminal.py      progress, tables, histograms
language.py      English or Chinese
fonts.py         draws pictures in a font with Chinese characters
"""
