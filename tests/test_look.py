"""`minigpt look`, `plot` and `experiment`, `eval --show_wrong`, `train --keep_every`: on a tiny run."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.cells import cell_len

from minigpt import lens
from minigpt.commands.look import USES, Options, ViewName
from minigpt.console.flags import flags_of
from minigpt.families.registry import new_model
from minigpt.finetuning.adapters import save_adapter
from minigpt.finetuning.lora import LoraConfig, apply_lora
from minigpt.model import GPTConfig
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.training.checkpoint import list_checkpoints
from minigpt.weights.pretrained import load_model_and_tokenizer, save_pretrained, save_tokenizer
from tests.commands import RunCommand
from tests.runs import config, trainer, write_data

QUESTION, ANSWER = "天是什么颜色？", "天是黑色。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with several checkpoints, a model with BPE, one without a tokenizer, and an adapter."""
    folder = tmp_path_factory.mktemp("look")
    write_data(folder)
    trainer(config(folder, max_steps=12, eval_steps=6, keep_every=4, save_total_limit=1)).run()
    trainer(config(folder, "other", max_steps=2, eval_steps=1)).run()
    tokenizer = BpeTokenizer.train([QUESTION + ANSWER] * 2, 270)
    torch.manual_seed(3)
    shape = GPTConfig(n_embd=16, n_head=2, n_layer=2, vocab_size=tokenizer.get_vocab_size(), block_size=64)
    save_pretrained(new_model(shape), folder / "bpe", tokenizer)
    save_pretrained(new_model(shape), folder / "bare")
    model, _ = load_model_and_tokenizer(folder / "run" / "best")
    lora = LoraConfig(r=2)
    apply_lora(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_adapter(model, lora, folder / "adapter", str(folder / "run" / "best"))
    return folder


def arguments(view: str, folder: Path) -> list[object]:
    """Return the arguments that a view needs."""
    data = folder / "train.jsonl"
    needed: dict[str, list[object]] = {
        "tokens": ["--text", QUESTION], "neighbours": ["--text", "天"], "weights": [],
        "data": ["--data", data],
        "batch": ["--train_data", data, "--line", 1, 2],
    }  # fmt: skip
    return needed.get(view, ["--question", QUESTION])


def test_keep_every_keeps_and_evaluates(folder: Path) -> None:
    kept = {int(path.name[-8:]) for path in list_checkpoints(folder / "run")}
    best = int((folder / "run" / "best").resolve().name[-8:])
    assert kept == {4, 8, 12, best}, "step 6 was an evaluation like any other"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6, 8, 12]


def test_keep_every_does_not_change_what_is_learned(folder: Path) -> None:
    trainer(config(folder, "plain", max_steps=12, eval_steps=6)).run()
    weights = [(folder / run / "last" / "model.safetensors").read_bytes() for run in ("run", "plain")]
    assert weights[0] == weights[1]


