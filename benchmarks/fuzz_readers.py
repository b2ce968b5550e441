"""The readers that fuzz.py tries, with seeds that the tool's own writers make: tiny models, runs and data.

`make_seeds(folder)` writes folder/READER/SEED/FILES. A reader's `read` gets a folder of that shape and
returns a text that tells results apart. Its documented error is InputError; `errors` names others.
"""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from minigpt import __main__ as command
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
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.reference.weights import load as load_reference
from minigpt.storage.files import atomic_folder, verify_manifest
from minigpt.storage.regular_files import read_bytes
from minigpt.storage.safetensors_files import WeightFiles
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.chat_template import encode_chat, render_chat
from minigpt.training.checkpoint import read_newest
from minigpt.training.config import TrainConfig, read_recipe, read_run
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.run_state import Progress
from minigpt.weights.classifiers import load_classifier
from minigpt.weights.pretrained import load_model, load_tokenizer, read_config, save_pretrained

__all__ = ["READERS", "REFUSED", "Reader", "make_seeds", "set_base"]

REFUSED = "refused"  # a result: the file was noticed to be damaged, and something else is used
ROOT = Path(__file__).resolve().parents[1]
PAIRS = [
    *(("天空是什么颜色?", "蓝色。"), ("1+1=?", "2"), ("Who are you?", "a small model"), ("再见", "下次见")),
    *(("猫会飞吗", "不会"), ("  space ", "é\u0301 ok"), ("数到三", "一二三"), ("what is\ttab", 'a, "b"; c')),
]
CHAT = (
    "{%- for m in messages -%}<|{{ m['role'] }}|>{{ m.content | trim }}\n{%- if not loop.last %} {% endif -%}"
    "{%- endfor -%}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "plain": CHAT,
    "macro": "{% macro one(m) %}[{{ m.role|upper }}] {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ one(m) }}{% endfor %}",
    "namespace": "{% set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.content %}"
    "{{ '%s:%s' % (m.role, ns.last.split('x')[0].strip()) }}{% endfor %}{{ messages|length * 2 }}",
    "filters": "{{ messages | map(attribute='content') | join(', ') }}{{ messages | tojson(indent=1) }}"
    "{{ messages[0].content | replace('a', 'b') | title }}{{ range(3) | list }}{% if x is defined %}{{ x }}"
    "{% endif %}{{ strftime_now('%Y')|length }}",
    "loops": "{% for a in range(9) %}{% for b in range(9) %}{{ a * b }}{% if b > a %}{% break %}{% endif %}"
    "{% endfor %}{% endfor %}{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}",
}
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
TEXT = "The quick brown fox. 天地玄黄,宇宙洪荒。\n\n日月盈昃,辰宿列张。\tOne more line of text é.\n" * 6


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
            one.name: {"size": one.stat().st_size, "sha256": hashlib.sha256(one.read_bytes()).hexdigest()}
            for one in sorted(path.parent.iterdir())
            if one.is_file() and one.stat().st_size < 10**8 and one != path
        }
        path.write_text(json.dumps({"format": 1, "files": files}))


def new_shards(rng: random.Random, folder: Path) -> None:
    """Make the checksum of shards.json right."""
    path = folder / "shards.json"
    try:
        values = json.loads(path.read_bytes())
        values.pop("own_sha256", None)
        own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**values, "own_sha256": own}))
    except (OSError, ValueError, AttributeError, RecursionError):
        pass


# -- seeds --------------------------------------------------------------------------------------------------


BASE: list[Path] = []  # the base of the adapter, and a folder with a BPE tokenizer; filled by make_seeds


def run(*arguments: object) -> None:
    """Run a command in this process; it must succeed."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = command.main([str(one) for one in arguments])
    if code:
        raise RuntimeError(f"minigpt {' '.join(map(str, arguments))}: {said.getvalue()}")


def place(folder: Path, name: str, content: bytes | str) -> None:
    """Write FOLDER/NAME, where NAME has the seed's name before its own."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
    return packed.getvalue()


