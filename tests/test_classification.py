"""Texts with labels: reading, splitting, training a classifier, resuming, its numbers, `minigpt classify`."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt.data.labelled import (
    LabelledOptions,
    LabelledText,
    class_weights,
    encode_labelled,
    hold_out,
    label_names,
    read_labelled,
)
from minigpt.data.records import ProblemType
from minigpt.errors import InputError
from minigpt.evaluation.classification import (
    ClassificationReport,
    calibration_error,
    evaluate_classifier,
    mistakes,
    predict,
    report_of,
)
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import ModelConfig, new_model
from minigpt.finetuning.classification import Labels, SequenceClassifier, labels_of
from minigpt.model import GPTConfig
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.training import pretraining
from minigpt.training.classification import ClassificationLoss, read_data
from minigpt.training.config import checked_config
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.loop import Trainer
from minigpt.training.resolve import resolve
from minigpt.training.run import run_training
from minigpt.weights.classifiers import (
    classifier_labels,
    load_classifier,
    save_classifier,
    start_classifier,
)
from minigpt.weights.pretrained import load_model, save_pretrained
from tests.commands import RunCommand
from tests.runs import identical, metrics, stop_at

GOOD, BAD = "房间很好早餐也好", "房间太差服务也差"
TOKENIZER = Tokenizer.from_word2id(build_vocabulary([GOOD, BAD, "甲乙丙丁戊己庚辛壬癸"]))
V = TOKENIZER.get_vocab_size()
MODELS: dict[str, ModelConfig] = {
    "gpt": GPTConfig(32, 2, 2, 0.1, 32, V),
    "qwen3": Qwen3Config(V, 32, 64, 2, 2, 1, 16, 32),
}
TINY: dict[str, Any] = {
    "task": "classification", "max_steps": 12, "eval_steps": 6, "logging_steps": 2, "batch_size": 16,
    "learning_rate": 3e-3, "warmup_steps": 0, "threads": 1, "device": "cpu", "precision": "float32",
    "report_to": "none", "max_length": 32,
}  # fmt: skip


def reviews() -> list[tuple[str, str]]:
    """Return forty texts, sorted by label. The last character but one decides the label."""
    marks = "甲乙丙丁戊己庚辛壬癸"
    rows = [(f"{a}{b}{GOOD}", "好评") for a, b in zip(marks * 2, marks + marks[::-1])]
    return rows + [(f"{a}{b}{BAD}", "差评") for a, b in zip(marks * 2, marks + marks[::-1])]


def write_csv(path: Path, rows: list[tuple[str, str]], head: str = "review,label") -> Path:
    path.write_text("".join(f"{line}\n" for line in [head, *map(",".join, rows)]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make language models of both families, and a file of reviews."""
    found = tmp_path_factory.mktemp("classification")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        save_pretrained(new_model(config), found / name, TOKENIZER)
    write_csv(found / "reviews.csv", reviews())
    return found


def settings(folder: Path, output: Path, model: str = "qwen3", **values: Any) -> FinetuneConfig:
    given = {
        **TINY,
        "model": folder / model,
        "train_data": folder / "reviews.csv",
        "output": output,
        **values,
    }
    config = resolve(given, FinetuneConfig)
    assert isinstance(config, FinetuneConfig)
    return config


