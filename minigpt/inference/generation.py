"""Writing on from a prompt: batches of prompts, greedy or sampled, with a cache, each row until its own end.

    generate(model, tokenizer, "四川省的省会是哪里？")                      # one answer
    answer_questions(model, tokenizer, questions, options)                  # thousands, batched by length
    generate_ids(model, prompts, options, eos_token_id=tokenizer.sep_token_id)  # the ids themselves

Prompts of unlike length share a batch: the shorter ones are padded on the left, so that all rows end in the
same column and each step adds one. Padding has attention weight 0 and takes no position; a batch without any
takes the path without a mask. (Batches of equal lengths only would need no padding, but there are too many,
too small ones of them.) So a row's result is the one that it has alone, up to the rounding of floating-point
sums, which depends on a batch's shape in every library.

Loading a model and reading questions are other rooms' work.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.command_line import InputError, unknown_name
from minigpt.families import LanguageModel
from minigpt.inference import sampling
from minigpt.inference.cache import KeyValueCache
from minigpt.tokenizer import Tokenizer

__all__ = ["Answer", "Completion", "GenerationOptions", "answer_questions", "generate", "generate_ids"]

StopReason = Literal["eos", "length", "context"]
BATCH_SIZE = 64


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens, and how many. Names and meanings are those of Hugging Face's `generate`."""

    max_new_tokens: int = 128  # tokens of an answer, at most
    do_sample: bool = False  # False: always the likeliest token, whatever the next three say
    temperature: float = 1.0  # divides the scores; below 1 the likely tokens gain
    top_k: int = 0  # draw among the k likeliest only; 0: off
    top_p: float = 1.0  # draw among the likeliest whose probabilities add up to this; 1: off
    seed: int | None = None  # decides what is drawn; None: torch's global generator does
    use_cache: bool = True  # False computes all positions anew for each token: slow, for comparison

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}: got {name}={value!r}")
        # The lower end is where scores in single precision stay finite: 1e-6 is greedy to all intents.
        if not (_is_number(self.temperature) and 1e-6 <= self.temperature < math.inf):
            raise InputError(
                "temperature must be a finite number of at least 1e-6 (do_sample=False takes the likeliest "
                f"token): got temperature={self.temperature!r}"
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1: got top_p={self.top_p!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Completion(NamedTuple):
    """What followed a prompt."""

    ids: list[int]  # the new tokens, without the one that ended it
    stop_reason: StopReason  # "eos" came; "length": max_new_tokens; "context": the model can read no further


class Answer(NamedTuple):
    """What followed a question."""

    text: str
    stop_reason: StopReason  # as in Completion
    unknown_characters: list[str]  # the question's characters that are not in the vocabulary


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **options: Any) -> str:
    """The answer to one question; the model reads it followed by <sep> and writes until the next <sep>.

    Args:
        prompt: the question.
        options: fields of GenerationOptions.

    Raises:
        InputError: for an unknown option, naming the nearest; a bad value; a question that is too long.
    """
    known = [field.name for field in dataclasses.fields(GenerationOptions)]
    for name in options:
        if name not in known:
            raise InputError(unknown_name("option", name, known))
    return answer_questions(model, tokenizer, [prompt], GenerationOptions(**options))[0].text


def answer_questions(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    options: GenerationOptions | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer questions, in their order.

    With a seed, the answer to question number i depends on (seed, i) and the question, not on the others.

    Args:
        batch_size: questions answered at once, at most.
        on_progress: called with the number of answers that are finished.

    Raises:
        InputError: if a question leaves no room for an answer, naming it and both numbers.
    """
    prompts = [[*tokenizer.encode_text(question), tokenizer.sep_token_id] for question in questions]
    for number, (question, prompt) in enumerate(zip(questions, prompts), 1):
        start = question if len(question) <= 20 else question[:20] + "..."
        _check_room(f"question {number} ({start!r}) with its <sep>", prompt, model)
    completions = generate_ids(
        model, prompts, options or GenerationOptions(), tokenizer.sep_token_id, batch_size, on_progress
    )
    return [
        Answer(tokenizer.decode(ids), reason, tokenizer.unknown_characters(question))
        for question, (ids, reason) in zip(questions, completions)
    ]


def _check_room(name: str, prompt: Sequence[int], model: LanguageModel) -> None:
    limit = model.config.max_position_embeddings
    if len(prompt) > limit - 1:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model reads block_size={limit}, answer included: "
            f"at most {limit - 1} are possible"
        )
    if not prompt:
        raise InputError(f"{name} is empty: the model needs a token to start from")


@torch.inference_mode()
def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos_token_id: int,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Write on from each prompt; returns the completions in the prompts' order.

    Prompts are batched by length. A row leaves its batch once it has met eos_token_id, max_new_tokens, or the
    model's block_size, prompt included. The model is left in the mode (train or eval) that it was in.

    Raises:
        InputError: if a prompt is empty or leaves no room for a token, naming it and both numbers; if the
            model's scores are not numbers.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: got batch_size={batch_size}")
    for number, prompt in enumerate(prompts, 1):
        _check_room(f"prompt {number}", prompt, model)
    seed = options.seed
    if options.do_sample and seed is None:
        seed = int(torch.randint(2**62, ()))  # so that torch.manual_seed decides
    completions: dict[int, Completion] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(prompts), batch_size):
            rows = order[first : first + batch_size]
            batch = _Batch(model, [prompts[index] for index in rows], options, eos_token_id)
            if seed is not None and options.do_sample:
                batch.draw(seed, rows)
            for finished in batch.run():
                if on_progress:
                    on_progress(first + finished)
            completions.update(zip(rows, batch.completions()))
    finally:
        model.train(was_training)
    return [completions[index] for index in range(len(prompts))]


class _Batch:
    """Prompts that are written on together; B rows, S columns so far, n rows not finished yet."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        eos_token_id: int,
    ) -> None:
        self.model, self.options, self.eos_token_id = model, options, eos_token_id
        weight = next(model.parameters())
        self.device = weight.device
        lengths = [len(prompt) for prompt in prompts]
        limits = [
            min(options.max_new_tokens, model.config.max_position_embeddings - length) for length in lengths
        ]
        B, self.width, self.steps = len(prompts), max(lengths), max(limits)
        ids = torch.zeros(B, self.width + self.steps, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) : self.width] = torch.tensor(prompt)
        self.ids = ids.to(self.device)  # (B, S_max)  the prompts, padded on the left; then what follows
        self.limits = torch.tensor(limits, device=self.device)  # (B,)  new tokens, at most
        self.mask: Tensor | None = None  # (B, S_max)  True: token, False: padding
        self.positions: Tensor | None = None  # (B, S_max)
        if min(lengths) < self.width:
            column = torch.arange(self.width + self.steps, device=self.device)  # (S_max,)
            place = column - (self.width - torch.tensor(lengths, device=self.device))[:, None]  # (B, S_max)
            self.mask, self.positions = place >= 0, place.clamp(min=0)
        self.counts = torch.zeros_like(self.limits)  # (B,)  new tokens of finished rows, without eos
        self.met_eos = torch.zeros(B, dtype=torch.bool, device=self.device)
        self.uniform: Tensor | None = None
        self.cache: KeyValueCache | None = None
        if options.use_cache:  # the last token is never read: one column less
            columns = self.width + self.steps - 1
            self.cache = KeyValueCache(model.config, B, columns, self.device, weight.dtype)

    def draw(self, seed: int, indices: Sequence[int]) -> None:
        """Draw all numbers that sampling will use, each row's from its own generator (seed, index)."""
        drawn = np.stack([np.random.default_rng([seed, index]).random(self.steps) for index in indices])
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self.uniform = torch.from_numpy(drawn).to(self.device, dtype)  # (B, steps)

    def run(self) -> Iterator[int]:
        """Generate to the end; yields the number of finished rows whenever it grows."""
        alive = torch.arange(len(self.ids), device=self.device)  # (n,)  which row the cache's rows are
        for step in range(self.steps):
            end = self.width + step
            tokens = self._next(alive, step, end)  # (n,)
            self.ids[alive, end] = tokens
            ended = tokens == self.eos_token_id
            finished = ended | (self.limits[alive] == step + 1)
            n = len(alive) - int(finished.sum())
            if n == len(alive):
                continue
            self.met_eos[alive[ended]] = True
            self.counts[alive[finished]] = step + 1 - ended[finished].long()
            yield len(self.ids) - n
            if not n:
                return
            # Holes are filled from the end, so that the cache moves as few rows as possible.
            rows = torch.arange(n, device=self.device)
            staying = (~finished).nonzero()[:, 0]  # (n,)
            rows[finished[:n]] = staying[staying >= n]
            alive = alive[rows]
            if self.cache is not None:
                self.cache.select(rows)

    def _next(self, alive: Tensor, step: int, end: int) -> Tensor:
        """One token for each row that is alive, from the columns before `end`."""
        start = 0 if self.cache is None else self.cache.length
        hidden = self.model.base_model(
            self.ids[alive, start:end],
            None if self.mask is None else self.mask[alive, :end],
            None if self.positions is None else self.positions[alive, start:end],
            self.cache,
        )  # (n, T, C)
        logits = self.model.lm_head(hidden[:, -1]).float()  # (n, V)  only the last position is asked
        likeliest = sampling.greedy(logits)  # (n,)  where there is a NaN or an infinity, it is that
        if not logits.gather(-1, likeliest[:, None]).isfinite().all():
            raise InputError("the model's scores are not finite numbers: its weights are damaged or diverged")
        if self.uniform is None:
            return likeliest
        options = self.options
        logits = sampling.filtered(logits, options.temperature, options.top_k, options.top_p)
        return sampling.sample(logits, self.uniform[alive, step])

    def completions(self) -> list[Completion]:
        """What every row has become."""
        result = []
        for row, count, met_eos in zip(self.ids.tolist(), self.counts.tolist(), self.met_eos.tolist()):
            full = count == self.options.max_new_tokens
            reason: StopReason = "eos" if met_eos else "length" if full else "context"
            result.append(Completion(row[self.width : self.width + count], reason))
        return result
