"""HTML files: their content, read by a reader written here, and their program's numbers and ids, under node.

test_html_page.py tests the page in a browser.
"""

import base64
import dataclasses
import gzip
import hashlib
import html.parser
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM, RopeScaling
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import add_adapter
from minigpt.finetuning.lora import LoraConfig
from minigpt.finetuning.masked_lm import MASK
from minigpt.generation.api import generate_ids
from minigpt.generation.conversation import question_ids
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sampling import filtered, sample
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.definition import BYTE_SYMBOLS
from minigpt.tokenization.wordpiece import WordPieceTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.html_file import SCRIPTS, write_html
from minigpt.weights.pretrained import save_pretrained
from minigpt.weights.quantized import set_precision
from tests.commands import RunCommand

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node, which runs the page's program here, is missing")
JAVASCRIPT = Path(__file__).parents[1] / "minigpt" / "weights" / "html"
CHARACTERS = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒？。，日月盈昃"]))
V = CHARACTERS.get_vocab_size()
OFF: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
}


# -- models and tokenizers ---------------------------------------------------------------------------------


def spread(model: Any, scale: float = 0.1) -> Any:
    """Set all weights, biases and norms to random values, so that no two tensors can be confused."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gpt(**more: Any) -> GPTLMHeadModel:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "block_size": 64, "vocab_size": V, "dropout": 0.0}
    torch.manual_seed(1)
    model: GPTLMHeadModel = spread(GPTLMHeadModel(GPTConfig(**{**sizes, **more})))
    return model


def qwen(**more: Any) -> Qwen3ForCausalLM:
    config = Qwen3Config(V, 32, 48, 2, 4, 2, 10, max_position_embeddings=64)
    torch.manual_seed(1)
    model: Qwen3ForCausalLM = spread(Qwen3ForCausalLM(dataclasses.replace(config, **more)))
    return model


def scaled(kind: Any, **more: Any) -> RopeScaling:
    return RopeScaling(rope_type=kind, factor=4.0, original_max_position_embeddings=16, **more)


MODELS: dict[str, Callable[[], Any]] = {
    "gpt": gpt,
    "gpt-2": lambda: gpt(bias=True, gelu="tanh"),
    "gpt-untied": lambda: gpt(tie_word_embeddings=False, n_embd=33, n_head=3),  # odd sizes
    "qwen3": qwen,
    "qwen3-untied-bias": lambda: qwen(tie_word_embeddings=False, attention_bias=True),
    "qwen3-linear": lambda: qwen(rope_scaling=scaled("linear")),
    "qwen3-dynamic": lambda: qwen(rope_scaling=scaled("dynamic")),
    "qwen3-yarn": lambda: qwen(rope_scaling=scaled("yarn", attention_factor=1.2)),
    "qwen3-llama3": lambda: qwen(rope_scaling=scaled("llama3")),
    "qwen3-sliding": lambda: qwen(sliding_window=5, layer_types=("sliding_attention", "full_attention")),
    "qwen3-one-kv-head": lambda: qwen(num_key_value_heads=1),
}
IDS = torch.randint(V, (1, 40), generator=torch.Generator().manual_seed(5))


def write(path: Path, model: Any, tokenizer: Any = CHARACTERS, **more: Any) -> Path:
    write_html(path, model, tokenizer, **{"form": "question", "eos": [2], "dtype": "float32", **more})
    return path


# -- a reader of the file, which shares no code with the writer --------------------------------------------


class Elements(html.parser.HTMLParser):
    """Collects every element with its attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", {}, []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def texts(self, tag: str, kind: str | None = None) -> list[str]:
        return [
            "".join(text) for name, attrs, text in self.found if name == tag and attrs.get("class") == kind
        ]


