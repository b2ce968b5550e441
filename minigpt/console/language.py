"""Chooses the language of messages that exist in English and Chinese."""

import os
from typing import Literal, TypeAlias

__all__ = ["Language", "chosen_language"]

Language: TypeAlias = Literal["en", "zh"]


def chosen_language(wanted: str) -> Language:
    """Return the language of messages. "auto": the first of LC_ALL, LC_MESSAGES, LANG that is set decides."""
    if wanted == "auto":
        names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        wanted = next((name for name in names if name), "")
    return "zh" if wanted.lower().startswith("zh") else "en"
