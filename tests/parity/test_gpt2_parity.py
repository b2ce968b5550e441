"""GPT-2 compared with `transformers`: the same weights give the same logits, gradients, ids and files."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt.families.gpt2.family import FAMILY
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import load_model, load_model_and_tokenizer, save_pretrained

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")

SHAPES = [  # (n_embd, n_head, n_layer, block_size, vocab_size)
    (8, 1, 1, 4, 11),
    (16, 4, 2, 16, 29),
    (24, 3, 3, 7, 50),
    (32, 2, 1, 33, 5),
    (20, 5, 4, 12, 101),
]
VARIANTS = [(True, "tanh"), (True, "exact"), (False, "exact"), (False, "tanh")]
SPECIALS = ["<pad>", "<unk>", "<sep>"]
# a combining accent and a joiner are characters of their own
CHARACTERS = "你好吗？我很\n \r\t<sep>abAé\u0301😀👩\u200d🚀"


@pytest.fixture(autouse=True)
def quiet_transformers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that transformers' log stays empty. It would report unexpected keys there."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def tokenizer() -> Tokenizer:
    return Tokenizer.from_word2id(
        {word: index for index, word in enumerate(dict.fromkeys([*SPECIALS, *CHARACTERS]))}
    )


def random_weights(model: torch.nn.Module, *, keep_zero: tuple[str, ...] = ()) -> None:
    """Set all weights, biases and norms to random values, so that a missing term changes the result."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(keep_zero):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def pair(shape: tuple[int, ...], bias: bool, gelu: Any) -> tuple[Any, GPTLMHeadModel]:
    """Return Hugging Face's model and ours with the same weights, both in double precision."""
    n_embd, n_head, n_layer, block_size, vocab_size = shape
    config = GPTConfig(n_embd, n_head, n_layer, 0.1, block_size, vocab_size, bias, gelu)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**FAMILY.config_to_hugging_face(config), attn_implementation="eager")
    )
    theirs = theirs.double().eval()
    random_weights(theirs, keep_zero=() if bias else ("c_proj.bias", "c_fc.bias"))
    ours = GPTLMHeadModel(config).double().eval()
    ours.load_state_dict(FAMILY.from_hugging_face(theirs.state_dict(), config, torch.float64), strict=False)
    return theirs, ours


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Both sides compute in double precision and sum in another order: they differ by about 1e-13."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("bias", "gelu"), VARIANTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_are_hugging_faces(shape: tuple[int, ...], bias: bool, gelu: str) -> None:
    theirs, ours = pair(shape, bias, gelu)
    ids = torch.randint(shape[4], (3, shape[3]), generator=torch.Generator().manual_seed(4))
    logits_there, logits_here = theirs(ids).logits, ours(ids)
    assert_same(logits_here, logits_there)
    for logits in (logits_there, logits_here):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
    gradients_there = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for row in FAMILY.weights:
        for block in map(str, range(shape[2])) if "*" in row.ours else ["*"]:
            name = row.ours.replace("*", block)
            if name in dict(ours.named_parameters()):
                gradient = ours.get_parameter(name).grad
                assert gradient is not None
                there = gradients_there[row.theirs.replace("*", block)]
                assert_same(gradient.t() if row.transposed else gradient, there)
                compared += 1
    assert compared == len(list(ours.named_parameters()))


def test_logits_are_hugging_faces_with_left_padding() -> None:
    theirs, ours = pair(SHAPES[1], True, "tanh")
    ids = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    there = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert_same(ours(ids, mask, positions)[mask.bool()], there[mask.bool()])


def test_logits_and_gradients_are_hugging_faces_with_a_mask_of_queries_and_keys() -> None:
    theirs, ours = pair(SHAPES[1], True, "tanh")
    ids = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(5))
    visible = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(6)) < 0.5
    visible |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(3, 1, 9, 9).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    there, here = theirs(ids, attention_mask=added).logits, ours(ids, visible)
    assert_same(here, there)
    for logits in (there, here):
        logits.square().sum().backward()
    gradient = ours.transformer.wte.weight.grad
    assert gradient is not None
    assert_same(gradient, theirs.transformer.wte.weight.grad)


def test_attention_weights_are_hugging_faces() -> None:
    theirs, ours = pair(SHAPES[2], True, "tanh")
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(6))
    for here, there in zip(ours.attentions(ids), theirs(ids, output_attentions=True).attentions, strict=True):
        assert_same(here, there)


# ------------------------------------------------------------------------------------------------ directories


def our_model(bias: bool = False, gelu: Any = "exact") -> GPTLMHeadModel:
    config = GPTConfig(16, 2, 2, 0.1, 48, tokenizer().get_vocab_size(), bias, gelu)
    model = GPTLMHeadModel(config).eval()
    random_weights(model)
    return model