def workbook(rows: list[tuple[str, ...]]) -> bytes:
    """A small .xlsx with texts in its cells."""
    cells = "".join(
        f'<row r="{r}">'
        + "".join(
            f'<c r="{chr(65 + c)}{r}" t="inlineStr"><is><t>{escape(v)}</t></is></c>'
            for c, v in enumerate(row)
        )
        + "</row>"
        for r, row in enumerate(rows, 1)
    )
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    rel = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" '
        f'ContentType="{kind}.sheet.main+xml"/><Override PartName="/xl/worksheets/sheet1.xml" '
        f'ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{rel}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{rel}"><sheets><sheet name="S" sheetId="1" '
        f'r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{rel}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }  # fmt: skip
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def make_data(root: Path) -> None:
    """Seeds of data in all formats."""
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in PAIRS
    ]
    shared = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS
    ]
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in PAIRS]
    plain = lines(rows).encode()
    table = "question,answer\n" + "".join(f'"{q}","{a.replace(chr(34), chr(34) * 2)}"\n' for q, a in PAIRS)
    log = "".join(f"2024-05-01 10:0{i}:00 {'甲' if i % 2 else '乙'}\n{q}\n" for i, (q, _) in enumerate(PAIRS))
    whatsapp = "".join(
        f"[01/05/24, 10:0{i}:00] {'Ann' if i % 2 else 'Bob'}: {q}\n" for i, (q, _) in enumerate(PAIRS)
    )
    files: dict[str, bytes | str] = {
        "pairs.jsonl": plain,
        "array.json": json.dumps(rows),
        "chats.jsonl": lines(chats),
        "sharegpt.json": json.dumps(shared, ensure_ascii=False),
        "alpaca.json": json.dumps(alpaca, indent=1),
        "table.csv": table,
        "table.tsv": "".join(f"{q}\t{a}\n" for q, a in PAIRS[:6]),
        "table.xlsx": workbook([("question", "answer"), *PAIRS]),
        "table.parquet": parquet(rows),
        "chats.parquet": parquet(chats),
        "pairs.jsonl.gz": gzip.compress(plain, mtime=0),
        "pairs.jsonl.bz2": bz2.compress(plain),
        "pairs.jsonl.xz": lzma.compress(plain),
        "utf16.csv": table.encode("utf-16"),
        "gb.jsonl": plain.decode().encode("gb18030"),
        "log.txt": log,
        "whatsapp.txt": whatsapp,
        "text.txt": "".join(f"Q: {q}\nA: {a}\n\n" for q, a in PAIRS),
        "latin.csv": "question,answer\nça,là\nété,où\n".encode("utf-16-le"),
    }
    zstd = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(plain)
    files["pairs.jsonl.zst"] = zstd.getvalue().to_pybytes()
    for name, content in files.items():
        place(root, f"data/{name}/{name}", content)
    for name in ("text.txt", "log.txt", "pairs.jsonl", "table.csv", "table.parquet", "pairs.jsonl.gz"):
        place(root, f"texts/{name}/{name}", files[name])
    place(root, "texts/plain.txt/plain.txt", TEXT)
    place(root, "texts/records.jsonl/records.jsonl", lines([{"text": TEXT[:80]}, {"text": "b\nc"}]))
    pairs = [{"prompt": q, "chosen": a, "rejected": "no"} for q, a in PAIRS]
    place(root, "preferences/pairs.jsonl/pairs.jsonl", lines(pairs))
    place(root, "preferences/pairs.json/pairs.json", json.dumps(pairs))
    place(root, "preferences/pairs.csv/pairs.csv", "prompt,chosen,rejected\na,b,c\nd,e,f\n")
    place(root, "preferences/pairs.parquet/pairs.parquet", parquet(pairs))
    labels = [{"text": q, "label": "ab"[i % 2]} for i, (q, _) in enumerate(PAIRS)]
    place(root, "labelled/texts.jsonl/texts.jsonl", lines(labels))
    place(root, "labelled/texts.csv/texts.csv", "text,label\ngood one,pos\nbad one,neg\n")
    place(root, "labelled/texts.parquet/texts.parquet", parquet(labels))
    place(root, "questions/lines.txt/lines.txt", "".join(f"{q}\n" for q, _ in PAIRS))
    place(root, "questions/pairs.jsonl/pairs.jsonl", plain)


