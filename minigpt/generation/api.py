"""Answers questions, continues ids, and streams text. Scores, hidden states and attentions are optional.

    generate(model, tokenizer, "四川省的省会是哪里？")                      # one answer
    stream(model, tokenizer, "四川省的省会是哪里？")                        # the same, in pieces
    answer_questions(model, tokenizer, questions, options)                  # thousands of questions
    generate_ids(model, prompts, options, eos_token_id=tokenizer.sep_token_id)  # the ids themselves
    generate_output(model, prompts, options, eos_token_id=...)              # with scores, hidden states, ...

Each function makes sequences, which minigpt.generation.loop decodes. This module loads no model.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as Rows
from typing import Any, Literal, NamedTuple, overload

import torch

from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel
from minigpt.generation.beam_search import BeamSearch
from minigpt.generation.inputs_embeds import placeholders
from minigpt.generation.loop import decode
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import Completion, GenerateOutput, Recorder, StopReason, joined
from minigpt.generation.sequence import (
    IncrementalDetokenizer,
    Sequence,
    TextTokenizer,
    base_seed,
    check_prompt,
    check_request,
    cut,
    row_seed,
)
from minigpt.generation.speculative_decoding import check_assistant, speculation

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
    "stream",
    "stream_ids",
]

BATCH_SIZE = 64
_DEFAULTS = GenerationOptions()  # made only once, because making it checks all values, which takes time


class Answer(NamedTuple):
    """The answer to one question."""

    text: str  # the answer; if a stop string ended it, without this stop string
    stop_reason: StopReason
    unknown_characters: list[str]  # characters of the question that are not in the vocabulary


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
    """Without return_dict_in_generate, the result is the text of the answer."""


@overload
def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    return_dict_in_generate: Literal[True],
    **options: Any,
) -> GenerateOutput:
    """With return_dict_in_generate=True, the result holds ids and the outputs that the options select."""


def generate(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    return_dict_in_generate: bool = False,
    assistant_model: LanguageModel | None = None,
    **options: Any,
) -> str | GenerateOutput:
    """Answer one question: the model reads the question and <sep>, and continues until the next <sep>.

    Exception: if the tokenizer has no sep_token_id, the model reads the prompt alone, and continues until the
    tokenizer's eos_token_id, if there is one.

    Args:
        prompt: the question.
        return_dict_in_generate: True returns a GenerateOutput instead of the text. It has the outputs that
            output_scores, output_logits, output_hidden_states, output_attentions and logprobs select.
        assistant_model: a smaller model with the same tokenizer, which guesses tokens
            (minigpt.generation.speculative_decoding).
        options: fields of GenerationOptions.

    Raises:
        InputError: if an option is unknown (the message names a similar name), a value is wrong, or the
            question is too long.
    """
    chosen = options_from(options, also=["return_dict_in_generate", "assistant_model"])
    if return_dict_in_generate:
        prompts = [prompt_ids(tokenizer, prompt)]
        return generate_output(
            model, prompts, chosen, ends_of_answer(tokenizer), tokenizer, assistant_model=assistant_model
        )
    if chosen.num_return_sequences > 1:
        raise InputError(
            f"num_return_sequences={chosen.num_return_sequences} needs return_dict_in_generate=True, or "
            "answer_questions: generate returns one text"
        )
    return answer_questions(model, tokenizer, [prompt], chosen, assistant_model=assistant_model)[0].text


def options_from(values: Mapping[str, Any], also: Rows[str] = ()) -> GenerationOptions:
    """Build the options from a dictionary of keyword arguments.

    Args:
        values: option name -> value.
        also: names of the caller's arguments that are not options. The error for a misspelt name may suggest
            one of them.

    Raises:
        InputError: if a name is unknown; the message suggests a similar name.
    """
    if not values:
        return _DEFAULTS
    known = [field.name for field in dataclasses.fields(GenerationOptions)]
    for name in values:
        if name not in known:
            raise InputError(unknown_name("option", name, [*known, *also]))
    return GenerationOptions(**values)


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt, followed by the id of <sep>.

    If the tokenizer has no <sep>, or itself adds special tokens to each text, no <sep> is added.
    """
    ids, separator = tokenizer.encode_text(prompt), _separator(tokenizer)
    is_complete = any(getattr(tokenizer, name, ()) for name in ("before_text", "after_text"))
    return ids if separator is None or is_complete else [*ids, separator]


def eos_of(tokenizer: TextTokenizer) -> int | None:
    """Return the id that ends a text: the tokenizer's eos_token_id, or else its <sep>, or else None."""
    eos: int | None = getattr(tokenizer, "eos_token_id", None)
    return _separator(tokenizer) if eos is None else eos


def ends_of_answer(tokenizer: TextTokenizer) -> list[int]:
    """Return the ids that end an answer: <sep>, which follows each answer in training, and eos_token_id."""
    return [index for index in dict.fromkeys((_separator(tokenizer), eos_of(tokenizer))) if index is not None]


def _separator(tokenizer: TextTokenizer) -> int | None:
    return getattr(tokenizer, "sep_token_id", None)


