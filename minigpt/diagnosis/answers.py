"""Checks the best checkpoint of a run: measures its loss on held-out answers, and asks it questions.

    model, tokenizer = load_best(record)
    # the loss of answers: once after their own questions, once after other questions
    loss = measure(model, tokenizer, conversations)
    answers, limit = ask(model, tokenizer, conversations)
    findings = judge(loss, answers, limit)

Only this part of a diagnosis loads weights.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from minigpt.console.terminal import shortened
from minigpt.data.batches import Batch, encode_conversations
from minigpt.data.conversation import Conversation, Exchange, conversation_of_pair
from minigpt.diagnosis.findings import Finding, finding
from minigpt.diagnosis.record import RunRecord
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import Answer, GenerationOptions, answer_questions
from minigpt.weights.pretrained import AnyTokenizer, load_model_and_tokenizer

__all__ = ["MAX_NEW_TOKENS", "PAIRS", "QUESTIONS", "AnswerLoss", "ask", "judge", "load_best", "measure"]

QUESTIONS = 32  # number of questions to ask: enough to see what most answers are like, in seconds on a CPU
PAIRS = 64  # number of answers whose loss is measured; this is faster than generating answers
MAX_NEW_TOKENS = 128  # largest number of tokens of an answer; `minigpt eval` has the same default
# A model is healthy if at least nine in ten of its answers end before they reach this number of tokens. A few
# questions always get endless answers.
END_SHARE = 0.9
# A model that has learned little has endless answers, too. So the finding "no_end_learned" needs more: a loss
# of the end token that is at least one nat above the loss of the other tokens.
END_NATS = 1.0
# If more than half of all questions get the same answer, the answer does not depend on the question.
SAME_SHARE = 0.5
# Report a problem if more than one answer in ten is empty. An empty answer is never right: the data has no
# empty answers.
EMPTY_SHARE = 0.1
# Answers depend on their questions if the loss of an answer is lower after its own question than after the
# question of another pair: by at least 2 %, and by at least two standard errors.
OWN_SHARE, OWN_ERRORS = 0.02, 2.0
_CHUNK = 2**24  # largest number of logits in memory at a time: 64 MiB in float32


class AnswerLoss(NamedTuple):
    """The loss of answers, in nats per token."""

    pairs: int
    own: float  # mean loss of answers after their own questions
    other: float  # mean loss of the same answers after questions of pairs with different answers
    error: float  # standard error of other - own
    end: float  # loss of the <sep> that ends an answer
    inside: float  # loss of an answer's tokens, except this <sep>
    example: Exchange


def load_best(record: RunRecord) -> tuple[LanguageModel, AnyTokenizer]:
    """Load the best checkpoint of a run.

    Raises:
        InputError: if the checkpoint does not exist or cannot be read.
    """
    folder = record.folder / "best"
    if not folder.exists():
        raise InputError(f"{folder} does not exist: no evaluation has been done yet")
    return load_model_and_tokenizer(folder)


def spread(items: Sequence[Exchange], count: int) -> list[Exchange]:
    """Select at most `count` items, spread evenly over all items."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