def make_tasks(root: Path) -> None:
    """Seeds of tasks."""
    choices = [{"question": q, "choices": ["a", "b", a], "answer": 2} for q, a in PAIRS]
    place(root, "tasks/choices.jsonl/choices.jsonl", lines(choices))
    place(root, "tasks/letters.csv/letters.csv", "question,A,B,C,D,answer\nx,1,2,3,4,B\ny,1,2,3,4,A\n")
    place(root, "tasks/open.jsonl/open.jsonl", lines([{"question": q, "answer": a} for q, a in PAIRS]))
    place(
        root,
        "tasks/toml/task.toml",
        'test = "test.jsonl"\ntemplate = "Q: {{question}}\\nA:"\nmax_new_tokens = 3\n',
    )
    place(root, "tasks/toml/test.jsonl", lines(choices))


def make_models(root: Path) -> None:
    """Seeds of model folders, tokenizers, runs: what the commands write."""
    work = root / "_work"
    work.mkdir()
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    place(work, "data.jsonl", lines(rows))
    run("vocab", "--data", work / "data.jsonl", "--output", work / "vocab.json")
    sizes = ("--n_embd", 8, "--n_head", 2, "--n_layer", 1, "--max_length", 32)
    steps = (
        "--max_steps",
        4,
        "--batch_size",
        2,
        "--eval_steps",
        2,
        "--logging_steps",
        1,
        "--device",
        "cpu",
        "--threads",
        1,
    )
    files = (
        "--train_data",
        work / "data.jsonl",
        "--val_data",
        work / "data.jsonl",
        "--vocab_path",
        work / "vocab.json",
    )
    run("train", *files, *sizes, *steps, "--output", work / "run")
    run(
        "train",
        *files,
        *sizes[:6],
        *sizes[6:],
        *steps,
        "--family",
        "qwen3",
        "--head_dim",
        8,
        "--num_key_value_heads",
        1,
        "--output",
        work / "qwen3",
    )
    place(work, "text.txt", TEXT * 3)
    run(
        "train",
        "--text",
        work / "text.txt",
        *sizes[:6],
        "--block_size",
        16,
        *steps,
        "--output",
        work / "text",
    )
    run(
        "finetune",
        "--model",
        work / "run/best",
        *files[:4],
        "--method",
        "lora",
        "--r",
        2,
        *steps,
        "--output",
        work / "lora",
    )
    run("quantize", "--model", work / "run/best", "--precision", "int8", "--output", work / "int8")
    torch.manual_seed(1)
    wide = GPTLMHeadModel(GPTConfig(64, 2, 1, 0.1, 32, 280, False, "exact"))
    words = BpeTokenizer.train([TEXT, *(q for q, _ in PAIRS)], 280)
    save_pretrained(wide, work / "wide", words)
    run("quantize", "--model", work / "wide", "--precision", "int4", "--output", work / "int4")
    small = GPTLMHeadModel(GPTConfig(8, 2, 1, 0.1, 32, 280, True, "tanh"))
    save_pretrained(small, work / "bpe", words.with_chat_template(CHAT))
    save_pretrained(small, work / "sharded", words, max_shard_size=4000)
    atomic_folder(work / "whole", lambda goal: save_pretrained(small, goal, words))
    run(
        "finetune",
        "--task",
        "classification",
        "--model",
        work / "run/best",
        "--train_data",
        labels_of(work),
        *steps,
        "--output",
        work / "classes",
    )
    for folder in ("run/best", "qwen3/best", "text/best"):
        copied(work / folder, root / "config" / folder.replace("/", "-"), "*.json")
    for folder in ("bpe", "sharded", "qwen3/best"):
        copied(work / folder, root / "weights" / folder.replace("/", "-"), "*.safetensors*")
    for folder in ("bpe", "qwen3/best", "sharded"):
        copied(work / folder, root / "model" / folder.replace("/", "-"), "*", without="manifest.json")
        copied(work / folder, root / "reference" / folder.replace("/", "-"), "*", without="manifest.json")
    for folder in ("int8", "int4"):
        copied(work / folder, root / "quantized" / folder, "*", without="manifest.json")
    for folder in ("whole", "run/best", "int8"):
        copied(work / folder, root / "sealed" / folder.replace("/", "-"), "*")
        copied(work / folder, root / "manifest" / folder.replace("/", "-"), "*")
    copied(work / "classes/best", root / "classifier/classes", "*", without="manifest.json")
    copied(work / "lora/best", root / "adapter/lora", "adapter*")
    copied(work / "bpe", root / "tokenizer/bpe", "*", without="model.safetensors")
    copied(work / "run/best", root / "tokenizer/characters", "*token*")
    parts = json.loads((work / "bpe/tokenizer.json").read_bytes())["model"]
    place(root, "tokenizer/two-files/vocab.json", json.dumps(parts["vocab"], ensure_ascii=False))
    merges = [one if isinstance(one, str) else " ".join(one) for one in parts["merges"]]
    place(root, "tokenizer/two-files/merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    place(root, "tokenizer/two-files/config.json", (work / "bpe/config.json").read_bytes())
    place(root, "tokenizer/two-files/tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}')
    wordpiece = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted(set("你好吗天地abcxyz0123")),
        "##b",
        "##c",
    ]
    place(root, "tokenizer/wordpiece/vocab.txt", "\n".join(wordpiece) + "\n")
    place(
        root,
        "tokenizer/wordpiece/tokenizer_config.json",
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}',
    )
    place(root, "tokenizer/wordpiece/config.json", '{"model_type": "gpt2"}')
    for folder in ("run", "text", "qwen3"):
        for reader in ("doctor", "plot", "run", "checkpoint", "state"):
            copied(work / folder, root / reader / folder, "*")
            if reader in ("doctor", "plot"):
                for path in (root / reader / folder).glob("*/*.safetensors"):
                    path.write_bytes(b"")
    (found,) = (work / "text").rglob("shards.json")
    copied(found.parent, root / "shards/text", "*")
    copied(found.parent, root / "forged-shards/text", "*")
    torch.save({"model_state_dict": small.state_dict(), "epoch": 3}, work / "document.pth")
    torch.save({"model": small.state_dict(), "model_args": {"n_head": 2}, "iter_num": 7}, work / "nano.pth")
    for name in ("document", "nano"):
        for reader in ("pth", "forged-pth"):
            place(root, f"{reader}/{name}/model.pth", (work / f"{name}.pth").read_bytes())
    for name, text in TEMPLATES.items():
        place(root, f"template/{name}/chat_template.jinja", text)
    for path in (ROOT / "minigpt/training/recipes").glob("*.toml"):
        place(root, f"recipe/{path.stem}/recipe.toml", path.read_bytes())
    for name in ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        place(root, f"bundle/tiny/{name}", (ROOT / "tests/golden/openai_gpt2_tiny" / name).read_bytes())


def labels_of(work: Path) -> Path:
    path = work / "labels.jsonl"
    path.write_text(lines([{"text": q, "label": "ab"[i % 2]} for i, (q, _) in enumerate(PAIRS * 2)]))
    return path


def copied(source: Path, goal: Path, pattern: str, without: str = "") -> None:
    """Copy the files of a folder, and of the folders in it; links stay links."""
    goal.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob(pattern)):
        if path.is_symlink():
            (goal / path.name).symlink_to(path.readlink())
        elif path.is_dir():
            shutil.copytree(path, goal / path.name, symlinks=True)
        elif path.name != without and path.name != "run.lock":
            shutil.copyfile(path, goal / path.name)


def make_seeds(root: Path) -> None:
    """Write the seeds of all readers."""
    make_data(root)
    make_tasks(root)
    make_models(root)


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