def answer_questions(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    questions: Rows[str],
    options: GenerationOptions | None = None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
    assistant_model: LanguageModel | None = None,
) -> list[Answer]:
    """Return num_return_sequences answers to each question, in the order of the questions.

    With a seed, the answer to question number i depends only on (seed, i) and the question itself, not on the
    other questions.

    Args:
        batch_size: largest number of answers that are generated together.
        on_progress: called with the number of answers that are finished.

    Raises:
        InputError: if a question leaves no tokens for an answer; the message names the question.
    """
    options = options or GenerationOptions()
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    for number, (question, prompt) in enumerate(zip(questions, prompts), 1):
        start = question if len(question) <= 20 else question[:20] + "..."
        separator = "" if _separator(tokenizer) is None else " with its <sep>"
        check_prompt(f"question {number} ({start!r}){separator}", prompt, model, options)
    completions = generate_ids(
        model, prompts, options, ends_of_answer(tokenizer), batch_size, on_progress, tokenizer,
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
    prompts: Rows[Rows[int]],
    options: GenerationOptions,
    eos_token_id: int | Rows[int] | None,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], None] | None = None,
    tokenizer: TextTokenizer | None = None,
    inputs_embeds: Rows[torch.Tensor] = (),
    assistant_model: LanguageModel | None = None,
) -> list[Completion]:
    """Return num_return_sequences continuations of each prompt, in the order of the prompts.

    A sequence ends with an eos, with a stop string, after max_new_tokens, or when prompt and new tokens fill
    the model's context. The next waiting sequence then takes the place of the ended sequence in the batch.
    The model's mode (train or eval) is restored at the end.

    Args:
        eos_token_id: one or several ids that end a sequence; None: no id does. If options.eos_token_id is
            given, it replaces this argument.
        batch_size: largest number of sequences in a batch. With beam search, a prompt has num_beams
            sequences.
        on_progress: called with the number of completions that are finished.
        tokenizer: needed for the options stop_strings, choices, regex and json_schema. With a tokenizer, ids
            for which it has no token are never chosen. (A model may have more ids than there are tokens.)
        inputs_embeds: prompts as vectors (tokens, C), instead of ids; `prompts` is then empty. Penalties and
            forbidden n-grams then look at the new ids alone.
        assistant_model: a smaller model with the same tokenizer, which guesses tokens: see
            minigpt.generation.speculative_decoding.

    Raises:
        InputError: if a prompt is empty, leaves no place for a new token, or has an id that is not in the
            vocabulary; if an option does not fit the model; if the model's scores are not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1: got batch_size={batch_size}")
    if options.reports:
        raise InputError(f"{options.reports[0]} needs return_dict_in_generate=True, or generate_output")
    sequences = _sequences(model, prompts, options, eos_token_id, tokenizer, inputs_embeds, assistant_model)
    finished, each = 0, options.num_return_sequences if options.num_beams > 1 else 1
    for ended in decode(model, sorted(sequences, key=lambda one: len(one.prompt)), batch_size):
        for _ in {one.beams or one for one in ended}:
            finished += each
            if on_progress:
                on_progress(finished)
    return [completion for sequence in sequences for completion in _completions(sequence)]


@torch.inference_mode()
def generate_output(
    model: LanguageModel,
    prompts: Rows[Rows[int]],
    options: GenerationOptions,
    eos_token_id: int | Rows[int] | None,
    tokenizer: TextTokenizer | None = None,
    inputs_embeds: Rows[torch.Tensor] = (),
    assistant_model: LanguageModel | None = None,
) -> GenerateOutput:
    """Continue each prompt as generate_ids does, and return also the outputs that the options select.

    All prompts are one batch. With inputs_embeds, `sequences` in the result holds new ids only, as in Hugging
    Face.

    The outputs can need much memory. For B sequences, scores and logits have steps * B * vocabulary numbers
    each. Attention weights have layers * heads * B * T ** 2 numbers, if the longest sequence has T tokens.
    """
    if not prompts and not inputs_embeds:
        raise InputError("prompts are empty: outputs need at least one")
    sequences = _sequences(model, prompts, options, eos_token_id, tokenizer, inputs_embeds, assistant_model)
    for sequence in sequences:
        if options.reports:
            sequence.recorder = recorder = Recorder(options)
            sequence.watcher = recorder if recorder.needs_states else None
    for _ in decode(model, sequences, len(sequences) * options.num_beams):
        pass
    completions = [completion for sequence in sequences for completion in _completions(sequence)]
    copies = len(completions) // len(sequences)
    starts = [[] if inputs_embeds else one.prompt for one in sequences for _ in range(copies)]
    pad = next(iter(sequences[0].eos), 0)
    if options.num_beams > 1:
        found = [one for sequence in sequences for one in _finished(sequence)]
        scores = torch.tensor([one.score for one in found])
        return GenerateOutput(completions, _padded(starts, [one.ids for one in found], pad), scores)
    ids = _padded(starts, [one.chosen for one in sequences], pad).to(next(model.parameters()).device)
    if not options.reports:
        return GenerateOutput(completions, ids)
    return joined([one.recorder for one in sequences if one.recorder], completions, ids)


def stream(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    assistant_model: LanguageModel | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield the answer to one question in pieces, while it is generated. Joined, the pieces are the answer.

    A piece never ends inside a character. Text that may be the beginning of a stop string is held back until
    the next tokens decide this. The model stays in eval mode until the last piece is taken, or the iterator
    is closed.

    Args:
        options: fields of GenerationOptions.

    Raises:
        InputError: as `generate`; also for num_beams > 1, num_return_sequences > 1, and options that select
            outputs such as scores. The error is raised by this call, not by the iterator.
    """
    chosen = options_from(options, also=["assistant_model"])
    if chosen.eos_token_id is None:
        chosen = dataclasses.replace(chosen, eos_token_id=ends_of_answer(tokenizer))
    ids = prompt_ids(tokenizer, prompt)
    return stream_ids(model, tokenizer, ids, chosen, assistant_model=assistant_model)


