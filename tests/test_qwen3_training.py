"""`--family qwen3` has the same loop, checkpoints, answers, estimates, and exact resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigpt
from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import estimate as report
from minigpt.training.config import FOREIGN_OPTIONS, TrainConfig, read_recipe, read_run
from minigpt.training.loop import Trainer
from minigpt.training.optimizer import make_optimizers
from minigpt.training.run_data import read_data
from tests.commands import RunCommand
from tests.runs import one_step, stop_at

TINY: dict[str, Any] = {
    "family": "qwen3", "dropout": 0.0, "n_layer": 2, "n_embd": 32, "n_head": 4, "num_key_value_heads": 2,
    "block_size": 32, "max_length": 32, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 8,
    "eval_steps": 4, "logging_steps": 2, "threads": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tiny data set: six answers of different lengths."""
    things, colours = "天地日月山水", ("黑", "土黄", "红", "雪白", "青", "淡淡的蓝")
    pairs = [(f"{t}是什么颜色？", f"{t}是{c}色。") for t, c in zip(things, colours)]
    lines = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "val.jsonl").write_text("".join(lines.splitlines(keepends=True)[:3]), encoding="utf-8")
    Tokenizer.from_word2id(build_vocabulary(q + a for q, a in pairs)).save(tmp_path / "vocab.json")
    return tmp_path


def config(folder: Path, output: str = "run", **values: Any) -> TrainConfig:
    paths: dict[str, Any] = {
        "train_data": folder / "train.jsonl",
        "val_data": folder / "val.jsonl",
        "vocab_path": folder / "vocab.json",
        "output": folder / output,
    }
    return TrainConfig(**{**paths, **TINY, **values})


def trainer(settings: TrainConfig) -> Trainer:
    return Trainer(settings, read_data(settings))


def flags(folder: Path, **values: Any) -> list[str]:
    names = ("train_data", "val_data", "vocab_path")
    files = {
        name: folder / f"{name.split('_')[0]}.{'json' if 'vocab' in name else 'jsonl'}" for name in names
    }
    given = {**TINY, **files, "output": folder / "run", **values}
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


# -- the model that the options describe --------------------------------------------------------------------


def test_knobs_become_a_qwen3(folder: Path) -> None:
    made = config(folder, rope_theta=500.0, tie_word_embeddings=False).model_config(99)
    # 8/3 * 32 = 85.3: the nearest multiple of 8 is 88
    assert made == Qwen3Config(99, 32, 88, 2, 4, 2, 8, 32, 1e-6, 500.0, False)
    options: dict[str, Any] = {"num_key_value_heads": 0, "head_dim": 10, "intermediate_size": 17, "n_head": 5}
    assert config(folder, **options).model_config(99) == Qwen3Config(
        99, 32, 17, 2, 5, 5, 10, 32, 1e-6, 1e4, True
    )


@pytest.mark.parametrize("n_embd", [64, 256, 768, 1024])
def test_the_mlp_is_as_large_as_gpts(folder: Path, n_embd: int) -> None:
    made = config(folder, n_embd=n_embd).model_config(99)
    assert isinstance(made, Qwen3Config)
    assert made.intermediate_size % 8 == 0
    # at most 4 channels away from 8/3 n_embd, of at least 170
    assert 3 * made.intermediate_size * n_embd == pytest.approx(2 * 4 * n_embd * n_embd, rel=4 / 170)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dropout": 0.1}, "family qwen3 has no dropout: got dropout=0.1; it must be 0.0 here"),
        ({"bias": True}, "family qwen3 has no bias: got bias=True; it must be False here"),
        ({"gelu": "tanh"}, "family qwen3 has no gelu: got gelu=tanh; it must be exact here"),
        ({"family": "gpt"}, "family gpt has no num_key_value_heads: got num_key_value_heads=2"),
        ({"family": "gpt", "num_key_value_heads": 0, "rope_theta": 1e6}, "family gpt has no rope_theta"),
        ({"head_dim": -1}, "head_dim must be from 0 to 1000000: got head_dim=-1"),
        ({"intermediate_size": -8}, "intermediate_size must be from 0 to 10000000"),
    ],
    ids=str,
)
def test_a_knob_of_the_other_family_is_an_error(folder: Path, values: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        config(folder, **values)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"n_head": 5}, "n_head must divide n_embd: got n_head=5, n_embd=32; or give --head_dim"),
        ({"n_head": 0}, "n_head must be from 1 to 10000: got n_head=0"),
        ({"num_key_value_heads": 3}, "must divide n_head: got num_key_value_heads=3, n_head=4"),
        ({"n_layer": 0}, "n_layer must be from 1 to 1000: got n_layer=0"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"rope_theta": 0.0}, "rope_theta must be from 1e-06 to 1e+38: got rope_theta=0.0"),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_make_no_model_are_told_by_the_names_of_the_flags(
    folder: Path, values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError) as error:
        config(folder, **values).model_config(99)
    assert text in str(error.value)