def run_of(config: FinetuneConfig) -> Trainer:
    return Trainer(config, read_data(config))


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Do a run of each family. Return its folder and its result."""
    output = folder / "run"
    return output, run_training(settings(folder, output, "gpt", max_steps=24), TINY)


# -- a run -------------------------------------------------------------------------------------------------


def test_a_run_learns_and_says_how_well(trained: tuple[Path, dict[str, Any]]) -> None:
    output, result = trained
    assert result["accuracy"] == result["macro_f1"] == 1.0  # two words tell the labels apart
    assert result["confusion"] == [[2, 0], [0, 2]]  # a tenth of each label is held out
    assert result["labels"] == ["好评", "差评"] == sorted(["好评", "差评"])
    assert result["mistakes"] == []
    assert 0 <= result["calibration_error"] < 0.5
    lines = [line for line in metrics(output) if "val_loss" in line]
    assert {*lines[-1]} == {"step", "val_loss", "accuracy", "macro_f1"}
    content = json.loads((output / "best" / "config.json").read_text(encoding="utf-8"))
    assert content["id2label"] == {"0": "好评", "1": "差评"}
    assert content["label2id"] == {"好评": 0, "差评": 1}
    assert content["problem_type"] == "single_label_classification"
    assert content["pad_token_id"] == TOKENIZER.pad_token_id
    assert content["architectures"] == ["GPT2ForSequenceClassification"]


def test_classify_labels_texts_and_files(
    trained: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    model = trained[0] / "best"
    result = run_command("classify", "--model", model, "--text", GOOD, BAD, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])["results"]
    assert [each["label"] for each in found] == ["好评", "差评"]
    assert all(abs(sum(each["probabilities"].values()) - 1) < 1e-5 for each in found)  # of six digits
    assert all(each["score"] == max(each["probabilities"].values()) for each in found)
    output = tmp_path / "found.jsonl"
    measured = run_command(
        "classify", "--model", model, "--file", folder / "reviews.csv", "--output", output, "--json"
    )
    values = json.loads(measured.out.splitlines()[-1])
    assert values["accuracy"] == values["macro_f1"] == 1.0
    assert values["texts"] == len(reviews())
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(each["text"], each["label"]) for each in written] == reviews()
    plain = tmp_path / "plain.txt"
    plain.write_text(f"{BAD}\n\n{GOOD}\n", encoding="utf-8")
    found = json.loads(
        run_command("classify", "--model", model, "--file", plain, "--json").out.splitlines()[-1]
    )
    assert [each["label"] for each in found["results"]] == ["差评", "好评"]
    assert "accuracy" not in found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "lora"},
        {"method": "adapter", "bottleneck_size": 4},
        {"method": "ia3"},
        {"method": "freeze", "train_only": "last:1", "token_dropout": 0.3},
    ],
)
def test_a_resumed_run_ends_on_the_same_bits(folder: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    values = {**values, "model": folder / "gpt", "save_async": not values}  # with dropout
    whole = run_of(settings(folder, tmp_path / "whole", **values))
    frozen = {n: p.detach().clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == ("method" in values)
    assert whole.model.score.weight.requires_grad  # type: ignore[union-attr]
    whole.run()
    now = dict(whole.model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    stop_at(run_of(settings(folder, tmp_path / "parts", **values)), 4)
    again = run_of(settings(folder, tmp_path / "parts", **values, resume=True))
    again.resume()
    again.run()
    if values.get("method") not in ("lora", "adapter", "ia3"):
        identical(tmp_path / "whole", tmp_path / "parts")
        return
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    ends = [load_file(tmp_path / each / "last" / "adapter_model.safetensors") for each in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    assert "base_model.model.score.weight" in ends[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    adapter = json.loads((tmp_path / "whole" / "best" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["task_type"], adapter["modules_to_save"]) == ("SEQ_CLS", ["score"])
    loaded, _ = load_classifier(tmp_path / "whole" / "best")
    report = evaluate_classifier(loaded, whole.data.val.in_order(8))
    assert report.loss == pytest.approx(whole.progress.best_val_loss, abs=1e-6)  # float32, in other batches
    advice = f"it is a classifier's: minigpt classify --model {tmp_path / 'whole' / 'best'} --text TEXT"
    for path, beside in ((tmp_path / "whole" / "best", None), (folder / "gpt", tmp_path / "whole")):
        with pytest.raises(InputError) as error:
            load_model(path, adapter=beside)
        assert advice in str(error.value)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_classifier_on_quantised_weights_is_an_adapter(
    folder: Path, tmp_path: Path, precision: Any
) -> None:
    from minigpt.commands.quantize import Options, main

    main(Options(model=folder / "gpt", output=tmp_path / "small", precision=precision))
    values: dict[str, Any] = {"model": tmp_path / "small", "method": "lora"}
    run = run_of(settings(folder, tmp_path / "run", **values))
    run.run()
    loaded, _ = load_classifier(tmp_path / "run" / "best")
    report = evaluate_classifier(loaded, run.data.val.in_order(8))
    assert report.loss == pytest.approx(run.progress.best_val_loss, abs=1e-5)
    given = {"model": str(tmp_path / "small")}
    with pytest.raises(InputError, match="small is quantised, so its weights cannot be trained: train an"):
        run_of(settings(folder, tmp_path / "full", **given))


def test_a_classifier_of_the_same_labels_keeps_its_head(trained: tuple[Path, Any], folder: Path) -> None:
    again = run_of(settings(folder, folder / "again", model="run/best"))
    before, _ = load_classifier(trained[0] / "best")
    assert torch.equal(again.model.score.weight, before.score.weight)  # type: ignore[union-attr,arg-type]
    content = json.loads((trained[0] / "best" / "config.json").read_text(encoding="utf-8"))
    turned = folder / "turned"  # the same labels in another order
    turned.mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (turned / file).write_bytes((trained[0] / "best" / file).read_bytes())
    content |= {"id2label": {"0": "差评", "1": "好评"}, "label2id": {"差评": 0, "好评": 1}}
    (turned / "config.json").write_text(json.dumps(content), encoding="utf-8")
    same = run_of(settings(folder, folder / "same", model="turned"))
    assert same.model.labels.names == ("差评", "好评")  # type: ignore[union-attr]
    assert torch.equal(same.model.score.weight, before.score.weight)  # type: ignore[union-attr,arg-type]
    rows = [(text, f"{label}{number % 2}") for number, (text, label) in enumerate(reviews())]
    write_csv(folder / "four.csv", rows)
    other = run_of(settings(folder, folder / "other", model="run/best", train_data=folder / "four.csv"))
    assert other.model.score.weight.shape == (4, 32)  # type: ignore[union-attr]
    own, theirs = other.model.base_model.state_dict(), before.base_model.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_several_labels(folder: Path, tmp_path: Path) -> None:
    rows = [
        (text, "早餐|房间" if "好" in text else "房间" if i % 2 else "")
        for i, (text, _) in enumerate(reviews())
    ]
    data = write_csv(tmp_path / "several.csv", rows)
    kind: ProblemType = "multi_label_classification"
    config = settings(folder, tmp_path / "run", train_data=data, val_data=data, problem_type=kind)
    result = run_training(config, TINY)
    model, _ = load_classifier(tmp_path / "run")
    assert model.labels == Labels(("房间", "早餐"), kind)
    assert {"val_loss", "micro_f1", "macro_f1"} <= result.keys()
    assert np.array(result["confusion"]).shape == (2, 3)


def test_numbers(folder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rated.csv", [(t, "1.5" if "好" in t else "-0.5") for t, _ in reviews()])
    config = settings(folder, tmp_path / "run", train_data=data, problem_type="regression", max_steps=20)
    result = run_training(config, TINY)
    assert result["mse"] == result["val_loss"] < 1.0  # the variance of these numbers
    assert result["pearson"] > 0.9
    content = json.loads((tmp_path / "run" / "best" / "config.json").read_text(encoding="utf-8"))
    assert (content["problem_type"], content["id2label"]) == ("regression", {"0": "LABEL_0"})


def test_without_a_model_a_language_model_of_the_texts_comes_first(
    folder: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    shown = {key: value for key, value in TINY.items() if key not in ("eval_steps", "logging_steps")}
    flags = [part for name, value in shown.items() for part in (f"--{name}", value)]
    flags += ["--train_data", folder / "reviews.csv", "--output", tmp_path / "c", "--pretraining_epochs", 1]
    result = run_command("finetune", *flags, "--json")
    assert result.code == 0, result.err
    texts = (tmp_path / "c.pretrained" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    held = {line["text"] for line in map(json.loads, texts)}
    _, val = hold_out(read_labelled(folder / "reviews.csv", LabelledOptions())[0], 0.1, 42)
    assert len(held) == 36
    assert not held & {each.text for each in val}  # what is measured on is not read before
    pretrained = load_file(tmp_path / "c.pretrained" / "run" / "best" / "model.safetensors")
    config = json.loads((tmp_path / "c" / "run.json").read_text(encoding="utf-8"))["config"]
    assert Path(config["model"]) == tmp_path / "c.pretrained" / "run" / "best"
    assert load_file(tmp_path / "c" / "best" / "model.safetensors").keys() == {
        name for name in pretrained if name != "lm_head.weight"
    } | {"score.weight"}
    again = run_command("finetune", *flags)
    assert (again.code, "holds a run already" in again.err) == (2, True)
    finished = run_command("finetune", *flags, "--resume")
    assert (finished.code, "the run is finished" in finished.err) == (2, True)
    (tmp_path / "c").rename(tmp_path / "aside")  # as if it had been stopped between both runs
    second = run_command("finetune", *flags, "--resume")
    assert (second.code, "first a language model" in second.out) == (0, False)
    ends = [load_file(tmp_path / each / "last" / "model.safetensors") for each in ("c", "aside")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


# -- numbers -----------------------------------------------------------------------------------------------


def test_f1_by_hand() -> None:
    """Right are 3 of 4 a (one is predicted b), 1 of 2 b (one is predicted a), 0 of 1 c (predicted a)."""
    report = ClassificationReport(Labels(("a", "b", "c", "never")))
    truth, given = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0]
    report.count(np.eye(4)[given], np.array(truth))
    assert report.accuracy == 4 / 7
    # F1 = 2 right / (2 right + wrong + missed)
    assert report.macro_f1 == pytest.approx((6 / (6 + 2 + 1) + 2 / (2 + 1 + 1) + 0) / 3)
    several = ClassificationReport(Labels(("a", "b"), "multi_label_classification"))
    several.count(np.array([[0.9, 0.6], [0.2, 0.4]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    # a: right 1, wrong 0, missed 1; b: right 0, wrong 1, missed 1
    assert several.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert several.micro_f1 == pytest.approx(2 / (2 + 1 + 2))


def test_pearson_by_hand() -> None:
    report = ClassificationReport(Labels(("LABEL_0",), "regression"))
    report.count(np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [2.0], [3.0]]))
    # deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): 3 / sqrt(2 * 42/9)
    assert report.pearson == pytest.approx(3 / (2 * 42 / 9) ** 0.5)


def test_calibration_by_hand() -> None:
    """Bins (0.5, 0.6] and (0.9, 1.0]: |1/2 - 0.56| of two texts, |1 - 0.95| of two."""
    sure = np.array([0.55, 0.57, 0.94, 0.96])
    found = np.stack([sure, 1 - sure], axis=1)
    assert calibration_error(found, np.array([0, 1, 0, 0]), bins=10) == pytest.approx(
        (2 * abs(0.5 - 0.56) + 2 * abs(1 - 0.95)) / 4
    )


def test_sums_of_processes_and_of_rows_that_do_not_count(folder: Path) -> None:
    run = run_of(settings(folder, folder / "sums"))
    loss = run.step.loss
    batch = run.data.train.batch(np.arange(7))
    with torch.no_grad():
        whole = float(loss(*loss.select(batch)))
        parts = [float(loss(*loss.select(batch.some(slice(first, None, 2))))) for first in (0, 1)]
        assert float(loss(*loss.select(batch.blank()))) == 0
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    model: Any = run.model
    reports = [evaluate_classifier(model, [batch.some(slice(i, None, 2))]) for i in (0, 1)]
    total = ClassificationReport(model.labels)
    total.set_sums([a + b for a, b in zip(reports[0].sums(), reports[1].sums())])
    once = evaluate_classifier(model, [batch, batch.blank()])
    assert total.loss == pytest.approx(once.loss, rel=1e-5)
    assert np.array_equal(total.counts, once.counts)
    assert once.counts.sum() == 7
    found = predict(model, run.data.train, batch_size=3)
    same = report_of(model.labels, found, run.data.train)
    assert same.loss == pytest.approx(evaluate_classifier(model, run.data.train.in_order(8)).loss, rel=1e-5)


def test_hidden_tokens_are_hidden_in_training_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(settings(folder, folder / "hidden", token_dropout=0.5))
    loss = run.step.loss
    batch = run.data.train.batch(np.arange(36))
    seen: list[torch.Tensor] = []

    def forward(input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids)
        return torch.zeros(len(input_ids), 2)

    monkeypatch.setattr(loss.model, "forward", forward)
    for _ in range(2):
        loss(*loss.select(batch))
    for ids in seen:
        hidden = ids != batch.input_ids
        assert (ids[hidden] == TOKENIZER.unk_token_id).all()
        assert not hidden[torch.arange(len(ids)), batch.last].any(), "the label is read there"
        assert 0 < hidden.sum() < batch.token_mask.sum() - len(ids)
    assert not torch.equal(*seen), "other tokens each time"
    loss.model.eval()
    loss(*loss.select(batch))
    assert torch.equal(seen[-1], batch.input_ids)


def test_a_text_begins_as_in_pretraining(folder: Path, tmp_path: Path) -> None:
    sep = TOKENIZER.sep_token_id
    new = read_data(settings(folder, tmp_path / "new"))
    for part in (new.train, new.val):
        assert (part.ids[part.starts[:-1]] == sep).all(), "<sep> is before each text"
        assert (part.ids[part.starts[1:] - 1] == sep).all(), "and after it"
    # a classifier that learned from texts without <sep> before them continues with such texts
    unframed = Tokenizer.from_word2id(TOKENIZER.word2id)
    old = start_classifier(folder / "qwen3", new.labels, unframed)
    save_classifier(old, tmp_path / "old", unframed)
    again = read_data(settings(folder, tmp_path / "again", model=str(tmp_path / "old")))
    assert not (again.train.ids[again.train.starts[:-1]] == sep).any()
    assert again.train.lengths.tolist() == [length - 1 for length in new.train.lengths]


def test_the_surest_mistakes_come_first() -> None:
    texts = [LabelledText(text, ("a",), line) for line, text in enumerate("甲乙丙", 1)]
    encoded = encode_labelled(texts, TOKENIZER, ("a", "b"), "single_label_classification", 8, "here")
    found = np.array([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])
    assert [
        (each["line"], each["probability"]) for each in mistakes(Labels(("a", "b")), found, encoded, texts)
    ] == [
        (3, 0.8),
        (1, 0.6),
    ]


def test_balanced_weights_count_each_label_alike(folder: Path, tmp_path: Path) -> None:
    texts = [LabelledText("甲", ("a",), 1)] * 3 + [LabelledText("乙", ("b",), 4)]
    weights = class_weights(texts)
    assert weights == {"a": 4 / (2 * 3), "b": 4 / (2 * 1)}
    data = write_csv(tmp_path / "few.csv", reviews()[:24])
    run = run_of(settings(folder, tmp_path / "run", train_data=data, val_data=data, class_weights="balanced"))
    counted = Counter(zip(run.data.train.labels.tolist(), run.data.train.weights.tolist()))
    assert [number * weight for (_, weight), number in sorted(counted.items())] == pytest.approx([12, 12])
    assert set(run.data.val.weights.tolist()) == {1.0}
    assert isinstance(run.step.loss, ClassificationLoss)


# -- data --------------------------------------------------------------------------------------------------


def test_each_label_is_held_out_and_equal_texts_stay_together() -> None:
    texts = [LabelledText(text, (label,), line) for line, (text, label) in enumerate(reviews(), 2)]
    texts += [each._replace(text=f" {each.text} ", line=each.line + 100) for each in texts]  # the same again
    train, val = hold_out(texts, 0.25, seed=1)
    assert Counter(each.labels for each in val) == {("好评",): 10, ("差评",): 10}
    assert not {each.text.strip() for each in train} & {each.text.strip() for each in val}
    again, _ = hold_out(texts[::-1], 0.25, seed=1)
    assert sorted(again) == sorted(train)
    assert hold_out(texts, 0.25, seed=2)[0] != train
    with pytest.raises(InputError, match="cannot be divided"):
        hold_out(texts[:1], 0.5, seed=1)


ROWS = [{"内容": "甲", "标签": 1}, {"内容": "乙", "标签": 0}, {"内容": "丙", "标签": 1}]
FILES = {
    "lines.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "array.json": json.dumps(ROWS),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "table.csv": "标签,内容\n1,甲\n0,乙\n1,丙\n",
    "table.tsv": "内容\t标签\n甲\t1\n乙\t0\n丙\t1\n",
    "bare.txt": "甲\t1\n乙\t0\n丙\t1\n",
    "bare.tsv": "1\t甲\n0\t乙\n1\t丙\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    texts, report = read_labelled(tmp_path / name, LabelledOptions())
    assert [(each.text, each.labels) for each in texts] == [("甲", ("1",)), ("乙", ("0",)), ("丙", ("1",))]
    assert report.skipped == []
    assert label_names(texts, name) == ("0", "1")


def test_parquet_and_other_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"wording": ["甲", "乙"], "kind": [1.0, None], "id": [7, 8]})
    parquet.write_table(table, tmp_path / "a.parquet")
    texts, report = read_labelled(
        tmp_path / "a.parquet", LabelledOptions(text_field="Wording", label_field="kind")
    )
    assert [(each.text, each.labels) for each in texts] == [("甲", ("1",))]  # 1.0 is how pandas stores 1
    assert report.skipped == [(2, "the label is missing")]


def test_numbers_are_labels_in_their_order() -> None:
    texts = [LabelledText("甲", (str(number),), 1) for number in (10, 9, -1)]
    assert label_names(texts, "here") == ("-1", "9", "10")


def test_a_long_text_loses_its_end_and_keeps_its_separator() -> None:
    texts = [LabelledText("甲乙丙丁戊", ("a",), 1), LabelledText("甲", ("b",), 2)]
    sep = TOKENIZER.sep_token_id
    encoded = encode_labelled(
        texts, TOKENIZER, ("a", "b"), "single_label_classification", 4, "here", end=sep, pad_token_id=0
    )
    batch = encoded.batch(np.array([1, 0]))
    ids = [TOKENIZER.encode_text(text) for text in ("甲", "甲乙丙")]
    assert batch.input_ids.tolist() == [[*ids[0], sep, 0, 0], [*ids[1], sep]]
    assert batch.last.tolist() == [1, 3]
    assert batch.labels.tolist() == [1, 0]
    assert batch.token_mask.sum().item() == 6
    assert encoded.n_cut == 1


# -- bad input ---------------------------------------------------------------------------------------------

BAD_FILES = {
    "one label": ("review,label\n甲,a\n乙,a\n", "one label alone, 'a'"),
    "no text": ("id,words,label\n1,甲,a\n2,乙,b\n", "usual name for the text; it has 'id', 'words', 'label'"),
    "no label": ("id,review,stars\n1,甲,a\n2,乙,b\n", "for the label; it has 'id', 'review', 'stars'"),
    "no names": (
        "words,stars\n甲,a\n乙,b\n",
        "the first line is 'words', 'stars': if these are column names",
    ),
    "one left": ("review,label\n甲,1\n乙,\n", "one label alone, '1'"),
    "plain": ("甲\n乙\n", "plain text without labels"),
    "all empty": ("review,label\n甲,\n乙,\n", "the label is missing"),
    "several": ('{"text": "甲", "label": ["a", "b"]}\n', "--problem_type multi_label_classification"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, folder: Path, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.csv") as error:
        read_data(settings(folder, tmp_path / "run", train_data=tmp_path / "bad.csv"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_odd_labels(tmp_path: Path) -> None:
    rows: list[Any] = [
        *(
            {"text": "甲", "label": value}
            for value in (True, 1.0, None, "x", ["y"], {"a": 1}, "b\0", [], " ")
        ),
        7,
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, report = read_labelled(path, LabelledOptions())
    assert [(each.line, each.labels) for each in texts] == [
        (1, ("true",)),
        (2, ("1",)),
        (4, ("x",)),
        (5, ("y",)),
    ]
    assert report.skipped == [
        (3, "the label is missing"),
        (6, "`label` is neither text nor number"),
        (7, "`label` holds what no text has"),
        (8, "several labels, which take --problem_type multi_label_classification"),
        (9, "the label is missing"),
        (10, "not an object with text and label"),
    ]


def test_a_field_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no field 'stars'; it has 'review', 'label': give --label_field"):
        read_data(settings(folder, tmp_path / "run", label_field="stars"))


def test_a_new_label_in_the_validation_part(folder: Path, tmp_path: Path) -> None:
    val = write_csv(tmp_path / "val.csv", [(GOOD, "好评"), (BAD, "中评")])
    with pytest.raises(InputError, match=r"val\.csv:3: the label '中评' does not occur in the training data"):
        read_data(settings(folder, tmp_path / "run", val_data=val))


@pytest.mark.parametrize(
    ("state", "is_finished"),
    [
        ({"steps_done": 9, "total_steps": 9, "evaluated": True}, True),
        ({"steps_done": 9, "total_steps": 9}, False),
        ({"steps_done": 8, "total_steps": 9, "evaluated": True}, False),
        ({"steps_done": "9", "total_steps": 9, "evaluated": True}, False),
        ({"steps_done": 9, "total_steps": None, "evaluated": True}, False),
        ({"evaluated": True}, False),
        (None, False),
    ],
)
def test_a_language_model_that_is_finished(state: object, is_finished: bool, tmp_path: Path) -> None:
    if state is not None:
        (tmp_path / "last").mkdir()
        (tmp_path / "last" / "training_state.json").write_text(json.dumps(state))
    assert pretraining._is_finished(tmp_path) == is_finished


def test_folders_of_the_wrong_kind(
    trained: tuple[Path, dict[str, Any]], folder: Path, run_command: RunCommand
) -> None:
    language = run_command("classify", "--model", folder / "gpt", "--text", GOOD)
    assert language.code == 2
    assert "without a head that classifies" in language.err
    writing = run_command("generate", "--model", trained[0] / "best", "--question", GOOD)
    assert writing.code == 2
    assert "minigpt classify --model" in writing.err
    assert len(language.err.splitlines()) == len(writing.err.splitlines()) == 1
    for flags, message in (
        ([], "either --text TEXT or --file FILE"),
        (["--text", " "], "--text is empty"),
        (["--file", folder / "none.csv"], "does not exist"),
    ):
        result = run_command("classify", "--model", trained[0] / "best", *flags)
        assert (result.code, message in result.err) == (2, True), result.err


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small classifier's folder."""
    found = tmp_path_factory.mktemp("classifier") / "c"
    labels = Labels(("a", "b"), "single_label_classification")
    save_classifier(SequenceClassifier(MODELS["gpt"], labels, TOKENIZER.pad_token_id), found, TOKENIZER)
    return found


