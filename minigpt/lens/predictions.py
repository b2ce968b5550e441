"""What a model predicts: the loss of each token, the distribution of the next token, sampled answers.

loss(model, tokenizer, "四川的省会是哪里？", "成都。").mean
cool = GenerationOptions(do_sample=True, temperature=0.5)
next_token(model, tokenizer, "四川的省会是哪里？", options=[cool]).probabilities
sampled_answers(model, tokenizer, "四川的省会是哪里？", options=[cool], count=10)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel
from minigpt.generation.conversation import QuestionAnswering, token_text
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.logits_processors import make_processors
from minigpt.generation.loop import filtered
from minigpt.generation.native import without_warning
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sequence import bare_ids
from minigpt.lens.reading import Reading, prompt_ids, read_question, usual_format
from minigpt.lens.recorder import read_logits
from minigpt.lens.results import NOTHING, Bars, Floats, Part, Table, View, percent, shown
from minigpt.lens.words import Say
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["Answers", "Loss", "NextToken", "loss", "next_token", "sampled_answers"]


class TokenLoss(NamedTuple):
    """The loss of one token of an answer, and the most likely other tokens."""

    text: str
    id: int
    loss: float  # -log(probability of the token), in nats
    probability: float
    rank: int  # rank of the token; 1: the model's first choice
    others: list[tuple[str, float]]  # the most likely other tokens, with probabilities


@dataclass(frozen=True)
class Loss(View):
    """A view of the loss of an answer, token by token."""

    question: str
    tokens: list[TokenLoss]
    is_own: bool  # True: the model has written the answer itself
    is_text: bool = False  # True: the tokens come from a plain text, not from an answer

    @property
    def mean(self) -> float:
        """The mean loss of a token in nats, as in `minigpt eval`."""
        return sum(token.loss for token in self.tokens) / len(self.tokens)

    @property
    def answer(self) -> str:
        """The answer as text, with visible signs for invisible characters."""
        return "".join(token.text for token in self.tokens)

    @property
    def least_sure(self) -> TokenLoss:
        """The token with the highest loss: the model was least sure of it."""
        return max(self.tokens, key=lambda token: token.loss)

    def as_dict(self) -> dict[str, object]:
        """Return the numbers of this view as a dict for JSON."""
        return {**super().as_dict(), "mean": self.mean}

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        rows = [
            (token.text, f"{token.loss:.4f}", percent(token.probability), token.rank, _named(token.others))
            for token in self.tokens
        ]
        whose = say("the model's own answer") if self.is_own else say("the given answer")
        whose = say("the text") if self.is_text else whose
        title = say("{whose}: {loss} nats a token, {count} tokens; least sure: {token} ({probability})",
                    whose=whose, loss=f"{self.mean:.4f}", count=len(self.tokens),
                    token=self.least_sure.text, probability=percent(self.least_sure.probability))  # fmt: skip
        columns = (say("token"), say("loss"), "p", say("rank"), say("instead"))
        bars = Bars(
            say("loss of each token (nats)"), [t.text for t in self.tokens], [t.loss for t in self.tokens]
        )
        return [Table(title, columns, rows, (1, 2, 3)), bars]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        sure = f"{self.least_sure.text} {percent(self.least_sure.probability)}"
        return {say("answer"): self.answer, say("loss"): f"{self.mean:.4f}", say("least sure"): sure}


def _named(tokens: Sequence[tuple[str, float]]) -> str:
    return "  ".join(f"{text} {percent(value)}" for text, value in tokens)


def loss(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str | Reading,
    answer: str | None = None,
    form: PromptFormat | None = None,
    others: int = 5,
) -> Loss:
    """Compute loss and rank of each token of an answer, and the most likely other tokens.

    Args:
        answer: the answer; None: the model writes it.
        others: number of other tokens to list for each position.

    Raises:
        InputError: if the answer is empty, or the text is too long for the model.
    """
    reading = read_question(model, tokenizer, question, answer, form)
    if not reading.answer:
        raise InputError("the answer has no tokens: there is no loss to look at")
    logits = read_logits(model, reading.ids)[len(reading.prompt) - 1 : -1]  # (n, V)  n tokens of the answer
    log_p = F.log_softmax(logits, dim=-1)
    top = log_p.topk(min(others + 1, log_p.shape[-1]))
    found = []
    for row, index in enumerate(reading.answer):
        own = float(log_p[row, index])
        pairs = zip(top.indices[row].tolist(), top.values[row].exp().tolist())
        rest = [(shown(token_text(tokenizer, one)), value) for one, value in pairs if one != index][:others]
        rank = 1 + int((logits[row] > logits[row, index]).sum())
        text = reading.pieces[len(reading.prompt) + row]
        found.append(TokenLoss(text, index, -own, float(log_p[row, index].exp()), rank, rest))
    return Loss(question if isinstance(question, str) else "", found, reading.is_own, reading.is_text)


@dataclass(frozen=True)
class NextToken(View):
    """A view of the next token's probabilities under several generation options."""

    before: str  # the end of the text that the model has read
    # a name for each distribution: first "", the model's own distribution; then a short text for each set of
    # generation options, such as "T 0.5" for temperature=0.5
    options: list[str]
    tokens: list[str]  # the whole vocabulary, the most likely tokens first
    probabilities: Floats  # (len(options), len(tokens)); 0 means that the token cannot be drawn
    kept: list[int]  # for each entry of `options`: number of tokens with a probability above 0
    entropy: list[float]  # for each entry of `options`: entropy of the distribution in nats
    show: int = 10

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        names = [say("model"), *self.options[1:]]
        top = range(min(self.show, len(self.tokens)))
        rows = [(self.tokens[i], *(percent(float(p)) for p in self.probabilities[:, i])) for i in top]
        rows.append((say("can be drawn"), *(f"{count:,}" for count in self.kept)))
        rows.append((say("entropy"), *(f"{value:.2f}" for value in self.entropy)))
        title = say("the next token after {text}", text=self.before)
        bars: list[Part] = [
            Bars(name, [self.tokens[i] for i in top], [float(row[i]) for i in top])
            for name, row in zip(names, self.probabilities)
        ]
        return [Table(title, ("", *names), rows, range(1, len(names) + 1)), *bars]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        pairs = zip(self.tokens[:5], self.probabilities[0][:5])
        return {say("next token"): _named([(text, float(value)) for text, value in pairs])}


