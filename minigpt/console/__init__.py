"""Code that all commands share. Imports minigpt.errors only.

flags.py         makes flags from a dataclass: parsing and --help
command_line.py  runs a command: errors in one line, exit codes, signals, streams
terminal.py      progress, tables, histograms
language.py      English or Chinese
fonts.py         a font with Chinese characters, pictures
"""
