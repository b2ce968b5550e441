"""Rows that are written one by one, token by token: beyond the context, or with guesses.

    for token in write(model, prompt, options, request, seed, assistant_model): ...

What the options name decides the way: `window` is .window's, `prompt_lookup_num_tokens` and an assistant
model are .speculation's. Many rows in one batch are .batch's work; beams are .beam's.
"""

from collections.abc import Generator, Sequence

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion
from minigpt.generation.request import Request
from minigpt.generation.sliding_window import slide
from minigpt.generation.speculative_decoding import Drafter, ModelDrafter, NgramDrafter, speculate

__all__ = ["check_assistant", "write", "written_singly"]


def written_singly(options: GenerationOptions, assistant_model: LanguageModel | None) -> bool:
    """Do the options, or an assistant model, ask for a way that writes one row at a time?"""
    return options.special is not None or assistant_model is not None


def check_assistant(
    model: LanguageModel, options: GenerationOptions, assistant_model: LanguageModel | None
) -> None:
    """Raise InputError for options that an assistant model does not go with, and for other vocabularies."""
    if assistant_model is None:
        return
    ours, theirs = assistant_model.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"the assistant model has vocab_size={ours}, the model {theirs}: both must have one tokenizer"
        )
    plain = {"window": None, "prompt_lookup_num_tokens": None, "num_beams": 1, "use_cache": True}
    for name, value in plain.items():
        if getattr(options, name) != value:
            raise InputError(
                f"{name}={getattr(options, name)} does not go with an assistant model: leave out one"
            )
    if options.reports:
        raise InputError(f"{options.reports[0]} does not go with an assistant model: leave out one")


def write(
    model: LanguageModel,
    prompt: Sequence[int],
    options: GenerationOptions,
    request: Request,
    seed: Sequence[int] | None,
    assistant_model: LanguageModel | None = None,
) -> Generator[int, None, Completion]:
    """Write on from a prompt of a checked request: yields each token, the eos that ends it too.

    Args:
        seed: what the row draws with (.request's row_seed); None: the likeliest tokens.
    """
    if options.window is not None:
        return (yield from slide(model, prompt, options, request, seed))
    guesses = options.prompt_lookup_num_tokens or options.num_assistant_tokens
    drafter: Drafter = (
        NgramDrafter(options.max_matching_ngram_size)
        if assistant_model is None
        else ModelDrafter(assistant_model)
    )
    found = yield from speculate(model, prompt, options, request, seed, drafter, guesses)
    return found.completion
