"""`minigpt import`: the tutorial's .pth becomes a folder. Its code is not run; doubtful files are refused."""

import dataclasses
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.gpt2.pth_file import read_pth
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import SPECIAL_TOKENS, Tokenizer
from minigpt.weights.pretrained import load_model_and_tokenizer
from tests.commands import RunCommand

VOCABULARY = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *"你好吗 abc"])}
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


def make_model(bias: bool = False, n_layer: int = 2) -> GPTLMHeadModel:
    torch.manual_seed(1)
    model = GPTLMHeadModel(GPTConfig(16, 8, n_layer, 0.1, 12, len(VOCABULARY), bias, "exact")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def document_checkpoint(model: GPTLMHeadModel) -> dict[str, Any]:
    """Return a checkpoint like that of the tutorial's training script, after a step of its optimiser."""
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    model(torch.tensor([[3, 4, 5]])).sum().backward()
    optimizer.step()
    model.load_state_dict(before)
    state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    return {"epoch": 7, **state}


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    Tokenizer.from_word2id(VOCABULARY).save(tmp_path / "vocab.json")
    return tmp_path / "vocab.json"


def message(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(content: object, tmp_path: Path) -> str:
    torch.save(content, tmp_path / "x.pth")
    line = message(lambda: read_pth(tmp_path / "x.pth"))
    assert line.startswith(str(tmp_path / "x.pth"))
    return line


def assert_same(model: LanguageModel, expected: GPTLMHeadModel) -> None:
    assert model.config == expected.config
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert model.lm_head.weight is model.get_parameter("transformer.wte.weight")


# ---------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("bias", [False, True])
def test_a_documents_checkpoint_becomes_a_folder(
    bias: bool, tmp_path: Path, vocab: Path, run_command: RunCommand
) -> None:
    model = make_model(bias)
    torch.save(document_checkpoint(model), tmp_path / "best_model.pth")
    result = run_command("import", tmp_path / "best_model.pth", "--vocab", vocab, "--json")
    assert (result.code, result.err) == (0, "")
    assert f"{model.config.parameter_count():,} parameters of epoch 7" in result.out
    assert json.loads(result.out.splitlines()[-1])["output"] == str(tmp_path / "best_model")
    back, tokenizer = load_model_and_tokenizer(tmp_path / "best_model")  # which has a manifest
    assert_same(back, model)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.word2id == VOCABULARY
    again = run_command("import", tmp_path / "best_model.pth", "--vocab", vocab)
    assert again.code == 2
    assert "exists already" in again.err


def test_vocabulary_and_model_must_belong_together(
    tmp_path: Path, vocab: Path, run_command: RunCommand
) -> None:
    torch.save(make_model().state_dict(), tmp_path / "m.pth")
    Tokenizer.from_word2id({**VOCABULARY, "d": len(VOCABULARY)}).save(vocab)
    result = run_command("import", tmp_path / "m.pth", "--vocab", vocab)
    assert result.code == 2
    assert "is not this model's vocabulary: it has 11 entries, the model 10" in result.err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["nowhere.pth"], "nowhere.pth does not exist: give the .pth"),
        (["m.pth", "--vocab", "nowhere.json"], "nowhere.json is missing"),
        (["m.pth", "--n_head", "5"], "n_head must divide n_embd: got n_head=5, n_embd=16"),
        (["m.pth", "--n_head", "0"], "n_head must be from 1 to 10000: got n_head=0"),
        (["m.pth", "--gelu", "relu"], "--gelu must be one of 'auto', 'exact', 'tanh': got 'relu'"),
        (["bare"], "has no suffix to leave out: name the folder to make with --output"),
        (["m.pth", "--output", "vocab.json"], "exists already"),
        (["."], "must be a file"),
        (["m.pth", "other.pth"], "unexpected argument: other.pth"),
    ],
)
def test_what_cannot_be_is_said(
    flags: list[str],
    text: str,
    tmp_path: Path,
    vocab: Path,
    run_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save(make_model().state_dict(), tmp_path / "m.pth")
    (tmp_path / "bare").write_bytes((tmp_path / "m.pth").read_bytes())
    monkeypatch.chdir(tmp_path)
    standard = [] if "--vocab" in flags else ["--vocab", vocab]
    standard += ["--output", "new"] if flags == ["."] else []
    result = run_command("import", *flags, *standard)
    assert result.code == 2
    assert text in result.err
    assert result.err.count("\n") == 1


# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("bare", [False, True])
def test_wrappers_leave_no_trace(prefix: str, bare: bool, tmp_path: Path) -> None:
    model = make_model()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(OrderedDict(state) if bare else {"epoch": 3, "model_state_dict": state}, tmp_path / "m.pth")
    found = read_pth(tmp_path / "m.pth")
    assert_same(found.model, model)
    assert (found.step, found.origin) == ("" if bare else "epoch 3", "the tutorial")
    assert not found.model.training


def test_other_precisions_and_a_missing_head_are_read(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in make_model().state_dict().items()}
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "m.pth")
    back = read_pth(tmp_path / "m.pth", gelu="tanh").model
    assert back.config.gelu == "tanh"
    for name, tensor in state.items():
        assert torch.equal(back.get_parameter(name), tensor.float())


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(12, 12).tril(),
        torch.ones(12, 12, dtype=torch.bool).tril()[None, None],
        torch.ones(12, 12, dtype=torch.bool).triu(1),
        torch.full((12, 12), -torch.inf).triu(1),
        torch.tensor(-1e4),
    ],
    ids=["tril", "bool", "triu", "additive", "number"],
)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_masks_beside_the_weights_are_left_out(name: str, mask: Tensor, tmp_path: Path) -> None:
    state = make_model().state_dict()
    state |= {f"transformer.blocks.{block}.attn.{name}": mask for block in range(2)}
    torch.save(state, tmp_path / "m.pth")
    assert_same(read_pth(tmp_path / "m.pth").model, make_model())


