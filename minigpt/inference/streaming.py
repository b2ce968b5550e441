"""An answer in pieces, while it is being written.

    for piece in stream(model, tokenizer, "四川省的省会是哪里？"):
        print(piece, end="", flush=True)

The pieces joined are what `generate` returns. A piece never ends inside a character, and never holds the
beginning of a stop string.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from minigpt.command_line import InputError
from minigpt.families import LanguageModel
from minigpt.inference.batch import Batch, evaluating
from minigpt.inference.generation import (
    TextTokenizer,
    base_seed,
    check_request,
    eos_of,
    options_from,
    prompt_ids,
    row_seed,
)
from minigpt.inference.options import GenerationOptions
from minigpt.inference.output import StopReason
from minigpt.inference.stopping import TextSoFar

__all__ = ["stream", "stream_ids"]


def stream(model: LanguageModel, tokenizer: TextTokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """The answer to one question, as `generate` gives it, in pieces; each step gives one or none.

    The model stays in eval mode until the last piece is taken, or the iterator is closed.

    Args:
        options: fields of GenerationOptions.

    Raises:
        InputError: as generate does, and for what has no pieces: beams, several sequences, reports. Before
            anything is computed, not at the first piece.
    """
    return stream_ids(model, tokenizer, prompt_ids(tokenizer, prompt), options_from(options))


def stream_ids(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    options: GenerationOptions,
    taken: list[int] | None = None,
) -> Generator[str, None, StopReason]:
    """As `stream`, from ids. The generator returns (StopIteration's value) why it stopped.

    Args:
        taken: a list that gets each id when it is chosen, the eos that ends the text too.
    """
    if options.num_beams > 1 or options.num_return_sequences > 1:
        name = "num_beams" if options.num_beams > 1 else "num_return_sequences"
        raise InputError(
            f"{name}={getattr(options, name)} cannot be streamed: there is no one text until its end"
        )
    if options.reports:
        raise InputError(f"{options.reports[0]} cannot be streamed: pieces are text; use generate")
    request = check_request(model, [prompt], options, eos_of(tokenizer), tokenizer)
    return _pieces(Batch(model, [prompt], options, request), tokenizer, [] if taken is None else taken)


@torch.inference_mode()
def _pieces(batch: Batch, tokenizer: TextTokenizer, taken: list[int]) -> Generator[str, None, StopReason]:
    options = batch.options
    if (seed := base_seed(options)) is not None:
        batch.draw([row_seed(seed, 0, 0)])
    text = TextSoFar(tokenizer.decode, options.stops)
    with evaluating(batch.model):
        for step, _ in enumerate(batch.run()):
            taken.append(int(batch.ids[0, batch.width + step]))
            if not batch.met_eos[0] and (piece := text.push(taken[-1])):
                yield piece
        if piece := text.finish():
            yield piece
    return batch.completions()[0].stop_reason
