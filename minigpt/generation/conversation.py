"""Conversations with a model, and single questions to it, in the prompt format of the model.

    talk = Conversation(model, tokenizer, "chat", options)
    for piece in talk.say("你好"):
        print(piece, end="")
    talk.why()                      # the last answer's tokens, with their probabilities and alternatives

The model's input depends on its prompt format (`minigpt.generation.generation_config.prompt_format`):

- chat: the input is all turns, rendered by the tokenizer's chat template.
- question: the input is the question, then <sep>. With history=True, it is all questions and answers so far,
  each followed by <sep>, as in minigpt.data.conversation. A system text is a line before the first question.
- text: the input is the whole text so far. The user's text begins on a new line, and the model continues it.

If the context is full, the oldest turns are left out of the input. This module prints nothing.
"""

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minigpt.data.batches import encode_prompt
from minigpt.data.conversation import Exchange
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import BATCH_SIZE, Answer, answer_questions, eos_of, generate_ids, stream_ids
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import StopReason
from minigpt.generation.sampling import filtered
from minigpt.generation.sequence import bare_ids, cut
from minigpt.generation.speculative_decoding import check_assistant
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Choice", "Conversation", "QuestionAnswering", "Turn", "question_ids", "token_text"]


@dataclass(frozen=True)
class Turn:
    """A user's message and the model's answer."""

    said: str
    answer: str  # the generated text, which may be cut off
    prompt: list[int]  # ids that the model read
    ids: list[int]  # ids that the model chose, including the eos that ended the answer
    stop_reason: StopReason | None  # None: stopped by the user
    options: GenerationOptions  # options with which the ids were chosen


class Choice(NamedTuple):
    """One token of an answer, its probability, and the most likely other tokens at this position."""

    token: int
    probability: float
    others: list[tuple[int, float]]  # (id, probability) of the other tokens, the most likely first
    # Probabilities after temperature, top_k and the like: the token's, then those of `others`, in the same
    # order. Empty if the answer was not sampled.
    drawn: list[float]


