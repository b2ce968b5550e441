"""What every command shares. Imports minigpt.errors only.

flags.py         flags from a dataclass: reading them, --help
command_line.py  runs a command: errors in one line, exit codes, signals, streams
terminal.py      progress, tables, histograms
"""
