"""What a model's folder says about its use: its generation_config.json, and what it was trained on.

    GenerationOptions(**recommended_options(folder))    # Qwen3: sampling at temperature 0.6, two eos ids, ...

Only what a GenerationOptions has is taken. A folder without the file advises nothing.
"""

from pathlib import Path
from typing import Any, Literal

from minigpt.errors import InputError
from minigpt.generation.options import GenerationOptions
from minigpt.storage.json_files import read_json
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["PromptFormat", "prompt_format", "recommended_options"]

PromptFormat = Literal["chat", "question", "text"]

_FILE, _STATE = "generation_config.json", "training_state.json"
# How to draw. Lengths are left out: published files name the model's whole context.
_NAMES = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "eos_token_id"),
)


def recommended_options(folder: Path) -> dict[str, Any]:
    """Fields of GenerationOptions that a folder's generation_config.json gives; eos_token_id may be several.

    Raises:
        InputError: naming the file, if it is no JSON object or a value makes no sense.
    """
    path = folder / _FILE
    content = _object(path)
    found = {name: content[name] for name in _NAMES if content.get(name) is not None}
    try:
        GenerationOptions(**found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def prompt_format(folder: Path, tokenizer: AnyTokenizer) -> PromptFormat:
    """The format of a model's prompts.

    "chat": by the chat template that its tokenizer came with. "question": the question, then <sep>, as models
    are trained here on questions and answers. "text": the text that it continues, for models with
    tokens of several characters and no template, and those that were trained here on plain text.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        return "text" if tokenizer.chat_template is None else "chat"
    config = _object(folder / _STATE).get("config")
    return "text" if isinstance(config, dict) and config.get("text") is not None else "question"


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
