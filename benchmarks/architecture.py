"""Counts the size and the structure of the code, in one or several checkouts.

    python benchmarks/architecture.py                     # this checkout
    python benchmarks/architecture.py ../before .         # two checkouts, side by side
    python benchmarks/architecture.py --json
    python benchmarks/architecture.py --comments 50 --seed 1
    python benchmarks/architecture.py --comments 50 --seed 1 --in_place

It counts the files and lines of the package, functions of more than 40 lines, public names, and the modules
at the top of the package. It also follows two stories: the modules of minigpt that one training step enters
(from one update of the weights to the next, without an evaluation or a save), and those that one call of
`minigpt.generate` enters. A step enters a module if it calls one of its functions; imports do not count. Each
checkout runs in its own process. `--comments` prints comments and docstrings of the package, drawn at random:
a reader should understand each of them at first sight. Each is shown with the line that it is about, or by
`--in_place` between the lines around it, as a reader of the file sees it.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_BEFORE, _AFTER = 6, 10  # number of lines that --in_place shows before and after a comment
ROWS = {
    "files": "Python files",
    "lines": "lines of Python",
    "lines_of_c": "lines of C",
    "top": "modules at the top",
    "long_functions": "functions over 40 lines",
    "public_names": "public names",
    "train_step": "modules that one training step enters",
    "generate": "modules that one generate call enters",
}


def counted(root: Path) -> dict[str, Any]:
    """Count everything that can be counted without running the code."""
    package = root / "minigpt"
    files = sorted(package.rglob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    functions = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {
        "files": len(files),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files),
        "lines_of_c": sum(
            len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.[ch]")
        ),
        "top": sum(1 for path in package.glob("*.py") if not path.name.startswith("__")),
        "long_functions": sum((node.end_lineno or 0) - node.lineno + 1 > 40 for node in functions),
        "public_names": sum(len(public_names(tree)) for tree in trees),
    }


def public_names(tree: ast.Module) -> set[str]:
    """Return the functions and classes of a module whose names do not begin with an underscore."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


class Entered:
    """Records the modules of a package whose functions are called, in the order of their first calls."""

    def __init__(self, package: Path) -> None:
        self.package = f"{package}{os.sep}"
        self.modules: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Handle an event of sys.setprofile."""
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(self.package) and frame.f_code.co_name != "<module>":
            module = name.removeprefix(self.package)
            if module not in self.modules:
                self.modules.append(module)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the modules that are entered inside the block."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def stories(root: Path) -> dict[str, list[str]]:
    """Return the modules of one training step and one generate call. `root` must be first on sys.path."""
    import torch

    import minigpt
    from minigpt.__main__ import main

    def quietly(*argv: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(list(argv)) == 0, argv

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        rows = [{"question": f"{n}加一等于几？", "answer": f"等于{n + 1}。"} for n in range(64)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path("train.jsonl").write_text(text, encoding="utf-8")
        quietly("vocab", "--data", "train.jsonl", "--output", "vocab.json")
        steps = 0
        entered = Entered(root / "minigpt")
        update = torch.optim.AdamW.step

        def counting(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            # Record from the run's third update to its fourth. The estimate before the run does two updates.
            sys.setprofile(entered if steps == 5 else None)
            return update(self, *arguments, **options)

        torch.optim.AdamW.step = counting  # type: ignore[method-assign]
        try:
            quietly(
                *("train", "--train_data", "train.jsonl", "--val_data", "train.jsonl"),
                *("--vocab_path", "vocab.json", "--output", "run", "--recipe", "document", "--device", "cpu"),
                *("--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--batch_size", "8", "--threads", "1"),
                *("--max_steps", "6", "--eval_steps", "6", "--logging_steps", "6", "--report_to", "none"),
            )
        finally:
            sys.setprofile(None)
            torch.optim.AdamW.step = update  # type: ignore[method-assign]
        found["train_step"] = entered.modules
        model, tokenizer = minigpt.load_model("run/best"), minigpt.load_tokenizer("run/best")
        answer: Callable[[], str] = lambda: minigpt.generate(model, tokenizer, "3加一等于几？")  # noqa: E731
        answer()
        entered = Entered(root / "minigpt")
        with entered.watching():
            answer()
        found["generate"] = entered.modules
    return found


def remarks(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (first line, last line, text) of the comments and docstrings of a file.

    The text includes the line that the comment or docstring is about.

    This is the line of a comment behind code, the line below a comment of its own, and the name of a function
    or class. Adjacent comment lines are one text.
    """
    source = path.read_text(encoding="utf-8")
    lines = ["", *source.splitlines(), ""]
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            about = "" if isinstance(node, ast.Module) else lines[node.lineno].strip() + "\n"
            yield node.body[0].lineno, node.body[0].end_lineno or 0, about + text
    blocks: list[tuple[int, int, list[str]]] = []  # (first line, column, texts)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (line, column), text = token.start, token.string.lstrip("#").strip()
        if token.type != tokenize.COMMENT or re.match(r"noqa|type: ignore|fmt:|--", text):
            continue
        alone = not token.line[:column].strip()
        if alone and blocks and (blocks[-1][0] + len(blocks[-1][2]), blocks[-1][1]) == (line, column):
            blocks[-1][2].append(text)
        else:
            blocks.append((line, column, [text if alone else token.line.strip()]))
    for line, column, texts in blocks:
        alone = not lines[line][:column].strip()
        below = [lines[line + len(texts)].strip()] if alone else []
        text = "\n".join([*(f"# {text}" for text in texts), *below] if alone else texts)
        yield line, line + len(texts) - 1, text


