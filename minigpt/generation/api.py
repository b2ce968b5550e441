"""Writing on from a prompt: answers to questions, completions of ids, and on request all that led to them.

    generate(model, tokenizer, "四川省的省会是哪里？")                      # one answer
    answer_questions(model, tokenizer, questions, options)                  # thousands, batched by length
    generate_ids(model, prompts, options, eos_token_id=tokenizer.sep_token_id)  # the ids themselves
    generate_output(model, prompts, options, eos_token_id=...)              # with scores, hidden states, ...

The loop itself is minigpt.generation.batch, or .beam for beam search; .streaming gives an answer in pieces.
Loading a model and reading questions are other rooms' work.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch

from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel
from minigpt.generation.batch import Batch, evaluating
from minigpt.generation.beam_search import Finished, beam_search
from minigpt.generation.inputs_embeds import placeholders
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, GenerateOutput, Recorder, StopReason
from minigpt.generation.request import Request, TextTokenizer, base_seed, check_request, check_room, row_seed
from minigpt.generation.sequence import outcome
from minigpt.generation.single_sequence import check_assistant, write, written_singly
from minigpt.generation.stopping import cut

__all__ = [
    "Answer",
    "Completion",
    "GenerateOutput",
    "GenerationOptions",
    "TextTokenizer",
    "answer_questions",
    "generate",
    "generate_ids",
    "generate_output",
]

BATCH_SIZE = 64


class Answer(NamedTuple):
    """What followed a question."""

    text: str  # without the stop string that ended it
    stop_reason: StopReason
    unknown_characters: list[str]  # the question's characters that are not in the vocabulary


@overload
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    return_dict_in_generate: Literal[False] = False,
    assistant_model: LanguageModel | None = None,
    **options: Any,
) -> str:
    """The answer's text."""


@overload
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    return_dict_in_generate: Literal[True],
    **options: Any,
) -> GenerateOutput:
    """The answer's ids, and what the options ask for."""


def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    return_dict_in_generate: bool = False,
    assistant_model: LanguageModel | None = None,
    **options: Any,
) -> str | GenerateOutput:
    """The answer to one question; the model reads it followed by <sep> and writes until the next <sep>.

    A tokenizer without a sep_token_id gives the prompt as it is, and its eos_token_id, if any, ends the text.

    Args:
        prompt: the question.
        return_dict_in_generate: return a GenerateOutput instead of the text, with what the options'
            output_scores, output_logits, output_hidden_states, output_attentions and logprobs ask for.
        assistant_model: a smaller model of the same tokenizer, which guesses: see .speculation.
        options: fields of GenerationOptions.

    Raises:
        InputError: for an unknown option, naming the nearest; a bad value; a question that is too long.
    """
    chosen = options_from(options, also=["return_dict_in_generate", "assistant_model"])
    if return_dict_in_generate:
        if assistant_model is not None:
            raise InputError("assistant_model does not go with return_dict_in_generate=True: leave out one")
        return generate_output(model, [prompt_ids(tokenizer, prompt)], chosen, eos_of(tokenizer), tokenizer)
    if chosen.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences={chosen.num_return_sequences} needs return_dict_in_generate=True, or "
            "answer_questions: generate returns one text"
        )
    return answer_questions(model, tokenizer, [prompt], chosen, assistant_model=assistant_model)[0].text


def options_from(values: Mapping[str, Any], also: Sequence[str] = ()) -> GenerationOptions:
    """Options from a dictionary.

    Raises:
        InputError: for an unknown name, naming the nearest one, of the options or of `also`.
    """
    known = [field.name for field in dataclasses.fields(GenerationOptions)]
    for name in values:
        if name not in known:
            raise InputError(unknown_name("option", name, [*known, *also]))
    return GenerationOptions(**values)


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """The ids that the model reads: the prompt's, and <sep>, where the tokenizer has one."""
    ids, separator = tokenizer.encode_text(prompt), _separator(tokenizer)
    return ids if separator is None else [*ids, separator]


