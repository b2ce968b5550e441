"""The loss of a model on a text: per token, and in bits per byte and per character.

    report = evaluate_text(model, tokenizer, text)
    print(report.loss.perplexity, report.bits_per_byte)

Losses per token cannot be compared between two tokenizers, because their tokens differ in length. The loss of
the whole text in bits, divided by its number of bytes or characters, can be compared. The text is cut into
windows (pieces of `window` tokens), which do not overlap. An end-of-text token is put before the text, so
that the first token is predicted, too. Each token is predicted exactly once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minigpt.data.batches import Batch
from minigpt.data.shards import end_of_text
from minigpt.errors import InputError
from minigpt.evaluation.loss import LossSum, evaluate_loss
from minigpt.families.registry import LanguageModel
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["TextReport", "evaluate_text"]

_MEASURED = 1 << 13  # largest number of tokens of a batch; a batch of one window may have more


@dataclass(frozen=True)
class TextReport:
    """The loss of a model on a text."""

    loss: LossSum  # sum of the losses of all tokens
    characters: int  # number of characters in the text
    bytes: int  # number of bytes of the text in UTF-8

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole text, divided by its number of UTF-8 bytes."""
        return self.loss.nll / math.log(2) / self.bytes

    @property
    def bits_per_character(self) -> float:
        """Bits of the whole text, divided by its number of characters (code points)."""
        return self.loss.nll / math.log(2) / self.characters

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a dict that JSON can hold; NaN and infinity become None."""
        bits = {"bits_per_byte": self.bits_per_byte, "bits_per_character": self.bits_per_character}
        shown = {name: value if math.isfinite(value) else None for name, value in bits.items()}
        return {**self.loss.as_dict(), **shown, "characters": self.characters, "bytes": self.bytes}


def evaluate_text(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    text: str | Iterable[str],
    window: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> TextReport:
    """Measure the loss of a model on a text.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: the text, or pieces of it that can be encoded separately (as from minigpt.data.corpus).
        window: number of tokens of a window; 0: as many as the model can read, but at most 1,024.
        on_progress: called with the approximate number of characters measured so far.

    Raises:
        InputError: if the text is empty, the window too long, or the tokenizer has no end-of-text token.
    """
    limit = model.config.max_position_embeddings
    if not 0 <= window <= limit:
        raise InputError(f"window must be 1 to {limit}, what the model reads, or 0: got window={window}")
    pieces = [np.array([end_of_text(tokenizer)], dtype=np.int32)]
    characters = n_bytes = 0
    for piece in [text] if isinstance(text, str) else text:
        pieces.append(tokenizer.encode_array(piece))
        characters, n_bytes = characters + len(piece), n_bytes + len(piece.encode("utf-8", "surrogatepass"))
    ids = np.concatenate(pieces).astype(np.int64)
    if len(ids) < 2:
        raise InputError("the text is empty: there is nothing to measure")
    windows = _watched(_windows(ids, window or min(limit, 1024)), characters / (len(ids) - 1), on_progress)
    return TextReport(evaluate_loss(model, windows, next(model.parameters()).device).all, characters, n_bytes)


def _watched(
    batches: Iterator[Batch], characters_per_token: float, on_progress: Callable[[int], None] | None
) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += int(batch.token_mask.sum())
        if on_progress:
            on_progress(int(done * characters_per_token))


def _windows(ids: npt.NDArray[np.int64], T: int) -> Iterator[Batch]:
    n, rows = len(ids) - 1, max(1, _MEASURED // T)
    starts = np.arange(0, n, T)
    for first in range(0, len(starts), rows):
        some = starts[first : first + rows]  # (B,) starts of windows
        lengths = np.minimum(n - some, T)  # (B,)
        width = int(lengths.max())
        column = np.arange(width)  # (width,)
        real = column < lengths[:, None]  # (B, width)
        place = np.where(real, some[:, None] + column, 0)  # (B, width) indices in `ids`
        mask = torch.from_numpy(real)
        yield Batch(torch.from_numpy(ids[place]), torch.from_numpy(ids[place + 1]), mask, mask, some)