@pytest.mark.parametrize(("bias", "gelu"), VARIANTS, ids=str)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(
    bias: bool, gelu: str, tmp_path: Path
) -> None:
    model = our_model(bias, gelu)
    save_pretrained(model, tmp_path / "ours", tokenizer())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert {key: len(value) for key, value in report.items() if value} == {}
    assert theirs.dtype == torch.float32
    ids = torch.randint(1, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(7))
    # Both sides compute in float32, but sum in another order.
    torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), rtol=1e-4, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back, read_tokenizer = load_model_and_tokenizer(tmp_path / "theirs")
    assert back.config == model.config
    assert read_tokenizer == tokenizer()
    for (name, parameter), original in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, original), name


def test_a_published_style_gpt2_directory_is_read(tmp_path: Path) -> None:
    """transformers writes it with its own defaults except for the sizes: no key of minigpt, all biases."""
    sizes = {"vocab_size": 31, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    ).eval()
    random_weights(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert isinstance(ours.config, GPTConfig)
    assert (ours.config.bias, ours.config.gelu) == (True, "tanh")
    ids = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)  # float32, see above


def test_a_gpt2_without_its_head_is_read_too() -> None:
    theirs, ours = pair(SHAPES[1], True, "tanh")
    weights = FAMILY.from_hugging_face(theirs.transformer.state_dict(), ours.config, torch.float64)
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, ours.get_parameter(name)), name


def test_names_and_shapes_are_exactly_hugging_faces() -> None:
    theirs, ours = pair(SHAPES[2], False, "exact")
    expected = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: tensor.shape for name, tensor in FAMILY.to_hugging_face(ours).items()} == expected


def test_configurations_go_through_gpt2config_and_back() -> None:
    for bias, gelu in VARIANTS:
        config = GPTConfig(24, 3, 5, 0.25, 40, 99, bias, gelu)  # type: ignore[arg-type]
        there = transformers.GPT2Config(
            **FAMILY.config_to_hugging_face(config, eos_token_id=2, pad_token_id=0)
        )
        assert (there.eos_token_id, there.pad_token_id, there.bos_token_id) == (2, 0, None)
        assert FAMILY.config_from_hugging_face(there.to_dict()) == config


# -------------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "你好吗？",
    "",
    " ",
    "  你 \n\n好\r\n\t?",
    "<sep>",
    "你好<sep><pad><unk>吗",
    "aé e\u0301 A",
    "😀👩‍🚀 unknown: ☃\ufffd",
    "\u00a0\u3000\u200b\u2028\x00",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save_pretrained(our_model(), path, tokenizer())
    return path


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_autotokenizer_gives_our_ids(directory: Path, text: str) -> None:
    ours, theirs = tokenizer(), transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode_text(text)
    assert theirs(text).input_ids == [*ours.encode_text(text), ours.sep_token_id]
    ids, _ = ours.encode(text, "我很好", max_length=100, pad_to_max_length=False)
    assert theirs(text, "我很好").input_ids == ids


def test_autotokenizer_knows_the_special_tokens(directory: Path) -> None:
    ours, theirs = tokenizer(), transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.pad_token_id == ours.pad_token_id
    assert theirs.unk_token_id == ours.unk_token_id
    assert theirs.sep_token_id == theirs.eos_token_id == ours.sep_token_id
    assert len(theirs) == ours.get_vocab_size()
    assert theirs.model_max_length == 48


def test_autotokenizer_pads_and_decodes_like_ours(directory: Path) -> None:
    ours, theirs = tokenizer(), transformers.AutoTokenizer.from_pretrained(directory)
    padded = theirs([["你好", "我"], ["a", "b"]], padding="max_length", max_length=12)
    for row, (question, answer) in enumerate((("你好", "我"), ("a", "b"))):
        ids, mask = ours.encode(question, answer, max_length=12, pad_to_max_length=True)
        assert padded.input_ids[row] == ids
        assert padded.attention_mask[row] == mask
    text = " 你好\n吗？ <sep>e\u0301😀"
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text


def test_what_a_user_types_never_becomes_a_special_token(directory: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    special = {theirs.pad_token_id, theirs.unk_token_id, theirs.sep_token_id}
    ids = theirs("<sep>", add_special_tokens=False).input_ids
    assert len(ids) == 5
    assert not special & set(ids)
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("<sep>", add_special_tokens=False).input_ids == ids


def test_hugging_faces_generate_stops_at_our_sep(directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.generation_config.eos_token_id == theirs.sep_token_id
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()  # a model that always says <sep>
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[theirs.sep_token_id] * 100)
    prompt = theirs(["你好"], return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8)[0, prompt.input_ids.shape[1] :]
    assert answer.tolist() == [theirs.sep_token_id]
