"""Learns a byte-level BPE vocabulary from texts. minigpt/reference/bpe.py explains the algorithm."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers.trainers import BpeTrainer

from minigpt.tokenization.bpe_files import GPT2_WORDS, KINDS, QWEN_WORDS, frame_of, split_by
from minigpt.tokenization.definition import BYTE_SYMBOLS, Definition, checked
from minigpt.tokenization.library import in_one_line, prepared, require_whole_characters

__all__ = ["LONGEST_WORD", "learn"]

# The tokens with the ids 0, 1 and 2. The character tokenizer has the same ids for <pad> and <sep>.
_TRAINED_SPECIAL = ("<pad>", "<|endoftext|>", "<sep>")
# In training, a word with more characters than this is cut into pieces, because the time of training grows
# with the square of a word's length, and a Chinese text without punctuation is one word. Encoding does not
# cut words.
LONGEST_WORD = 64
_CUT = f"(?m:.{{1,{LONGEST_WORD}}})"
_TRAINING_WORDS = {"gpt2": GPT2_WORDS, "qwen2": QWEN_WORDS}


def learn(
    texts: Iterable[str],
    vocab_size: int,
    kind: str,
    special_tokens: Sequence[str],
    min_frequency: int,
    on_progress: Callable[[int, str], None],
) -> Definition:
    """Train a tokenizer and return its definition. For arguments and errors, see `BpeTokenizer.train`."""
    special = list(dict.fromkeys((*_TRAINED_SPECIAL, *special_tokens)))
    least = len(special) + len(BYTE_SYMBOLS)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least}, the bytes and special tokens: got {vocab_size}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: got {kind!r:.80}")
    frame = frame_of(kind)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    frame["added_tokens"] = [{"id": i, "content": text, **flags} for i, text in enumerate(special)]
    library = prepared({**frame, "pre_tokenizer": split_by(_TRAINING_WORDS[kind], _CUT)})
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=list(BYTE_SYMBOLS),
        show_progress=False,
    )
    _train(library, trainer, texts, on_progress)
    learned = json.loads(library.to_str())["model"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<|endoftext|>",
        "sep_token": "<sep>",
        "split_special_tokens": True,  # tells transformers to read "<sep>" in a text as five characters
        "clean_up_tokenization_spaces": False,
    }
    names = {text: index for index, text in enumerate(special)}
    merges = [(first, second) for first, second in learned["merges"]]
    roles = {key: config[key] for key in ("pad_token", "eos_token", "sep_token")}
    definition = Definition(learned["vocab"], merges, names, {}, frame, config, roles)
    return checked(definition, "the trained tokenizer")


def _train(
    library: Library, trainer: BpeTrainer, texts: Iterable[str], on_progress: Callable[[int, str], None]
) -> None:
    """Train a `tokenizers.Tokenizer` in a thread, so that Ctrl-C works although `tokenizers` ignores signals.

    The main thread waits and handles Ctrl-C. `tokenizers` cannot be stopped while it merges. So after Ctrl-C,
    the thread runs until the process ends, and its result is not used.
    """
    characters, is_read, is_stopped = 0, False, False
    failures: list[BaseException] = []

    def read() -> Iterator[str]:
        nonlocal characters, is_read
        for number, text in enumerate(texts, 1):
            require_whole_characters(text, f"text {number}, ")
            if is_stopped:
                return
            characters += len(text)
            yield text
        is_read = True

    def work() -> None:
        try:
            library.train_from_iterator(read(), trainer)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    began = time.monotonic()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if is_read:
                on_progress(
                    2, f"learning merges from {characters:,} characters, {time.monotonic() - began:.0f} s"
                )
            else:
                on_progress(1, f"{characters:,} characters read")
    finally:
        is_stopped = True
    for error in failures:
        raise error if isinstance(error, Exception) else in_one_line(error, "training failed")
