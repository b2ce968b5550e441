"""The runs of benchmarks/doctor.py: thirty with one planted fault each, and fifteen healthy ones.

    from benchmarks.doctor_runs import CASES, Desk
    CASES[0].plant(Desk(folder, seed=1))      # trains; the run lies in folder/run

Each is a run that a user could have started: a tiny model, some hundred steps, parts of the built-in corpus.
The docstring of a function is the name of its run in the table. The doctor must name one of the codes above
the function first. A run without a code is healthy.
"""

import contextlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import InputError
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training.loop import Trainer
from minigpt.training.loss import NextTokenLoss
from minigpt.training.run import train

__all__ = ["CASES", "CORPUS", "Case", "Desk"]

CORPUS = Path(__file__).resolve().parents[1] / "data" / "data.jsonl"

Pairs = list[tuple[str, str]]

# A small GPT that learns a hundred facts in some hundred steps. Cases use these options unless they set
# others.
PLAIN: dict[str, Any] = {
    "recipe": "document", "n_layer": 2, "n_embd": 48, "n_head": 4, "block_size": 64, "max_length": 64,
    "dropout": 0.0, "batch_size": 32, "by_length": True, "pad_to_max_length": False, "loss_on": "answer",
    "num_train_epochs": 16.0, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10,
    "max_grad_norm": 1.0, "device": "cpu", "threads": 1, "report_to": "none",
}  # fmt: skip
# The same run with the family, optimiser and schedule of the recipe qa-cpu.
QWEN3: dict[str, Any] = {
    "family": "qwen3", "optimizer": "muon", "learning_rate": 1e-2, "lr_scheduler_type": "wsd",
    "decay_ratio": 0.8, "min_lr_ratio": 0.0, "zero_projections": True, "tie_word_embeddings": False,
    "adam_beta2": 0.99, "weight_decay": 0.1, "muon_weight_decay": 0.1, "num_train_epochs": 8.0,
}  # fmt: skip


# -- what a case has at hand --------------------------------------------------------------------------------