class Conversation:
    """A conversation with one model; the module's docstring describes the prompt formats.

    Attributes:
        options: options with which tokens are chosen. The method `choose` replaces them.
        assistant_model: a smaller model with the same tokenizer, which guesses tokens; None: no guesses.
        system: system text, not used by models with the format "text"; "": no system text.
        thinking: True: a chat model thinks before it answers; False: it does not; None: the template decides.
        turns: all turns, including old turns that no longer fit into the model's context.
        forgotten: number of old turns that no longer fit into the model's context.
        saved: files that `save` has written.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: AnyTokenizer,
        form: PromptFormat,
        options: GenerationOptions,
        *,
        history: bool = False,
        assistant_model: LanguageModel | None = None,
    ) -> None:
        require_form(tokenizer, form)
        self.model, self.tokenizer, self.form, self.history = model, tokenizer, form, history
        self.assistant_model = assistant_model
        self.system = ""
        self.thinking: bool | None = None
        self.saved: set[Path] = set()
        self.choose(options)
        self.reset()

    def choose(self, options: GenerationOptions) -> None:
        """Replace the options. Raise InputError if the new options do not fit the model."""
        config = self.model.config
        options.check_model(config.vocab_size, config.max_position_embeddings)
        if self.assistant_model is not None:
            check_assistant(self.model, options, self.assistant_model)
        self.options = options

    @property
    def can_think(self) -> bool:
        """True if the chat template can switch thinking on and off."""
        template = self.tokenizer.chat_template if isinstance(self.tokenizer, SubwordTokenizer) else None
        return self.form == "chat" and "enable_thinking" in (template or "")

    def reset(self) -> None:
        """Delete all turns, so that the conversation begins again."""
        self.turns: list[Turn] = []
        self.forgotten = 0

    def say(self, text: str) -> Generator[str, None, None]:
        """Send a message to the model, and yield its answer in pieces.

        If the iterator is closed or Ctrl-C is pressed, the answer so far is kept as a turn.

        Raises:
            InputError: before the first piece, if the text leaves no tokens for an answer.
        """
        prompt = self._fitting(text)
        ids: list[int] = []
        pieces = stream_ids(self.model, self.tokenizer, prompt, self.options, ids, self.assistant_model)
        return self._answer(text, prompt, ids, pieces)

    def _answer(
        self, text: str, prompt: list[int], ids: list[int], pieces: Generator[str, None, StopReason]
    ) -> Generator[str, None, None]:
        answer: list[str] = []
        options, reason = self.options, None
        failed = False
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    reason = end.value
                    return
                answer.append(piece)
                yield piece
        except InputError:
            failed = True
            raise
        finally:
            pieces.close()
            if not failed:
                self.turns.append(Turn(text, "".join(answer), prompt, ids, reason, options))

    # -- the model's input ----------------------------------------------------------------------------------

    def _fitting(self, text: str) -> list[int]:
        """Return the ids of the prompt for a new message, without the oldest turns if the context is full."""
        context = self.model.config.max_position_embeddings
        room = context - max(1, min(self.options.wanted, context // 4))
        while True:
            prompt = self._prompt(self.turns[self.forgotten :], text)
            if len(prompt) <= room or self.forgotten == len(self.turns) or not self._keeps_turns:
                return prompt
            self.forgotten += 1

    @property
    def _keeps_turns(self) -> bool:
        return self.form != "question" or self.history

    def _prompt(self, turns: list[Turn], text: str) -> list[int]:
        if self.form == "chat":
            return question_ids(self.tokenizer, "chat", text, self._read_messages(turns), self.thinking)
        if self.form == "question":
            before = [Exchange(turn.said, turn.answer) for turn in turns] if self.history else []
            if before:
                before[0] = before[0]._replace(question=_below(self.system, before[0].question))
            else:
                text = _below(self.system, text)
            # sys.maxsize: no limit on the number of tokens, because `_fitting` shortens the prompt
            return encode_prompt(before, text, self.tokenizer, sys.maxsize)
        ids: list[int] = []
        end = "\n"
        for turn in turns:
            ids += bare_ids(self.tokenizer, _on_new_line(end, turn.said))
            ids += turn.ids[:-1] if turn.stop_reason == "eos" else turn.ids
            end = turn.answer
        ids += bare_ids(self.tokenizer, _on_new_line(end, text))
        if isinstance(self.tokenizer, SubwordTokenizer):
            ids = [*self.tokenizer.before_text, *ids, *self.tokenizer.after_text]
        return ids

    def _read_messages(self, turns: list[Turn]) -> list[dict[str, Any]]:
        """Return the messages of earlier turns for the chat template, with the ids of the model's answers.

        The ids are needed, because encoding an answer's text again could give other ids than the model chose.
        """
        messages: list[dict[str, Any]] = [*_messages(self.system, turns)]
        for turn, message in zip(turns, [one for one in messages if one["role"] == "assistant"]):
            ids = turn.ids[:-1] if turn.stop_reason == "eos" else turn.ids
            # Keep the ids only if their text is exactly the answer. If a stop string ended the answer, the
            # text of the ids is longer.
            if self.tokenizer.decode(ids) == turn.answer:
                message["token_ids"] = ids
        return messages

    # -- looking back ---------------------------------------------------------------------------------------

    def why(self, others: int = 3) -> list[Choice]:
        """Return each token of the last answer with its probability and the most likely other tokens.

        The probabilities are the model's own, before temperature, top_p and the like. `Choice.drawn` has
        the probabilities after these options. Penalties are left out of both. If an eos ended the answer,
        this eos is the last token.

        Args:
            others: number of other tokens to return for each token of the answer.

        Raises:
            InputError: if there is no answer yet.
        """
        if not self.turns or not self.turns[-1].ids:
            raise InputError("there is no answer yet that could be explained")
        return _choices(self.model, self.turns[-1], others)

    def messages(self) -> list[dict[str, str]]:
        """Return all messages, each with a role and a content."""
        return _messages(self.system, self.turns)

    def save(self, path: Path) -> None:
        """Write all messages to a file, as one line of JSON. minigpt can train on such a file.

        If the file exists, it is replaced.
        """
        line = json_text({"messages": self.messages()})
        atomic_write(path, line.encode("utf-8", "backslashreplace") + b"\n")
        self.saved.add(path)


def _on_new_line(before: str, text: str) -> str:
    return text if before.endswith("\n") else f"\n{text}"


def _below(system: str, question: str) -> str:
    """Put a system text on a line of its own before a question, as in the training data."""
    return f"{system}\n{question}" if system else question


def question_ids(
    tokenizer: AnyTokenizer,
    form: PromptFormat,
    text: str,
    before: Sequence[Mapping[str, Any]] = (),
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Return the ids that a model reads before it answers a question or continues a text.

    Args:
        form: the model's prompt format.
        before: messages before the question. With the format "chat", the model reads all of them. With
            "question", it reads only the system messages. With "text", it reads none.
        thinking: True: a chat model thinks before it answers; False: it does not; None: the template decides.
        tools: JSON descriptions of functions that a chat model may call.
        allow_special: True: a special token's name in the text, such as "<|im_end|>", is encoded as this
            token, as in transformers. False: the name is encoded as ordinary text.

    Raises:
        InputError: if the prompt format needs a chat template or <sep>, and the tokenizer has none.
    """
    require_form(tokenizer, form)
    if isinstance(tokenizer, SubwordTokenizer) and form == "chat":
        # imported here, because chat_template imports Jinja, which only chat models need
        from minigpt.tokenization.chat_template import encode_chat, render_chat

        messages = [*before, {"role": "user", "content": text}]
        given: Any = {"tools": tools, "add_generation_prompt": True, "enable_thinking": thinking}
        if not allow_special or tokenizer.chat_template is None:
            return encode_chat(tokenizer, messages, **given)
        text = render_chat(tokenizer.chat_template, messages, named_tokens=tokenizer.named_tokens, **given)
        return tokenizer.encode_text(text, add_special_tokens=False, allow_special=True)
    if form == "text" and allow_special and isinstance(tokenizer, SubwordTokenizer):
        return tokenizer.encode_text(text, allow_special=True)
    if form == "text":
        return tokenizer.encode_text(text)
    assert tokenizer.sep_token_id is not None, "require_form"
    return [*bare_ids(tokenizer, _below(_system_in(before), text)), tokenizer.sep_token_id]