def changed(folder: Path, goal: Path, name: str = "config.json", **values: Any) -> Path:
    """Copy a folder, and change keys of one of its JSON files."""
    shutil.copytree(folder, goal)
    content = json.loads((goal / name).read_bytes()) if (goal / name).exists() else {}
    (goal / name).write_text(json.dumps({**content, **values}))
    return goal


def test_wrong_keys_of_a_classifier_are_named(classifier: Path, tmp_path: Path) -> None:
    path = changed(classifier, tmp_path / "pad", pad_token_id="0")
    with pytest.raises(InputError, match=r"config\.json: pad_token_id must be a whole number or null"):
        load_classifier(path)
    path = changed(classifier, tmp_path / "labels", id2label={"1": "a"})
    for read in (load_classifier, classifier_labels):
        with pytest.raises(InputError, match=f"^{path}/config.json: id2label must name the outputs 0, 1"):
            read(path)
    assert classifier_labels(classifier) == Labels(("a", "b"), "single_label_classification")


def test_adapters_that_are_no_classifier_s(classifier: Path, folder: Path, tmp_path: Path) -> None:
    lora: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["c_attn"], "task_type": "SEQ_CLS"}
    path = changed(folder / "gpt", tmp_path / "writes", "adapter_config.json", **lora)
    with pytest.raises(InputError, match="writes is an adapter for a language model, without a head"):
        load_classifier(path)
    for number, base in enumerate((None, 7, "nowhere", str(tmp_path / "nowhere"))):
        lora["base_model_name_or_path"] = base
        path = changed(classifier, tmp_path / f"base{number}", "adapter_config.json", **lora)
        with pytest.raises(InputError, match=f"adapter_config.json: the base model {base!r} is not there"):
            load_classifier(path)
    lora["base_model_name_or_path"] = str(folder / "gpt")
    path = changed(
        changed(classifier, tmp_path / "x", id2label=[]), tmp_path / "y", "adapter_config.json", **lora
    )
    with pytest.raises(InputError, match=f"^{path}/config.json: id2label must name the outputs"):
        load_classifier(path)