def eos_of(tokenizer: TextTokenizer) -> int | None:
    """What ends an answer: <sep>, where the tokenizer has one, or else its eos_token_id."""
    separator = _separator(tokenizer)
    return getattr(tokenizer, "eos_token_id", None) if separator is None else separator


def _separator(tokenizer: TextTokenizer) -> int | None:
    return getattr(tokenizer, "sep_token_id", None)


def answer_questions(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    questions: Sequence[str],
    options: GenerationOptions | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
    assistant_model: LanguageModel | None = None,
) -> list[Answer]:
    """Answer questions, in their order; with num_return_sequences, each that many times, one after another.

    With a seed, the answer to question number i depends on (seed, i) and the question, not on the others.

    Args:
        batch_size: answers written at once, at most.
        on_progress: called with the number of answers that are finished.

    Raises:
        InputError: if a question leaves no room for an answer, naming it and both numbers.
    """
    options = options or GenerationOptions()
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    for number, (question, prompt) in enumerate(zip(questions, prompts), 1):
        start = question if len(question) <= 20 else question[:20] + "..."
        separator = "" if _separator(tokenizer) is None else " with its <sep>"
        check_room(f"question {number} ({start!r}){separator}", prompt, model, options)
    completions = generate_ids(
        model, prompts, options, eos_of(tokenizer), batch_size, on_progress, tokenizer,
        assistant_model=assistant_model,
    )  # fmt: skip
    asked = [question for question in questions for _ in range(options.num_return_sequences)]
    return [
        Answer(cut(tokenizer.decode(ids), options.stops), reason, tokenizer.unknown_characters(question))
        for question, (ids, reason) in zip(asked, completions)
    ]


