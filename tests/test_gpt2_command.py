"""`python gpt2.py "prompt"`: three backends, two kinds of model folders, one line for each bad input."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from minigpt.families.gpt2.openai_checkpoint import read_checkpoint
from minigpt.families.gpt2.presets import OPENAI_FILES
from minigpt.tokenization.bpe import BpeTokenizer
from tests.commands import Result, RunCommand

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "golden" / "openai_gpt2_tiny"
# TensorFlow's own results (make_openai_checkpoint.py): a prompt, its ids, and the most likely next ids.
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
PROMPT, NEXT = EXPECTED["prompt"], EXPECTED["next_ids"]
BACKENDS = ("numpy", "jax", "torch")

Command = Callable[..., Result]


@pytest.fixture
def command(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Return a function that runs `python gpt2.py` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return partial(run_command, "../gpt2.py")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "jax":
        pytest.importorskip("jax", reason="JAX is optional and not installed")
    return name


def copy_of_openai_form(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in OPENAI_FILES:
        shutil.copy(FIXTURE / name, folder)
    return folder


def copy_of_hugging_face_form(folder: Path, prefix: str = "transformer.") -> Path:
    """Write the same model as transformers would write it."""
    folder.mkdir(parents=True)
    sizes, weights = read_checkpoint(FIXTURE)
    save_file({name.replace("transformer.", prefix): array for name, array in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    config = {
        "model_type": "gpt2",
        "vocab_size": sizes.n_vocab,
        "n_positions": sizes.n_ctx,
        "n_embd": sizes.n_embd,
        "n_head": sizes.n_head,
        "n_layer": sizes.n_layer,
        "activation_function": "gelu_new",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURE / "encoder.json", folder / "vocab.json")
    shutil.copy(FIXTURE / "vocab.bpe", folder / "merges.txt")
    tokenizer = BpeTokenizer.from_folder(folder)
    tokenizer.save(folder)
    return folder


def run(command: Command, *arguments: object) -> Result:
    """Run the command with the fixture as the model."""
    return command("--models_dir", FIXTURE.parent, "--model_size", FIXTURE.name, *arguments)


# -- what it writes -----------------------------------------------------------------------------------------


def test_all_backends_write_what_tensorflow_wrote(command: Command, backend: str) -> None:
    result = run(command, PROMPT, "--n_tokens_to_generate", len(NEXT), "--backend", backend, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["ids"] == NEXT
    assert found["prompt"] == PROMPT


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_hugging_faces_form(command: Command, backend: str, tmp_path: Path, prefix: str) -> None:
    copy_of_hugging_face_form(tmp_path / "models" / "mine", prefix)
    result = command(
        PROMPT, "--model_size", "mine", "--n_tokens_to_generate", 20, "--backend", backend, "--json"
    )
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ids"] == NEXT


def test_the_prompt_is_encoded_as_openai_would() -> None:
    assert BpeTokenizer.from_folder(FIXTURE).encode_text(PROMPT) == EXPECTED["prompt_ids"]


def test_text(command: Command) -> None:
    """NumPy is the default. Control characters (this model often writes U+001F) are escaped."""
    result = run(command, PROMPT, "--n_tokens_to_generate", 5)
    raw = b"".join(BpeTokenizer.from_folder(FIXTURE).token_bytes(index) for index in NEXT[:5])
    assert raw[-1:] == b"\x1f"
    assert result == (0, raw[:-1].decode("utf-8", "replace") + "\\x1f\n", "")


def test_to_the_end_of_the_context(command: Command, backend: str) -> None:
    room = 48 - len(EXPECTED["prompt_ids"])
    result = run(command, PROMPT, "--n_tokens_to_generate", room, "--backend", backend, "--json")
    assert json.loads(result.out)["ids"][: len(NEXT)] == NEXT
    result = run(command, PROMPT, "--n_tokens_to_generate", room + 1, "--backend", backend)
    assert (result.code, result.out) == (2, "")
    assert "the model reads 48 tokens: 15 of the prompt and --n_tokens_to_generate 34" in result.err


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (["--help"], set()),
        (
            [
                PROMPT,
                "--n_tokens_to_generate",
                "3",
                "--models_dir",
                str(FIXTURE.parent),
                "--model_size",
                FIXTURE.name,
            ],
            {"numpy"},
        ),
    ],
)
def test_nothing_is_loaded_that_is_not_needed(arguments: list[str], loaded: set[str], tmp_path: Path) -> None:
    """Also, the file gpt2.py and the folder families/gpt2 do not shadow each other, from any folder."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['gpt2.py', *{arguments!r}]\n"
        f"sys.path.insert(0, {str(ROOT)!r})  # as Python does for a script\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'gpt2.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, *sorted({'torch', 'jax', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].split() == ["0", *sorted(loaded)]


