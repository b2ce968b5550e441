"""Training on plain text: windows, their order, the loss over all windows, resuming, the written folder."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import minigpt
from minigpt.data import shards
from minigpt.data import worker_pool as processes
from minigpt.data.batches import Batch
from minigpt.data.memory_mapped import Tokens, read_manifest
from minigpt.data.shards import prepare
from minigpt.data.windows import TextPart, WindowPlan, permuted
from minigpt.errors import InputError
from minigpt.evaluation.loss import evaluate_loss
from minigpt.families.registry import new_model
from minigpt.finetuning.adapters import save_adapter
from minigpt.finetuning.lora import LoraConfig, apply_lora
from minigpt.generation.generation_config import prompt_format
from minigpt.model import GPTConfig
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import estimate as report
from minigpt.training.config import TrainConfig, read_recipe, read_run
from minigpt.training.lock import LOCK_FILE, lock_folder
from minigpt.training.loop import Trainer
from minigpt.training.loss import summed_cross_entropy
from minigpt.training.run_data import TextData, read_data
from minigpt.training.stop_request import Stopped
from minigpt.weights.pretrained import load_model_and_tokenizer
from tests.commands import RunCommand
from tests.prepared import Program

quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。\n寒来暑往，秋收冬藏。闰余成岁，律吕调阳。\n" * 8
TINY: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2,
    "max_steps": 12, "eval_steps": 6, "logging_steps": 2, "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Make 4,000 different tokens. Each is equal to its position."""
    folder = tmp_path_factory.mktemp("text")
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3999)))
    (folder / "t.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_word2id(build_vocabulary(text))
    found = prepare(folder / "t.txt", folder / "shards", tokenizer)
    assert len(set(found.read(0, 4000).tolist())) == 4000
    return found


def config(folder: Path, output: str = "run", **values: Any) -> TrainConfig:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(**{"text": folder / "text.txt", "output": folder / output, **TINY, **values})


def trainer(settings: TrainConfig) -> Trainer:
    return Trainer(settings, read_data(settings))


# -- windows and their order --------------------------------------------------------------------------------


@quick
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_the_permutation_is_one(count: int, seed: int) -> None:
    keys = np.random.default_rng(seed).integers(2**64, size=8, dtype=np.uint64)
    assert sorted(permuted(np.arange(count), count, keys).tolist()) == list(range(count))


def test_the_permutation_of_billions_takes_no_memory() -> None:
    count = 3 * 10**12
    keys = np.random.default_rng(0).integers(2**64, size=8, dtype=np.uint64)
    places = permuted(np.arange(count - 1000, count), count, keys)
    assert len(set(places.tolist())) == 1000
    assert 0 <= places.min() < places.max() < count


def test_the_permutation_looks_random() -> None:
    count, keys = 10_000, np.random.default_rng(1).integers(2**64, size=8, dtype=np.uint64)
    places = permuted(np.arange(count), count, keys)
    # independent uniform places: the correlation of n pairs has a standard deviation of 1 / sqrt(n) = 0.01
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < 0.05
    distances = np.diff(places)
    assert len(set(distances.tolist())) > 5000  # a * i + b modulo n would have two
    other = permuted(np.arange(count), count, keys + np.uint64(1))
    assert (other == places).mean() < 0.01  # expected: one place in 10,000


@quick
@given(
    first=st.integers(0, 50),
    length=st.integers(2, 700),
    T=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    tokens_per_batch=st.sampled_from([0, 1, 64]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_each_token_once(
    tokens: Tokens,
    first: int,
    length: int,
    T: int,
    batch_size: int,
    tokens_per_batch: int,
    seed: int,
    epoch: int,
) -> None:
    part = TextPart(tokens, first, first + length, T)
    plan = WindowPlan(part, batch_size=batch_size, tokens_per_batch=tokens_per_batch, seed=seed)
    inside = set(tokens.read(first, length).tolist())
    seen: list[int] = []
    sizes = set()
    for number in range(epoch * len(plan), (epoch + 1) * len(plan)):
        batch = part.batch(plan.rows(number))
        assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
        assert batch.token_mask.all()
        assert batch.answer_mask.all()
        sizes.add(len(batch.rows))
        seen += batch.targets.flatten().tolist()
        assert set(batch.input_ids.flatten().tolist()) <= inside  # never a token of the other part
    assert len(seen) == len(set(seen))
    assert set(seen) <= inside
    assert len(seen) > length - 2 * T or length < 2 * T  # the remainder
    assert max(sizes) - min(sizes) <= 1
    limit = max(1, min(batch_size, tokens_per_batch // T)) if tokens_per_batch else batch_size
    assert max(sizes) <= limit


def test_a_batch_depends_on_its_number_alone(tokens: Tokens) -> None:
    part = TextPart(tokens, 0, 2000, 8)

    def rows(number: int, seed: int = 0) -> list[int]:
        return [int(row) for row in WindowPlan(part, batch_size=4, seed=seed).rows(number)]

    plan = WindowPlan(part, batch_size=4)
    order = [200, 3, 70, 3, 500, 0]
    assert [plan.rows(number).tolist() for number in order] == [rows(number) for number in order]
    assert rows(0) != rows(len(plan))  # another epoch
    assert rows(0) != rows(0, seed=1)
    other = WindowPlan(TextPart(tokens, 0, 1999, 8), batch_size=4)
    assert other.rows(0).tolist() != rows(0)  # other data
    offsets = {rows(epoch * len(plan))[0] % 8 for epoch in range(40)}
    assert len(offsets) == 8  # 8 (7/8)^40 = 0.04 of them missing on average, and this is one fixed draw


@quick
@given(length=st.integers(2, 300), T=st.integers(1, 40), batch_size=st.integers(1, 20))
def test_an_evaluation_has_each_target_once(tokens: Tokens, length: int, T: int, batch_size: int) -> None:
    part = TextPart(tokens, 7, 7 + length, T)
    targets = [i for batch in part.in_order(batch_size) for i in batch.targets[batch.token_mask].tolist()]
    assert targets == tokens.read(8, length - 1).tolist()
    assert sum(len(batch.rows) for batch in part.in_order(batch_size)) == part.rows


def test_the_loss_over_a_part_is_that_of_its_windows_one_by_one(tokens: Tokens) -> None:
    torch.manual_seed(0)
    model = new_model(GPTConfig(vocab_size=4003, n_layer=1, n_embd=16, n_head=2, block_size=16, dropout=0.0))
    model.double()
    part = TextPart(tokens, 100, 151, 16)
    measured = evaluate_loss(model, part.in_order(2))
    total, ids = 0.0, torch.from_numpy(tokens.read(100, 51))
    model.eval()
    for start in range(0, 50, 16):
        window = ids[start : start + 17]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert measured.all.count == measured.answer.count == 50
    # both in double precision: sums of 50 terms in another order
    assert measured.all.nll == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("trained", ["both", "head", "hidden"])
def test_the_loss_in_pieces_is_the_loss(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=False).double().requires_grad_(trained != "hidden")
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=trained != "head")
    targets, parts = torch.randint(11, (23,)), [p for p in (head.weight, hidden) if p.requires_grad]
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    gradients = torch.autograd.grad(0.5 * expected, parts)
    # 1: autograd's, or if the matrix is frozen in one piece; the others: pieces of 5 positions and of 1
    for limit in (10**6, 55, 1):
        loss = summed_cross_entropy(head, hidden, targets, limit)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)  # summed in float32
        for found, wanted in zip(torch.autograd.grad(0.5 * loss, parts), gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            summed_cross_entropy(head, hidden, targets, 55).double(), expected, rtol=1e-6, atol=0.0
        )
    # no more logits exist at a time than the limit allows: the fused loss never asks for all of them
    widest = list[int]()

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        widest.append(len(x))
        return x @ weight.T

    monkeypatch.setattr(F, "linear", linear)
    torch.autograd.grad(summed_cross_entropy(head, hidden, targets, 55), parts)
    assert widest == [5, 5, 5, 5, 3]


def test_the_gradient_of_the_loss_in_pieces_is_used_once() -> None:
    head, hidden = torch.nn.Linear(4, 7, bias=False), torch.randn(5, 4, requires_grad=True)
    loss = summed_cross_entropy(head, hidden, torch.arange(5), 14)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


# -- the run ------------------------------------------------------------------------------------------------


def test_it_learns_a_text_by_heart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(config(tmp_path, max_steps=100, eval_steps=50, dropout=0.0, learning_rate=3e-3, n_embd=64))
    assert isinstance(run.data, TextData)
    assert run.data.tokenizer.get_vocab_size() == 3 + len(set(TEXT))
    result = run.run()
    assert result["val_loss"] < 1.0  # the validation part repeats the text; guessing: log(40) = 3.7
    out = capsys.readouterr().out
    assert out.count("' goes on '") == 2
    model, tokenizer = minigpt.load_model(tmp_path / "run"), minigpt.load_tokenizer(tmp_path / "run")
    ids = torch.tensor([tokenizer.encode_text("天地玄黄，宇宙")])
    assert tokenizer.decode([int(model(ids)[0, -1].argmax())]) == "洪"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_parts_are_cut_by_position(tmp_path: Path) -> None:
    data = read_data(config(tmp_path, val_fraction=0.25))
    assert isinstance(data, TextData)
    total = len(TEXT) + 1  # and the end of the document
    assert (len(data.train), len(data.val)) == (total - total // 4, total // 4)
    assert data.tokenizer.decode(data.val.tokens.read(data.val.first, 9)) == TEXT[len(data.train) :][:9]
    (tmp_path / "other.txt").write_text("天地乾坤", encoding="utf-8")
    data = read_data(config(tmp_path, val_text=tmp_path / "other.txt"))
    assert isinstance(data, TextData)
    assert (len(data.train), len(data.val)) == (total, 5)
    assert data.tokenizer.decode(data.val.tokens.read(0, 5)) == "天地<unk><unk><sep>"


@pytest.mark.parametrize(("stop_after", "optimizer"), [(0, "muon"), (1, "muon"), (6, "adamw"), (11, "adamw")])
def test_a_resumed_run_ends_on_the_same_bits(tmp_path: Path, stop_after: int, optimizer: Any) -> None:
    trainer(config(tmp_path, "straight", dropout=0.1, optimizer=optimizer)).run()
    stopped = trainer(config(tmp_path, "stopped", dropout=0.1, optimizer=optimizer))
    batches = stopped.step.batches

    def stopping(step: int) -> list[Batch]:
        if (
            step == stop_after
        ):  # these batches are prepared before the first step, or at the end of the last one
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    stopped.step.batches = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    again = trainer(read_run(tmp_path / "stopped"))
    torch.manual_seed(999)
    assert again.resume().name == f"step-{stop_after:08d}"
    again.run()
    for name in ("model", "optimizer", "rng"):
        left, right = (
            load_file(tmp_path / run / "last" / f"{name}.safetensors") for run in ("straight", "stopped")
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_resume_refuses_another_text(tmp_path: Path) -> None:
    trainer(config(tmp_path)).run()
    (tmp_path / "text.txt").write_text(TEXT[1:] + TEXT[0], encoding="utf-8")
    longer = dataclasses.replace(read_run(tmp_path / "run"), max_steps=20)
    with pytest.raises(InputError, match=r"another training data \(.*text\.txt\)"):
        trainer(longer).resume()
    with pytest.raises(InputError, match=r"with --val_fraction 0.1, which gives other examples"):
        trainer(config(tmp_path, max_steps=20, val_fraction=0.2)).resume()


def test_bytes_and_hugging_face(tmp_path: Path) -> None:
    """The byte-level vocabulary is learned from the same text, and transformers reads the folder."""
    BpeTokenizer.train([TEXT], 300, min_frequency=1).save(tmp_path / "bpe")
    for name in (str(tmp_path / "bpe"), "char"):
        trainer(config(tmp_path, f"run-{name == 'char'}", tokenizer=name, max_steps=2, eval_steps=2)).run()
        folder = tmp_path / f"run-{name == 'char'}" / "best"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ours = minigpt.load_tokenizer(folder)
        ids = ours.encode_text("天地玄黄，\n宇宙")
        assert tokenizer("天地玄黄，\n宇宙", add_special_tokens=False).input_ids == ids
        # two implementations of the same sums in single precision
        given_ids = torch.tensor([ids])
        expected = theirs(given_ids).logits
        torch.testing.assert_close(minigpt.load_model(folder)(given_ids), expected, atol=1e-4, rtol=1e-4)
        end = prepare(tmp_path / "text.txt", folder.parent / "shards", ours).manifest["end_of_text"]
        assert theirs.config.eos_token_id == tokenizer.eos_token_id == end


def test_a_recipe_of_the_usual_size() -> None:
    recipe = read_recipe("shakespeare-cpu")
    assert recipe.block_size == 64
    assert (
        recipe.model_config(68).parameter_count() <= 810_000
    )  # nanoGPT's for the same text has 800 thousand


def test_the_estimate(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, batch_size=3))
    expected = report.estimate(run)
    assert expected.steps == 12
    assert expected.tokens_per_step == 3 * 16
    assert expected.seconds > 0


def test_a_loss_that_is_not_finite_says_where(tmp_path: Path) -> None:
    run = trainer(config(tmp_path, learning_rate=1e30, max_grad_norm=0.0))
    with pytest.raises(
        InputError, match=r"the windows from tokens \d.* of .*text\.txt, the first of which begins '"
    ):
        run.run()


# -- the command --------------------------------------------------------------------------------------------


def flags(folder: Path) -> list[str]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    found = [f"--{key}={value}" for key, value in {**TINY, "max_steps": 2, "eval_steps": 2}.items()]
    return [*found, "--recipe=shakespeare-cpu", f"--text={folder / 'text.txt'}", f"--output={folder / 'run'}"]


def test_the_command(tmp_path: Path, run_command: RunCommand) -> None:
    first = run_command("train.py", *flags(tmp_path))
    assert first.code == 0, first.err
    assert "tokens to learn from" in first.out
    assert "goes on" in first.out
    again = run_command("train.py", *flags(tmp_path), "--overwrite")
    assert again.code == 0, again.err
    assert "as prepared in" in again.out
    assert (tmp_path / "run" / "shards" / "shards.json").exists()  # they did not go with the old run
    assert not (tmp_path / "run.previous" / "shards").exists()
    resumed = run_command("train.py", "--resume", f"--output={tmp_path / 'run'}", "--max_steps=4")
    assert resumed.code == 0, resumed.err
    assert "as prepared in" in resumed.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--val_fraction=0"], "val_fraction must be from 1e-06 to 0.999999"),
        (["--val_fraction=0.0001"], "0 tokens are left to measure on"),
        (["--block_size=1000"], "do not fill one window of block_size=1000"),
        (["--tokenizer=nowhere"], "nowhere does not exist"),
        (["--val_text=nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, run_command: RunCommand, more: list[str], message: str
) -> None:
    result = run_command("train.py", *flags(tmp_path), *more)
    assert result.code == 2
    assert message in result.err


def test_text_flags_need_text(tmp_path: Path, run_command: RunCommand) -> None:
    result = run_command("train.py", "--recipe=qa-cpu", "--val_text=bpe")
    assert result.code == 2
    assert "belongs to --text" in result.err
    result = run_command("train.py", "--recipe=qa-cpu", f"--shards={tmp_path}", f"--output={tmp_path}")
    assert result.code == 2
    assert "each needs a folder of its own" in result.err


@pytest.mark.parametrize("kind", ["jsonl", "txt", "folder"])
def test_vocabularies_of_texts(tmp_path: Path, run_command: RunCommand, kind: str) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(TEXT, encoding="utf-8")
    pairs = json.dumps({"question": TEXT, "answer": TEXT}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(pairs + "\n", encoding="utf-8")
    data = {"jsonl": tmp_path / "d.jsonl", "txt": tmp_path / "books" / "a.txt", "folder": tmp_path / "books"}[
        kind
    ]
    made = run_command("build_vocab.py", f"--data={data}", f"--output={tmp_path / 'vocab.json'}")
    assert made.code == 0, made.err
    assert Tokenizer(tmp_path / "vocab.json") == Tokenizer.from_word2id(build_vocabulary(TEXT))
    bpe = ("--kind=bpe", "--vocab_size=280", f"--data={data}")
    made = run_command("build_vocab.py", *bpe, f"--output={tmp_path / 'bpe'}")
    assert made.code == 0, made.err
    tokenizer = BpeTokenizer.from_folder(tmp_path / "bpe")
    assert tokenizer.get_vocab_size() == 280
    assert len(tokenizer.encode_text(TEXT)) < len(TEXT.encode())
    assert run_command("build_vocab.py", *bpe, f"--output={tmp_path / 'v.json'}").code == 2
    refused = run_command("build_vocab.py", *bpe, "--vocab_size=9", f"--output={tmp_path / 'bpe'}")
    assert "--vocab_size must be at least 259" in refused.err


# -- several processes --------------------------------------------------------------------------------------

READING = """
import sys
from pathlib import Path
from minigpt.data import shards
from minigpt.training.config import TrainConfig
from minigpt.training.run_data import read_data

text, folder, output = map(Path, sys.argv[1:])
shards.PIECE = 300  # many shards, so that two processes would get into each other's way
read_data(TrainConfig(text=text, shards=folder, output=output, block_size=16, workers=1))
"""


class Reading:
    """A process that makes shards of the text in tmp_path, or uses existing ones."""

    def __init__(self, tmp_path: Path, name: str) -> None:
        arguments = [str(tmp_path / part) for part in ("t.txt", "shards", name)]
        reading, writing = os.pipe()
        self.stdout = os.fdopen(reading, encoding="utf-8")
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            streams = nothing.fileno(), writing, writing
            self.program = Program(["-c", READING, *arguments], streams)
        os.close(writing)

    def end(self) -> str:
        """Wait for its end, and return the rest of its output."""
        with self.stdout:
            out = self.stdout.read()
        assert self.program.wait(120.0) == 0, out
        return out


@pytest.mark.slow
def test_who_finds_shards_being_made_waits_for_them(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    lock = lock_folder(tmp_path / "shards")
    process = Reading(tmp_path, "run")
    line = process.stdout.readline()
    assert line.endswith("shards is in use by another run: waiting until it is done\n")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [LOCK_FILE]
    lock.release()
    out = process.end()
    assert out.count("\n") == 1
    assert "; prepared in " in out
    again = Reading(tmp_path, "run")  # nobody has to wait for what is there, whoever has the lock
    lock = lock_folder(tmp_path / "shards")
    out = again.end()
    lock.release()
    assert ", as prepared in " in out
    assert "waiting" not in out


@pytest.mark.slow
def test_two_that_make_the_same_shards_at_once_make_them_once(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 40, encoding="utf-8")
    both = [Reading(tmp_path, name) for name in ("one", "two")]
    said = [process.end() for process in both]
    assert sum("; prepared in " in out for out in said) == 1, said
    assert sum(", as prepared in " in out for out in said) == 1, said
    tokenizer = Tokenizer(tmp_path / "shards" / "vocab.json")
    alone = prepare(tmp_path / "t.txt", tmp_path / "alone", tokenizer, workers=1)
    manifest = read_manifest(tmp_path / "shards")
    assert manifest is not None
    assert len(manifest["shards"]) > 10
    assert np.array_equal(
        Tokens(tmp_path / "shards", manifest).read(0, len(alone)), alone.read(0, len(alone))
    )


def test_the_number_of_workers_reaches_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    seen = []
    real = processes.run_in_processes

    def counting(*arguments: Any, workers: int, **more: Any) -> Any:
        seen.append(workers)
        return real(*arguments, workers=1, **more)

    monkeypatch.setattr(shards, "run_in_processes", counting)
    flags: dict[str, Any] = {"text": tmp_path / "t.txt", "val_text": tmp_path / "t.txt", **TINY}
    read_data(TrainConfig(output=tmp_path / "run", workers=3, **flags))
    assert seen == [3, 3, 3]  # characters, text, val_text
    with pytest.raises(InputError, match="workers must be from 0 to 1024: got workers=-1"):
        TrainConfig(workers=-1)


# -- folders made of a run's -------------------------------------------------------------------------------


def test_folders_made_of_a_run_s_keep_the_prompt_format(tmp_path: Path, run_command: RunCommand) -> None:
    settings = config(tmp_path, max_steps=1, eval_steps=1)
    trainer(settings).run()
    best = settings.output / "best"
    model, tokenizer = load_model_and_tokenizer(best)
    lora = LoraConfig(r=2)
    apply_lora(model, lora)
    for name, learned in (("answers", None), ("texts", "more.txt")):
        save_adapter(model, lora, tmp_path / name, str(best))
        state = json.dumps({"config": {"text": learned}})
        (tmp_path / name / "training_state.json").write_text(state, encoding="utf-8")

    def derive(verb: str, source: Path, name: str, *more: object) -> Path:
        result = run_command(verb, "--model", source, "--output", tmp_path / name, *more)
        assert result.code == 0, result.err
        return tmp_path / name

    assert prompt_format(best, tokenizer) == "text"
    assert prompt_format(derive("quantize", best, "int8"), tokenizer) == "text"
    assert prompt_format(best, tokenizer, tmp_path / "answers") == "question"
    assert prompt_format(best, tokenizer, tmp_path / "texts") == "text"
    merged = derive("merge", best, "merged", "--adapter", tmp_path / "answers")
    assert prompt_format(merged, tokenizer) == "question"
    again = derive("merge", best, "again", "--adapter", tmp_path / "texts")
    assert prompt_format(derive("quantize", again, "again8"), tokenizer) == "text"
    views = [
        run_command("look", "loss", "--question", "天", "--answer", "地", *given, "--json").out
        for given in (["--model", best], ["--model", best, "--adapter", tmp_path / "answers"])
    ]
    counts = [len(json.loads(view.splitlines()[-1])["tokens"]) for view in views]
    assert counts == [1, 2], "an answer ends with <sep>, a text does not"