def read(path: Path) -> tuple[dict[str, Any], list[npt.NDArray[np.float64]]]:
    """Return the description, and every tensor in float64."""
    page = Elements(path.read_text(encoding="utf-8"))

    def stream(kind: str) -> bytes:
        return gzip.decompress(b"".join(map(base64.b64decode, page.texts("script", kind))))

    about, content = json.loads(stream("description")), stream("weights")
    assert len(content) == about["bytes"]

    def planes(start: int, count: int, dtype: str) -> npt.NDArray[np.float64]:
        width = np.dtype(dtype).itemsize
        block = np.frombuffer(content, np.uint8, count * width, start).reshape(width, count)
        return np.frombuffer(block.T.tobytes(), f"<{np.dtype(dtype).str[1:]}").astype(np.float64)

    tensors = []
    for entry in about["tensors"]:
        count, start = int(np.prod(entry["shape"])), entry["offset"]
        values = planes(start, count, entry["dtype"]).reshape(entry["shape"])
        if entry["dtype"] == "int8":
            values = values * planes(start + count, entry["shape"][0], "float32")[:, None]
        tensors.append(values)
    return about, tensors


# -- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["gpt-2", "qwen3-untied-bias"])
def test_the_weights_are_the_model_s(name: str, dtype: Any, tmp_path: Path) -> None:
    model = MODELS[name]()
    _, tensors = read(write(tmp_path / "a.html", model, dtype=dtype))
    own = sorted(
        (p.detach().double().numpy() for p in model.parameters()), key=lambda one: (one.shape, *one.ravel())
    )
    # rounding may change the order of tensors of one shape by little: compare each with its nearest
    assert sorted(one.shape for one in tensors) == sorted(one.shape for one in own)
    for tensor in tensors:
        nearest = min(
            (one for one in own if one.shape == tensor.shape),
            key=lambda one: float(np.abs(one - tensor).max()),
        )
        if dtype == "float32" or tensor.ndim == 1:
            assert np.array_equal(nearest, tensor)
        elif dtype == "float16":
            assert np.array_equal(nearest.astype(np.float16).astype(np.float64), tensor)
        else:
            step = np.abs(nearest).max(axis=1, keepdims=True) / 127
            assert (np.abs(nearest - tensor) <= step * 0.501).all()


