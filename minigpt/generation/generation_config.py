"""What a model's folder says about its use: its generation_config.json, and what it was trained on.

    GenerationOptions(**recommended_options(folder))    # Qwen3: sampling at temperature 0.6, two eos ids, ...

Without that file transformers takes the same keys from config.json, and so does this module. Only what a
GenerationOptions has is taken; `notes_of` says what is not, and where nothing ends an answer.
"""

from pathlib import Path
from typing import Any, Literal

from minigpt.errors import InputError
from minigpt.generation.options import GenerationOptions, id_list
from minigpt.storage.json_files import read_json
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["PromptFormat", "notes_of", "prompt_format", "recommended_options", "start_token"]

PromptFormat = Literal["chat", "question", "text"]

_FILE, _CONFIG, _STATE = "generation_config.json", "config.json", "training_state.json"
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # of no effect without do_sample
# How to choose. Lengths are left out: published files name the model's whole context.
_NAMES = (
    *("do_sample", *_DRAWING, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("bad_words_ids", "eos_token_id"),
)
# What transformers follows, and this program does not; each with the value that means nothing.
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
    """The file that says how to generate."""
    return folder / (_FILE if (folder / _FILE).exists() else _CONFIG)


def recommended_options(folder: Path) -> dict[str, Any]:
    """Fields of GenerationOptions that a folder gives; of eos_token_id a list of those in its vocabulary.

    Raises:
        InputError: naming the file, if it is no JSON object or a value makes no sense.
    """
    path = _source(folder)
    if not path.exists():
        return {}
    content = _object(path)
    found = {name: content[name] for name in _NAMES if content.get(name) is not None}
    for name, value in list(found.items()):
        try:
            GenerationOptions(**{name: value})
        except InputError as error:
            if name not in _DRAWING or content.get("do_sample") or not isinstance(value, int | float):
                raise InputError(f"{path}: {error}") from None
            del found[name]  # temperature 0.0, say
    size = _object(folder / _CONFIG).get("vocab_size")
    eos = id_list(found.get("eos_token_id"))
    return {**found, "eos_token_id": [one for one in eos if not isinstance(size, int) or one < size]}


def start_token(folder: Path, tokenizer: AnyTokenizer) -> int | None:
    """Return the token that begins an empty text: the BOS, or else the EOS, which separates texts."""
    size = _object(folder / _CONFIG).get("vocab_size")
    ids = [_object(_source(folder)).get("bos_token_id")]
    ids += [getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos")]
    return next((one for one in ids if type(one) is int and one < (size or one + 1)), None)


def notes_of(folder: Path, tokenizer: AnyTokenizer) -> list[str]:
    """What a user should know: settings that are not followed, and that nothing ends an answer."""
    path = _source(folder)
    content = _object(path)
    notes = []
    ignored = [
        f"{name}={content[name]!r}"
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
        why = "names no eos_token_id" if named is None else f"has eos_token_id {named}, which is no id here"
        advice = "" if own is None else f'; to end at the tokenizer\'s own: "eos_token_id": {own} in {_FILE}'
        notes.append(f"{path} {why}: nothing ends an answer, as in transformers{advice}")
    return notes


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
