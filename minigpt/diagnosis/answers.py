"""Checks the answers of a trained model to some validation questions.

    answers, limit = ask(record, conversations)
    findings = judge_answers(answers, limit, max_length=256)

Of all checks, only these load the weights.
"""

from collections import Counter
from collections.abc import Sequence

from minigpt.data.conversation import Conversation
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError, printable
from minigpt.generation.api import Answer, GenerationOptions, answer_questions
from minigpt.weights.pretrained import load_model_and_tokenizer

__all__ = ["MAX_NEW_TOKENS", "QUESTIONS", "ask", "judge_answers"]

QUESTIONS = 32  # number of questions that are asked; this takes seconds on a CPU
MAX_NEW_TOKENS = 128  # most tokens of an answer, as in `minigpt eval` and `minigpt generate`
# Least share of answers that end by themselves. In every healthy run nine in ten do.
END_SHARE = 0.9
# Most questions with the same answer, as a share. With more, the answer hardly depends on the question.
SAME_SHARE = 0.5
# Most empty answers, as a share. No answer in the data is empty, so an empty one is always wrong.
EMPTY_SHARE = 0.1


def ask(record: RunRecord, conversations: Sequence[Conversation]) -> tuple[list[Answer], int]:
    """Let the best checkpoint answer some of the questions, spread evenly over those that fit the context.

    Returns: the answers, and the most tokens that an answer may have.

    Raises:
        InputError: if no checkpoint can be read, or no question fits.
    """
    folder = record.folder / "best"
    if not folder.exists():
        raise InputError(f"{folder} does not exist: no evaluation has been done yet")
    model, tokenizer = load_model_and_tokenizer(folder)
    # minus 2, for <sep> after the question and one token of the answer
    room = model.config.max_position_embeddings - 2
    first = dict.fromkeys(each.exchanges[0].question for each in conversations)
    questions = [question for question in first if len(tokenizer.encode_text(question)) <= room]
    if not questions:
        raise InputError(f"no question fits the model's block_size={room + 2}")
    count = min(QUESTIONS, len(questions))
    chosen = [questions[i * len(questions) // count] for i in range(count)]
    limit = min(MAX_NEW_TOKENS, room + 1)
    return answer_questions(model, tokenizer, chosen, GenerationOptions(max_new_tokens=limit)), limit


def judge_answers(answers: Sequence[Answer], limit: int, max_length: int) -> list[Finding]:
    """Return findings on whether answers end, differ and are not empty. `answers` must not be empty."""
    count, found = len(answers), []
    ended = sum(answer.stop_reason == "eos" for answer in answers) / count
    if ended >= END_SHARE:
        found.append(finding("answers_end", share=ended, count=count))
    else:
        found.append(finding("no_end_learned", share=ended, count=count, limit=limit, max_length=max_length))
    texts = [answer.text.strip() for answer in answers]
    empty = texts.count("") / count
    if empty > EMPTY_SHARE:
        found.append(finding("answers_empty", share=empty, count=count))
    ((answer, times),) = Counter(texts).most_common(1)
    if answer and count > 1 and times / count > SAME_SHARE:
        shown = printable(answer) if len(answer) <= 40 else f"{printable(answer[:39])}…"
        found.append(finding("same_answer_given", share=times / count, count=count, answer=shown))
    return found
