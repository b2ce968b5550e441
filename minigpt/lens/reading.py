"""Encodes the input of a model: a question in its prompt format, and an answer, given or its own.

reading = read_question(model, tokenizer, "四川的省会是哪里？")
reading.prompt, reading.answer         # ids
reading.pieces                         # the text of each id
"""

from dataclasses import dataclass

from minigpt.families.registry import LanguageModel
from minigpt.generation.api import ends_of_answer, eos_of, generate_ids
from minigpt.generation.conversation import question_ids, token_text
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.native import without_warning
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sequence import bare_ids
from minigpt.lens.recorder import as_row, read_logits
from minigpt.lens.results import shown
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Reading", "prompt_ids", "read_question", "usual_format"]


@dataclass(frozen=True)
class Reading:
    """A prompt and an answer, as ids."""

    prompt: list[int]
    answer: list[int]  # includes the token that ends the answer, if there is one
    pieces: list[str]  # texts of all ids, to show
    is_own: bool  # True: the model has written the answer itself

    @property
    def ids(self) -> list[int]:
        """The ids of prompt and answer."""
        return [*self.prompt, *self.answer]


def usual_format(tokenizer: AnyTokenizer) -> PromptFormat:
    """Return the usual prompt format for a tokenizer. If the folder is known, use `prompt_format`."""
    if isinstance(tokenizer, SubwordTokenizer):
        return "text" if tokenizer.chat_template is None else "chat"
    return "question"


def prompt_ids(tokenizer: AnyTokenizer, question: str, form: PromptFormat | None = None) -> list[int]:
    """Return the ids that a model reads before it answers a question, or continues a text."""
    return question_ids(tokenizer, form or usual_format(tokenizer), question)


def read_question(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str,
    answer: str | None = None,
    form: PromptFormat | None = None,
    max_new_tokens: int = 48,
) -> Reading:
    """Encode a question and an answer.

    Args:
        model: writes the answer if none is given, always with its most likely token.
        tokenizer: the model's tokenizer.
        question: the question, or for a model of texts the beginning of a text.
        answer: the answer; None: the model's own. An end token is added, except in plain text.
        form: the prompt format; None: the tokenizer's usual format.
        max_new_tokens: largest number of tokens of the model's own answer.

    Raises:
        InputError: if question and answer together are longer than the model can read.
    """
    form = form or usual_format(tokenizer)
    prompt = prompt_ids(tokenizer, question, form)
    if answer is not None:
        end = None if form == "text" else eos_of(tokenizer)
        ids = [*bare_ids(tokenizer, answer), *([] if end is None else [end])]
    else:
        as_row(model, prompt)  # raises a clear error if the prompt is empty or too long
        room = model.config.max_position_embeddings - len(prompt)
        ids = _written(model, tokenizer, prompt, min(room, max_new_tokens)) if room > 0 else []
    pieces = [shown(token_text(tokenizer, index)) for index in (*prompt, *ids)]
    return Reading(prompt, ids, pieces, answer is None)


@without_warning()
def _written(model: LanguageModel, tokenizer: AnyTokenizer, prompt: list[int], most: int) -> list[int]:
    ends = ends_of_answer(tokenizer)
    options = GenerationOptions(max_new_tokens=most)
    (ids, reason), *_ = generate_ids(model, [prompt], options, ends, tokenizer=tokenizer)
    if reason != "eos":
        return ids
    last = read_logits(model, [*prompt, *ids])[-1]  # shows which end token ended the answer
    return [*ids, max(ends, key=last.__getitem__)]