def in_place(path: Path, first: int, last: int) -> str:
    """Return the lines of a remark, each marked with ">", and the lines around them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    shown = range(max(1, first - _BEFORE), min(len(lines), last + _AFTER) + 1)
    return "\n".join(f"{'>' if first <= number <= last else ' '} {lines[number - 1]}" for number in shown)


def drawn(root: Path, count: int, seed: int, as_in_file: bool = False) -> list[str]:
    """Draw comments and docstrings of the package at random. Each begins with its file and line."""
    files = sorted((root / "minigpt").rglob("*.py"))
    found = [(path, *remark) for path in files for remark in sorted(remarks(path))]
    return [
        f"{path}:{first}\n{in_place(path, first, last) if as_in_file else text}"
        for path, first, last, text in random.Random(seed).sample(found, min(count, len(found)))
    ]


def measured(root: Path) -> dict[str, Any]:
    """Return all numbers of a checkout. The two stories are followed in another process."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--stories", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return {**counted(root), "stories": json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Print a table with a column for each checkout, and the two stories of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--comments", type=int, metavar="N", help="print N comments and docstrings instead")
    parser.add_argument("--in_place", action="store_true", help="with --comments: show the lines around them")
    parser.add_argument("--seed", type=int, default=1, help="of the draw of --comments")
    parser.add_argument("--stories", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stories:
        sys.path.insert(0, str(chosen.stories))
        print(json.dumps(stories(chosen.stories)))
        return
    if chosen.comments is not None:
        for root in chosen.checkouts:
            print(*drawn(root, chosen.comments, chosen.seed, chosen.in_place), sep="\n\n")
        return
    found = {str(root): measured(root.resolve()) for root in chosen.checkouts}
    if chosen.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, title in ROWS.items():
        cells = [
            len(each["stories"][key]) if key in each["stories"] else each[key] for each in found.values()
        ]
        print(f"{title:<42}" + "".join(f"{cell:>12,}" for cell in cells))
    for root, each in found.items():
        for key, modules in each["stories"].items():
            print(f"\n{root}, {ROWS[key]}:\n  " + "\n  ".join(modules))


if __name__ == "__main__":
    main()