def test_the_page_allows_its_own_script_and_nothing_else(tmp_path: Path) -> None:
    page = Elements(write(tmp_path / "a.html", gpt()).read_text(encoding="utf-8"))
    policy = next(
        a["content"] for tag, a, _ in page.found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    [script], [style] = page.texts("script"), page.texts("style")
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag, attributes, _ in page.found:
        assert tag not in ("link", "iframe", "img", "object", "base"), tag
        assert not {key for key in attributes if key.startswith("on")} | (
            {"src", "href", "style"} & set(attributes)
        )


FORBIDDEN = [
    *("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "import("),
    *("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "localStorage", "cookie"),
]


@pytest.mark.parametrize("file", SCRIPTS)
def test_the_program_writes_no_html_and_asks_no_server(file: str) -> None:
    text = (JAVASCRIPT / file).read_text(encoding="utf-8")
    for word in FORBIDDEN:
        assert word not in text, word
    assert "</script" not in text.lower()
    assert "<!--" not in text
    assert max(map(len, text.splitlines())) <= 250


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, gpt()).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


ATTACKS = [
    "</title><script>document.title='x'</script>", '"><img src=x onerror=alert(1)>', "{{model}}{{script}}",
    "<!--", "</script>", "'-alert(1)-'", "\u202e<b>", "{{title}}", "\ud800", "&lt;i&gt;",
]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_name_stays_text(name: str, tmp_path: Path) -> None:
    plain = Elements(write(tmp_path / "a.html", gpt(), name="plain").read_text(encoding="utf-8"))
    page = Elements(write(tmp_path / "b.html", gpt(), name=name).read_text(encoding="utf-8"))
    assert [(tag, set(attributes)) for tag, attributes, _ in page.found] == [
        (tag, set(attributes)) for tag, attributes, _ in plain.found
    ]
    assert "".join(page.texts("title")) == name.replace("\ud800", "?")
    assert page.texts("script") == plain.texts("script")
    assert read(tmp_path / "b.html")[0]["name"] == name


def test_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.weights.html_file._PART", 3000)
    model = gpt(tie_word_embeddings=False)
    path = write(tmp_path / "a.html", model)
    assert len(Elements(path.read_text(encoding="utf-8")).texts("script", "weights")) > 10
    _, tensors = read(path)
    assert sum(one.size for one in tensors) == model.config.parameter_count()


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    for model in (gpt(), qwen()):
        _, tensors = read(write(tmp_path / "a.html", model))
        assert sum(one.size for one in tensors) == model.config.parameter_count()


def test_the_demo_s_shape_has_at_most_3_mb(tmp_path: Path) -> None:
    # the recipe qa-cpu on the project's data: 1,081,920 parameters; random weights compress worst
    words = [chr(0x4E00 + i) for i in range(1439)]
    tokenizer = Tokenizer.from_word2id(build_vocabulary(words))
    config = Qwen3Config(
        tokenizer.get_vocab_size(),
        160,
        432,
        2,
        4,
        4,
        40,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    assert model.config.parameter_count() > 1_000_000
    assert write(tmp_path / "a.html", model, tokenizer, dtype="float16").stat().st_size <= 3e6


# -- refusals ----------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_model_too_large_is_refused_with_its_size(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write(tmp_path / "a.html", gpt(n_embd=128), dtype="float16", max_bytes=2**19)
    assert re.search(
        r"has 1 MiB .*as float16; a page holds at most 0: convert with --dtype int8", one_line(error)
    )
    assert not (tmp_path / "a.html").exists()
    with pytest.raises(InputError, match="smaller model"):
        write(tmp_path / "a.html", gpt(n_embd=128), dtype="int8", max_bytes=2**10)


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = gpt()
    with torch.no_grad():
        model.blocks[1].mlp.c_fc.weight[0, 0] = 1e6
    with pytest.raises(InputError) as error:
        write(tmp_path / "a.html", model, dtype="float16")
    assert "--dtype float32" in one_line(error)
    write(tmp_path / "a.html", model, dtype="float32")


def test_tokenizers_that_the_page_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer.train([], 260)
    cuts = {**tokenizer.definition.frame["pre_tokenizer"], "use_regex": False}
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": cuts},
    ):
        frame = {**tokenizer.definition.frame, **change}
        other = BpeTokenizer(dataclasses.replace(tokenizer.definition, frame=frame))
        with pytest.raises(InputError) as error:
            write(tmp_path / "a.html", gpt(vocab_size=260), other)
        assert "cuts or changes text" in one_line(error)
    vocab = {token: id for token, id in tokenizer.definition.vocab.items() if token != BYTE_SYMBOLS[0]}
    with pytest.raises(InputError) as error:
        write(
            tmp_path / "a.html",
            gpt(vocab_size=260),
            BpeTokenizer(dataclasses.replace(tokenizer.definition, vocab=vocab)),
        )
    assert "no token for some bytes" in one_line(error)


def test_the_command(tmp_path: Path, run_command: RunCommand) -> None:
    folder = tmp_path / "my run" / "best"
    save_pretrained(gpt(), folder, CHARACTERS)
    code, out, err = run_command("convert", "--model", folder, "--output", tmp_path / "a.html", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert (result["format"], result["dtype"]) == ("html", "float16")
    assert result["bytes"] == (tmp_path / "a.html").stat().st_size
    about, _ = read(tmp_path / "a.html")
    assert (about["name"], about["form"], about["eos"]) == ("my run", "question", [2])
    code, out, _ = run_command("convert", "--model", folder, "--format", "html", "--dtype", "q8_0")
    assert code == 0
    assert (tmp_path / "my run" / "best-int8.html").exists()
    code, _, err = run_command(
        "convert", "--model", folder, "--format", "html", "--output", tmp_path / "a.gguf"
    )
    assert code == 2
    assert err.count("\n") == 1
    assert ".html" in err


def test_a_quantised_folder_is_refused(tmp_path: Path, run_command: RunCommand) -> None:
    save_pretrained(gpt(n_embd=64), tmp_path / "m", CHARACTERS)
    assert run_command("quantize", "--model", tmp_path / "m", "--output", tmp_path / "q").code == 0
    code, _, err = run_command("convert", "--model", tmp_path / "q", "--output", tmp_path / "a.html")
    assert code == 2
    assert "is quantised" in err


def test_what_a_page_cannot_compute_is_refused(tmp_path: Path, run_command: RunCommand) -> None:
    for adapter in (LoraConfig(r=2), BottleneckConfig(), IA3Config()):
        model = gpt()
        add_adapter(model, adapter)
        with pytest.raises(InputError) as error:
            write(tmp_path / "a.html", model)
        assert "merge them first" in one_line(error)
    with pytest.raises(InputError) as error:
        write(tmp_path / "a.html", set_precision(gpt(n_embd=64), "int8"))
    assert "stored in int8" in one_line(error)
    fills = Tokenizer.from_word2id({**CHARACTERS.word2id, MASK: V})
    save_pretrained(gpt(vocab_size=V + 1), tmp_path / "m", fills)
    code, _, err = run_command("convert", "--model", tmp_path / "m", "--output", tmp_path / "a.html")
    assert (code, err.count("\n")) == (2, 1)
    assert "fill gaps" in err
    assert not (tmp_path / "a.html").exists()


# -- the program, under node -------------------------------------------------------------------------------


def node(path: Path, *tasks: dict[str, Any]) -> list[Any]:
    assert NODE is not None
    command = [NODE, str(Path(__file__).with_name("html_page.js")), str(path)]
    done = subprocess.run(
        command, input=json.dumps(tasks), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


@needs_node
@pytest.mark.parametrize("name", MODELS)
def test_logits_attention_and_lens_are_the_model_s(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    position = 33
    path = write(tmp_path / "a.html", model)
    tasks: list[dict[str, Any]] = [
        {"do": "logits", "ids": IDS[0].tolist()},
        {"do": "lens", "position": position},
        {"do": "kinds"},
    ]
    tasks += [{"do": "attention", "layer": layer, "position": position} for layer in (0, 1)]
    logits, lens, kinds, *attentions = node(path, *tasks)
    with torch.no_grad():
        expected = model(IDS)[0].numpy()
        weights = model.attentions(IDS)
        states: list[torch.Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
            for block in model.blocks
        ]
        hooks.append(model.blocks[-1].register_forward_hook(lambda _, __, out: states.append(out)))
        model(IDS)
        for hook in hooks:
            hook.remove()
        norm = model.transformer.ln_f if isinstance(model, GPTLMHeadModel) else model.model.norm
        by_layer = [model.lm_head(norm(state))[0, position].numpy() for state in states]
    # float32 here, float64 sums there: a few units in the last place of logits of about 10
    assert np.abs(np.array(logits) - expected).max() < 1e-4
    for layer in (0, 1):
        found = np.array(attentions[layer])
        assert np.abs(found - weights[layer][0, :, position, : position + 1].detach().numpy()).max() < 1e-5
    assert [one["kind"] for one in kinds] == ["embed", "attention", "mlp", "attention", "mlp"]
    assert np.abs(np.array(lens)[[0, 2, 4]] - np.array(by_layer)).max() < 1e-4


@needs_node
@pytest.mark.parametrize("name", ["gpt-2", "qwen3"])
def test_logits_of_narrow_weights(name: str, tmp_path: Path) -> None:
    for dtype in ("float16", "int8"):
        model = MODELS[name]()
        path = write(tmp_path / f"{dtype}.html", model, dtype=dtype)
        [logits] = node(path, {"do": "logits", "ids": IDS[0].tolist()})
        _, tensors = read(path)  # checked above: what the file holds is the rounded model
        with torch.no_grad():
            exact = model(IDS)[0]
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    choice = (one for one in tensors if one.shape == tuple(parameter.shape))
                    own = parameter.detach().numpy()
                    nearest = min(choice, key=lambda one: float(np.abs(one - own).max()))
                    parameter.copy_(torch.from_numpy(nearest).float())
            expected = model(IDS)[0]
        assert (torch.tensor(logits) - expected).abs().max() < 1e-4
        if dtype == "float16":  # against the weights before rounding; logits here reach about 10
            assert (torch.tensor(logits) - exact).abs().max() < 2e-3 * float(exact.abs().max())


@needs_node
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_answers_are_those_of_generate(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    generator = random.Random(2)
    prompts = [
        [*(generator.randrange(3, V) for _ in range(generator.randrange(1, 20))), 2] for _ in range(60)
    ]
    # The cached tokens of one prompt are used for the next prompt.
    prompts += [[*prompts[number // 4], *range(3, 4 + number % 4)] for number in range(20)]
    chosen: dict[str, dict[str, Any]] = {"greedy": OFF, "plain": {**OFF, "do_sample": True}}
    chosen["all"] = {**chosen["plain"], "temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.02}
    chosen["all"]["repetition_penalty"] = 1.4
    tasks: list[dict[str, Any]] = []
    expected = []
    for options in chosen.values():
        for number, prompt in enumerate(prompts):
            options = {**options, "max_new_tokens": 12}
            tasks.append({"do": "answer", "ids": prompt, "options": options, "seed": number})
            given = GenerationOptions(**options, seed=number)
            [done] = generate_ids(model, [prompt], given, [2])  # leaves out the end, which the page shows
            expected.append([*done.ids, *([2] if done.stop_reason == "eos" else [])])
    assert node(write(tmp_path / "a.html", model), *tasks) == expected


@needs_node
def test_the_sampler_is_ours_for_the_same_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    grid = [
        {**OFF, "do_sample": True, "temperature": t, "top_k": k, "top_p": p, "min_p": m}
        for t in (0.3, 1, 2) for k in (0, 1, 7, V, 99) for p in (0.05, 0.6, 1) for m in (0, 0.1, 1)
    ]  # fmt: skip
    logits = (3 * generator.standard_normal((len(grid), V))).astype(np.float32)
    uniform = generator.random(len(grid))
    tasks = [
        {"do": "choose", "logits": row.tolist(), "ids": [], "options": options, "u": u}
        for row, options, u in zip(logits, grid, uniform)
    ]
    found = node(write(tmp_path / "a.html", gpt()), *tasks)
    names = ("temperature", "top_k", "top_p", "min_p")
    for row, options, u, token in zip(logits, grid, uniform, found):
        scores = filtered(torch.from_numpy(row)[None], *(options[name] for name in names))
        assert int(sample(scores, torch.tensor([u]))) == token, options


@needs_node
def test_random_numbers_are_numpy_s(tmp_path: Path) -> None:
    seeds = [0, 1, 42, 2**32 - 1, 2**32, 2**53, 2**63 - 1]
    tasks = [{"do": "random", "seed": str(seed), "count": 20} for seed in seeds]
    found = node(write(tmp_path / "a.html", gpt()), *tasks)
    assert found == [np.random.default_rng([seed, 0]).random(20).tolist() for seed in seeds]


@needs_node
def test_characters(tmp_path: Path) -> None:
    texts = ["天地", "", "<sep>天<pad>", "x天😀\n", "？？。"]
    path = write(tmp_path / "a.html", gpt())
    ids, prompt, texts_back = node(
        path,
        {"do": "encode", "texts": texts},
        {"do": "prompt", "turns": [], "text": "天地？"},
        {"do": "decode", "rows": [[3, 0, 4, 1, 2]]},
    )
    assert ids == [CHARACTERS.encode_text(text) for text in texts]
    assert prompt["ids"] == CHARACTERS.encode("天地？", None, pad_to_max_length=False)[0]
    assert texts_back == [CHARACTERS.decode([3, 0, 4, 1, 2])]


CORPUS = ["low lower lowest newest 你好吗 你好 四川的省会是成都。 It's I'LL we're 123 45 +++ \n\n  x"] * 3
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u200a\u200b\u2028\u202f\u205f\u3000\ufeff"

HARD = [
    *(
        "'s",
        "'S",
        "'ſ",
        "'LL",
        "'ve",
        "low",
        "est",
        "你好",
        "四川",
        "1",
        "23",
        "!",
        "++",
        "é",
        "e\u0301",
        "-",
    ),
    *("😀", "\U0001f468\u200d\U0001f469", "<|im_end|>", "<sep>", "\u0130", "\u00df", "\u01c6", "\u0663"),
    *("\u2167", "\u0000", "\ufffd"),
]


def texts() -> list[str]:
    """Return texts that are hard to split: contractions, digits, white space, accents, emoji, markup."""
    generator = random.Random(1)
    pieces = [*SPACES, *HARD]
    return ["".join(generator.choices(pieces, k=generator.randrange(1, 25))) for _ in range(400)]


@needs_node
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "prefix", "words"])
def test_byte_level_bpe(kind: str, tmp_path: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = BpeTokenizer.train(
        CORPUS, 320, kind="qwen2" if kind == "qwen2" else "gpt2", special_tokens=special
    )
    if kind == "prefix":
        frame = tokenizer.definition.frame
        frame = {**frame, "pre_tokenizer": {**frame["pre_tokenizer"], "add_prefix_space": True}}
        tokenizer = BpeTokenizer(dataclasses.replace(tokenizer.definition, frame=frame))
    if kind == "words":
        tokenizer = tokenizer.with_tokens(["四川省", "四川", "C++ (x)", "\n\n"])
    given = [*texts(), "C++ (x)四川省\n\n四川 C++ (y)"]
    path = write(
        tmp_path / "a.html", gpt(vocab_size=tokenizer.get_vocab_size()), tokenizer, form="text", eos=[1]
    )
    rows = [tokenizer.encode_text(text) for text in given]
    generator = random.Random(3)
    rows_to_read = [[generator.randrange(tokenizer.get_vocab_size()) for _ in range(9)] for _ in range(100)]
    ids, back = node(path, {"do": "encode", "texts": given}, {"do": "decode", "rows": rows_to_read})
    assert [row for row, other in zip(given, ids) if tokenizer.encode_text(row) != other] == []
    assert ids == rows
    assert back == [tokenizer.decode(row) for row in rows_to_read]


@needs_node
@pytest.mark.parametrize("config", [{}, {"do_lower_case": False, "clean_up_tokenization_spaces": True}])
def test_word_pieces(config: dict[str, Any], tmp_path: Path) -> None:
    words = "low est ##est ##er l ##o ##w 你 好 四 ##川 1 ##2 ! ' s , . don ##t E é É do not 's n't I Ⅷ ٣ ss"
    pieces = re.split(" ", words)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **config}), encoding="utf-8"
    )
    tokenizer = WordPieceTokenizer.from_folder(tmp_path)
    path = write(tmp_path / "a.html", gpt(vocab_size=len(vocab)), tokenizer, form="text", eos=[3])
    given = [*texts(), "lowest Lower! É 你好 don't, [UNK] [SEP]" + "x" * 101]
    generator = random.Random(3)
    rows = [[generator.randrange(len(vocab)) for _ in range(9)] for _ in range(300)]
    prompts = [{"do": "prompt", "turns": [], "text": text} for text in given[:20]]
    ids, back, *read = node(path, {"do": "encode", "texts": given}, {"do": "decode", "rows": rows}, *prompts)
    bare = [tokenizer.encode_text(text, add_special_tokens=False) for text in given]
    assert [text for text, one, other in zip(given, ids, bare) if one != other] == []
    assert back == [tokenizer.decode(row) for row in rows]
    assert [one["ids"] for one in read] == [tokenizer.encode_text(text) for text in given[:20]]


CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": "{{ '<|im_start|>system\\nBe short.<|im_end|>\\n' }}" + CHATML,
    "trims": CHATML.replace("message.content +", "message.content | trim +"),
    "thoughts": CHATML.replace(
        "message.content +",
        "(message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant'"
        " else message.content) +",
    ).replace(
        "{%- endif %}",
        "{%- if enable_thinking is defined and not enable_thinking %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    ),
    "plain text": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
}  # fmt: skip


@needs_node
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_prompts(name: str, tmp_path: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = BpeTokenizer.train(CORPUS, 320, special_tokens=special).with_chat_template(TEMPLATES[name])
    end = tokenizer.special_tokens["<|im_end|>"]
    said = ["你好", "\n low <|im_end|> ", "四川\n\n"]
    answers = ["newest 12", "<think>\nx\n</think>\n\n你好"]
    thinks = [tokenizer.encode_text(text, allow_special=True) for text in answers]
    path = write(tmp_path / "a.html", gpt(vocab_size=320), tokenizer, form="chat", eos=[end])
    turns: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    tasks, expected = [], []
    for number, text in enumerate(said):
        for thinking in (True, False):
            tasks.append({"do": "prompt", "turns": list(turns), "text": text, "thinking": thinking})
            expected.append(question_ids(tokenizer, "chat", text, list(before), None if thinking else False))
        if number < 2 and (number == 0 or name in ("chatml", "thoughts")):
            ids = thinks[number]
            turns.append({"said": text, "ids": [*ids, end], "answer": answers[number]})
            before += [{"role": "user", "content": text}]
            before += [{"role": "assistant", "content": answers[number], "token_ids": ids}]
    found = node(path, *tasks)
    assert [one["ids"] for one in found] == expected
    [short] = node(path, {**tasks[-2], "room": 10})
    assert short["left"] == len(turns)
    assert short["ids"] == question_ids(tokenizer, "chat", said[-1])


def test_a_template_that_changes_messages_is_named(tmp_path: Path) -> None:
    changed = CHATML.replace("message.content +", "message.content.lstrip('\\n') +")
    tokenizer = BpeTokenizer.train(CORPUS, 300, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.with_chat_template(changed)
    notes = write_html(tmp_path / "a.html", gpt(vocab_size=300), tokenizer, form="chat", eos=[4])
    assert ["white space" in note for note in notes] == [True]


def test_a_template_of_another_kind_asks_each_question_alone(tmp_path: Path) -> None:
    numbered = CHATML.replace("message.role +", "message.role + loop.index|string +")
    tokenizer = BpeTokenizer.train(CORPUS, 300, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.with_chat_template(numbered)
    notes = write_html(tmp_path / "a.html", gpt(vocab_size=300), tokenizer, form="chat", eos=[4])
    assert len(notes) == 1
    assert "each question alone" in notes[0]
    assert read(tmp_path / "a.html")[0]["chat"]["between"] is None


@needs_node
def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.html", gpt())
    text = path.read_text(encoding="utf-8")
    place = text.index('class="weights">') + 2000
    for damaged in (
        text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :],
        text[:place] + text[place + 400 :],
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(AssertionError, match="Error"):
            node(path, {"do": "words"})


@needs_node
def test_both_languages_have_all_texts(tmp_path: Path) -> None:
    [words] = node(write(tmp_path / "a.html", gpt()), {"do": "words"})
    assert words["en"].keys() == words["zh"].keys()
    for key in words["en"]:
        assert set(re.findall(r"\{\d\}", words["en"][key])) == set(re.findall(r"\{\d\}", words["zh"][key])), (
            key
        )
    program = "".join((JAVASCRIPT / file).read_text(encoding="utf-8") for file in (*SCRIPTS, "page.html"))
    used = set(re.findall(r"(?:say\(\"|status\(\"|data-say=\"|data-label=\"|data-say\": \")(\w+)", program))
    assert used <= words["en"].keys()