# -- look --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", get_args(ViewName))
def test_every_view_in_the_terminal_as_json_and_as_a_page(
    view: str, folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    given = [*arguments(view, folder), "--model", folder / "run" / "best"]
    result = run_command("look", view, *given, "--json", "--plot", tmp_path / "page.html", "--language", "zh")
    assert result.code == 0, result.err
    *shown, last = result.out.splitlines()
    assert json.loads(last)["view"] == view
    assert shown[-1].startswith("图：")
    assert max(map(cell_len, shown[:-1])) <= 60
    assert "<table>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["bpe", "int8", "adapter", "adapter-int8"])
@pytest.mark.parametrize(
    "view", ["loss", "next", "attention", "lens", "ablate", "neighbours", "cache", "weights"]
)
def test_other_models(view: str, kind: str, folder: Path, run_command: RunCommand) -> None:
    model: list[object] = ["--model", folder / ("bpe" if kind == "bpe" else "run/best")]
    model += ["--adapter", folder / "adapter"] if "adapter" in kind else []
    model += ["--precision", "int8"] if "int8" in kind else []
    result = run_command("look", view, *arguments(view, folder), *model)
    assert result.code == 0, result.err
    assert result.out


def test_the_command_shows_the_numbers_of_the_functions(folder: Path, run_command: RunCommand) -> None:
    best = folder / "run" / "best"
    model, tokenizer = load_model_and_tokenizer(best)
    given = ["--model", best, "--question", QUESTION, "--answer", ANSWER, "--json"]
    found = json.loads(run_command("look", "loss", *given).out.splitlines()[-1])
    view = lens.loss(model, tokenizer, QUESTION, ANSWER, "question")
    assert found["mean"] == pytest.approx(view.mean, rel=1e-6)
    heads = json.loads(
        run_command("look", "attention", *given, "--layer", 1, "--head", 0).out.splitlines()[-1]
    )
    assert list(heads["probabilities"]) == ["blocks.1.0"]
    seen = lens.attention(model, tokenizer, QUESTION, ANSWER).probabilities[1, 0]
    torch.testing.assert_close(torch.tensor(heads["probabilities"]["blocks.1.0"]), torch.tensor(seen))
    options = ["--temperature", 0.5, 2, "--top_k", 3, "--json"]
    found = json.loads(run_command("look", "next", *given[:4], *options).out.splitlines()[-1])
    assert found["options"] == ["", "T 0.5", "T 2", "top_k 3"]


def test_against_an_earlier_model(folder: Path, run_command: RunCommand) -> None:
    run = folder / "run"
    given = ["--model", run / "last", "--against", run / "step-00000004", "--json"]
    found = json.loads(run_command("look", "weights", *given).out.splitlines()[-1])
    assert all(part["change"] > 0 for part in found["matrices"])


@pytest.mark.parametrize(
    "view",
    ["loss", "next", "answers", "attention", "lens", "ablate", "neighbours", "cache", "weights", "data"],
)
def test_along_a_run(view: str, folder: Path, run_command: RunCommand) -> None:
    more = ["--answer", ANSWER] if "answer" in USES[view] else []
    result = run_command("look", view, *arguments(view, folder), *more, "--along", folder / "run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert {4, 8, 12} <= {*found["steps"]}
    if view == "loss":
        step = found["steps"].index(4)
        model, tokenizer = load_model_and_tokenizer(folder / "run" / "step-00000004")
        expected = lens.loss(model, tokenizer, QUESTION, ANSWER, "question").mean
        assert found["views"][step]["mean"] == pytest.approx(expected, rel=1e-6)


def test_along_a_run_of_adapters(folder: Path, run_command: RunCommand, tmp_path: Path) -> None:
    base = folder / "run" / "best"
    model, tokenizer = load_model_and_tokenizer(base)
    plain = lens.loss(model, tokenizer, QUESTION, ANSWER, "question").mean
    step = tmp_path / "step-00000004"
    shutil.copytree(folder / "adapter", step)
    save_tokenizer(tokenizer, step, 32)
    given = ["--along", tmp_path, "--question", QUESTION, "--answer", ANSWER, "--json"]
    result = run_command("look", "loss", *given)
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    adapted, _ = load_model_and_tokenizer(base, adapter=folder / "adapter")
    expected = lens.loss(adapted, tokenizer, QUESTION, ANSWER, "question").mean
    assert found["steps"] == [4]
    assert found["views"][0]["mean"] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - plain) > 1e-3, "the adapter changes something"


def test_the_flags_of_the_views_exist_and_each_flag_has_a_view() -> None:
    names = set(flags_of(Options)) - {"view", "json", "plot", "language"}
    assert {flag for flags in USES.values() for flag in flags} == names
    assert set(USES) == set(get_args(ViewName))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["attention", "--question", QUESTION, "--layer", "9"],
            "layer 9 does not exist: the model has layers 0 to 1",
        ),
        (
            ["attention", "--question", QUESTION, "--layer", "1", "--head", "9"],
            "head 9 does not exist: the model has",
        ),
        (["attention", "--question", QUESTION, "--head", "1"], "--head needs --layer"),
        (["attention"], "look attention needs --question"),
        (["tokens"], "look tokens needs --text"),
        (["tokens", "--text", "天", "--head", "1"], "look tokens does not use --head: it is for attention"),
        (["atention"], "did you mean 'attention'?"),
        (["loss", "--question", "天" * 60], "the text has 61 tokens, but the model reads at most 32"),
        (["neighbours", "--text", "😀"], "not in the vocabulary, so there is no vector to look at: 😀"),
        (["loss", "--question", QUESTION, "--plot", "x.bmp3"], ".bmp3 cannot be written; use .png"),
        (["loss", "--question", QUESTION, "--plot", "nowhere/x.html"], "the folder nowhere does not exist"),
        (["loss", "--question", QUESTION, "--plot", "."], "--plot . is a folder: give a file"),
        (["loss", "--question", QUESTION, "--model", "RUN/none"], "does not exist: train a model first"),
        (["loss", "--question", QUESTION, "--model", "bare"], "bare"),
        (
            ["loss", "--question", QUESTION, "--along", "none"],
            "none does not exist: give the folder of a run",
        ),
        (
            ["loss", "--question", QUESTION, "--along", "bpe"],
            "bpe holds no checkpoint: train with --keep_every N",
        ),
        (
            ["loss", "--question", QUESTION, "--along", "run", "--precision", "int8"],
            "leave out --model, --adapter",
        ),
        (["weights", "--against", "bpe"], "the models differ in shape"),
        (
            ["batch", "--train_data", "train.jsonl", "--line", "99"],
            "train.jsonl has no example in line 99: it has 8",
        ),
        (["next", "--question", QUESTION, "--temperature", "0"], "temperature must be from 1e-06"),
        (["--question", QUESTION, "--text", "天"], "look all reads one thing: give --question or --text"),
        (
            ["loss", "--text", "天是", "--answer", "天"],
            "--answer belongs to a --question: a --text is only read",
        ),
        (["loss", "--text", "天"], "a text needs two tokens at least, the first is only read: got 1"),
        (["lens", "--file", "none.txt"], "--file none.txt cannot be read: No such file"),
        (["lens", "--file", "bpe"], "--file bpe cannot be read"),
        (["lens", "--file", "empty.txt"], "--file empty.txt is empty"),
        (["lens", "--file", "run/best/model.safetensors"], "is a binary file"),
        (["neighbours", "--file", "x.txt"], "look neighbours does not use --file"),
        (
            ["--question", QUESTION, "--output", "x.png"],
            "--output must end in .html, for a browser: got x.png",
        ),
        (["loss", "--question", QUESTION, "--output", "x.html"], "look loss does not use --output"),
        (["--question", QUESTION, "--output", "no/x.html"], "the folder no does not exist"),
        (
            ["--question", QUESTION, "--output", "x.html", "--precision", "int8"],
            "without --precision: it shows one model as it is stored",
        ),
        (
            ["next", "--question", QUESTION, "--output", "x.html", "--top_k", "3"],
            "without --top_k: its sliders do that",
        ),
        (
            ["attention", "--question", QUESTION, "--output", "x.html", "--layer", "9"],
            "layer 9 does not exist",
        ),
        (["answers", "--question", QUESTION, "--top_p", "2"], "top_p must be from"),
    ],
)
def test_bad_input_is_one_clear_line(
    given: list[str], message: str, folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("\n", encoding="utf-8")
    if not {"--model", "--along"} & {*given}:
        given = [*given, "--model", "run/best"]
    result = run_command("look", *given)
    assert result.code == 2, result.out
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_a_text_file_is_read_as_it_is(
    encoding: str, folder: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    text = "天是什么颜色？天是黑色。" * 200_000  # 7 MB in UTF-8: only the beginning is read
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    given = ["--model", folder / "run/best", "--file", tmp_path / "a.txt", "--json"]
    result = run_command("look", "loss", *given)
    assert (result.code, result.err) == (0, "note: the text is long: its first 32 tokens are looked at\n")
    found = json.loads(result.out.splitlines()[-1])
    assert "".join(token["text"] for token in found["tokens"]) == text[1:32]
    model, tokenizer = load_model_and_tokenizer(folder / "run/best")
    ids = torch.tensor([tokenizer.encode_text(text[:32])])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert found["mean"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("view", ["tokens", "all", "attention", "lens", "cache"])
def test_the_views_of_a_text(view: str, folder: Path, run_command: RunCommand) -> None:
    given = ["--model", folder / "run/best", "--text", "天是黑色", "--json", "--language", "zh"]
    result = run_command("look", view, *given)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out.splitlines()[-1])
    if view == "all":
        assert list(found) == ["view", "tokens", "loss", "attention", "lens", "cache"]
        found = found["lens"]
    if view in ("all", "lens"):
        assert (found["reads"], found["writes"]) == (["天", "是", "黑"], ["是", "黑", "色"])
    if view == "attention":
        assert (found["pieces"], found["start"]) == (["天", "是", "黑", "色"], 3)
    if view == "cache":
        assert (found["prompt"], found["shape"][2]) == (4, 4)


def test_an_unknown_character_is_a_warning(folder: Path, run_command: RunCommand) -> None:
    result = run_command("look", "next", "--model", folder / "run/best", "--question", "天😀")
    assert result.code == 0
    assert result.err == "warning: not in the vocabulary, read as <unk>: 😀\n"


def test_a_vocabulary_is_enough_for_tokens_and_batches(
    folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "vocab.json"):
        (tmp_path / "data" / name).write_bytes((folder / name).read_bytes())
    assert run_command("look", "batch").code == 0
    assert run_command("look", "tokens", "--text", "天").code == 0
    (tmp_path / "data" / "vocab.json").unlink()
    assert "train a model first" in run_command("look", "tokens", "--text", "天").err


# -- plot, experiment, eval --------------------------------------------------------------------------------


def test_plot_compares_runs(folder: Path, run_command: RunCommand, tmp_path: Path) -> None:
    runs = [folder / "run", folder / "other"]
    picture = tmp_path / "curves.html"
    result = run_command("plot", *runs, "--question", QUESTION, "--output", picture, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])["runs"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["val"] == [
        [line["step"] for line in lines if "val_loss" in line],
        [line["val_loss"] for line in lines if "val_loss" in line],
    ]
    assert found[0]["best_loss"] == min(found[0]["val"][1])
    model, _ = load_model_and_tokenizer(folder / "run" / "best")
    assert found[0]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {4, 8, 12} <= {*found[0]["checkpoints"]}
    assert len(found[1]["answers"]) == 1
    assert "<svg" in picture.read_text(encoding="utf-8")
    (alone,) = lens.compare_runs(runs[:1]).runs
    assert (alone.val[1], alone.answers) == (found[0]["val"][1], [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "RUN is missing"),
        (["none"], "none does not exist"),
        (["bpe"], "bpe holds no run.json"),
        (["run", "--output", "x.bmp3"], "--output x.bmp3: .bmp3 cannot be written"),
    ],
)
def test_plot_refuses(
    given: list[str], message: str, folder: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run_command("plot", *given)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


def test_experiment_lists_refuses_and_runs(folder: Path, run_command: RunCommand, tmp_path: Path) -> None:
    listed = run_command("experiment", "--json")
    assert "no-causal-mask" in json.loads(listed.out.splitlines()[-1])["experiments"]
    wrong = run_command("experiment", "no-mask")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "unknown experiment 'no-mask'; did you mean" in wrong.err
    given: list[Any] = [
        "--train_data",
        folder / "train.jsonl",
        "--steps",
        2,
        "--plot",
        tmp_path / "e.html",
        "--json",
    ]
    result = run_command("experiment", "no-warmup", *given)
    assert result.code == 0, result.err
    assert [run["name"] for run in json.loads(result.out.splitlines()[-1])["runs"]] == ["usual", "no-warmup"]
    assert "<svg" in (tmp_path / "e.html").read_text(encoding="utf-8")


def test_eval_shows_what_is_wrong(folder: Path, run_command: RunCommand) -> None:
    given = [
        "--model",
        folder / "run/best",
        "--data",
        folder / "train.jsonl",
        "--max_new_tokens",
        2,
        "--show",
        0,
    ]
    plain = run_command("eval", *given, "--json")
    result = run_command("eval", *given, "--show_wrong", 3, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert "wrong" not in json.loads(plain.out.splitlines()[-1])
    assert len(found["wrong"]) == 3
    assert all(row["expected"] != row["given"] for row in found["wrong"])
    assert "8 of 8 are wrong" in result.out