def measure(
    model: LanguageModel, tokenizer: AnyTokenizer, conversations: Sequence[Conversation]
) -> AnswerLoss | None:
    """Measure the loss of answers: of each after its own question, and after another conversation's question.

    These are the first answers of at most 64 conversations (`PAIRS`), spread evenly over all conversations.

    Returns: the mean losses; None if all answers are the same, or a pair is too long for the model.
    """
    first = {each.exchanges[0].question: each.exchanges[0] for each in conversations}
    pairs = spread(list(first.values()), PAIRS)
    answers = [pair.answer for pair in pairs]
    # For each answer, choose the question of a pair whose answer is a different text. The search starts half
    # the list after the answer's own pair, because neighbouring pairs may be alike.
    others = []
    for number, answer in enumerate(answers):
        turns = range(number + len(pairs) // 2, number + len(pairs) // 2 + len(pairs))
        there = next((i % len(pairs) for i in turns if answers[i % len(pairs)] != answer), None)
        if there is None:
            return None
        others.append(pairs[there].question)
    limit = model.config.max_position_embeddings + 1
    both = [
        conversation_of_pair(question, answer, number)
        for questions in ([pair.question for pair in pairs], others)
        for number, (question, answer) in enumerate(zip(questions, answers))
    ]
    try:
        encoded = encode_conversations(both, tokenizer, limit)
    except InputError:
        return None
    if encoded.n_cut or len(encoded) != len(both):
        return None
    model.eval()
    rows = []  # (index in `both`, loss of the answer in nats, loss of its <sep> in nats, number of tokens)
    for batch in encoded.in_order(64):
        rows += list(zip(batch.rows.tolist(), *(part.tolist() for part in _costs(model, batch))))
    nats, ends, counts = (list(part) for part in zip(*[row[1:] for row in sorted(rows)]))
    half, tokens = len(pairs), sum(counts[: len(pairs)])
    differences = [(b - a) / n for a, b, n in zip(nats[:half], nats[half:], counts[:half])]
    mean = sum(differences) / half
    variance = sum((d - mean) ** 2 for d in differences) / max(1, half - 1)
    return AnswerLoss(
        pairs=half,
        own=sum(nats[:half]) / tokens,
        other=sum(nats[half:]) / tokens,
        error=math.sqrt(variance / half),
        end=sum(ends[:half]) / half,
        inside=(sum(nats[:half]) - sum(ends[:half])) / max(1, tokens - half),
        example=pairs[0],
    )


@torch.inference_mode()
def _costs(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three tensors (B,), one value for the answer in each row.

    The tensors hold: the loss of the answer in nats, summed over its tokens; the loss of its last token in
    nats; its number of tokens.
    """
    hidden = model.base_model(batch.input_ids)[batch.answer_mask]  # (P, C): P answer tokens, C channels
    targets, size = batch.targets[batch.answer_mask], max(1, _CHUNK // model.config.vocab_size)
    pieces = zip(torch.split(hidden, size), torch.split(targets, size))
    parts = [F.cross_entropy(model.lm_head(some).float(), goal, reduction="none") for some, goal in pieces]
    nats = torch.zeros(batch.targets.shape).masked_scatter_(batch.answer_mask, torch.cat(parts))
    last = batch.token_mask.sum(dim=1, keepdim=True) - 1  # (B, 1): index of each row's last token
    return nats.sum(dim=1), nats.gather(1, last)[:, 0], batch.answer_mask.sum(dim=1)


def ask(
    model: LanguageModel, tokenizer: AnyTokenizer, conversations: Sequence[Conversation]
) -> tuple[list[Answer], int]:
    """Let the model answer some of the questions that fit into its context, evenly spread over the data.

    Returns: the answers, and the largest number of tokens that an answer may have.

    Raises:
        InputError: if no question fits, or the model's outputs are not finite.
    """
    # Largest number of tokens of a question. Two positions are kept for <sep> and one token of the answer.
    room = model.config.max_position_embeddings - 2
    first = dict.fromkeys(each.exchanges[0] for each in conversations)
    fitting = [one for one in first if len(tokenizer.encode_text(one.question)) <= room]
    if not fitting:
        raise InputError(f"no question fits the model's block_size={room + 2}")
    chosen = [one.question for one in spread(fitting, QUESTIONS)]
    limit = min(MAX_NEW_TOKENS, room + 1)
    return answer_questions(model, tokenizer, chosen, GenerationOptions(max_new_tokens=limit)), limit


def judge(
    loss: AnswerLoss | None, answers: Sequence[Answer], limit: int, pairs_fit: bool = True
) -> list[Finding]:
    """Judge the answers: do they depend on their questions, do they end, do they differ, are they empty?

    Returns: the findings.

    Args:
        limit: largest number of tokens of an answer.
        pairs_fit: True if the questions and answers in the data belong together, as `answers_fit` says.
    """
    count, found = len(answers), []
    if loss is not None and loss.other - loss.own < max(OWN_SHARE * loss.own, OWN_ERRORS * loss.error):
        question, answer = (shortened(text) for text in loss.example)
        numbers = {"count": loss.pairs, "own": loss.own, "other": loss.other}
        code = "question_ignored" if pairs_fit else "answers_unrelated"
        found.append(
            finding(code, **numbers, **({} if pairs_fit else {"question": question, "answer": answer}))
        )
    ended = sum(answer.stop_reason == "eos" for answer in answers) / count
    if ended >= END_SHARE:
        found.append(finding("answers_end", share=ended, count=count))
    elif loss is not None and loss.end > loss.inside + END_NATS:
        costs = {"end": loss.end, "loss": loss.inside}
        found.append(finding("no_end_learned", share=ended, count=count, limit=limit, **costs))
    texts = [answer.text.strip() for answer in answers]
    empty = texts.count("") / count
    if empty > EMPTY_SHARE:
        found.append(finding("answers_empty", share=empty, count=count))
    ((answer_text, times),) = Counter(texts).most_common(1)
    if answer_text and count > 1 and times / count > SAME_SHARE:
        found.append(
            finding("same_answer_given", share=times / count, count=count, answer=shortened(answer_text))
        )
    return found
