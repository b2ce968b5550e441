"""A model that is asked in the form that its folder says: questions in, answers out, whatever the form.

asked = Asked(model, tokenizer, form, options)
asked.answers(questions)        # a list
asked.pieces(question)          # one, while it is being written
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from minigpt.families.registry import LanguageModel
from minigpt.generation.api import BATCH_SIZE, Answer, answer_questions, eos_of, generate_ids
from minigpt.generation.conversation import question_ids
from minigpt.generation.generation_config import Form
from minigpt.generation.options import GenerationOptions
from minigpt.generation.output import StopReason
from minigpt.generation.stopping import cut
from minigpt.generation.streaming import stream_ids
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """Who is asked, and how."""

    model: LanguageModel
    tokenizer: AnyTokenizer
    form: Form
    options: GenerationOptions
    assistant_model: LanguageModel | None = None  # guesses

    def has_answer(self, question: str) -> bool:
        """A blank question has none; a text to write on from may be blank."""
        return bool(question.strip()) or self.form == "text"

    def answers(
        self,
        questions: Sequence[str],
        batch_size: int = BATCH_SIZE,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """The answers, num_return_sequences to each question, in order; blank ones to blank questions.

        Args:
            batch_size: answers written at once, at most.
            on_progress: called with the number of answers that are finished.

        Raises:
            InputError: as minigpt.generation.api.answer_questions does.
        """
        model, tokenizer, options = self.model, self.tokenizer, self.options
        asked = [question for question in questions if self.has_answer(question)]
        if self.form == "question":
            found = answer_questions(
                model, tokenizer, asked, options, batch_size, on_progress, self.assistant_model
            )
        else:
            prompts = [question_ids(tokenizer, self.form, question) for question in asked]
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
        """One answer in pieces; the generator returns why it ended."""
        prompt = question_ids(self.tokenizer, self.form, question)
        return stream_ids(
            self.model, self.tokenizer, prompt, self.options, assistant_model=self.assistant_model
        )
