"""Trains a small GPT twice: as usual, and with one detail changed, to show why this detail matters.

    experiment("no-causal-mask", conversations).runs

The result shows the loss curves of both runs, some answers, and why the changed run fails. Only one detail
of the runs differs: the model's architecture, a training option, or the number of training examples. Both
runs use the training step of `minigpt train`.
"""

import dataclasses
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.data.batches import encode_conversation, encode_conversations
from minigpt.data.conversation import Conversation
from minigpt.data.split import split_conversations
from minigpt.devices import seed_everything
from minigpt.errors import InputError, unknown_name
from minigpt.families.registry import LanguageModel
from minigpt.lens.results import NOTHING, Lines, Part, Table, View, shown
from minigpt.lens.words import Say
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.config import TrainConfig, read_recipe
from minigpt.training.distributed import SINGLE_PROCESS
from minigpt.training.loss import NextTokenLoss
from minigpt.training.objective import make_objective
from minigpt.training.run_data import RunData
from minigpt.training.step import TrainStep

__all__ = ["EXPERIMENTS", "Experiment", "Result", "experiment"]

STEPS = 120
# only conversations whose answer is one of the first 100 distinct answers are used: a small model learns
# these in seconds
_ANSWERS = 100
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Experiment:
    """One experiment: what differs from the usual run, and why this makes the run fail."""

    what: str  # what differs from the usual run, in English; minigpt.lens.words translates it
    why: str
    model: Callable[[Any], None] = lambda model: None  # a function that changes the failing run's model
    options: dict[str, Any] = field(default_factory=dict)  # training options of the failing run alone
    usual: dict[str, Any] = field(default_factory=dict)  # training options of both runs


# -- changes of the model ----------------------------------------------------------------------------------


def _see_everything(model: Any) -> None:
    """Let each token attend to all tokens of its row, also to later tokens."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], values: dict[str, Any]) -> Any:
        ids = inputs[0]
        B, T = ids.shape
        real = (ids != 0)[:, None, :].expand(B, T, T) | torch.eye(T, dtype=torch.bool, device=ids.device)
        return (ids,), {**values, "attention_mask": real}

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def _forget_positions(model: Any) -> None:
    model.base_model.wpe.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))


def _replace_blocks(forward: Callable[..., Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for block in model.blocks:
            block.forward = types.MethodType(forward, block)

    return change


def _without_residual(block: Any, x: Tensor, visible: Any, cache: Any, attentions: Any, *_: Any) -> Tensor:
    x = block.attn(block.ln_1(x), visible, cache, attentions)
    out: Tensor = block.mlp(block.ln_2(x))
    return out


def _without_norms(block: Any, x: Tensor, visible: Any, cache: Any, attentions: Any, *_: Any) -> Tensor:
    x = x + block.attn(x, visible, cache, attentions)
    out: Tensor = x + block.mlp(x)
    return out


def _without_attention(block: Any, x: Tensor, visible: Any, cache: Any, attentions: Any, *_: Any) -> Tensor:
    out: Tensor = x + block.mlp(block.ln_2(x))
    return out


EXPERIMENTS = {
    "no-causal-mask": Experiment(
        "attention without the causal mask",
        "Each token sees the token that it has to predict, so the model learns to copy it: the loss is lower "
        "than the usual one's. When it answers, there is no later token to copy, and it stops or writes "
        "nonsense.",
        _see_everything,
    ),
    "no-positions": Experiment(
        "no position embeddings",
        "Attention is a weighted mean: by itself it does not know the order of the tokens. Yet the "
        "causal mask shows each token fewer others the earlier it stands, and short questions are "
        "clear from their characters alone: on this data the loss hardly changes. It is the one "
        "experiment here that does not fail.",
        _forget_positions,
    ),
    "no-residual": Experiment(
        "blocks without residual connections",
        "The gradient must pass every attention and every MLP, and each of them shrinks it. The first"
        " layers learn almost nothing, and the loss stays near that of counting characters.",
        _replace_blocks(_without_residual),
        usual={"n_layer": 4},
    ),
    "no-attention": Experiment(
        "blocks without attention",
        "Each token is computed alone: the model knows only the newest character, as a table of pairs"
        " does. Every question gets the same answer.",
        _replace_blocks(_without_attention),
    ),
    "no-norm": Experiment(
        "blocks without LayerNorm",
        "The numbers of the residual stream are too small for attention at first, and their size "
        "changes with each step. The same learning rate is then wrong for every layer.",
        _replace_blocks(_without_norms),
    ),
    "no-warmup": Experiment(
        "no warm-up of the learning rate",
        "AdamW's first steps all have full length, before it knows how much the gradient varies. They throw "
        "the weights somewhere from where training has to recover.",
        options={"warmup_steps": 0},
        usual={"optimizer": "adamw", "learning_rate": 0.01, "warmup_steps": 60, "adam_beta2": 0.999},
    ),
    "learning-rate-too-high": Experiment(
        "a learning rate that is 30 times higher",
        "Each step overshoots the minimum that it aims at. The loss jumps, and the weights grow instead of "
        "learning.",
        options={"learning_rate": 0.3, "muon_learning_rate": 0.6},
    ),
    "learning-rate-too-low": Experiment(
        "a learning rate that is 100 times lower",
        "Each step goes in the right direction, but hardly moves. The loss falls slowly: more steps would "
        "help, a higher rate helps sooner.",
        options={"learning_rate": 0.0001, "muon_learning_rate": 0.0002},
    ),
    "loss-on-all": Experiment(
        "the loss counts the questions, too",
        "The model also has to predict the questions, which nobody asks it to write. In the same "
        "number of steps it learns the answers less well.",
        options={"loss_on": "all"},
    ),
    "little-data": Experiment(
        "one training example in a hundred",
        "The model learns its few examples by heart: the training loss goes to zero while the "
        "validation loss rises. This is overfitting.",
    ),
}
_SHARE = {"little-data": 0.01}  # experiment -> share of the training examples that its failing run uses


# -- running -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One of the two runs of an experiment: its losses and answers."""

    name: str
    train: tuple[list[int], list[float]]  # (training steps, training loss at each of these steps)
    val: tuple[list[int], list[float]]  # (training steps, loss of the held-out answers at these steps)
    answers: list[str]