# -- downloads ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a file server with tmp_path/"served" as its root. Return its address."""
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)

    def handler(*arguments: object) -> http.server.SimpleHTTPRequestHandler:
        folder = str(tmp_path / "served")
        return http.server.SimpleHTTPRequestHandler(*arguments, directory=folder)  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["124M", "gpt2"])
def test_a_mirror(command: Command, server: str, tmp_path: Path, name: str) -> None:
    served = copy_of_openai_form(tmp_path / "served" / "124M")
    arguments = (PROMPT, "--n_tokens_to_generate", 20, "--model_size", name, "--json")
    result = command(*arguments, "--mirror", server)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ids"] == NEXT
    shutil.rmtree(served)
    assert {path.name for path in (tmp_path / "models" / "124M").iterdir()} == set(OPENAI_FILES)
    assert json.loads(command(*arguments).out)["ids"] == NEXT  # the second time from the disk


def test_hf_endpoint(command: Command, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of_hugging_face_form(tmp_path / "served/openai-community/gpt2-large/resolve/main")
    monkeypatch.setenv("HF_ENDPOINT", server)
    result = command(PROMPT, "--n_tokens_to_generate", 20, "--model_size", "774M", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ids"] == NEXT


def test_what_is_missing_there(command: Command, server: str, tmp_path: Path) -> None:
    (copy_of_openai_form(tmp_path / "served" / "355M") / "vocab.bpe").unlink()
    result = command(PROMPT, "--model_size", "355M", "--mirror", server)
    assert result.code == 2
    assert result.err == (
        f"gpt2.py: error: {server}/355M/vocab.bpe cannot be downloaded: the server answers 404 (File not "
        "found), there is no such file. Without a network: put vocab.bpe, model.ckpt.index, "
        f"model.ckpt.data-00000-of-00001 into models/355M, from {server}/355M/\n"
    )


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "PROMPT is missing: see --help"),
        ([""], "the prompt is empty: the model needs a token to start from"),
        (["two", "words"], "unexpected argument: words (a value with spaces needs quotes around it)"),
        (["-x"], "unknown flag '-x'; known: --json, --language, --n_tokens_to_generate, "),
        (["--prompt", "x"], "unknown flag '--prompt'; write PROMPT without a flag before it"),
        (["x", "--model_sise", "124M"], "unknown flag '--model_sise'; did you mean '--model_size'?"),
        (["x", "--model_size", "345M"], "unknown GPT-2 model '345M'; did you mean '355M'?"),
        (["x", "--backend", "tf"], "--backend must be one of 'numpy', 'jax', 'torch': got 'tf'"),
        (
            ["x", "--n_tokens_to_generate", "0"],
            "n_tokens_to_generate must be from 1 to 1000000: got n_tokens_to_generate=0",
        ),
        (["x", "--mirror", "ftp://a"], "mirror must be an address like https://example.org/models: got 'ftp"),
    ],
)
def test_bad_input(command: Command, arguments: list[str], text: str) -> None:
    result = command(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"gpt2.py: error: {text}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["-x", "--help", "--n_tokens_to_generate"])
def test_a_prompt_that_looks_like_a_flag(command: Command, prompt: str) -> None:
    result = run(command, "--n_tokens_to_generate", 1, "--json", "--", prompt)
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["prompt"] == prompt


def test_a_folder_of_ones_own_that_lacks_a_file(command: Command, backend: str, tmp_path: Path) -> None:
    folder = copy_of_openai_form(tmp_path / "models" / "mine")
    (folder / "model.ckpt.index").unlink()
    result = command("x", "--model_size", "mine", "--backend", backend)
    assert result.code == 2
    assert result.err.startswith("gpt2.py: error: models/mine/model.ckpt.index is missing")


def test_a_tokenizer_of_another_model(command: Command, backend: str, tmp_path: Path) -> None:
    folder = copy_of_openai_form(tmp_path / "models" / "mine")
    words = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    (folder / "encoder.json").write_text(json.dumps(words | {"zz": len(words)}))
    with (folder / "vocab.bpe").open("a") as file:
        file.write("z z\n")
    result = command("x", "--model_size", "mine", "--backend", backend)
    assert result.code == 2
    assert "the tokenizer has 272 entries, the model 271: they do not belong together" in result.err


def test_without_jax(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)  # then `import jax` raises ImportError
    result = command("x", "--backend", "jax")  # 124M, which is not there: nothing is downloaded before
    assert result.code == 2
    assert 'pip install "minigpt[jax]"' in result.err
