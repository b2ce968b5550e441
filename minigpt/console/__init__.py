"""The frame of every command: flags, exit codes, signals, progress, tables."""