@torch.inference_mode()
def generate_ids(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos_token_id: int | Sequence[int] | None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
    tokenizer: TextTokenizer | None = None,
    inputs_embeds: Sequence[torch.Tensor] = (),
    assistant_model: LanguageModel | None = None,
) -> list[Completion]:
    """Write on from each prompt; returns the completions in the prompts' order, num_return_sequences of each.

    Prompts are batched by length. A row leaves its batch once it has met an eos, a stop string,
    max_new_tokens, or the longest sequence that the model reads, prompt included. The model is left in the
    mode (train or eval) that it was in.

    Args:
        eos_token_id: one, several, or None; options.eos_token_id stands instead, where it is given.
        batch_size: rows written at once, at most. Beam search writes num_beams rows for one prompt. Guesses
            and a window are for one row at a time.
        on_progress: called with the number of completions that are finished.
        tokenizer: needed for the options stop_strings, choices, regex and json_schema. Rows of the model's
            vocabulary that it has no token for never come; transformers lets them.
        inputs_embeds: prompts as vectors (tokens, C), instead of ids; `prompts` is then empty. Penalties and
            prohibitions see the new ids alone.
        assistant_model: a smaller model of the same tokenizer, which guesses: see .speculation.

    Raises:
        InputError: if a prompt is empty, leaves no room for a token, or has an id that the vocabulary lacks;
            if an option does not fit the model; if the model's scores are not numbers.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: got batch_size={batch_size}")
    if options.reports:
        raise InputError(f"{options.reports[0]} needs return_dict_in_generate=True, or generate_output")
    if inputs_embeds:
        if assistant_model is not None:
            raise InputError("assistant_model does not go with inputs_embeds: leave out one")
        prompts = _embedded(model, prompts, inputs_embeds, options)
    check_assistant(model, options, assistant_model)
    request = check_request(model, prompts, options, eos_token_id, tokenizer)
    if options.num_beams > 1:
        found = _search(model, prompts, options, request, on_progress)
        return [one.completion() for one in found]
    copies, seed = options.num_return_sequences, base_seed(options)
    n_rows = copies * len(prompts)
    if written_singly(options, assistant_model):
        rows_written = []
        for row in range(n_rows):
            drawn = None if seed is None else row_seed(seed, *divmod(row, copies))
            tokens = write(model, prompts[row // copies], options, request, drawn, assistant_model)
            rows_written.append(outcome(tokens))
            if on_progress:
                on_progress(row + 1)
        return rows_written
    completions: dict[int, Completion] = {}
    order = sorted(range(n_rows), key=lambda row: len(prompts[row // copies]))
    with evaluating(model):
        for first in range(0, n_rows, batch_size):
            rows = order[first : first + batch_size]
            embeds = [inputs_embeds[row // copies] for row in rows] if inputs_embeds else None
            given = [prompts[row // copies] for row in rows]
            batch = Batch(model, given, options, request, embeds=embeds)
            if seed is not None:
                batch.draw([row_seed(seed, *divmod(row, copies)) for row in rows])
            before = 0
            for finished in batch.run():
                if on_progress and finished > before:
                    on_progress(first + finished)
                before = finished
            completions.update(zip(rows, batch.completions()))
    return [completions[row] for row in range(n_rows)]


@torch.inference_mode()
def generate_output(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos_token_id: int | Sequence[int] | None,
    tokenizer: TextTokenizer | None = None,
    inputs_embeds: Sequence[torch.Tensor] = (),
) -> GenerateOutput:
    """As generate_ids, with the outputs that the options ask for; all prompts are one batch.

    With inputs_embeds, the sequences hold the new ids alone, as in Hugging Face.

    Memory grows with what is asked for: scores and logits are steps * rows * vocabulary numbers each,
    attention weights layers * heads * rows * length ** 2.
    """
    if options.special:
        raise InputError(
            f"{options.special} does not go with generate_output: leave it out, or use generate_ids"
        )
    if inputs_embeds:
        prompts = _embedded(model, prompts, inputs_embeds, options)
    request = check_request(model, prompts, options, eos_token_id, tokenizer)
    if not prompts:
        raise InputError("prompts are empty: outputs need at least one")
    copies = options.num_return_sequences
    rows = [prompt for prompt in prompts for _ in range(copies)]
    pad = next(iter(request.eos), 0)
    if options.num_beams > 1:
        found = _search(model, prompts, options, request)
        scores = torch.tensor([one.score for one in found])
        return GenerateOutput(
            [one.completion() for one in found], _padded(rows, [one.ids for one in found], pad), scores
        )
    recorder, seed = Recorder(options), base_seed(options)
    embeds = [vectors for vectors in inputs_embeds for _ in range(copies)]
    batch = Batch(model, rows, options, request, recorder, embeds or None)
    if seed is not None:
        batch.draw([row_seed(seed, *divmod(row, copies)) for row in range(len(rows))])
    with evaluating(model), recorder.watching(model):
        steps = sum(1 for _ in batch.run())
    start = batch.width if inputs_embeds else 0
    return recorder.output(batch.completions(), batch.ids[:, start : batch.width + steps])


def _embedded(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    inputs_embeds: Sequence[torch.Tensor],
    options: GenerationOptions,
) -> list[list[int]]:
    if options.num_beams > 1 or not options.use_cache or options.special:
        name = options.special or ("num_beams" if options.num_beams > 1 else "use_cache")
        raise InputError(f"{name}={getattr(options, name)} does not go with inputs_embeds")
    return placeholders(model, prompts, inputs_embeds)


def _search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    request: Request,
    on_progress: Callable[[int], None] | None = None,
) -> list[Finished]:
    found: list[Finished] = []
    with evaluating(model):
        for prompt in prompts:
            found += beam_search(model, prompt, options, request)
            if on_progress:
                on_progress(len(found))
    return found


def _padded(prompts: Sequence[Sequence[int]], new: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Prompts, padded on the left, and what followed, padded on the right: (B, S)."""
    width, steps = max(map(len, prompts)), max(map(len, new))
    rows = [
        [pad] * (width - len(prompt)) + [*prompt, *ids] + [pad] * (steps - len(ids))
        for prompt, ids in zip(prompts, new)
    ]
    return torch.tensor(rows)