def test_every_knob_that_a_family_lacks_has_its_default_or_nothing_there() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert all(defaults[name] == nothing for name, nothing in FOREIGN_OPTIONS["gpt"].items())
    assert set(FOREIGN_OPTIONS["qwen3"]) <= set(defaults)
    assert not set(FOREIGN_OPTIONS["gpt"]) & set(FOREIGN_OPTIONS["qwen3"])


# -- the run ------------------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_blocks_whole(folder: Path) -> None:
    run = trainer(config(folder, optimizer="muon", tie_word_embeddings=False))
    adamw, muon = make_optimizers(run.model, run.config)
    names = {p: name for name, p in run.model.named_parameters()}
    (group,) = muon.param_groups
    assert group["parts"] == 1  # nothing is fused here
    taken = {names[p].split(".layers.")[1][2:] for p in group["params"]}
    attention = {f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
    assert taken == attention | {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert len(group["params"]) == 2 * 7
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert len(rest) + 14 == len(names)
    decayed = [names[p] for p in adamw.param_groups[0]["params"]]
    assert decayed == ["model.embed_tokens.weight", "lm_head.weight"]


def identical(a: Path, b: Path) -> None:
    """Check that weights, optimiser and random state of two runs are equal, bit for bit."""
    for name in ("model", "optimizer", "rng"):
        left, right = (load_file(run / "last" / f"{name}.safetensors") for run in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)


@pytest.mark.parametrize(("optimizer", "tied"), [("muon", True), ("adamw", False)])
def test_a_resumed_run_ends_on_the_same_bits(folder: Path, optimizer: Any, tied: bool) -> None:
    options = {"optimizer": optimizer, "tie_word_embeddings": tied}
    trainer(config(folder, "straight", **options)).run()
    stop_at(trainer(config(folder, "stopped", **options)), 5)
    again = trainer(read_run(folder / "stopped"))
    torch.manual_seed(999)  # whatever happened to the generator since must not matter
    assert again.resume().name == "step-00000005"
    again.run()
    identical(folder / "straight", folder / "stopped")


def test_the_command_line_trains_answers_and_resumes(folder: Path, run_command: RunCommand) -> None:
    result = run_command("train.py", *flags(folder, dropout=None), "--recipe", "qa-cpu", "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out.splitlines()[-1])
    assert numbers["steps"] == 8
    again = run_command("train.py", "--resume", "--output", folder / "run", "--max_steps", 10)
    assert again.code == 0, again.err
    assert "resumed from" in again.out
    model = minigpt.load_model(folder / "run")
    assert isinstance(model, minigpt.Qwen3ForCausalLM)
    measured = run_command("eval", "--model", folder / "run", "--data", folder / "val.jsonl")
    assert measured.code == 0, measured.err
    asked = run_command(
        "generate.py", "--model", folder / "run", "--question", "山是什么颜色？", "--max_new_tokens", 5
    )
    assert asked.code == 0, asked.err


def test_transformers_loads_what_training_wrote(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = trainer(config(folder))
    run.run()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "run" / "best").eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "best")
    ids = tokenizer("山是什么颜色？", return_tensors="pt").input_ids
    ours = minigpt.load_model(folder / "run" / "best")
    with torch.no_grad():
        # float32: the same numbers, summed in another order
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_learns(folder: Path) -> None:
    run = trainer(config(folder, n_embd=64, learning_rate=3e-3, batch_size=6, max_steps=80))
    losses = [one_step(run).loss for _ in range(80)]
    # A model that knows everything except the colour, one of six, has ln 6 on one of about 6.8 tokens: 0.26.
    assert losses[-1] < 0.2
    ids = [*run.data.tokenizer.encode_text("山是什么颜色？"), run.data.tokenizer.sep_token_id]
    assert isinstance(run.model, Qwen3ForCausalLM)
    assert run.model.eval()(torch.tensor([ids]))[0, -1].argmax() == run.data.tokenizer.encode_text("山")[0]


def test_a_recipe_s_knobs_of_the_other_family_are_dropped_aloud(
    folder: Path, run_command: RunCommand
) -> None:
    """The recipe `document` has dropout=0.1, which is dropped with a note. As a flag, it is an error."""
    assert read_recipe("document").dropout == 0.1
    given = flags(folder, dropout=None, tie_word_embeddings=None)
    result = run_command("train.py", *given, "--recipe", "document", "--dry_run")
    assert result.code == 0, result.err
    assert "family qwen3 has no such options, the recipe's values do not count: dropout=0.1" in result.out
    assert "layers.*.self_attn.q_norm" in result.out
    refused = run_command("train.py", *given, "--recipe", "document", "--dry_run", "--dropout", 0.2)
    assert refused.code == 2
    assert "family qwen3 has no dropout: got dropout=0.2" in refused.err
    refused = run_command("train.py", *flags(folder, family="qwen4"), "--recipe", "document")
    assert refused.code == 2
    assert "unknown --family qwen4; did you mean qwen3?" in refused.err.replace("'", "")


# -- estimates ----------------------------------------------------------------------------------------------


def test_flops_of_both_families_by_hand(folder: Path) -> None:
    rows, T, counted = 3.0, 10.0, 0.5
    run = trainer(config(folder, head_dim=6))  # q: 32 -> 24, k and v: 32 -> 12, o: 24 -> 32; MLP: 3 * 32 * 88
    V = run.data.tokenizer.get_vocab_size()
    matrices = 2 * (32 * 24 + 2 * 32 * 12 + 24 * 32 + 3 * 32 * 88)
    attention = 2 * 3 * 4 * T * 4 * 6  # layers, forward and backward, two products, heads and their channels
    by_hand = rows * T * (6 * matrices + attention + counted * 6 * V * 32)
    assert report.batch_flops(run, rows, T, counted) == by_hand
    gpt = {**FOREIGN_OPTIONS["gpt"], "family": "gpt"}
    by_hand = rows * T * (6 * 2 * 12 * 32 * 32 + 2 * 3 * 4 * T * 32 + counted * 6 * V * 32)
    assert report.batch_flops(trainer(config(folder, **gpt)), rows, T, counted) == by_hand


@pytest.mark.parametrize("family", ["gpt", "qwen3"])
def test_memory_of_a_batch_is_what_autograd_keeps_of_it(folder: Path, family: str) -> None:
    """Compare the memory of the third row, times the number of rows, with that of the whole batch."""
    options = {**FOREIGN_OPTIONS["gpt"], "family": "gpt", "dropout": 0.1} if family == "gpt" else {}
    run = trainer(config(folder, **options))
    # the batch with the most tokens
    rows, T = max(
        ((rows, T - 1) for rows, T in run.data.shapes(run.step.plan, 0)), key=lambda s: s[0] * (s[1] + 1)
    )
    ids = (torch.zeros((some, T), dtype=torch.int64) for some in (2, 3, 7))
    two, three, seven = (report._kept_bytes(run, some) for some in ids)
    per_row, C, L = three - two, 32, 2
    assert seven == two + 5 * per_row
    # at least what the matrices of a layer read: 3 times C and 4 C, or 3 times C and 88
    assert per_row > 4 * T * L * (3 * C + 88)
    share = run.data.train.answer_share if run.config.loss_on == "answer" else 1.0
    head = 4 * rows * T * share * (2 * C + 3 * run.data.tokenizer.get_vocab_size())
    counted = 16 * run.model.config.parameter_count() + rows * per_row + head
    assert report.memory_needed(run) == pytest.approx(report.HELD * counted + report.TORCH_ITSELF, abs=1)


@pytest.mark.parametrize("tied", [True, False])
def test_zero_projections_begin_with_equal_chances_and_learn(folder: Path, tied: bool) -> None:
    run = trainer(config(folder, zero_projections=True, tie_word_embeddings=tied, optimizer="muon"))
    assert isinstance(run.model, Qwen3ForCausalLM)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    embedded = run.model.model.norm(run.model.model.embed_tokens(ids))  # (B, T, C)
    torch.testing.assert_close(run.model(ids), run.model.lm_head(embedded), rtol=0, atol=0)
    assert bool((run.model(ids) == 0).all()) is not tied
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(4):  # the head moves first, then the projections, then what is before them
        run.step()
    for name, parameter in run.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