@dataclass(frozen=True)
class Result(View):
    """A view of an experiment: the usual run and the failing run side by side."""

    name: str
    runs: list[Run]
    questions: list[str]
    expected: list[str]

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        about = EXPERIMENTS[self.name]
        names = [say("usual"), say(about.what)]
        rows = [
            (name, f"{run.train[1][-1]:.3f}", f"{run.val[1][-1]:.3f}") for name, run in zip(names, self.runs)
        ]
        columns = (say("run"), say("training loss"), say("validation loss"))
        answers = [
            (shown(question) if i == 0 else "", name, shown(text) or NOTHING)
            for number, question in enumerate(self.questions)
            for i, (name, text) in enumerate(
                zip(
                    (say("expected"), *names),
                    (self.expected[number], *(run.answers[number] for run in self.runs)),
                )
            )
        ]
        found: list[Part] = [Table(self.name, columns, rows, (1, 2))]
        for part, title in (("train", say("training loss")), ("val", say("validation loss"))):
            series = {name: getattr(run, part) for name, run in zip(names, self.runs)}
            found.append(Lines(title, say("step"), say("loss"), series))
        found.append(Table(say("answers"), (say("question"), say("run"), say("answer")), answers))
        return [*found, Table(say("why"), ("",), [(say(about.why),)])]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        return {run.name: f"{run.val[1][-1]:.3f}" for run in self.runs}