@pytest.mark.parametrize(
    "tensor", [torch.ones(12, 12).triu(), torch.rand(12, 12), torch.ones(16), torch.ones(3, 4)]
)
def test_what_only_has_the_name_of_a_mask_is_unexpected(tensor: Tensor, tmp_path: Path) -> None:
    state = {**make_model().state_dict(), "transformer.blocks.0.attn.bias": tensor}
    assert "unexpected: transformer.blocks.0.attn.bias" in refused(state, tmp_path)


# ------------------------------------------------------------------------------------ files of other programs


def untied(bias: bool = True) -> GPTLMHeadModel:
    model = make_model(bias)
    whole = GPTLMHeadModel(dataclasses.replace(model.config, tie_word_embeddings=False)).eval()
    whole.load_state_dict({**model.state_dict(), "lm_head.weight": torch.rand(len(VOCABULARY), 16)})
    return whole


def gpt2_names(model: GPTLMHeadModel, *, transposed: bool = False) -> dict[str, Tensor]:
    """Return the weights under the names of nanoGPT, minGPT and transformers, with causal masks."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace(".blocks.", ".h.").replace("qkv_proj", "c_attn").replace("out_proj", "c_proj")
        inner = ".h." in name and tensor.ndim == 2
        renamed[name] = tensor.t().contiguous() if inner and transposed else tensor
    masks = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 12, 12).tril() for block in range(2)}
    return renamed | masks


def first_names(model: GPTLMHeadModel) -> dict[str, Tensor]:
    """Return the weights under the names of minGPT's first release."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("transformer.").replace("lm_head", "head").replace("wte", "tok_emb")
        name = name.replace("ln_1", "ln1").replace("ln_2", "ln2").replace("out_proj", "proj")
        name = name.replace("mlp.c_fc", "mlp.0").replace("mlp.c_proj", "mlp.2")
        if "qkv_proj" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[name.replace("qkv_proj", part)] = piece
        else:
            renamed[name] = tensor
    renamed["pos_emb"] = renamed.pop("wpe.weight")[None]
    return renamed


