"""Texts longer than the model can read: it goes on with the last part of them, if the caller asks for that.

    slide_ids(model, prompt, options, eos_token_id, Window(tokens=512, sinks=4))

Nothing slides by itself: generate_ids refuses what does not fit, and stops with "context" at the end. Here,
each time that the context is full, the model reads the window anew: the first `sinks` tokens of the text and
the last ones, `tokens` in all, as if they stood alone, at positions 0, 1, 2 ... What is written from there on
is what generate_ids writes behind that window. The rest is forgotten.

To keep the old keys and values instead would be cheaper, and something else: they were made with what has
been dropped in view, and a learned position, as GPT-2's, is part of them. Reading anew costs `tokens` tokens
each time that context - tokens new ones have come.
"""

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.batch import evaluating, new_cache
from minigpt.generation.model_runner import Reader
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion
from minigpt.generation.request import Request, TextTokenizer, base_seed, check_request, row_seed
from minigpt.generation.sequence import Row, check_single, outcome

__all__ = ["Window", "slide", "slide_ids"]


@dataclass(frozen=True)
class Window:
    """What is kept of a text when the context is full.

    Raises:
        InputError: if no place is left for the last tokens.
    """

    tokens: int  # in all
    # the first so many of them are the text's first: trained models look there whatever stands there,
    # https://arxiv.org/abs/2309.17453 (attention sinks); a system prompt fits, too
    sinks: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sinks < self.tokens:
            raise InputError(
                f"sinks must be at least 0 and fewer than the window's tokens: got sinks={self.sinks}, "
                f"tokens={self.tokens}"
            )

    def check(self, context: int, name: str = "block_size") -> None:
        """Raise InputError where so many tokens, which `name` says, leave no place for a new one."""
        if self.tokens >= context:
            raise InputError(
                f"the window's tokens must be fewer than the model reads, {name}={context}: got "
                f"tokens={self.tokens}"
            )

    def of(self, ids: Sequence[int]) -> list[int]:
        """What is kept of these.

        >>> Window(tokens=5, sinks=2).of([10, 11, 12, 13, 14, 15, 16, 17])
        [10, 11, 15, 16, 17]
        """
        if len(ids) <= self.tokens:
            return list(ids)
        return [*ids[: self.sinks], *ids[len(ids) - self.tokens + self.sinks :]]


def slide_ids(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    eos_token_id: int | Sequence[int] | None,
    window: Window,
    tokenizer: TextTokenizer | None = None,
) -> Completion:
    """Write on from a prompt of any length, up to max_new_tokens of any number; arguments as generate_ids.

    Penalties and prohibitions look at the whole text. A text that fits is what generate_ids makes of it.

    Raises:
        InputError: as generate_ids does, but not for lengths; for beams and reports; for a window that leaves
            no place for a new token.
    """
    check_single(options, "a sliding window")
    window.check(model.config.max_position_embeddings)
    options = dataclasses.replace(options, window=window.tokens, sinks=window.sinks)
    request = check_request(model, [prompt], options, eos_token_id, tokenizer)
    base = base_seed(options)
    return outcome(slide(model, prompt, options, request, None if base is None else row_seed(base, 0, 0)))


@torch.inference_mode()
def slide(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    request: Request,
    seed: Sequence[int] | None,
) -> Generator[int, None, Completion]:
    """As slide_ids, of a checked request with options.window: yields each token as it is chosen, eos too."""
    assert options.window is not None
    window, config = Window(options.window, options.sinks), model.config
    context = config.max_position_embeddings
    with evaluating(model):
        reader = Reader(model, options.cache_implementation)
        row = Row(prompt, options.wanted, options, request, config.vocab_size, reader.device, seed)
        held = list(prompt) if len(prompt) < context else window.of(prompt)  # what the model has in view
        cache = new_cache(model, 1, min(context, len(held) + row.limit - 1), options)
        new = held
        while True:
            row.push(token := row.choose(reader.read(new, cache)))
            yield token
            if row.stop_reason is not None:
                return row.completion()
            held, new = [*held, token], [token]
            if len(held) == context:
                held = new = window.of([*row.prompt, *row.ids])
                cache.truncate(0)
