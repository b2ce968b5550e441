"""Converts the questions of a task to ids: instruction, shots, question, and the choices to be scored.

    shots = choose_shots(task, options)          # subject -> its examples
    prompter = Prompter(tokenizer, "text", start)
    prompter.requests(example, shots[example.subject])    # [(context, continuation), ...] to be scored

Shots are examples with their answers, which stand before the question. The context is the prompt; a
continuation is a choice or an answer. With the prompt format "text", the two are encoded together as one
text, and the ids are then split after the tokens of the context. White space at the end of the context is
moved to the continuation. lm-evaluation-harness does the same, so its numbers can be compared with ours. With
the other prompt formats (question <sep> answer, and the chat template), the two are encoded separately.
"""

import random
from collections.abc import Sequence

from minigpt.errors import InputError
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.task_shapes import Example
from minigpt.evaluation.tasks import Task
from minigpt.generation.conversation import require_form
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.sequence import bare_ids
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["STOPS", "Prompter", "Request", "choose_shots", "encode_pair"]

Request = tuple[Sequence[int], Sequence[int]]
STOPS = ("\n\n", "Question:", "问题：")  # with the prompt format "text", one of these ends an answer


def encode_pair(
    tokenizer: AnyTokenizer, context: str, continuation: str, start: int | None
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation.

    Args:
        start: id of a token. If the context is empty, this token is used as the context.

    Raises:
        InputError: if the context is empty and `start` is None.
    """
    n_blanks = len(context) - len(context.rstrip())
    if n_blanks:
        context, continuation = context[:-n_blanks], context[-n_blanks:] + continuation
    if not context:
        return _from_start(bare_ids(tokenizer, continuation), start)
    before = list(getattr(tokenizer, "before_text", ()))
    ids, whole = bare_ids(tokenizer, context), bare_ids(tokenizer, context + continuation)
    return [*before, *ids], whole[len(ids) :]


def _from_start(ids: list[int], start: int | None) -> tuple[list[int], list[int]]:
    if start is None:
        raise InputError("an empty prompt needs a model with a BOS or EOS token: give an --instruction")
    return (ids[:1], ids[1:]) if ids[:1] == [start] and len(ids) > 1 else ([start], ids)


def choose_shots(task: Task, options: TaskOptions) -> dict[str, list[Example]]:
    """Return a dict: subject -> examples to be used as shots.

    Usually, these are `options.shots` examples per subject. If the shots come from the measured file itself,
    there is one example more. A question that is itself among the examples later leaves itself out, and still
    has `options.shots` shots.

    Raises:
        InputError: if the task has no dev part (examples for shots), or too few examples in it.
    """
    if not options.shots:
        return {}
    found = {}
    for subject in dict.fromkeys(one.subject for one in task.examples):
        dev, name = task.dev.get(subject, []), f"{task.name}{f' ({subject})' if subject else ''}"
        if not dev:
            raise InputError(
                f"{name} has no dev part to take --shots {options.shots} from: name one with --dev"
            )
        wanted = options.shots + task.is_own_dev
        if len(dev) < wanted:
            raise InputError(
                f"{name}: --shots {options.shots} is more than the {len(dev)} examples of the dev part"
            )
        if options.shots_seed is None:
            found[subject] = dev[:wanted]
        else:
            found[subject] = random.Random(options.shots_seed).sample(dev, wanted)
    return found


class Prompter:
    """Turns examples into ids for one model.

    Args:
        form: the prompt format: plain text, question <sep> answer, or the chat template.
        start: id of the token put before a text without context.

    Raises:
        InputError: if the tokenizer lacks a token or a template that the form needs.
    """

    def __init__(self, tokenizer: AnyTokenizer, form: PromptFormat, start: int | None) -> None:
        require_form(tokenizer, form)
        self.tokenizer, self.form, self.start = tokenizer, form, start

    def format_of(self, one: Example) -> PromptFormat:
        """Return the prompt format of an example: usually `self.form`.

        The format is always "text" for a cloze, for a text without a question (form "perplexity"), and for an
        example whose answer directly follows the prompt, without even a space (delimiter "").
        """
        return "text" if one.form in ("cloze", "perplexity") or one.delimiter == "" else self.form

    def requests(self, one: Example, shots: Sequence[Example] = (), instruction: str = "") -> list[Request]:
        """Return the pairs (context, continuation) of ids to score: one per choice; for a cloze, one pair."""
        form = self.format_of(one)
        answers = one.scored if one.form in ("multiple_choice", "classification") else one.references[:1]
        if form == "text":
            context = self.text(one, shots, instruction)
            return self._pairs(context, [one.delimiter + answer for answer in answers])
        ids = self.prompt(one, shots, instruction)
        return [(ids, bare_ids(self.tokenizer, answer)) for answer in answers]

    def prompt(self, one: Example, shots: Sequence[Example] = (), instruction: str = "") -> list[int]:
        """Return the ids of the prompt that the model answers."""
        form, tokenizer = self.format_of(one), self.tokenizer
        instruction = instruction or one.style.instruction
        if form == "text":
            text = self.text(one, shots, instruction)
            ids = [*getattr(tokenizer, "before_text", ()), *bare_ids(tokenizer, text.rstrip(" "))]
            return ids or _from_start([], self.start)[0]
        if form == "chat":
            # Imported here, because only chat models need Jinja.
            from minigpt.tokenization.chat_template import encode_chat

            assert isinstance(tokenizer, SubwordTokenizer), "require_form"
            messages = [{"role": "system", "content": instruction}] if instruction else []
            for shot in shots:
                messages += [
                    {"role": "user", "content": _asked(shot)},
                    {"role": "assistant", "content": shot.solution},
                ]
            messages.append({"role": "user", "content": _asked(one)})
            return encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
        assert tokenizer.sep_token_id is not None, "require_form"
        ids = bare_ids(tokenizer, f"{instruction}\n") if instruction else []
        for text in (part for shot in shots for part in (_asked(shot), shot.solution)):
            ids += [*bare_ids(tokenizer, text), tokenizer.sep_token_id]
        return [*ids, *bare_ids(tokenizer, _asked(one)), tokenizer.sep_token_id]

    def asked(self, one: Example) -> str:
        """Return the text of a question without shots, as the model reads it."""
        return self.text(one) if self.format_of(one) == "text" else _asked(one)

    def stops(self, one: Example) -> tuple[str, ...]:
        """Return the texts that end a generated answer. (The model's end token also ends an answer.)"""
        return one.style.stop or (STOPS if self.format_of(one) == "text" else ())

    def text(self, one: Example, shots: Sequence[Example] = (), instruction: str = "") -> str:
        """Return the prompt in plain text: instruction, shots, question."""
        instruction = instruction or one.style.instruction
        separator = one.style.separator
        before = [instruction] if instruction else []
        before += [_prompt_text(shot) + shot.delimiter + shot.solution for shot in shots]
        return "".join(part + separator for part in before) + _prompt_text(one)

    def _pairs(self, context: str, continuations: list[str]) -> list[Request]:
        """Encode a context with each continuation.

        To save time, the context is encoded once, and only its last line is encoded again with each
        continuation. This is right only if no token extends from the line before into the last line. So the
        code checks that the last line alone has the same ids as the end of the whole context.
        """
        line = context.rfind("\n") + 1
        tail, bare = context[line:], context.rstrip()
        if line < 200 or not tail.strip() or bare != context:
            return [encode_pair(self.tokenizer, context, one, self.start) for one in continuations]
        before = list(getattr(self.tokenizer, "before_text", ()))
        ids, ending = bare_ids(self.tokenizer, context), bare_ids(self.tokenizer, tail)
        if ids[len(ids) - len(ending) :] != ending:
            return [encode_pair(self.tokenizer, context, one, self.start) for one in continuations]
        ids = [*before, *ids]
        return [(ids, bare_ids(self.tokenizer, tail + one)[len(ending) :]) for one in continuations]


def _asked(one: Example) -> str:
    """Return the text that a user would send: the prompt.

    Exception: for multiple choice whose prompt does not list the choices, return only the question.
    """
    return one.question if one.form == "multiple_choice" and not one.letters else one.prompt


def _prompt_text(one: Example) -> str:
    """Return the prompt in plain text. For generation, the default template is "Question: ... Answer:"."""
    if one.form != "generation" or one.style.template:
        return one.prompt
    chinese = any("\u3400" <= character <= "\u9fff" for character in one.prompt)
    return f"问题：{one.prompt}\n答案：" if chinese else f"Question: {one.prompt}\nAnswer:"