def experiment(
    name: str,
    conversations: Sequence[Conversation],
    steps: int = STEPS,
    seed: int = 42,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Run an experiment: train a small GPT as usual, then again with the experiment's change.

    Args:
        name: a key of EXPERIMENTS.
        conversations: questions and answers; a fifth of the conversations is held out for validation.
        steps: number of training steps of each run.
        on_progress: called with the number of training steps done so far, in both runs together.

    Raises:
        InputError: if `name` is not a key of EXPERIMENTS.
    """
    if name not in EXPERIMENTS:
        raise InputError(unknown_name("experiment", name, EXPERIMENTS))
    about = EXPERIMENTS[name]
    conversations = _with_few_answers(conversations)
    split = split_conversations(conversations, 0.8, seed)
    tokenizer = Tokenizer.from_word2id(
        build_vocabulary(text for each in conversations for text in each.texts())
    )
    few = split.train[: max(8, int(len(split.train) * _SHARE.get(name, 1.0)))]
    asked = [each.exchanges[0] for each in split.val[:3]]
    runs = []
    for number, (kept, change, options) in enumerate(
        [(split.train, lambda model: None, {}), (few, about.model, about.options)]
    ):
        parts = [
            encode_conversations(part, tokenizer, 64, encode_conversation) for part in (kept, split.val[:256])
        ]
        run_data = RunData(tokenizer, parts[0], parts[1], split.val)
        config = _config(steps, seed, {**about.usual, **options})
        run = _run(name if number else "usual", config, run_data, change, number * steps, on_progress)
        answers = [_answer(run[1], tokenizer, one.question) for one in asked]
        runs.append(dataclasses.replace(run[0], answers=answers))
    return Result(name, runs, [one.question for one in asked], [one.answer for one in asked])


def _with_few_answers(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Return the conversations whose answer is one of the first `_ANSWERS` distinct answers in the data.

    Exception: if answers rarely repeat, so that too few conversations would remain, all are returned.
    """
    chosen = set(list(dict.fromkeys(each.answer for each in conversations))[:_ANSWERS])
    found = [each for each in conversations if each.answer in chosen]
    return found if len(found) > 2 * len(chosen) else list(conversations)


def _config(steps: int, seed: int, changes: dict[str, Any]) -> TrainConfig:
    """Return the training options of a run: the recipe qa-cpu, with a smaller GPT and with `changes`."""
    values: dict[str, Any] = {
        "family": "gpt", "n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 64, "max_length": 64,
        "tie_word_embeddings": True, "zero_projections": False, "batch_size": 32, "tokens_per_batch": 1024,
        "max_steps": steps, "seed": seed, "device": "cpu", "precision": "float32",
    }  # fmt: skip
    return dataclasses.replace(read_recipe("qa-cpu"), **{**values, **changes})


def _run(
    name: str,
    config: TrainConfig,
    run_data: RunData,
    change: Callable[[Any], None],
    done: int,
    on_progress: Callable[[int], None],
) -> tuple[Run, LanguageModel]:
    seed_everything(config.seed)
    objective, _ = make_objective(config, run_data, _CPU)
    change(objective.model)
    step = TrainStep(config, objective, run_data, _CPU, SINGLE_PROCESS)
    answers_only = NextTokenLoss(objective.model, "answer", _CPU)
    train: tuple[list[int], list[float]] = ([], [])
    val: tuple[list[int], list[float]] = ([], [])
    for number in range(1, config.max_steps + 1):
        step()
        metrics = step.read_metrics()[-1]
        train[0].append(number)
        train[1].append(metrics.loss)
        if number % max(1, config.max_steps // 10) == 0 or number == config.max_steps:
            report = answers_only.evaluate(objective.model, run_data.val.in_order(64), _CPU)
            val[0].append(number)
            val[1].append(report.loss)
        on_progress(done + number)
    return Run(name, train, val, []), objective.model


@torch.inference_mode()
def _answer(model: LanguageModel, tokenizer: Tokenizer, question: str, most: int = 24) -> str:
    """Answer a question with the most likely tokens, without a KV cache.

    With a cache, the experiment no-causal-mask would give wrong answers: its earlier tokens attend to later
    tokens. So each new token changes the keys and values of the earlier tokens.
    """
    ids = [*tokenizer.encode_text(question), tokenizer.sep_token_id]
    start = len(ids)
    model.eval()
    while len(ids) - start < most and len(ids) < model.config.max_position_embeddings:
        index = int(model(torch.tensor([ids]))[0, -1].argmax())
        if index == tokenizer.sep_token_id:
            break
        ids.append(index)
    return tokenizer.decode(ids[start:])
