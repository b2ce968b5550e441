"""Seeds of fuzz.py: undamaged files of every kind, made by minigpt: tiny models, runs and data.

`make_seeds(folder)` writes folder/READER/SEED/FILES.
"""

import bz2
import gzip
import io
import json
import lzma
import shutil
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from minigpt import __main__ as command
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.storage.files import atomic_folder
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.weights.pretrained import save_pretrained

__all__ = ["PAIRS", "TEMPLATES", "make_seeds"]

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
TEXT = "The quick brown fox. 天地玄黄,宇宙洪荒。\n\n日月盈昃,辰宿列张。\tOne more line of text é.\n" * 6


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