def test_a_finished_checkpoint_is_not_written_over(trained: tuple[Path, dict[str, Any]]) -> None:
    best = trained[0] / "best"
    model, tokenizer = load_classifier(best)
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    with pytest.raises(InputError, match=r"is a finished checkpoint with a manifest\.json: choose another"):
        save_classifier(model, best, tokenizer)
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "sft", "label_field": "x"}, "--label_field belongs to --task classification"),
        ({"task": "sft", "token_dropout": 0.1}, "--token_dropout belongs to --task classification"),
        ({"text": Path("a.txt")}, "learns from --train_data, not from --text"),
        ({"class_weights": "balanced", "problem_type": "regression"}, "--class_weights needs one label"),
        ({"size": "1min"}, "--size chooses a new model"),
        ({"parallel": "fsdp"}, "does not go with task=classification"),
    ],
)
def test_options_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_config({"task": "classification", **values}, "options", FinetuneConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the outputs"),
        ({"id2label": {}}, "id2label must name the outputs"),
        ({"num_labels": 0}, "num_labels must be"),
        ({"id2label": {"0": "a"}, "problem_type": "ranking"}, "problem_type must be one of"),
    ],
)
def test_bad_configurations(content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        labels_of(content)


def test_labels_as_transformers_fills_them_in() -> None:
    assert labels_of({}) == Labels(("LABEL_0", "LABEL_1"))
    assert labels_of({"id2label": {"0": "LABEL_0"}}).problem_type == "regression"
    assert dataclasses.asdict(labels_of({"id2label": {"1": "b", "0": "a"}}))["names"] == ("a", "b")
