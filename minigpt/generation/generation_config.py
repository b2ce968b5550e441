"""Reads a model folder's recommended options (generation_config.json) and its prompt format.

    GenerationOptions(**recommended_options(folder))    # Qwen3: sampling at temperature 0.6, two eos ids, ...

If generation_config.json is missing, the same keys are read from config.json, as in transformers. Only fields
of GenerationOptions are read. `notes_of` tells the user about settings that are ignored, and about models
without an eos.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minigpt.errors import InputError, shown
from minigpt.finetuning.adapters import adapter_folder
from minigpt.generation.options import GenerationOptions, id_list
from minigpt.storage.json_files import read_json
from minigpt.storage.regular_files import is_there
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = [
    "PromptFormat", "notes_of", "prompt_format", "recommended_options", "start_token", "trained_length",
    "with_training_facts",
]  # fmt: skip

PromptFormat = Literal["chat", "question", "text"]

_FILE, _CONFIG, _STATE = "generation_config.json", "config.json", "training_state.json"
# Two keys of config.json: the prompt format and the max_length of the training. A training run's folder has
# these facts in training_state.json. A new folder that minigpt makes from it, for example by quantising or
# merging, has no training_state.json. So minigpt writes the facts into the new folder's config.json.
_FORM, _LENGTH = "prompt_format", "training_max_length"
# options that have an effect only with do_sample=True
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# The options that are read from generation_config.json. The file's max_length is not read: in the files of
# published models, it only repeats the length of the model's context.
_NAMES = (
    *("do_sample", *_DRAWING, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("bad_words_ids", "eos_token_id"),
)
# Options of generation_config.json that minigpt ignores, each with the value that means "off". If a file has
# another value, the user is told that it is ignored.
_NOT_FOLLOWED = {
    "num_beams": 1,
    "min_length": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "stop_strings": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "diversity_penalty": 0.0,
    "renormalize_logits": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "watermarking_config": None,
}


def _source(folder: Path) -> Path:
    """Return the file with the recommended options: generation_config.json, or else config.json."""
    return folder / (_FILE if is_there(folder / _FILE) else _CONFIG)


def recommended_options(folder: Path) -> dict[str, Any]:
    """Read the options that a model folder recommends: name of a GenerationOptions field -> value.

    Eos ids beyond the vocabulary are left out.

    Raises:
        InputError: if the file is not a JSON object or a value is wrong; the message names the file.
    """
    path = _source(folder)
    if not is_there(path):
        return {}
    content = _object(path)
    found = {name: content[name] for name in _NAMES if content.get(name) is not None}
    for name, value in list(found.items()):
        try:
            GenerationOptions(**{name: value})
        except InputError as error:
            if name not in _DRAWING or content.get("do_sample") or not isinstance(value, int | float):
                raise InputError(f"{path}: {error}") from None
            # without do_sample this option has no effect, so a wrong value (temperature 0.0) is no error: it
            # is left out
            del found[name]
    eos, size = id_list(found.get("eos_token_id")), _vocabulary_size(folder)
    return {**found, "eos_token_id": [one for one in eos if one < size]}


def _vocabulary_size(folder: Path) -> float:
    """Return the number of tokens that the model of a folder has; infinity if config.json does not say it."""
    size = _object(folder / _CONFIG).get("vocab_size")
    return size if type(size) is int else math.inf


def start_token(folder: Path, tokenizer: AnyTokenizer) -> int | None:
    """Return the id with which a model begins if the prompt is empty, or None if there is no such id.

    It is the id of the BOS token, or else of the EOS token, which separated the texts in training.
    """
    size = _vocabulary_size(folder)
    ids = [_object(_source(folder)).get("bos_token_id")]
    ids += [getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos")]
    return next((one for one in ids if type(one) is int and 0 <= one < size), None)


def notes_of(folder: Path, tokenizer: AnyTokenizer) -> list[str]:
    """Return sentences for the user about ignored settings, and about a missing eos."""
    path = _source(folder)
    content = _object(path)
    notes = []
    ignored = [
        f"{name}={shown(content[name])}"
        for name, nothing in _NOT_FOLLOWED.items()
        if content.get(name) not in (None, nothing, [], {})
    ]
    if ignored and path.name == _FILE:
        notes.append(f"{path}: not followed: {', '.join(ignored)}")
    own = getattr(tokenizer, "eos_token_id", None)
    if recommended_options(folder).get("eos_token_id") == [] and (
        own is not None or content.get("eos_token_id")
    ):
        named = content.get("eos_token_id")
        why = (
            "names no eos_token_id"
            if named is None
            else f"has eos_token_id {shown(named)}, which is no id here"
        )
        advice = "" if own is None else f'; to end at the tokenizer\'s own: "eos_token_id": {own} in {_FILE}'
        notes.append(f"{path} {why}: nothing ends an answer, as in transformers{advice}")
    return notes


def prompt_format(folder: Path, tokenizer: AnyTokenizer, adapter: Path | None = None) -> PromptFormat:
    """Return the prompt format of a model: "chat", "question" or "text".

    "chat": the tokenizer's chat template renders the prompt. "question": the prompt is the question and
    <sep>, as in minigpt's training on questions and answers. "text": the model continues the text. A model
    has the format "text" if it was trained on plain text, or its subword tokenizer has no chat template.

    Args:
        adapter: folder of the adapter that the model was loaded with. If it has a training_state.json, the
            adapter's training decides the format, because it came after the model's training.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        return "text" if tokenizer.chat_template is None else "chat"
    return "text" if _learned_from_text(folder, adapter) else "question"


def with_training_facts(
    config: Mapping[str, Any], folder: Path, adapter: Path | None = None
) -> dict[str, Any]:
    """Return the content of config.json for a new folder that is made from `folder`, for example by merging.

    A training run's folder has training_state.json, which holds two facts about the training: the prompt
    format and max_length. The new folder has no such file, so this function adds both facts to `config`.
    """
    facts = {_FORM: "text"} if _learned_from_text(folder, adapter) else {}
    length = trained_length(folder if adapter is None else adapter_folder(adapter))
    rest = {key: value for key, value in config.items() if key not in (_FORM, _LENGTH)}
    return {**rest, **facts, **({_LENGTH: length} if length else {})}


def _learned_from_text(folder: Path, adapter: Path | None) -> bool:
    own = None if adapter is None else adapter_folder(adapter) / _STATE
    if own is not None and own.exists():
        config = _object(own).get("config")
    else:
        config = _object(folder / _STATE).get("config")
        if _object(folder / _CONFIG).get(_FORM) == "text":
            return True
    return isinstance(config, dict) and config.get("text") is not None


def trained_length(folder: Path) -> int:
    """Return the max_length with which a model was trained on questions and answers.

    Return 0 if the folder has no such value, because the model was trained on plain text or elsewhere.
    """
    config = _object(folder / _STATE).get("config")
    if isinstance(config, dict):
        length = config.get("max_length") if config.get("text") is None else None
    else:
        length = _object(folder / _CONFIG).get(_LENGTH)
    return length if type(length) is int and length > 0 else 0


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if is_there(path) else {}
