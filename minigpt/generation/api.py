"""Answers to questions, completions of ids, streams of text, and on request all that led to them.

    generate(model, tokenizer, "四川省的省会是哪里？")                      # one answer
    stream(model, tokenizer, "四川省的省会是哪里？")                        # the same, in pieces
    answer_questions(model, tokenizer, questions, options)                  # thousands
    generate_ids(model, prompts, options, eos_token_id=tokenizer.sep_token_id)  # the ids themselves
    generate_output(model, prompts, options, eos_token_id=...)              # with scores, hidden states, ...

Each makes sequences and lets minigpt.generation.loop decode them. No model is loaded here.
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
_DEFAULTS = GenerationOptions()  # checked once


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
    """The answer to one question: the model reads it and <sep>, and continues until the next <sep>.

    With a tokenizer that has no sep_token_id, the model reads the prompt alone, and eos_token_id, if there is
    one, ends the text.

    Args:
        prompt: the question.
        return_dict_in_generate: return a GenerateOutput instead of the text, with what the options'
            output_scores, output_logits, output_hidden_states, output_attentions and logprobs ask for.
        assistant_model: a smaller model of the same tokenizer, which guesses
            (minigpt.generation.speculative_decoding).
        options: fields of GenerationOptions.

    Raises:
        InputError: for an unknown option, naming the nearest; a bad value; a question that is too long.
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
    """Options from a dictionary.

    Raises:
        InputError: for an unknown name, naming the nearest one, of the options or of `also`.
    """
    if not values:
        return _DEFAULTS
    known = [field.name for field in dataclasses.fields(GenerationOptions)]
    for name in values:
        if name not in known:
            raise InputError(unknown_name("option", name, [*known, *also]))
    return GenerationOptions(**values)


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """The ids that the model reads: the prompt's, and what its tokenizer adds, or else its <sep>."""
    ids, separator = tokenizer.encode_text(prompt), _separator(tokenizer)
    is_complete = any(getattr(tokenizer, name, ()) for name in ("before_text", "after_text"))
    return ids if separator is None or is_complete else [*ids, separator]


def eos_of(tokenizer: TextTokenizer) -> int | None:
    """What ends a text: the tokenizer's eos_token_id, or else its <sep>."""
    eos: int | None = getattr(tokenizer, "eos_token_id", None)
    return _separator(tokenizer) if eos is None else eos


def ends_of_answer(tokenizer: TextTokenizer) -> list[int]:
    """What ends an answer to a question: <sep>, which stands behind answers in training, and eos_token_id."""
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
    """Answer questions, in their order; with num_return_sequences, each that many times, one after another.

    With a seed, the answer to question number i depends on (seed, i) and the question, not on the others.

    Args:
        batch_size: answers generated at once, at most.
        on_progress: called with the number of answers that are finished.

    Raises:
        InputError: if a question is too long for an answer, naming it and both numbers.
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
    """Continue each prompt; returns the completions in the prompts' order, num_return_sequences of each.

    A sequence ends with an eos, a stop string, max_new_tokens, or the longest text that the model reads,
    prompt included; then the next one takes its place. The model is left in its mode (train or eval).

    Args:
        eos_token_id: one, several, or None; options.eos_token_id stands instead, where it is given.
        batch_size: sequences at once, at most; of one prompt, beam search has num_beams.
        on_progress: called with the number of completions that are finished.
        tokenizer: needed for the options stop_strings, choices, regex and json_schema. Rows of the model's
            vocabulary that it has no token for never come; transformers lets them.
        inputs_embeds: prompts as vectors (tokens, C), instead of ids; `prompts` is then empty. Penalties and
            prohibitions see the new ids alone.
        assistant_model: a smaller model of the same tokenizer, which guesses: see
            minigpt.generation.speculative_decoding.

    Raises:
        InputError: if a prompt is empty, is too long for a new token, or has an id that the vocabulary lacks;
            if an option does not fit the model; if the model's scores are not numbers.
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
    """As generate_ids, with the outputs that the options ask for; all prompts are one batch.

    With inputs_embeds, the sequences hold the new ids alone, as in Hugging Face.

    Memory grows with what is asked for: scores and logits are steps * rows * vocabulary numbers each,
    attention weights layers * heads * rows * length ** 2.
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
    """The answer to one question in pieces, while it is generated; joined they are what `generate` returns.

    A piece never ends inside a character, and never holds the beginning of a stop string. The model stays in
    eval mode until the last piece is taken, or the iterator is closed.

    Args:
        options: fields of GenerationOptions.

    Raises:
        InputError: as generate does, and for what has no pieces: beams, several sequences, reports. Before
            anything is computed, not at the first piece.
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
    """As `stream`, from ids. The generator returns (StopIteration's value) why it stopped.

    Args:
        taken: a list that gets each id when it is chosen, the eos that ends the text too.
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
        steps.close()  # the model is left in the mode that it was in
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
    """The sequences of a request, checked: of each prompt one, or with sampling num_return_sequences."""
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
    """What a beam search has found, the best first."""
    assert isinstance(sequence.beams, BeamSearch)
    return sequence.beams.finished[: sequence.request.options.num_return_sequences]


def _completions(sequence: Sequence) -> list[Completion]:
    if sequence.beams is None:
        return [sequence.completion()]
    return [one.completion() for one in _finished(sequence)]


def _padded(prompts: Rows[Rows[int]], new: Rows[Rows[int]], pad: int) -> torch.Tensor:
    """Prompts, padded on the left, and what followed, padded on the right: (B, S)."""
    width, steps = max(map(len, prompts)), max(map(len, new))
    rows = [
        [pad] * (width - len(prompt)) + [*prompt, *ids] + [pad] * (steps - len(ids))
        for prompt, ids in zip(prompts, new)
    ]
    return torch.tensor(rows)