def stream_ids(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: Rows[int],
    options: GenerationOptions,
    taken: list[int] | None = None,
    assistant_model: LanguageModel | None = None,
) -> Generator[str, None, StopReason]:
    """Continue a prompt of ids. Return a generator that yields the new text in pieces, as `stream` does.

    The generator's return value is the stop reason: `reason = yield from stream_ids(...)`.

    Args:
        taken: a list to which each chosen id is appended, including the eos that ends the text.
    """
    for name in ("num_beams", "num_return_sequences"):
        if getattr(options, name) > 1:
            raise InputError(
                f"{name}={getattr(options, name)} cannot be streamed: there is no one text until its end"
            )
    if options.reports:
        raise InputError(f"{options.reports[0]} cannot be streamed: pieces are text; use generate")
    (sequence,) = _sequences(
        model, [prompt], options, eos_of(tokenizer), tokenizer, assistant_model=assistant_model
    )
    steps = decode(model, [sequence], 1)
    return _pieces(steps, tokenizer, sequence, [] if taken is None else taken)


def _pieces(
    steps: Generator[list[Sequence], None, None],
    tokenizer: TextTokenizer,
    sequence: Sequence,
    taken: list[int],
) -> Generator[str, None, StopReason]:
    text, n_shown = IncrementalDetokenizer(tokenizer.decode, sequence.request.options.stops), 0
    try:
        for _ in steps:
            taken += sequence.chosen[n_shown:]
            new, n_shown = sequence.ids[n_shown:], len(sequence.chosen)
            for token in new:
                if piece := text.push(token):
                    yield piece
        if piece := text.finish():
            yield piece
    finally:
        steps.close()  # end the loop now, which restores the model's mode (train or eval)
    assert sequence.stop_reason is not None, "it has ended"
    return sequence.stop_reason


def _sequences(
    model: LanguageModel,
    prompts: Rows[Rows[int]],
    options: GenerationOptions,
    eos_token_id: int | Rows[int] | None,
    tokenizer: TextTokenizer | None,
    inputs_embeds: Rows[torch.Tensor] = (),
    assistant_model: LanguageModel | None = None,
) -> list[Sequence]:
    """Check the arguments. Return num_return_sequences sequences for each prompt.

    With beam search, return one sequence for each prompt. It is the first beam; the search adds the others.
    """
    if inputs_embeds:
        prompts = placeholders(model, prompts, inputs_embeds)
    if assistant_model is not None:
        check_assistant(model, options, assistant_model)
    request = check_request(model, prompts, options, eos_token_id, tokenizer)
    seed, found = base_seed(options), []
    for number, prompt in enumerate(prompts):
        for copy in range(options.num_return_sequences if options.num_beams == 1 else 1):
            own = None if seed is None else row_seed(seed, number, copy)
            limit = options.limit(len(prompt), model.config.max_position_embeddings)
            embeds = inputs_embeds[number] if inputs_embeds else None
            sequence = Sequence(prompt, request, limit, own, embeds)
            if assistant_model is not None or options.prompt_lookup_num_tokens is not None:
                sequence.speculation = speculation(options, assistant_model)
            if options.num_beams > 1:
                sequence.beams = sequence.kind = BeamSearch(request)
            found.append(sequence)
    return found


def _finished(sequence: Sequence) -> list[Any]:
    """Return the num_return_sequences best finished sequences of a beam search, best first.

    Args:
        sequence: any beam of the search.
    """
    assert isinstance(sequence.beams, BeamSearch)
    return sequence.beams.finished[: sequence.request.options.num_return_sequences]


def _completions(sequence: Sequence) -> list[Completion]:
    if sequence.beams is None:
        return [sequence.completion()]
    return [one.completion() for one in _finished(sequence)]


def _padded(prompts: Rows[Rows[int]], new: Rows[Rows[int]], pad: int) -> torch.Tensor:
    """Return a tensor with a row for each prompt: the prompt, then its new ids.

    Prompts are padded on the left, new ids on the right, both with the id `pad`.
    """
    width, steps = max(map(len, prompts)), max(map(len, new))
    rows = [
        [pad] * (width - len(prompt)) + [*prompt, *ids] + [pad] * (steps - len(ids))
        for prompt, ids in zip(prompts, new)
    ]
    return torch.tensor(rows)
