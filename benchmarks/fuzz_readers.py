"""The readers that fuzz.py tries.

A reader's `read` gets a folder with the files of a seed (fuzz_seeds.py), which may be damaged. It
returns a text that tells results apart. Its documented error is InputError; `errors` names others.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from minigpt.data.corpus import TextOptions, read_texts, recognise
from minigpt.data.labelled import LabelledOptions, read_labelled
from minigpt.data.memory_mapped import Tokens
from minigpt.data.memory_mapped import read_manifest as read_shards
from minigpt.data.preferences import read_preferences
from minigpt.data.questions import parse_questions
from minigpt.data.reader import read_conversations
from minigpt.diagnosis.examination import examine
from minigpt.diagnosis.record import read_record
from minigpt.evaluation.tasks import read_tasks
from minigpt.families.gpt2.openai_checkpoint import read_checkpoint
from minigpt.families.gpt2.pth_file import read_pth
from minigpt.finetuning.adapters import load_adapter
from minigpt.generation.generation_config import recommended_options
from minigpt.lens.curves import compare_runs
from minigpt.reference.weights import load as load_reference
from minigpt.storage.files import verify_manifest
from minigpt.storage.regular_files import read_bytes
from minigpt.storage.safetensors_files import WeightFiles
from minigpt.tokenization.chat_template import encode_chat, render_chat
from minigpt.training.checkpoint import read_newest
from minigpt.training.config import TrainConfig, read_recipe, read_run
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.run_state import Progress
from minigpt.weights.classifiers import load_classifier
from minigpt.weights.pretrained import load_model, load_tokenizer, read_config

__all__ = ["READERS", "REFUSED", "Reader", "set_base"]

REFUSED = "refused"  # a result: the file was noticed to be damaged, and something else is used
PIECES = [  # of templates, to splice
    *(
        "{% for a in range(100000) %}",
        "{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ x ~ x }}",
        "{% set x = x ~ x %}",
    ),
    *(
        "{% macro m() %}",
        "{% endmacro %}",
        "{{ m() }}",
        "{{ m() }}{{ m() }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ [[]] * 99999 }}",
    ),
    *(
        "{{ messages|join(messages|tojson) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '%9999999d' % 1 }}",
        "{{ ''.__class__ }}",
    ),
    *("{{ messages|sort|list|tojson }}", "{% set ns = namespace(x=[1]) %}", "{% set ns.x = ns.x + ns.x %}"),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ self }}", "{{ loop.cycle(1) }}"),
    *(
        "{% call m() %}{% endcall %}",
        "{% filter upper %}",
        "{% endfilter %}",
        "{{ range(10**9)|list }}",
        "{% block a %}",
    ),
    *("{% raw %}", "{% endraw %}", "{{ cycler(1).next() }}", "{{ dict(a=1)|xmlattr }}", "{{ lipsum(1000) }}"),
    *(
        "{{ 'a'|center(10**8) }}",
        "{{ 'ab'|replace('', 'x' * 9999) }}",
        "{{ (1/3)|round(10**6) }}",
        "{{ {}.update }}",
    ),
    *(
        "{{ 'x'|wordwrap(1) }}",
        "{{ messages|batch(10**8, 'a')|list }}",
        "{{ messages|slice(10**8)|list }}",
        "(",
    ),
    *(
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'x' * 99999 | list | length }}",
        "{{",
    ),
]
MESSAGES = [
    {"role": "system", "content": "be x"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "axb"},
]


@dataclass(frozen=True)
class Reader:
    """A reader of files."""

    name: str
    words: str  # of the table
    read: Callable[[Path], str]
    share: float = 1.0  # of all inputs, relative to other readers
    sealed: bool = False  # checksums cover all: whatever is accepted must have the seed's result
    errors: tuple[type[BaseException], ...] = ()  # documented errors besides InputError
    only: str = ""  # pattern of the names of files that are changed
    forge: Callable[[random.Random, Path], None] | None = None  # after the change: makes checksums right
    change: Callable[[random.Random, bytes], bytes] | None = None  # a change of its own kind


def digest(*parts: Any) -> str:
    """A text that tells results apart."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu()
            found.update(str((part.dtype, part.shape)).encode())
            part = part.contiguous().view(torch.uint8).numpy() if part.numel() and part.ndim else str(part)
        if isinstance(part, np.ndarray):
            found.update(str((part.dtype, part.shape)).encode() + part.tobytes())
        else:
            found.update(repr(part).encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def model_digest(model: Any) -> str:
    """The weights and buffers of a model, and its configuration."""
    return digest(
        repr(model.config), *(value for pair in sorted(model.state_dict().items()) for value in pair)
    )


def the_file(folder: Path) -> Path:
    """The only file of a seed (it may be a link to itself)."""
    (path,) = [folder / entry.name for entry in os.scandir(folder)] or [folder / "missing"]
    return path


# -- reading -----------------------------------------------------------------------------------------------


def data(folder: Path) -> str:
    found, report = read_conversations(the_file(folder))
    report.print_summary()
    return digest([(c.turns, c.weight) for c in found])


def texts(folder: Path) -> str:
    path = the_file(folder)
    kind = recognise(path, TextOptions()).holds_texts
    return digest(kind, list(read_texts(path)))


def preferences(folder: Path) -> str:
    found, _ = read_preferences(the_file(folder))
    return digest([(p.chosen.turns, p.rejected.turns) for p in found])


def labelled(folder: Path) -> str:
    found, _ = read_labelled(the_file(folder), LabelledOptions())
    return digest([one[:2] for one in found])


def questions(folder: Path) -> str:
    return digest(parse_questions(read_bytes(the_file(folder)), "questions"))


def tokenizer(folder: Path) -> str:
    found = load_tokenizer(folder)
    ids = found.encode_text("你好 <|endoftext|> ab\n  x é 1234 \U0001f600")
    return digest(found.get_vocab_size(), ids, found.decode(ids), found.fingerprint)


def config(folder: Path) -> str:
    return digest(repr(read_config(folder)), repr(recommended_options(folder)))


def weights(folder: Path) -> str:
    files = WeightFiles(folder)
    return digest(*((name, files[name]) for name in files), *(files[name] for name in files))


def model(folder: Path) -> str:
    return model_digest(load_model(folder))


def reference(folder: Path) -> str:
    return digest(repr(load_reference(folder)))


def classifier(folder: Path) -> str:
    found, words = load_classifier(folder)
    return digest(model_digest(found), repr(found.labels), words.get_vocab_size())


def adapter(folder: Path) -> str:
    found = load_model(BASE[0])
    load_adapter(found, folder)
    return model_digest(found)


def pth(folder: Path) -> str:
    found = read_pth(the_file(folder))
    return digest(model_digest(found.model))


def bundle(folder: Path) -> str:
    sizes, arrays = read_checkpoint(folder)
    return digest(sizes, *(value for pair in sorted(arrays.items()) for value in pair))


def template(folder: Path) -> str:
    source = read_bytes(the_file(folder)).decode("utf-8", "replace")
    text = render_chat(source, MESSAGES, add_generation_prompt=True)
    return digest(text, encode_chat(words_of(BASE[1]), MESSAGES, template=source))


@functools.cache
def words_of(folder: Path) -> Any:
    """The tokenizer of a folder."""
    return load_tokenizer(folder)


def recipe(folder: Path) -> str:
    kind = FinetuneConfig if random.Random(str(folder)).random() < 0.3 else TrainConfig
    return digest(dataclasses.replace(read_recipe(str(folder / "recipe.toml"), kind), recipe=""))


def run_config(folder: Path) -> str:
    return digest(read_run(folder).as_dict() | {"output": ""})


def shards(folder: Path) -> str:
    manifest = read_shards(folder)
    if manifest is None:
        return REFUSED
    tokens = Tokens(folder, manifest)
    tokens.verify()
    return digest(tokens.read(0, len(tokens)), tokens.fingerprint)


def doctor(folder: Path) -> str:
    found = examine(read_record(folder), deep=False)
    return digest([one.code for one in found])


def plot(folder: Path) -> str:
    from minigpt.lens.results import in_terminal

    runs = compare_runs([folder])
    return digest(in_terminal(runs, "zh", 70))


def checkpoint(folder: Path) -> str:
    found, passed_over = read_newest(folder)
    if passed_over:
        return REFUSED
    tensors = {**(found.optimizer or {}), **found.rng}
    return digest(found.state, *(value for pair in sorted(tensors.items()) for value in pair))


def state(folder: Path) -> str:
    progress = Progress()
    progress.load(read_newest(folder)[0].state)
    return digest(progress)


def tasks(folder: Path) -> str:
    return digest([(one.form, one.examples) for one in read_tasks([the_task(folder)])])


def the_task(folder: Path) -> Path:
    """The file or folder of a task."""
    names = sorted(entry.name for entry in os.scandir(folder))
    return folder / next((name for name in names if name.endswith(".toml")), (*names, "missing")[0])


def manifest(folder: Path) -> str:
    verify_manifest(folder)
    return "whole"


# -- changes of their own kind -----------------------------------------------------------------------------


def spliced(rng: random.Random, content: bytes) -> bytes:
    """A template with pieces of other templates between its parts."""
    text = content.decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        parts = re.split(r"(?=\{[{%])|(?<=[%}]\})", text)
        parts.insert(rng.randrange(len(parts) + 1), "".join(rng.choices(PIECES, k=rng.choice((1, 1, 2, 4)))))
        if rng.random() < 0.3 and len(parts) > 1:
            del parts[rng.randrange(len(parts))]
        text = "".join(parts)
    return text.encode("utf-8", "surrogatepass")


def hostile_pickle(rng: random.Random, content: bytes) -> bytes:
    """A .pth whose pickle has other opcodes; its checksums are right."""
    source = zipfile.ZipFile(io.BytesIO(content))
    (name,) = [name for name in source.namelist() if name.endswith("data.pkl")]
    body = source.read(name)[2:-1]  # without its protocol and its end
    doubled = b"]q\xf0" + b"(h\xf0h\xf0tq\xf0" * rng.choice((5, 30, 100, 5000)) + b"0"
    extra = rng.choice(
        (
            b"(" * rng.choice((10, 5000, 10**6)),
            b"]" * rng.choice((10, 10**6)),
            doubled,
            doubled[:-1] + b"Q",
            b"cos\nsystem\n(S'touch executed'\ntR",
            b"cbuiltins\neval\n(S'1'\ntR0",
            b"}" + b"(" * 2000 + b"t" * 2000,
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"X" + (2**32 - 1).to_bytes(4, "little"),
            b"B\xff\xff\xff\x7f",
            b"\x8a\xff" + b"\xff" * 255,
            b"\x8b\xff\xff\xff\x7f",
            b"I" + b"9" * 10_000 + b"\n0",
            b"r\xff\xff\xff\x7f",
            b"2" * 10**6,
            b"]" + b"]a" * 100_000,
            b"(" + b"]" * 1000 + b"l",
            b"\x95" + b"\xff" * 8,
            b"N" * 1000,
            b"ccollections\nOrderedDict\n)R",
            b"(K\x01" * 300 + b"t" * 300 + b"0",
            b"ctorch\nFloatStorage\n(K\x01tR",
            b"Q",
            b"P1\n",
        )
    )
    at = rng.choice((0, len(body), rng.randrange(len(body))))
    body = body[:at] + extra + body[at:]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for one in source.namelist():
            archive.writestr(
                zipfile.ZipInfo(one), b"\x80\x02" + body + b"." if one == name else source.read(one)
            )
    return packed.getvalue()


def new_manifest(rng: random.Random, folder: Path) -> None:
    """Write the manifests of all folders anew, so that a change is one that its writer made."""
    for path in folder.rglob("manifest.json"):
        if not path.is_file():
            continue
        files = {
            one.name: {"size": one.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(one.read_bytes())}
            for one in sorted(path.parent.iterdir())
            if one.is_file() and one.stat().st_size < 10**8 and one != path
        }
        path.write_text(json.dumps({"format": 2, "files": files}))


def new_shards(rng: random.Random, folder: Path) -> None:
    """Make the checksum of shards.json right."""
    path = folder / "shards.json"
    if not path.is_file() or path.stat().st_size > 10**6:  # a device, or a file that claims a terabyte
        return
    try:
        values = json.loads(path.read_bytes())
        values.pop("own_sha256", None)
        own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**values, "own_sha256": own}))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass


# -- readers -----------------------------------------------------------------------------------------------


BASE: list[Path] = []  # the base of the adapter, and a folder with a BPE tokenizer; filled by set_base


def set_base(root: Path) -> None:
    """Tell the readers of adapters and templates which model they belong to."""
    BASE[:] = [root / "_work/run/best", root / "_work/bpe"]


READERS = [
    Reader("data", "questions and answers, twenty formats", data, 7.0),
    Reader("texts", "texts to learn from", texts, 1.5, only=r".*"),
    Reader("preferences", "pairs of answers", preferences, 1.0),
    Reader("labelled", "texts with labels", labelled, 1.0),
    Reader("questions", "a file of questions", questions, 1.0, errors=(OSError,)),
    Reader("tasks", "tasks of an evaluation", tasks, 2.5),
    Reader("tokenizer", "tokenizers: characters, BPE, WordPiece", tokenizer, 2.5),
    Reader("config", "config.json, generation_config.json", config, 3.0),
    Reader("weights", "safetensors, index, shards of weights", weights, 2.0),
    Reader("model", "a model's folder", model, 0.7),
    Reader("reference", "the same for NumPy", reference, 1.0),
    Reader("quantized", "folders of int8 and int4", model, 0.15),
    Reader("classifier", "a classifier's folder", classifier, 0.4),
    Reader("adapter", "an adapter's folder", adapter, 0.3),
    Reader("sealed", "a model's folder beside its manifest", model, 1.0, sealed=True),
    Reader("manifest", "manifest.json", manifest, 2.5, sealed=True),
    Reader("pth", ".pth", pth, 1.0, sealed=True),
    Reader("forged-pth", ".pth with other opcodes", pth, 0.7, change=hostile_pickle),
    Reader("bundle", "OpenAI's release", bundle, 2.5),
    Reader("template", "chat templates", template, 2.0, errors=(OSError,), change=spliced),
    Reader("recipe", "recipes", recipe, 2.5),
    Reader("run", "run.json", run_config, 1.5, only=r"run\.json"),
    Reader("shards", "shards of ids", shards, 2.0, sealed=True),
    Reader("forged-shards", "the same with right checksums", shards, 1.0, forge=new_shards),
    Reader("doctor", "the doctor on a run", doctor, 0.6, only=r"(?!.*\.(safetensors|bin)).*"),
    Reader("plot", "plot on a run", plot, 0.4, only=r"(?!.*\.(safetensors|bin)).*"),
    Reader("checkpoint", "the checkpoints of a run", checkpoint, 0.8, sealed=True, only=r"step-.*"),
    Reader("state", "training_state.json with a right checksum", state, 0.8,
           only=r"step-.*/training_state\.json", forge=new_manifest),
]  # fmt: skip