@dataclass
class Desk:
    """A folder, a seed, and the built-in corpus."""

    folder: Path
    seed: int
    draw: random.Random = field(init=False)
    ended_early: str = ""  # the run's error message if it ended early

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def facts(self, count: int) -> list[Pairs]:
        """Return facts of the corpus in random order. Each has several questions and one answer."""
        groups: dict[str, Pairs] = {}
        for line in CORPUS.read_text(encoding="utf-8").splitlines():
            pair = json.loads(line)
            groups.setdefault(pair["answer"], []).append((pair["question"], pair["answer"]))
        several = [pairs for _, pairs in sorted(groups.items()) if len(pairs) >= 5]
        return self.draw.sample(several, count)

    def known_facts(self, count: int = 100, share: float = 0.85) -> tuple[Pairs, Pairs]:
        """Return two parts. The second part asks for the same facts as the first, with other questions."""
        pairs = [pair for fact in self.facts(count) for pair in fact]
        self.draw.shuffle(pairs)
        cut = round(share * len(pairs))
        return pairs[:cut], pairs[cut:]

    def other_facts(self, train: int, val: int) -> tuple[Pairs, Pairs]:
        """Return two parts. The second part asks for facts that the first part does not have."""
        facts = self.facts(train + val)
        parts = [[pair for fact in some for pair in fact] for some in (facts[:train], facts[train:])]
        for part in parts:
            self.draw.shuffle(part)
        return parts[0], parts[1]

    def write(self, train: Pairs, val: Pairs, vocabulary: Pairs | None = None) -> None:
        """Write both parts to files, and a vocabulary of all their characters, or of other pairs."""
        for name, pairs in (("train", train), ("val", val)):
            lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs]
            (self.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        known = train + val if vocabulary is None else vocabulary
        Tokenizer.from_word2id(build_vocabulary(q + a for q, a in known)).save(self.folder / "vocab.json")

    def write_conversations(self, train: list[Pairs], val: list[Pairs]) -> None:
        """Do the same as `write` for conversations of several questions."""
        for name, part in (("train", train), ("val", val)):
            lines = []
            for pairs in part:
                turns = [t for q, a in pairs for t in (("user", q), ("assistant", a))]
                messages = [{"role": role, "content": text} for role, text in turns]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            (self.folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        texts = (q + a for pairs in train + val for q, a in pairs)
        Tokenizer.from_word2id(build_vocabulary(texts)).save(self.folder / "vocab.json")

    def train(self, **values: Any) -> None:
        """Train as `minigpt train` does. If a run ends with an error, its files are kept."""
        names = {"train_data": "train.jsonl", "val_data": "val.jsonl", "vocab_path": "vocab.json"}
        paths = {} if "text" in values else {key: self.folder / name for key, name in names.items()}
        given = {**PLAIN, **paths, "output": self.folder / "run", "seed": self.seed, **values}
        try:
            train(**given)
        except InputError as error:
            self.ended_early = str(error)


@dataclass(frozen=True)
class Case:
    """A run, its fault in words, and the codes of which the doctor must name one first."""

    name: str
    words: str
    chinese: str
    expected: tuple[str, ...]  # codes; (): the run is healthy
    plant: Callable[[Desk], None]


CASES: list[Case] = []


def case(*expected: str, zh: str) -> Callable[[Callable[[Desk], None]], Callable[[Desk], None]]:
    """Decorate a function that makes a run: it becomes a case. Its docstring describes the fault."""

    def add(plant: Callable[[Desk], None]) -> Callable[[Desk], None]:
        CASES.append(Case(plant.__name__, (plant.__doc__ or "").removesuffix("."), zh, expected, plant))
        return plant

    return add


# -- faults of the settings ---------------------------------------------------------------------------------


@case("rate_too_high", zh="AdamW 学习率 0.5，高出一百多倍")
def rate_far_too_high(desk: Desk) -> None:
    """AdamW's rate 0.5, a hundred times too high."""
    desk.write(*desk.known_facts())
    desk.train(learning_rate=0.5)


@case("rate_too_high", zh="Muon 学习率 2，高出一百倍")
def muon_rate_far_too_high(desk: Desk) -> None:
    """Muon's rate 2, a hundred times too high."""
    desk.write(*desk.known_facts())
    desk.train(**{**QWEN3, "muon_learning_rate": 2.0, "learning_rate": 0.3})


@case("non_finite", zh="学习率 1e5 且不限制梯度：数值溢出")
def numbers_overflow(desk: Desk) -> None:
    """A rate of 1e5 without clipping: numbers overflow."""
    desk.write(*desk.known_facts())
    desk.train(learning_rate=1e5, max_grad_norm=0.0, warmup_steps=0)


@case("rate_too_low", zh="学习率 1e-6")
def rate_far_too_low(desk: Desk) -> None:
    """A rate of 1e-6."""
    desk.write(*desk.known_facts())
    desk.train(learning_rate=1e-6)


@case("warmup_missing", zh="学习率 0.05，没有预热")
def warmup_missing(desk: Desk) -> None:
    """No warm-up at a rate of 0.05."""
    desk.write(*desk.known_facts())
    desk.train(
        **{**QWEN3, "optimizer": "adamw", "learning_rate": 0.05, "warmup_steps": 0, "max_grad_norm": 0.0}
    )


@case("weight_decay_high", zh="权重衰减 100")
def weight_decay_huge(desk: Desk) -> None:
    """Weight decay 100."""
    desk.write(*desk.known_facts())
    desk.train(weight_decay=100.0)


@case("dropout_high", zh="dropout 0.9")
def dropout_huge(desk: Desk) -> None:
    """Dropout 0.9."""
    desk.write(*desk.known_facts())
    desk.train(dropout=0.9)


@case("clip_tiny", zh="梯度被截到 1e-9")
def clip_tiny(desk: Desk) -> None:
    """Gradients clipped to 1e-9."""
    desk.write(*desk.known_facts())
    desk.train(max_grad_norm=1e-9)


@case("batch_too_small", zh="每批一对，学习率不变")
def batch_of_one(desk: Desk) -> None:
    """One pair a batch, at a constant rate."""
    desk.write(*desk.known_facts(40))
    desk.train(batch_size=1, lr_scheduler_type="constant", learning_rate=1e-2, num_train_epochs=6.0)


@case("too_short", zh="只有十二步")
def too_short(desk: Desk) -> None:
    """Twelve steps."""
    desk.write(*desk.known_facts())
    desk.train(max_steps=12, warmup_steps=0)


@case("overfitting", zh="六十条事实学四十轮，用别的事实评估")
def too_long(desk: Desk) -> None:
    """Forty epochs on sixty facts, measured on others."""
    desk.write(*desk.other_facts(60, 60))
    desk.train(num_train_epochs=40.0)


@case("overfitting", zh="一百五十万参数学三百多对")
def model_too_large(desk: Desk) -> None:
    """One and a half million parameters on three hundred pairs."""
    desk.write(*desk.other_facts(50, 50))
    desk.train(**{**QWEN3, "n_layer": 3, "n_embd": 192, "num_train_epochs": 12.0})


@case("model_too_small", zh="四个通道")
def model_too_small(desk: Desk) -> None:
    """Four channels."""
    desk.write(*desk.known_facts(150))
    desk.train(n_layer=1, n_embd=4, n_head=1, num_train_epochs=40.0, learning_rate=1e-2)


@case("mostly_questions", zh="损失也计入问题，而问题占六分之五")
def loss_on_everything(desk: Desk) -> None:
    """The loss counts on questions, which are five sixths of the text."""
    parts = desk.known_facts()
    every = [q for part in parts for q, _ in part]

    def long(pairs: Pairs) -> Pairs:
        return [("".join([*desk.draw.sample(every, 4), q]), a) for q, a in pairs]

    desk.write(*map(long, parts))
    desk.train(loss_on="all", block_size=160, max_length=160, num_train_epochs=8.0)


@case("pairs_cut", zh="回答被 max_length 截断")
def cut_by_max_length(desk: Desk) -> None:
    """Answers cut by max_length."""
    desk.write(*desk.known_facts())
    desk.train(max_length=16)


# -- faults of the data -------------------------------------------------------------------------------------


@case("answers_unrelated", zh="问题和回答被打乱")
def answers_shuffled(desk: Desk) -> None:
    """Each question has another one's answer."""
    train, val = desk.known_facts()
    answers = [a for _, a in train + val]
    desk.draw.shuffle(answers)
    mixed = [(q, a) for (q, _), a in zip(train + val, answers)]
    desk.write(mixed[: len(train)], mixed[len(train) :])
    desk.train()


@case("fields_swapped", zh="问题和回答颠倒")
def fields_swapped(desk: Desk) -> None:
    """Question and answer are swapped."""
    train, val = desk.known_facts()
    desk.write([(a, q) for q, a in train], [(a, q) for q, a in val])
    desk.train()


@case("unknown_characters", zh="用别的文本建的词表")
def vocabulary_lacks_characters(desk: Desk) -> None:
    """A vocabulary of other texts."""
    train, val = desk.known_facts()
    desk.write(train, val, vocabulary=train[:60])
    desk.train()


@case("leak", zh="一半验证问题在训练集里")
def leak(desk: Desk) -> None:
    """Half of the validation questions are in the training data."""
    train, val = desk.known_facts()
    desk.write(train + val[::2], val)
    desk.train()


WHO = "the baker, a sailor, my uncle, the old king, her teacher, a farmer, the doctor, our guest, two boys"
DOES = "sells, paints, finds, repairs, carries, remembers, counts, hides, borrows, draws"
WHAT = "the boats, nine lamps, a broken clock, green apples, the letters, two drums"
WHERE = "near the river, in winter, behind the house, at the market, every morning, at school, by night"


def english(desk: Desk, count: int) -> Pairs:
    """Return pairs of made-up English; there are 630."""
    words = [text.split(", ") for text in (WHO, DOES, WHERE)]
    return [
        (
            f"what happens {where} if {who} {does} something?",
            f"{where}, {who} {does} {desk.draw.choice(WHAT.split(', '))}.",
        )
        for who, does, where in desk.draw.sample(list(itertools.product(*words)), count)
    ]


@case("val_unlike_train", zh="验证集是另一种语言")
def validation_of_another_domain(desk: Desk) -> None:
    """The validation part is in another language."""
    train, _ = desk.known_facts()
    desk.write(train, english(desk, 80))
    desk.train()


@case("duplicates", zh="每对数据重复十遍")
def duplicated_pairs(desk: Desk) -> None:
    """Every pair ten times."""
    train, val = desk.known_facts(60)
    many = train * 10
    desk.draw.shuffle(many)
    desk.write(many, val)
    desk.train(num_train_epochs=2.0)


@case("contradictions", zh="同一个问题有几个不同的回答")
def contradicting_labels(desk: Desk) -> None:
    """Questions with several answers that differ."""
    train, val = desk.known_facts()
    answers = [a for _, a in train]
    train = [(q, b) for q, a in train for b in (a, desk.draw.choice(answers), desk.draw.choice(answers))]
    desk.draw.shuffle(train)
    desk.write(train, val)
    desk.train(num_train_epochs=6.0)


@case("template_differs", zh="训练问题以一句指令开头，验证问题没有")
def template_mismatch(desk: Desk) -> None:
    """Training questions begin with an instruction, validation questions do not."""
    train, val = desk.known_facts()
    desk.write([(f"请用一句话回答：{q}", a) for q, a in train], val)
    desk.train()


@case("markup", zh="正文里有对话模板的标记")
def marks_in_the_text(desk: Desk) -> None:
    """A chat template's marks stand in the text."""
    train, val = (
        [(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>") for q, a in part]
        for part in desk.known_facts()
    )
    desk.write(train, val)
    desk.train(block_size=128, max_length=128, num_train_epochs=10.0)


@case("mojibake", zh="UTF-8 被当作 Latin-1 读过")
def mojibake(desk: Desk) -> None:
    """UTF-8 that a program read as Latin-1."""

    def spoil(pairs: Pairs) -> Pairs:
        return [(q, a.encode().decode("latin-1")) for q, a in pairs]

    train, val = desk.known_facts()
    desk.write(spoil(train), spoil(val))
    desk.train(block_size=128, max_length=128, num_train_epochs=8.0)


@case("too_few_to_learn", zh="只有两对数据可学")
def two_pairs(desk: Desk) -> None:
    """Two pairs to learn from."""
    train, val = desk.known_facts(60)
    desk.write(train[:2], val, vocabulary=train + val)
    desk.train(max_steps=60)


# -- faults on the way --------------------------------------------------------------------------------------


@contextlib.contextmanager
def after_each_step(act: Callable[[Trainer], None]) -> Iterator[None]:
    """Call `act` after each step of a run."""
    log = Trainer.metrics_are_due

    def acting(self: Trainer) -> bool:
        act(self)
        return log(self)

    Trainer.metrics_are_due = acting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.metrics_are_due = log  # type: ignore[method-assign]


@case("rolled_back", zh="训练到一半，一个权重变成 NaN")
def nan_in_the_weights(desk: Desk) -> None:
    """A weight becomes NaN half way."""

    def spoil(run: Trainer) -> None:
        if run.progress.steps_done == run.step.total_steps // 2 and not run.progress.rollbacks:
            with torch.no_grad():
                next(run.model.parameters())[0] = math.nan

    desk.write(*desk.known_facts())
    with after_each_step(spoil):
        desk.train(num_train_epochs=14.0)


@case("steps_skipped", zh="有些批次的损失是 NaN")
def nan_in_the_loss(desk: Desk) -> None:
    """The loss of some batches is NaN."""
    forward = NextTokenLoss.forward
    calls = iter(range(10**6))

    def spoiled(self: NextTokenLoss, *arguments: Any) -> torch.Tensor:
        value: torch.Tensor = forward(self, *arguments)
        return value * math.nan if self.training and next(calls) % 40 == 39 else value

    desk.write(*desk.known_facts())
    NextTokenLoss.forward = spoiled  # type: ignore[method-assign, assignment]
    try:
        desk.train(num_train_epochs=14.0)
    finally:
        NextTokenLoss.forward = forward  # type: ignore[method-assign]


@case("data_replaced", zh="续训时换了训练文件")
def data_changed_on_resume(desk: Desk) -> None:
    """The training file was another one after a resume."""
    train, val = desk.known_facts(160)
    half = len(train) // 2
    desk.write(train[:half], val, vocabulary=train + val)
    desk.train(max_steps=150)
    desk.write(train[half:], val, vocabulary=train + val)
    desk.train(max_steps=300, resume=True, allow_changed_data=True)


@case("no_end_learned", zh="损失没有计入回答的结束符")
def end_never_learned(desk: Desk) -> None:
    """The loss leaves out the token that ends an answer."""
    mask = NextTokenLoss._mask

    def without_end(self: NextTokenLoss, batch: Any) -> torch.Tensor:
        kept: torch.Tensor = mask(self, batch) & (batch.targets != 2)
        return kept

    desk.write(*desk.known_facts())
    NextTokenLoss._mask = without_end  # type: ignore[method-assign]
    try:
        desk.train()
    finally:
        NextTokenLoss._mask = mask  # type: ignore[method-assign]


# -- healthy runs -------------------------------------------------------------------------------------------


@case(zh="GPT，AdamW，余弦")
def healthy_gpt(desk: Desk) -> None:
    """GPT, AdamW, cosine."""
    desk.write(*desk.known_facts())
    desk.train()


@case(zh="Qwen3，Muon，wsd，同 qa-cpu")
def healthy_qwen3_muon(desk: Desk) -> None:
    """Qwen3, Muon, wsd, as qa-cpu has them."""
    desk.write(*desk.known_facts())
    desk.train(**QWEN3)


@case(zh="dropout 0.1，学习率不变")
def healthy_constant_rate(desk: Desk) -> None:
    """Dropout 0.1 at a constant rate."""
    desk.write(*desk.known_facts())
    desk.train(dropout=0.1, lr_scheduler_type="constant", learning_rate=2e-3, num_train_epochs=24.0)


@case(zh="原教程的设置：损失计入全部，填充，不限制梯度")
def healthy_document(desk: Desk) -> None:
    """The tutorial's settings: loss on all, padded batches, no clipping."""
    desk.write(*desk.known_facts(80))
    desk.train(
        loss_on="all", pad_to_max_length=True, by_length=False, max_grad_norm=0.0, warmup_steps=0,
        lr_scheduler_type="constant", learning_rate=1e-3, block_size=48, max_length=48, dropout=0.1,
        num_train_epochs=40.0,
    )  # fmt: skip


def chained(desk: Desk, pairs: Pairs) -> list[Pairs]:
    """Return conversations of one to three questions."""
    found = []
    while pairs:
        count = desk.draw.randint(1, 3)
        found.append(pairs[:count])
        pairs = pairs[count:]
    return found


@case(zh="最多三问的对话")
def healthy_conversations(desk: Desk) -> None:
    """Conversations of up to three questions."""
    train, val = desk.known_facts()
    desk.write_conversations(chained(desk, train), chained(desk, val))
    desk.train(**{**QWEN3, "block_size": 128, "max_length": 128, "num_train_epochs": 16.0})


def write_text(desk: Desk) -> Path:
    """Write facts as lines of text. The last tenth is the validation part."""
    train, val = desk.known_facts(160, 0.9)
    path = desk.folder / "text.txt"
    path.write_text("".join(f"{q}{a}\n" for q, a in train + val), encoding="utf-8")
    return path


@case(zh="纯文本，一字一个词元")
def healthy_text(desk: Desk) -> None:
    """Plain text, a token a character."""
    desk.train(text=write_text(desk), loss_on="all", batch_size=16, max_steps=300)


@case(zh="纯文本，字节级词元，Qwen3")
def healthy_text_bpe(desk: Desk) -> None:
    """Plain text, byte-level tokens, Qwen3."""
    path = write_text(desk)
    BpeTokenizer.train([path.read_text(encoding="utf-8")], vocab_size=600).save(desk.folder / "bpe")
    values = {**QWEN3, "max_steps": 200, "batch_size": 16, "loss_on": "all"}
    desk.train(**values, text=path, tokenizer=str(desk.folder / "bpe"))


@case(zh="编造的英文：模型学会其语法")
def healthy_english(desk: Desk) -> None:
    """Made-up English: a grammar that the model learns."""
    pairs = english(desk, 600)
    desk.write(pairs[:500], pairs[500:])
    desk.train(block_size=128, max_length=128, num_train_epochs=12.0)


@case(zh="三层、96 个通道的模型")
def healthy_larger(desk: Desk) -> None:
    """A model of three layers and 96 channels."""
    desk.write(*desk.known_facts(120))
    desk.train(**{**QWEN3, "n_layer": 3, "n_embd": 96, "num_train_epochs": 5.0})


@case(zh="四对一批，四批一步")
def healthy_accumulation(desk: Desk) -> None:
    """Batches of four pairs, four of them a step."""
    desk.write(*desk.known_facts())
    desk.train(batch_size=4, gradient_accumulation_steps=4, num_train_epochs=10.0, learning_rate=2e-3)


@case(zh="在同样的数据上续训")
def healthy_resumed(desk: Desk) -> None:
    """A run that was continued, on the same data."""
    desk.write(*desk.known_facts())
    desk.train(max_steps=120)
    desk.train(max_steps=360, resume=True)


@case(zh="权重衰减 1，梯度限制 0.1，四十步预热")
def healthy_careful(desk: Desk) -> None:
    """A weight decay of 1, a clip of 0.1, forty steps of warm-up."""
    desk.write(*desk.known_facts())
    desk.train(weight_decay=1.0, max_grad_norm=0.1, warmup_steps=40, num_train_epochs=20.0)


@case(zh="Qwen3，共享键值，AdamW，共用嵌入")
def healthy_qwen3_adamw(desk: Desk) -> None:
    """Qwen3 with shared keys and values, AdamW, tied embeddings."""
    desk.write(*desk.known_facts())
    desk.train(family="qwen3", num_key_value_heads=2, precision="auto")


@case(zh="几样小毛病都有一点：截断、重复、未知字")
def healthy_with_blemishes(desk: Desk) -> None:
    """A little of everything: some pairs cut, twice, unknown, or in both parts."""
    train, val = desk.known_facts(120)
    repeated = [*train, *train[: len(train) // 50]]
    desk.write(repeated, val, vocabulary=repeated)
    desk.train(max_length=max(len(q + a) for q, a in train) - 1)


@case(zh="两数之和")
def healthy_sums(desk: Desk) -> None:
    """Sums of two numbers."""
    pairs = [(f"{a}+{b}=", f"{a + b}") for a in range(10, 60) for b in range(10, 60)]
    desk.draw.shuffle(pairs)
    desk.write(pairs[:2200], pairs[2200:])
    desk.train(**{**QWEN3, "block_size": 16, "max_length": 16, "batch_size": 64, "num_train_epochs": 12.0})