def without_biases(model: GPTLMHeadModel) -> GPTLMHeadModel:
    """Make a model like nanoGPT's bias=False: the projection of Q, K and V and the norms have no biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def nanogpt(model: GPTLMHeadModel, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    state = {f"_orig_mod.{name}": tensor for name, tensor in gpt2_names(model).items() if keep(name)}
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 12, "vocab_size": len(VOCABULARY)}
    more = {
        "optimizer": {"state": {}, "groups": []},
        "iter_num": 200,
        "best_val_loss": torch.tensor(1.5),
    }
    return {"model": state, "model_args": {**arguments, "bias": False, "dropout": 0.0}, **more}


FILES: dict[str, tuple[Callable[[], tuple[GPTLMHeadModel, Any]], str, str, int]] = {
    # name -> (a model and its file, the program, the GELU and the number of heads that are found)
    "nanogpt": (lambda: ((m := make_model(True)), nanogpt(m)), "nanoGPT", "exact", 4),
    "nanogpt-without-biases": (
        lambda: ((m := without_biases(make_model())), nanogpt(m, lambda name: "bias" not in name)),
        "nanoGPT", "exact", 4,
    ),
    "nanogpt-state": (lambda: ((m := make_model(True)), gpt2_names(m)), "nanoGPT", "exact", 8),
    "mingpt": (lambda: ((m := untied()), gpt2_names(m)), "minGPT", "tanh", 8),
    "mingpt-first": (lambda: ((m := untied()), first_names(m)), "minGPT's first release", "exact", 8),
    "transformers": (
        lambda: ((m := make_model(True)), gpt2_names(m, transposed=True)), "transformers", "tanh", 8
    ),
    "untied": (lambda: ((m := untied()), m.state_dict()), "the tutorial", "exact", 8),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_other_programs_are_the_same_model(case: str, tmp_path: Path) -> None:
    make, origin, gelu, n_head = FILES[case]
    model, content = make()
    torch.save(content, tmp_path / "m.pt")
    found = read_pth(tmp_path / "m.pt")
    assert found.origin == origin
    assert found.step == ("iteration 200" if "model_args" in content else "")
    assert (found.model.config.gelu, found.model.config.n_head) == (gelu, n_head)
    config = dataclasses.replace(model.config, n_head=n_head, gelu=gelu)  # type: ignore[arg-type]
    expected = GPTLMHeadModel(config).eval()
    expected.load_state_dict(model.state_dict())
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(found.model(ids), expected(ids))
    assert read_pth(tmp_path / "m.pt", n_head=2, gelu="tanh").model.config.n_head == 2


def test_transformers_own_pickle_is_the_same_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle here is not installed")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12, "vocab_size": 20}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    found = read_pth(tmp_path / "pytorch_model.bin", n_head=4).model(ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nanogpt_s_checkpoint_becomes_a_folder(tmp_path: Path, vocab: Path, run_command: RunCommand) -> None:
    torch.save(nanogpt(make_model(True)), tmp_path / "ckpt.pt")
    result = run_command("import", tmp_path / "ckpt.pt", "--vocab", vocab, "--json")
    assert (result.code, result.err) == (0, "")
    assert "as nanoGPT writes it: " in result.out
    assert " parameters of iteration 200" in result.out
    assert "gelu=exact (--gelu says another)" in result.out
    model, _ = load_model_and_tokenizer(tmp_path / "ckpt")
    assert model.config.num_attention_heads == 4


# -------------------------------------------------------------------------------------------- what is refused


class Touch:
    """An object that makes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class Evaluate:
    def __init__(self, path: Path) -> None:
        self.code = f"__import__('pathlib').Path({str(path)!r}).touch()"

    def __reduce__(self) -> Any:
        return (eval, (self.code,))


