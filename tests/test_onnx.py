"""ONNX files: onnxruntime gives PyTorch's logits, with the cache and without, and the same greedy ids."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from minigpt.errors import InputError
from minigpt.finetuning.adapters import save_adapter
from minigpt.finetuning.layers import add_adapter
from minigpt.finetuning.lora import LoraConfig
from minigpt.finetuning.masked_lm import MASK
from minigpt.generation.api import generate_ids
from minigpt.generation.conversation import question_ids
from minigpt.generation.generation_config import PromptFormat
from minigpt.generation.options import GenerationOptions
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer
from minigpt.weights.onnx_file import write_onnx
from minigpt.weights.pretrained import save_pretrained
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand
from tests.test_html import CHARACTERS, MODELS, V, gpt, qwen

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'minigpt[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, which runs the files, is not installed")


class Session:
    """A file in onnxruntime, used as its documentation shows: arrays in, arrays out, by name."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.empty = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            for one in self.session.get_inputs()
            if one.name.startswith("past")
        }

    def __call__(
        self, ids: Any, mask: Any = None, positions: Any = None, past: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Return the logits, and the cache as the next call takes it."""
        ids = np.asarray(ids)
        if past is None:
            past = {name: np.repeat(value, len(ids), axis=0) for name, value in self.empty.items()}
        length = next(iter(past.values())).shape[2]
        if mask is None:
            mask = np.ones((len(ids), length + ids.shape[1]), np.int64)
        if positions is None:
            positions = np.tile(np.arange(length, length + ids.shape[1]), (len(ids), 1))
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = self.session.run(None, given)
        names = [name.replace("present", "past_key_values") for name in self.outputs[1:]]
        return logits, dict(zip(names, present))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        logits, past = self([prompt])
        ids: list[int] = []
        while True:
            ids.append(int(logits[0, -1].argmax()))
            if len(ids) == count:
                return ids
            logits, past = self([ids[-1:]], past=past)


@pytest.mark.parametrize("name", MODELS)
def test_logits_cache_and_greedy_ids_are_the_model_s(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    [path] = write_onnx(tmp_path / "model.onnx", model)
    whole_file = onnx.load(path)
    onnx.checker.check_model(whole_file, full_check=True)
    used = {name for node in whole_file.graph.node for name in node.input}
    assert {one.name for one in whole_file.graph.initializer} <= used
    run = Session(path)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(V, (3, 24), generator=generator)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :7] = mask[2, :15] = 0  # texts of three lengths, padded on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, mask, positions).numpy()
    whole, _ = run(ids, mask.numpy(), positions.numpy())
    # float32 here and there, with other orders of sums: a few units in the last place of logits of about 10
    assert np.abs(expected).max() < 40
    assert np.abs(whole - expected)[mask == 1].max() < 1e-4
    # the same text in pieces of 9, 1, 6 and 8 tokens
    past, places = None, [0, 9, 10, 16, 24]
    for start, end in itertools.pairwise(places):
        columns = slice(start, end)
        logits, past = run(ids[:, columns], mask[:, :end].numpy(), positions[:, columns].numpy(), past)
        assert np.abs(logits - expected[:, columns])[mask[:, columns] == 1].max() < 1e-4
    # right padding needs no mask: no token sees a later one
    right, _ = run(ids[:1, :20])
    assert np.abs(run(ids[:1])[0][:, :20] - right).max() < 1e-4
    prompt = ids[0, :13].tolist()
    [done] = generate_ids(model, [prompt], GenerationOptions(max_new_tokens=50), None)
    assert len(done.ids) == 50
    assert run.greedy(prompt, 50) == done.ids


def test_names_and_shapes_are_the_field_s(tmp_path: Path) -> None:
    [path] = write_onnx(tmp_path / "model.onnx", qwen())
    session = onnxruntime.InferenceSession(path)
    inputs = {one.name: (one.type, one.shape) for one in session.get_inputs()}
    outputs = {one.name: (one.type, one.shape) for one in session.get_outputs()}
    every = "total_sequence_length"
    assert inputs == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", every]),
        "position_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        **{
            f"past_key_values.{layer}.{kind}": (
                "tensor(float)",
                ["batch_size", 2, "past_sequence_length", 10],
            )
            for layer in (0, 1)
            for kind in ("key", "value")
        },
    }
    assert list(outputs) == ["logits", *(f"present.{n}.{kind}" for n in (0, 1) for kind in ("key", "value"))]
    assert outputs["logits"][1] == ["batch_size", "sequence_length", V]
    assert outputs["present.1.key"][1] == ["batch_size", 2, every, 10]


@pytest.mark.parametrize("name", ["gpt-2", "qwen3-untied-bias"])
def test_float16_weights_are_the_rounded_model_s(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    sizes = [
        write_onnx(tmp_path / f"{d}.onnx", model, dtype=d)[0].stat().st_size for d in ("float32", "float16")
    ]
    assert sizes[1] < 0.7 * sizes[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half().float())
        ids = torch.arange(20)[None] % V
        expected = model(ids).numpy()
    assert np.abs(Session(tmp_path / "float16.onnx")(ids)[0] - expected).max() < 1e-4


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    for model in (gpt(), qwen(), qwen(tie_word_embeddings=False)):
        [path] = write_onnx(tmp_path / "model.onnx", model)
        tensors = onnx.load(path).graph.initializer
        weights = {
            one.name: int(np.prod(one.dims)) for one in tensors if "weight" in one.name or "bias" in one.name
        }
        assert sum(weights.values()) == model.config.parameter_count()
        assert weights.keys() == dict(model.named_parameters()).keys()  # readable in any viewer


def test_large_weights_lie_beside_the_file(tmp_path: Path) -> None:
    model = gpt(tie_word_embeddings=False)
    path, data = write_onnx(tmp_path / "model.onnx", model, inline=1000)
    assert data == tmp_path / "model.onnx.data"
    assert data.stat().st_size == 4 * model.config.parameter_count()
    assert path.stat().st_size < 40_000
    onnx.checker.check_model(path)
    ids = torch.arange(20)[None] % V
    with torch.no_grad():
        assert np.abs(Session(path)(ids)[0] - model(ids).numpy()).max() < 1e-4


# -- the command ---------------------------------------------------------------------------------------------


def test_a_folder_has_all_that_a_program_needs(tmp_path: Path, run_command: RunCommand) -> None:
    """Text in, text out: with onnxruntime and the tokenizers library alone, as `minigpt generate` answers."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    bpe = BpeTokenizer.train(["low lower lowest 你好吗"] * 3, 290)
    forms: list[tuple[PromptFormat, Any, Any]] = [
        ("question", gpt(), CHARACTERS),
        ("text", qwen(vocab_size=bpe.get_vocab_size()), bpe),
    ]
    for form, model, tokenizer in forms:
        source, folder = tmp_path / form, tmp_path / f"{form}-onnx"
        save_pretrained(model, source, tokenizer)
        result = run_command("convert", "--model", source, "--format", "onnx", "--output", folder, "--json")
        assert result.code == 0, result.err
        said = json.loads(result.out.splitlines()[-1])
        assert said["bytes"] == (folder / "model.onnx").stat().st_size
        assert (said["format"], said["dtype"]) == ("onnx", "float32")
        for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
            assert (folder / file).exists()
        ids = HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json")).encode("你好天地").ids
        assert ids == question_ids(tokenizer, form, "你好天地")
        [done] = generate_ids(model, [ids], GenerationOptions(max_new_tokens=12), None)
        assert Session(folder / "model.onnx").greedy(ids, 12) == done.ids
        again = run_command("convert", "--model", source, "--format", "onnx", "--output", folder)
        assert again.code == 2
        assert again.err.count("\n") == 1
        assert "exists and is not empty" in again.err


def test_the_command_says_what_it_cannot_convert(tmp_path: Path, run_command: RunCommand) -> None:
    save_pretrained(gpt(), tmp_path / "m", CHARACTERS)

    def said(*flags: object, model: Path = tmp_path / "m") -> str:
        result = run_command("convert", "--model", model, *flags)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        return result.err

    assert "must end in .onnx, or be the name of a new folder" in said(
        "--format", "onnx", "--output", "a.bin"
    )
    assert "quantize_dynamic" in said("--output", tmp_path / "a.onnx", "--dtype", "int8")
    config = json.loads((tmp_path / "m" / "config.json").read_text("utf-8"))
    labels = {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **labels}), "utf-8")
    assert "is a classifier" in said("--output", tmp_path / "a.onnx")
    add_adapter(adapted := gpt(), LoraConfig(r=2))
    save_adapter(adapted, LoraConfig(r=2), tmp_path / "lora")
    assert "minigpt merge" in said("--output", tmp_path / "a.onnx", model=tmp_path / "lora")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["lora", "m"]
    save_pretrained(gpt(), tmp_path / "good", CHARACTERS)
    assert run_command("convert", "--model", tmp_path / "good", "--output", tmp_path / "a.onnx").code == 0
    assert (tmp_path / "a.onnx").exists()


# -- refusals ----------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="dtype must be float32 or float16 for ONNX: got 'int8'"):
        write_onnx(path, gpt(), dtype="int8")  # type: ignore[arg-type]
    adapted = gpt()
    add_adapter(adapted, LoraConfig(r=2))
    with pytest.raises(InputError, match=r"the model has adapters beside its weights .*: merge them first"):
        write_onnx(path, adapted)
    with pytest.raises(InputError, match="the model is stored in int8: give it unquantised"):
        write_onnx(path, set_precision(gpt(), "int8"))
    large = gpt()
    with torch.no_grad():
        large.transformer.wte.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"transformer.wte.weight holds values too large for float16"):
        write_onnx(path, large, dtype="float16")
    with torch.no_grad():
        large.transformer.wte.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"transformer.wte.weight"):
        write_onnx(path, large)
    with pytest.raises(InputError, match="trained to fill gaps"):
        write_onnx(path, gpt(vocab_size=V + 1), Tokenizer.from_word2id({**CHARACTERS.word2id, MASK: V}))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'minigpt\[onnx\]'"):
        write_onnx(path, gpt())
    assert list(tmp_path.iterdir()) == []
