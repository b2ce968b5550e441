"""What is asked of a model, checked before anything is computed: what every way to generate begins with.

`check_request` refuses what cannot work, and makes of the options, once for all prompts, what the ways need:
ids that end a text, a decoder for stop strings, a constraint, and how many ids there are tokens for. The
seeds of rows are here too, so that a row draws the same numbers whichever way it is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.constraints import make_constraint
from minigpt.generation.logits_processors import Processor, make_processors
from minigpt.generation.options import GenerationOptions, check_ids, id_list

__all__ = ["Request", "TextTokenizer", "base_seed", "check_request", "check_room", "row_seed"]


class TextTokenizer(Protocol):
    """What generation asks of a tokenizer; .generation's `prompt_ids` and `eos_of` ask for more."""

    def encode_text(self, text: str, /) -> list[int]:
        """The ids of a text, and nothing else."""

    def decode(self, ids: list[int], /) -> str:
        """The text of some ids."""

    def unknown_characters(self, text: str, /) -> list[str]:
        """What of a text cannot be encoded."""


@dataclass(frozen=True)
class Request:
    """What a request asks for besides its options, or was made of them, once for all its prompts."""

    eos: list[int]  # ids that end an answer
    decode: Callable[[list[int]], str] | None = None  # ids -> text, where there are stop strings
    constraint: Callable[[], Processor] | None = None  # makes a batch's minigpt.generation.constraints
    tokens: int | None = None  # how many ids have a text, the first ones; None: nobody knows, so all may come

    def processors(
        self, options: GenerationOptions, vocab_size: int, device: torch.device
    ) -> list[Processor]:
        """What changes a batch's scores, in order."""
        return make_processors(options, self.eos, vocab_size, device, self.constraint, self.tokens)


def check_request(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos_token_id: int | Sequence[int] | None,
    tokenizer: TextTokenizer | None,
) -> Request:
    """Refuse what cannot work before anything is computed, with an InputError.

    Where there is a tokenizer, ids that it has no token for never come: a published model may have more rows
    than tokens (Qwen3: 151,936 for 151,669), whose scores nothing has trained. transformers lets them come.
    """
    vocab_size = model.config.vocab_size
    options.check_model(vocab_size, model.config.max_position_embeddings)
    eos = id_list(eos_token_id if options.eos_token_id is None else options.eos_token_id)
    check_ids("eos_token_id", eos, vocab_size)
    for number, prompt in enumerate(prompts, 1):
        check_room(f"prompt {number}", prompt, model, options)
        check_ids(f"prompt {number}", prompt, vocab_size)
    if options.stops and tokenizer is None:
        raise InputError("stop_strings need the tokenizer: pass tokenizer=...")
    decode = tokenizer.decode if tokenizer is not None and options.stops else None
    count = getattr(tokenizer, "get_vocab_size", None)
    return Request(eos, decode, make_constraint(options, tokenizer, eos), count() if count else None)


def check_room(name: str, prompt: Sequence[int], model: LanguageModel, options: GenerationOptions) -> None:
    """Refuse a prompt that is empty, or, where no window slides over it, leaves no room for a token."""
    limit = model.config.max_position_embeddings
    if len(prompt) > limit - 1 and options.window is None:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model reads block_size={limit}, answer included: "
            f"at most {limit - 1} are possible"
        )
    if not prompt:
        raise InputError(f"{name} is empty: the model needs a token to start from")


def base_seed(options: GenerationOptions) -> int | None:
    """What all rows' generators begin with; None without sampling."""
    if not options.do_sample:
        return None
    return (
        int(torch.randint(2**62, ())) if options.seed is None else options.seed
    )  # torch.manual_seed decides


def row_seed(seed: int, prompt: int, copy: int) -> list[int]:
    """The seed of one row's generator: the first answer to a prompt is the same, however many follow."""
    return [seed, prompt, copy] if copy else [seed, prompt]
