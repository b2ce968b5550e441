"""An answer in pieces, while it is being written.

    for piece in stream(model, tokenizer, "四川省的省会是哪里？"):
        print(piece, end="", flush=True)

The pieces joined are what `generate` returns. A piece never ends inside a character, and never holds the
beginning of a stop string.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import eos_of, options_from, prompt_ids
from minigpt.generation.batch import Batch, evaluating
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, StopReason
from minigpt.generation.request import Request, TextTokenizer, base_seed, check_request, row_seed
from minigpt.generation.single_sequence import check_assistant, write, written_singly
from minigpt.generation.stopping import TextSoFar

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
    assistant_model: LanguageModel | None = None,
) -> Generator[str, None, StopReason]:
    """As `stream`, from ids. The generator returns (StopIteration's value) why it stopped.

    Args:
        taken: a list that gets each id when it is chosen, the eos that ends the text too.
        assistant_model: a smaller model of the same tokenizer, which guesses: see .speculation.
    """
    if options.num_beams > 1 or options.num_return_sequences > 1:
        name = "num_beams" if options.num_beams > 1 else "num_return_sequences"
        raise InputError(
            f"{name}={getattr(options, name)} cannot be streamed: there is no one text until its end"
        )
    if options.reports:
        raise InputError(f"{options.reports[0]} cannot be streamed: pieces are text; use generate")
    check_assistant(model, options, assistant_model)
    request = check_request(model, [prompt], options, eos_of(tokenizer), tokenizer)
    base = base_seed(options)
    seed = None if base is None else row_seed(base, 0, 0)
    if written_singly(options, assistant_model):
        tokens = write(model, prompt, options, request, seed, assistant_model)
    else:
        tokens = _batch_of_one(Batch(model, [prompt], options, request), seed)
    return _pieces(tokens, tokenizer, options, request, [] if taken is None else taken)


@torch.inference_mode()
def _batch_of_one(batch: Batch, seed: Sequence[int] | None) -> Generator[int, None, Completion]:
    """The tokens of a batch's only row."""
    if seed is not None:
        batch.draw([seed])
    with evaluating(batch.model):
        for step, _ in enumerate(batch.run()):
            yield int(batch.ids[0, batch.width + step])
    return batch.completions()[0]


def _pieces(
    tokens: Generator[int, None, Completion],
    tokenizer: TextTokenizer,
    options: GenerationOptions,
    request: Request,
    taken: list[int],
) -> Generator[str, None, StopReason]:
    text = TextSoFar(tokenizer.decode, options.stops)
    try:
        while True:
            try:
                taken.append(token := next(tokens))
            except StopIteration as end:
                if piece := text.finish():
                    yield piece
                reason: StopReason = end.value.stop_reason
                return reason
            if token not in request.eos and (piece := text.push(token)):
                yield piece
    finally:
        tokens.close()  # the model is left in the mode that it was in