@pytest.mark.parametrize("trap", [Touch, Evaluate])
@pytest.mark.parametrize("place", ["whole", "epoch", "optimizer", "name"])
def test_no_code_is_run(trap: Any, place: str, tmp_path: Path) -> None:
    bomb, content = trap(tmp_path / "gotcha"), document_checkpoint(make_model())
    if place == "whole":
        content = bomb
    elif place == "epoch":
        content["epoch"] = bomb
    elif place == "optimizer":
        content["optimizer_state_dict"]["state"][0] = bomb
    else:
        content["model_state_dict"] = {**content["model_state_dict"], "x": bomb}
    line = refused(content, tmp_path)
    assert re.search(r"it asks for [\w.]+, but only tensors are read; no code was run", line), line
    assert not (tmp_path / "gotcha").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # it is a trap indeed: this springs it
    assert (tmp_path / "gotcha").exists()


def test_a_plain_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Touch(tmp_path / "gotcha")))
    assert "or not a file of torch.save: " in message(lambda: read_pth(tmp_path / "x.pth"))
    torch.save(make_model().state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert "or not a file of torch.save: " in message(lambda: read_pth(tmp_path / "x.pth"))
    assert not (tmp_path / "gotcha").exists()


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(document_checkpoint(make_model()), path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:length])
        assert str(path) in message(lambda: read_pth(path))
    for other in (b"", b"hello", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(other)
        assert "not a file of torch.save" in message(lambda: read_pth(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert f"{path} is not a file of torch.save: it needs one folder" in message(lambda: read_pth(path))


def test_damage_anywhere_gives_a_line_or_weights(tmp_path: Path) -> None:
    """Torch checks no checksum of a .pth, so a flipped bit of a weight is not noticed. Nothing may crash."""
    path = tmp_path / "x.pth"
    buffer = io.BytesIO()
    torch.save(make_model(n_layer=1).state_dict(), buffer)
    content = buffer.getvalue()
    lines = []
    for position in range(0, len(content), len(content) // 150):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        try:
            read_pth(path)
        except InputError as error:
            lines.append(str(error))
    assert lines
    assert [line for line in lines if "\n" in line] == []


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        5,
        torch.ones(2),
        {"epoch": 1},
        {"model_state_dict": {}},
        {"model_state_dict": [torch.ones(2)]},
        {"state": {"a": torch.ones(1)}},
        {"a": torch.ones(1), "b": 2},
    ],
    ids=str,
)
def test_a_file_with_something_else_in_it(content: object, tmp_path: Path) -> None:
    assert "holds no model_state_dict of tensors, but " in refused(content, tmp_path)


def test_another_kind_of_model_is_told(tmp_path: Path) -> None:
    assert "there is no matrix transformer.wte.weight, but weight, bias" in refused(
        torch.nn.Linear(3, 4).state_dict(), tmp_path
    )
    assert "whose name is not a string" in refused({3: torch.ones(1)}, tmp_path)


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = make_model().state_dict()
    del state["transformer.blocks.1.ln_1.bias"]
    state["transformer.blocks.0.attn.rotary"] = torch.ones(3)
    state["transformer.blocks.0.mlp.c_fc.weight"] = torch.ones(16, 64)
    state["transformer.ln_f.bias"] = torch.ones(16, dtype=torch.int64)
    line = refused(state, tmp_path)
    assert "missing: transformer.blocks.1.ln_1.bias; " in line
    assert "unexpected: transformer.blocks.0.attn.rotary; " in line
    assert "transformer.blocks.0.mlp.c_fc.weight is float (16, 64), not float (64, 16)" in line
    assert "transformer.ln_f.bias is torch.int64 (16,), not float (16,)" in line


def test_blocks_must_follow_one_another(tmp_path: Path) -> None:
    state = make_model().state_dict()
    state["transformer.blocks.999999999.ln_1.bias"] = torch.ones(16)  # nor may it cost a billion blocks
    assert "unexpected: transformer.blocks.999999999.ln_1.bias" in refused(state, tmp_path)
    state = {name.replace(".1.", ".5."): tensor for name, tensor in make_model().state_dict().items()}
    line = refused(state, tmp_path)
    assert "missing: transformer.blocks.1." in line
    assert "unexpected: transformer.blocks.5." in line


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    state = make_model().state_dict()
    state["transformer.ln_f.weight"][2] = torch.nan
    assert "transformer.ln_f.weight holds NaN or infinity" in refused(state, tmp_path)
    state = dict(make_model().state_dict())
    state["transformer.wpe.weight"] = torch.ones(0, 16)
    assert "block_size must be a whole number of at least 1" in refused(state, tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(make_model().state_dict(), path)
    content = bytearray(path.read_bytes())
    weight = make_model().get_parameter("transformer.wpe.weight").detach().numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)
    assert re.search(
        r"x\.pth is damaged: .*/data/\d+ in it does not match its checksum", message(lambda: read_pth(path))
    )


def test_a_compressed_zip_is_no_file_of_torch_save(tmp_path: Path) -> None:
    torch.save(make_model().state_dict(), tmp_path / "x.pth")
    packed = zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.pth") as stored, packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert "never compresses" in message(lambda: read_pth(tmp_path / "y.pth"))


def test_tensors_that_are_less_or_more_than_their_bytes_are_refused(tmp_path: Path) -> None:
    for odd, name in ((torch.ones(4, 16).to_sparse(), "sparse"), (torch.ones(4, 16, device="meta"), "meta")):
        state = {**make_model().state_dict(), "transformer.wpe.weight": odd}
        line = refused(state, tmp_path)
        assert f"it asks for torch._utils._rebuild_{name}_tensor" in line
        assert "but only tensors are read; no code was run" in line
    for name, shape in (("wpe.weight", (10**9, 16)), ("blocks.0.attn.mask", (10**6, 10**6))):
        state = {**make_model().state_dict(), f"transformer.{name}": torch.ones(1, 1).expand(shape)}
        assert f"transformer.{name} claims more bytes than the file has" in refused(state, tmp_path)


# Pickles that nothing may be built of. Each is one line, in less than a second of processor time.
TWICE = b"]q\x05" + b"h\x05h\x05\x86q\x05" * 100  # 2**100 empty lists
PICKLES = {
    "deep": (b"]" * 100_000 + b"a" * 99_999, "nested too deeply"),
    "deep tuples": (b")" + b"\x85" * 100_000, "nested too deeply"),
    "doubled": (TWICE, "repeats its values too often"),
    "doubled, as a key": (b"}q\x01(" + TWICE + b"K\x01u", "repeats its values too often"),
    "doubled by lists": (b"]q\x05" + b"](h\x05h\x05h\x05h\x05eq\x05" * 20, "repeats its values too often"),
    "in itself": (b"]q\x05h\x05a", "part of another one"),
    "filled later": (b"]q\x05]h\x05ah\x05K\x01a", "part of another one"),
    "many": (b"N" * 500_000, "more than 400,000 entries"),
    "large": (b"N" * 9_000_000, "more than 8,000,000 are not read"),
    "a long text": (b"X\xff\xff\xff\x7f", "but only 1 remain"),
    "a long number": (b"I" + b"9" * 5000 + b"\n", "limit (4300 digits)"),
    "below a mark": (b"}(K\x01(s", "damaged"),
    "nothing": (b"", "damaged"),
    "no memo": (b"h\x09", "damaged"),
    "an old opcode": (b"I1\n", "the instruction INT, which no list of tensors needs"),
    "an object": (b"N}\x92", "the instruction NEWOBJ_EX"),
    "a function": (b"cos\nsystem\n(X\x01\x00\x00\x00atR", "it asks for os.system, but only tensors are read"),
    "memory": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", "it asks for builtins.bytearray"),
}


@pytest.mark.parametrize(("body", "text"), PICKLES.values(), ids=PICKLES)
def test_a_hostile_pickle_is_one_line_at_once(body: bytes, text: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/version", b"3\n")
    assert text in message(lambda: read_pth(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "names", [(), ("a/data.pkl", "a/DATA.PKL"), ("a/data.pkl", "a/x/data.pkl"), ("a/data.pkl", "b/0")]
)
def test_the_pickle_that_is_checked_is_the_one_that_is_read(names: tuple[str, ...], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps({}, 2))
    assert "it needs one folder with one data.pkl" in message(lambda: read_pth(tmp_path / "x.pth"))