def next_token(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str,
    after: str = "",
    form: PromptFormat | None = None,
    options: Sequence[GenerationOptions] = (),
    show: int = 10,
) -> NextToken:
    """Compute the distribution of the token that follows a question and the beginning of an answer.

    Args:
        after: the beginning of the answer; "": the first token of the answer is predicted.
        options: for each entry, one distribution is computed. As in generation, penalties change the logits
            first, then temperature, then top_k, top_p and min_p.
        show: number of tokens in the view's table.
    """
    ids = prompt_ids(tokenizer, question, form)
    ids += bare_ids(tokenizer, after) if after else []
    logits = read_logits(model, ids)[-1:]  # (1, V)
    rows = [logits.softmax(dim=-1)[0]]
    for one in options:
        # number of tokens of the answer so far, because some penalties count only the answer's tokens
        new = len(bare_ids(tokenizer, after)) if after else 0
        scores = logits
        eos = [index for index in (tokenizer.eos_token_id,) if index is not None]
        processors = make_processors(one, eos, logits.shape[-1], logits.device, tokenizer.get_vocab_size())
        for process in processors:
            scores = process(scores, torch.tensor([ids]), new)
        rows.append(filtered(scores, one).softmax(dim=-1)[0])
    probabilities = torch.stack(rows)  # (1 + number of options, V)
    order = probabilities[0].argsort(descending=True, stable=True)
    entropy = [abs(float((row[row > 0] * row[row > 0].log()).sum())) for row in rows]
    return NextToken(
        before="".join(shown(token_text(tokenizer, index)) for index in ids[-20:]),
        options=["", *map(_difference, options)],
        tokens=[shown(token_text(tokenizer, index)) for index in order.tolist()],
        probabilities=probabilities[:, order].numpy(),
        kept=[int((row > 0).sum()) for row in rows],
        entropy=entropy,
        show=show,
    )


def _difference(options: GenerationOptions) -> str:
    """Return a text such as "T 0.5" or "top_k 5": the options whose values are not the defaults."""
    usual = GenerationOptions(do_sample=True)
    changed = [name for name in vars(usual) if getattr(options, name) != getattr(usual, name)]
    short = {"temperature": "T", "repetition_penalty": "penalty"}
    return " ".join(f"{short.get(name, name)} {getattr(options, name):g}" for name in changed) or "T 1"


@dataclass(frozen=True)
class Answers(View):
    """A view of several answers to one question, drawn under several generation options."""

    question: str
    options: list[str]
    answers: list[list[str]]  # for each entry of `options`: the answers

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        rows = [
            (name if number == 0 else "", f"{count}x", text or NOTHING)
            for name, drawn in zip(self.options, self.answers)
            for number, (text, count) in enumerate(Counter(map(shown, drawn)).most_common())
        ]
        different = [float(len(set(drawn))) for drawn in self.answers]
        return [
            Table(say("answers to {text}", text=shown(self.question)), ("", "", say("answer")), rows, (1,)),
            Bars(say("different answers"), self.options, different),
        ]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {say("answer"): "  ".join(text for drawn in self.answers for text in dict.fromkeys(drawn))}


@without_warning()
def sampled_answers(
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    question: str,
    options: Sequence[GenerationOptions],
    count: int = 10,
    seed: int = 0,
    form: PromptFormat | None = None,
) -> Answers:
    """Let the model answer a question `count` times under each of several generation options."""
    found = []
    for one in options:
        many = replace(one, do_sample=True, num_return_sequences=count, seed=seed)
        asking = QuestionAnswering(model, tokenizer, form or usual_format(tokenizer), many)
        found.append([answer.text for answer in asking.answers([question])])
    return Answers(question, [_difference(one) for one in options], found)