def _system_in(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "system")


def require_form(tokenizer: AnyTokenizer, form: PromptFormat) -> None:
    """Raise InputError if a prompt format needs a chat template or <sep>, and the tokenizer has none."""
    if form == "chat" and (not isinstance(tokenizer, SubwordTokenizer) or tokenizer.chat_template is None):
        raise InputError("form=chat needs a model whose tokenizer has a chat_template")
    if form == "question" and tokenizer.sep_token_id is None:
        raise InputError("form=question needs a tokenizer with <sep>")


@dataclass(frozen=True)
class QuestionAnswering:
    """Answers questions with a model of any prompt format.

    asked = QuestionAnswering(model, tokenizer, form, options)
    asked.answers(questions)        # a list
    asked.pieces(question)          # one answer, in pieces
    """

    model: LanguageModel
    tokenizer: AnyTokenizer
    form: PromptFormat
    options: GenerationOptions
    assistant_model: LanguageModel | None = None  # a smaller model that guesses tokens
    # messages before each question, such as a system message; models with the format "text" ignore them
    before: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None  # True: a chat model thinks; False: it does not; None: the template decides
    tools: Sequence[Mapping[str, Any]] | None = None  # functions that a chat model may call
    allow_special: bool = False  # True: a special token's name in the text is encoded as this token
    start: int | None = None  # the id with which the model begins if the text is empty

    def _prompt(self, question: str) -> list[int]:
        ids = question_ids(
            self.tokenizer, self.form, question, self.before, self.thinking, self.tools, self.allow_special
        )
        return [self.start] if not ids and self.start is not None else ids

    def has_answer(self, question: str) -> bool:
        """Return True if the model answers the question: if it is not blank, or the format is "text"."""
        return bool(question.strip()) or self.form == "text"

    def answers(
        self,
        questions: Sequence[str],
        batch_size: int = BATCH_SIZE,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Return num_return_sequences answers to each question, in order. Blank questions get blank answers.

        Args:
            batch_size: largest number of answers that are generated together.
            on_progress: called with the number of answers that are finished.

        Raises:
            InputError: for the same reasons as minigpt.generation.api.answer_questions.
        """
        model, tokenizer, options = self.model, self.tokenizer, self.options
        asked = [question for question in questions if self.has_answer(question)]
        if self.form == "question":
            asked = [_below(_system_in(self.before), question) for question in asked]
            found = answer_questions(
                model, tokenizer, asked, options, batch_size, on_progress, self.assistant_model
            )
        else:
            prompts = [self._prompt(question) for question in asked]
            completions = generate_ids(
                model, prompts, options, eos_of(tokenizer), batch_size, on_progress, tokenizer,
                assistant_model=self.assistant_model,
            )  # fmt: skip
            found = [
                Answer(cut(tokenizer.decode(ids), options.stops), reason, []) for ids, reason in completions
            ]
        answers = iter(found)
        return [
            next(answers) if self.has_answer(question) else Answer("", "eos", [])
            for question in questions
            for _ in range(options.num_return_sequences)
        ]

    def pieces(self, question: str) -> Generator[str, None, StopReason]:
        """Generate one answer in pieces. The generator's return value is the stop reason."""
        prompt = self._prompt(question)
        return stream_ids(
            self.model, self.tokenizer, prompt, self.options, assistant_model=self.assistant_model
        )


def _messages(system: str, turns: list[Turn]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
    return messages


@torch.inference_mode()
def _choices(model: LanguageModel, turn: Turn, others: int) -> list[Choice]:
    """Return a Choice for each token of a turn's answer, by one forward pass over prompt and answer."""
    prompt, ids, options = turn.prompt, turn.ids, turn.options
    device = next(model.parameters()).device
    read = torch.tensor([[*prompt, *ids[:-1]]], device=device)  # (1, T)
    hidden = model.base_model(read)[0, len(prompt) - 1 :]  # (n, C)  n tokens of the answer
    logits = model.lm_head(hidden).float()  # (n, V)
    probabilities = logits.softmax(dim=-1)  # (n, V)
    drawn = None
    if options.do_sample:
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
        drawn = filtered(logits, *(getattr(options, name) for name in names)).softmax(dim=-1)  # (n, V)
    top = probabilities.topk(min(others + 1, probabilities.shape[-1]))
    found = []
    for row, token in enumerate(ids):
        pairs = zip(top.indices[row].tolist(), top.values[row].tolist())
        rest = [(index, value) for index, value in pairs if index != token][:others]
        shown = [token, *(index for index, _ in rest)]
        after = [] if drawn is None else drawn[row, shown].tolist()
        found.append(Choice(token, float(probabilities[row, token]), rest, after))
    return found


def token_text(tokenizer: AnyTokenizer, token: int) -> str:
    r"""Return a token's text to show. Bytes that are only a part of a character become \x.. escapes."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.id2word[token]
    if token >= tokenizer.get_vocab_size():  # Qwen3's embedding has more rows than the tokenizer has tokens
        return f"<{token}>"
    return tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
