"""Model folders that `transformers` makes give the same logits and answers here, or a clear refusal."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minigpt.errors import InputError, printable
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.generation_config import notes_of, recommended_options
from minigpt.weights.pretrained import load_model_and_tokenizer, save_pretrained
from tests.commands import RunCommand

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*eos_token_id must be")

TEXTS = [
    "the cat sat on the mat and the dog ran to the sea, said the old man",
    "你好，世界！四川的省会是成都。今天天气很好，我们去公园。",
] * 4
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PROMPTS = ["the cat", "你好，世界", "zq ! 12"]
NEW = 12  # tokens of an answer
Make = Callable[[Path], Any]


def bpe() -> Any:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END, START, STOP],
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


BPE = bpe()
ROWS = BPE.get_vocab_size()
GPT2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": ROWS}
GPT2 |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2}
QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": ROWS,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def tokenizer(library: Any = BPE, **more: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **{"eos_token": STOP, **more})


def saved(model: Any, folder: Path, tokens: Any = None, **more: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, **more)
    (tokenizer() if tokens is None else tokens).save_pretrained(folder)


def gpt2(tokens: Any = None, **values: Any) -> Make:
    return lambda folder: saved(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **values})), folder, tokens
    )


def qwen3(tokens: Any = None, **values: Any) -> Make:
    return lambda folder: saved(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**QWEN3, **values})), folder, tokens
    )


def steps(*makes: Make) -> Make:
    """Return a function that applies these functions one after another."""
    return lambda folder: [make(folder) for make in makes]


def edited(name: str, **values: Any) -> Make:
    """Return a function that changes keys of a JSON file; None removes a key."""

    def change(folder: Path) -> None:
        path = folder / name
        content = {**(json.loads(path.read_bytes()) if path.exists() else {}), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def without(*names: str) -> Make:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def with_template(pattern: str) -> Any:
    library = Library.from_str(BPE.to_str())
    known = [(token, library.token_to_id(token)) for token in (END, STOP)]
    library.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=known)
    return library


def ends_at_a_common_token(folder: Path) -> None:
    """Set eos_token_id, only in config.json, to the sixth token that the model writes."""
    qwen3()(folder)
    ids = answers_there(folder, PROMPTS[:1])[0]
    without("generation_config.json")(folder)
    edited("config.json", eos_token_id=[ids[5], 0])(folder)


def answers_there(folder: Path, prompts: list[str]) -> list[list[int]]:
    """Return the ids that transformers generates, without the id that ends an answer."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    found = []
    for prompt in prompts:
        ids = torch.tensor([theirs(prompt)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        new = out[0, ids.shape[1] :].tolist()
        found.append(new[:-1] if new[-1] in ends else new)
    return found


def answers_here(folder: Path, prompts: list[str]) -> list[list[int]]:
    model, tokens = load_model_and_tokenizer(folder)
    advised = {name: value for name, value in recommended_options(folder).items() if name != "do_sample"}
    options = GenerationOptions(**{**advised, "max_new_tokens": NEW})
    rows = [tokens.encode_text(prompt) for prompt in prompts]
    return [ids for ids, _ in generate_ids(model, rows, options, None, tokenizer=tokens)]


def chinese(folder: Path) -> None:
    """Make a folder with BERT's tokenizer, like the published Chinese GPT-2 models."""
    without("tokenizer.json", "tokenizer_config.json")(folder)
    characters = sorted({character for text in TEXTS for character in text if not character.isspace()})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "the", "##a", "##t", "cat"]
    words += [f"[unused{number}]" for number in range(ROWS - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    edited("config.json", tokenizer_class="BertTokenizer")(folder)


def renamed_weights(change: Callable[[str], str]) -> Make:
    def rename(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return rename


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **values}


SAME: dict[str, Make] = {
    "gpt2": gpt2(),
    "gpt2-bos": gpt2(tokenizer(with_template(f"{END} $A"))),
    "gpt2-bos-eos": gpt2(tokenizer(with_template(f"{END} $A {STOP}"))),
    "gpt2-eos-of-another-vocabulary": gpt2(bos_token_id=50256, eos_token_id=50256),
    "gpt2-without-generation-config": steps(gpt2(), without("generation_config.json")),
    "gpt2-no-end": steps(gpt2(), edited("generation_config.json", eos_token_id=None)),
    "gpt2-temperature-0": steps(
        gpt2(), edited("generation_config.json", do_sample=False, temperature=0.0, top_p=0.0)
    ),
    "gpt2-penalty": steps(gpt2(), edited("generation_config.json", repetition_penalty=1.3)),
    "gpt2-no-repeats": steps(gpt2(), edited("generation_config.json", no_repeat_ngram_size=2)),
    "gpt2-bad-words": steps(gpt2(), edited("generation_config.json", bad_words_ids=[[30], [31, 32]])),
    "gpt2-token-without-a-row": gpt2(tokenizer(pad_token="<pad>", bos_token="<s>")),
    "gpt2-untied": gpt2(tie_word_embeddings=False),
    "gpt2-dropouts": gpt2(resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.2),
    "gpt2-chinese": steps(gpt2(), chinese),
    "gpt2-compiled": steps(gpt2(), renamed_weights(lambda name: f"_orig_mod.{name}")),
    "qwen3-of-many-processes": steps(qwen3(), renamed_weights(lambda name: f"module._orig_mod.{name}")),
    "qwen3": qwen3(),
    "qwen3-dropout": qwen3(attention_dropout=0.2),
    "qwen3-untied": qwen3(tie_word_embeddings=False),
    "qwen3-biases": qwen3(attention_bias=True),
    "qwen3-theta-left-out": steps(qwen3(), edited("config.json", rope_parameters=None)),
    "qwen3-linear": qwen3(rope_parameters=rope("linear", factor=3.0)),
    "qwen3-dynamic": qwen3(rope_parameters=rope("dynamic", factor=2.0)),
    "qwen3-yarn": qwen3(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen3-yarn-of-one-length": qwen3(rope_parameters=rope("yarn", factor=4.0)),
    "qwen3-yarn-all-numbers": qwen3(
        rope_parameters=rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=24,
            attention_factor=0.7,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        )
    ),
    "qwen3-yarn-mscale": qwen3(rope_parameters=rope("yarn", factor=4.0, mscale=1.5, mscale_all_dim=0.5)),
    "qwen3-yarn-before-5": steps(
        qwen3(),
        edited(
            "config.json",
            rope_parameters=None,
            rope_theta=1e4,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ),
    "qwen3-llama3": qwen3(
        rope_parameters=rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "qwen3-windows": qwen3(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3-windows-named": qwen3(
        use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3-window-larger-than-any-text": qwen3(
        use_sliding_window=True, sliding_window=500, max_window_layers=0
    ),
    "qwen3-window-switched-off": qwen3(use_sliding_window=False, sliding_window=3, max_window_layers=0),
    "qwen3-eos-in-config": ends_at_a_common_token,
    "qwen3-sep-and-eos": qwen3(tokenizer(sep_token=END)),
}

WRAPPED = ("gpt2-compiled", "qwen3-of-many-processes")

REFUSED: dict[str, tuple[Make, str]] = {
    "longrope": (
        qwen3(rope_parameters=rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=2.0)),
        "config.json: rope_parameters: rope_type='longrope' is not supported",
    ),
    "two-files-of-weights": (
        steps(
            gpt2(),
            lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors"),
            lambda folder: shutil.copy(folder / "a.safetensors", folder / "b.safetensors"),
        ),
        r"no model.safetensors.index.json says which of these belong together: a.safetensors, b.safetensors",
    ),
    "other-names": (
        steps(gpt2(), renamed_weights(lambda name: name.replace(".h.", ".layer."))),
        r"missing: transformer.h.0.ln_1.weight, .* and 21 more; unexpected: transformer.layer.* and 21 more$",
    ),
    "activation": (qwen3(hidden_act="gelu"), "config.json: hidden_act='gelu' is not supported"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            torch.manual_seed(1)
            (SAME[name] if name in SAME else REFUSED[name][0])(folder)
        return folder

    return made


@pytest.mark.parametrize("name", SAME)
def test_logits_and_answers_are_transformers(name: str, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    ours, _ = load_model_and_tokenizer(folder)
    if name in WRAPPED:  # transformers does not read these names, so it gets the weights under its own names
        renamed_weights(lambda name: name.removeprefix("module.").removeprefix("_orig_mod."))(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(ROWS, (2, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, ours(ids)
    # Both sides compute in float32, but sum in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert answers_here(folder, PROMPTS) == answers_there(folder, PROMPTS)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused(name: str, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    with pytest.raises(InputError, match=REFUSED[name][1]) as caught:
        load_model_and_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("gpt2", []),
        (
            "gpt2-eos-of-another-vocabulary",
            [r"generation_config.json has eos_token_id 50256, which is no id here"],
        ),
        ("gpt2-no-end", [r'names no eos_token_id.*at the tokenizer\'s own: "eos_token_id": 2']),
        ("qwen3-eos-in-config", []),
    ],
)
def test_what_a_folder_leaves_open_is_said(
    name: str, notes: list[str], folders: Callable[[str], Path], run_command: RunCommand
) -> None:
    folder = folders(name)
    _, tokens = load_model_and_tokenizer(folder)
    found = notes_of(folder, tokens)
    assert len(found) == len(notes)
    done = run_command(
        "generate", "--model", folder, "--prompt", "the cat", "--max_new_tokens", NEW, "--json"
    )
    text = json.loads(done.out.splitlines()[-1])["text"]
    assert text == tokens.decode(answers_there(folder, ["the cat"])[0])
    for note, pattern in zip(found, notes):
        assert f"warning: {note}" in done.err
        assert re.search(pattern, note)


# -- what a command reads ----------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools|tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]


def written_there(folder: Path, ids: list[int]) -> str:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return str(tokens.decode([one for one in out[0, len(ids) :].tolist() if one != 2]))


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(1)
    tokens = tokenizer()
    tokens.chat_template = TEMPLATE
    qwen3(tokens, max_position_embeddings=256)(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}),
        (["--system", "be kind"], {"system": "be kind"}),
        (["--think", "off"], {"enable_thinking": False}),
        (["--think", "on"], {"enable_thinking": True}),
        (["--tools", json.dumps(TOOLS)], {"tools": TOOLS}),
        (["--tools", "tools.json", "--stream"], {"tools": TOOLS}),
    ],
    ids=str,
)
def test_a_chat_model_reads_system_tools_and_thinking(
    flags: list[str], given: dict[str, Any], chatting: Path, tmp_path: Path, run_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    messages = [{"role": "system", "content": given["system"]}] if "system" in given else []
    given = {name: value for name, value in given.items() if name != "system"}
    messages += [{"role": "user", "content": "the cat"}]
    tokens = transformers.AutoTokenizer.from_pretrained(chatting)
    ids = tokens.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)
    flags = ["--question", "the cat", "--max_new_tokens", str(NEW), *flags]
    done = run_command("generate", "--model", chatting, *flags, *([] if "--stream" in flags else ["--json"]))
    assert done.code == 0
    text = done.out[:-1] if "--stream" in flags else json.loads(done.out.splitlines()[-1])["answer"]
    expected = written_there(chatting, ids)
    assert text == (printable(expected) if "--stream" in flags else expected)


@pytest.mark.parametrize("kind", ["--prompt", "--question"])
def test_special_tokens_that_are_typed_are_text_unless_a_flag_says_otherwise(
    kind: str, chatting: Path, run_command: RunCommand
) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(chatting)
    typed = f"the {START}cat"
    flags = ["--model", chatting, kind, typed, "--max_new_tokens", str(NEW), "--json"]
    careful, plain = (
        run_command("generate", *flags),
        run_command("generate", *flags, "--special_tokens_in_prompt"),
    )
    assert (
        f"warning: read as plain text: {START}; as special tokens: --special_tokens_in_prompt" in careful.err
    )
    assert careful.err.count("plain text") == 1
    assert "plain text" not in plain.err
    messages = [{"role": "user", "content": typed}]
    ids = tokens(typed)["input_ids"] if kind == "--prompt" else tokens.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )  # fmt: skip
    split = tokens(typed, split_special_tokens=True)["input_ids"] if kind == "--prompt" else (
        tokens.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    )  # fmt: skip
    key = "text" if kind == "--prompt" else "answer"
    assert json.loads(plain.out.splitlines()[-1])[key] == written_there(chatting, ids)
    assert json.loads(careful.out.splitlines()[-1])[key] == written_there(chatting, split)


def test_a_schema_may_stand_in_a_file(chatting: Path, tmp_path: Path, run_command: RunCommand) -> None:
    pytest.importorskip("llguidance", reason="schemas are its work")
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    for schema in (tmp_path / "schema.json", '{"type": "boolean"}'):
        flags = ["--prompt", "the cat", "--json_schema", schema, "--json"]
        done = run_command("generate", "--model", chatting, *flags)
        assert json.loads(done.out.splitlines()[-1])["text"].strip() in ("true", "false")


def test_a_text_begins_from_the_token_that_begins_texts(
    folders: Callable[[str], Path], run_command: RunCommand
) -> None:
    for name in ("gpt2", "gpt2-bos"):  # bos_token_id of the configuration; the tokenizer's own template
        done = run_command(
            "generate", "--model", folders(name), "--prompt", "", "--max_new_tokens", NEW, "--json"
        )
        assert json.loads(done.out.splitlines()[-1])["text"] == written_there(folders(name), [0])


def test_weights_may_have_another_file_name(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for path in folders("gpt2").iterdir():
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "model.safetensors").rename(tmp_path / "gpt2-zh.safetensors")
    model, _ = load_model_and_tokenizer(tmp_path)
    expected, _ = load_model_and_tokenizer(folders("gpt2"))
    assert torch.equal(model(torch.tensor([[3, 4]])), expected(torch.tensor([[3, 4]])))


def test_settings_that_are_not_followed_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    gpt2()(tmp_path)
    edited("generation_config.json", num_beams=3, suppress_tokens=[4], guidance_scale=1.5)(tmp_path)
    _, tokens = load_model_and_tokenizer(tmp_path)
    (note,) = notes_of(tmp_path, tokens)
    assert "not followed: num_beams=3, suppress_tokens=[4], guidance_scale=1.5" in note


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-untied",
        *(f"qwen3-{kind}" for kind in ("biases", "yarn-all-numbers", "llama3", "dynamic", "windows")),
    ],
)
def test_what_is_saved_here_is_the_same_there(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model, tokens = load_model_and_tokenizer(folders(name))
    save_pretrained(model, tmp_path, tokens)
    back, _ = load_model_and_tokenizer(tmp_path)
    assert back.config == model.config
    assert sum(map(torch.numel, model.parameters())) == model.config.parameter_count()
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert {key: len(value) for key, value in report.items() if value} == {}
    ids = torch.randint(ROWS, (2, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    torch.testing.assert_close(back(ids), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_windows_with_padding_and_a_cache_are_transformers(folders: Callable[[str], Path]) -> None:
    folder = folders("qwen3-windows")
    ours, _ = load_model_and_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(ROWS, (2, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(
            ours(ids, mask, positions)[mask > 0], expected[mask > 0], rtol=1e-5, atol=1e-5
        )
        cache = KeyValueCache(ours.config, slots=1, max_length=20)
        slot = cache.allocate()
        pieces = [
            ours(ids[1:, a:b], past_key_values=cache.view([slot], [b - a]))
            for a, b in pairwise((0, 8, 9, 20))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1)[0], expected[1], rtol=1e-5, atol=1e-5)
        weights = ours.attentions(ids[1:])
    assert weights[0][0, 0, 19, 0] > 0
    assert weights[1][0, 0, 19, :15].max() == 0 < weights[1][0, 0, 19, 15]  # the second layer sees 5 tokens
