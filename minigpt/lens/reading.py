"""The token ids that a model reads: a question and an answer in the prompt format, or a plain text.

reading = read_question(model, tokenizer, "四川的省会是哪里？")
reading.prompt, reading.answer         # ids
reading.pieces                         # the text of each id
"""

from dataclasses import dataclass

from minigpt.errors import InputError
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

__all__ = ["Reading", "prompt_ids", "read_question", "read_text", "usual_format"]

# a plain text is cut to this number of tokens, because each head has tokens * tokens attention weights
_MOST = 512


@dataclass(frozen=True)
class Reading:
    """A prompt and an answer as ids.

    A plain text is stored in the same two fields: `prompt` has its first id, `answer` has the other ids.
    """

    prompt: list[int]
    answer: list[int]  # its last id is the end token, if the answer has one
    pieces: list[str]  # the text of each id, to show
    is_own: bool  # True: the model has written the answer itself
    is_text: bool = False  # True: the ids are a plain text, without a question
    left_out: int = 0  # number of tokens at the end of a long text that were cut off

    @property
    def ids(self) -> list[int]:
        """The ids of prompt and answer."""
        return [*self.prompt, *self.answer]


def usual_format(tokenizer: AnyTokenizer) -> PromptFormat:
    """Return the usual prompt format of models with this kind of tokenizer.

    If the model's folder is known, call `prompt_format` instead, which also uses the folder's settings.
    """
    if isinstance(tokenizer, SubwordTokenizer):
        return "text" if tokenizer.chat_template is None else "chat"
    return "question"


def prompt_ids(tokenizer: AnyTokenizer, question: str, form: PromptFormat | None = None) -> list[int]:
    """Return the ids of `question` in a prompt format. With form="text", `question` is a text to continue."""
    return question_ids(tokenizer, form or usual_format(tokenizer), question)


def read_question(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str | Reading,
    answer: str | None = None,
    form: PromptFormat | None = None,
    max_new_tokens: int = 48,
) -> Reading:
    """Encode a question and an answer.

    Args:
        model: writes the answer if none is given, always with its most likely token.
        tokenizer: the model's tokenizer.
        question: the question. For a model that continues texts: the beginning of a text.
        answer: the answer. An end token is added to it, except with form="text". None: the model writes it.
        form: the prompt format. None: the usual format for this tokenizer.
        max_new_tokens: largest number of tokens that the model writes.

    Raises:
        InputError: if the tokenizer lacks the chat template or <sep> that the prompt format needs. If the
            model has to write the answer: also if the prompt is empty or too long for the model.
    """
    if isinstance(question, Reading):
        return question
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


def read_text(model: LanguageModel, tokenizer: AnyTokenizer, text: str) -> Reading:
    """Encode a plain text without a prompt format. A long text is cut; `left_out` counts the tokens cut off.

    Raises:
        InputError: if the text has fewer than two tokens, so that the model predicts none of them.
    """
    every = prompt_ids(tokenizer, text, "text")
    if len(every) < 2:
        raise InputError(f"a text needs two tokens at least, the first is only read: got {len(every)}")
    ids = every[: min(_MOST, model.config.max_position_embeddings)]
    pieces = [shown(token_text(tokenizer, index)) for index in ids]
    return Reading(ids[:1], ids[1:], pieces, is_own=False, is_text=True, left_out=len(every) - len(ids))


@without_warning()
def _written(model: LanguageModel, tokenizer: AnyTokenizer, prompt: list[int], most: int) -> list[int]:
    ends = ends_of_answer(tokenizer)
    options = GenerationOptions(max_new_tokens=most)
    (ids, reason), *_ = generate_ids(model, [prompt], options, ends, tokenizer=tokenizer)
    if reason != "eos":
        return ids
    # generate_ids leaves out the end token: append the most likely of the possible end tokens
    last = read_logits(model, [*prompt, *ids])[-1]
    return [*ids, max(ends, key=last.__getitem__)]
