"""Checks the imports between minigpt's folders, and other rules about the source code."""

import ast
import fnmatch
import functools
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minigpt"

# A folder or a top-level file imports only from the lines above its own. Modules of one folder may import
# each other, but not in a circle. Two entries of one line do not import each other. A new folder must be
# added here.
LEVELS = (
    ("errors",),  # imports nothing
    ("console",),
    ("storage",),
    ("reference", "devices", "model", "tokenizer", "tokenization"),
    ("data", "families"),
    ("finetuning",),
    ("qa_dataset", "weights"),
    ("generation",),
    ("evaluation",),
    ("training",),
    ("diagnosis",),  # examines the files that training wrote
    ("lens",),  # examines a model and its runs
    ("build_vocab", "split_data", "dataset_stats", "train", "generate", "commands"),
    ("__main__",),  # has only the names of the commands
    ("__init__",),  # imports a public name at its first use
)
# Code that the models of all families have, each in its own file.
SHARED_BY_MODELS = ("KeyValueCache", "check_inputs", "causal_mask", "eager_attention")
# Only these may name a family: `families`, model.py, `reference` (the same models as functions), and
# `tokenization` (whose rules for splitting text are called gpt2 and qwen2).
FAMILY_NAMES = re.compile(r"(?i)gpt-?2|gptlmhead|gptconfig|qwen-?3")
MAY_NAME_A_FAMILY = {
    "__init__": "the public names",
    "commands.import_checkpoint": "a .pth is the documents' GPT: no other family has had one",
    "weights.gguf_file": "GGUF's names of tokenizers",
    "weights.html_tokenizer": "the names of the ways to cut words",
    "data.documents": "a message names the tokenizers' kinds",
}
SCRIPTS = ("build_vocab", "split_data", "dataset_stats", "train", "generate")  # the tutorial's scripts
RUNS_COMMANDS = "commands.quickstart"  # the only module that imports commands, to run them
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

# module -> packages that it may import. The standard library, and minigpt's lower levels (except in
# model.py), are always allowed.
ONLY: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": set(),
    "errors": set(),
    "console.command_line": set(),
    "console.flags": set(),
    "storage.files": {"xxhash"},
    "storage.json_files": set(),
    "storage.regular_files": set(),
    "storage.read_ahead": set(),
    "storage.safetensors_header": set(),
    "console.terminal": {"rich"},
    "model": {"torch"},
    "families.qwen3.model": {"torch"},
    "tokenizer": {"numpy"},
    "tokenization.definition": set(),
    "tokenization.library": {"tokenizers"},
    "tokenization.subword": {"numpy"},
    "tokenization.bpe_files": set(),
    "tokenization.bpe_training": {"tokenizers"},
    "tokenization.bpe": set(),
    "tokenization.wordpiece_files": set(),
    "tokenization.wordpiece": set(),
    "tokenization.chat_template": {"jinja2"},
    "tokenization.template_sandbox": {"jinja2"},
    "data.reader": set(),
    "data.split": {"numpy"},
    "weights.download": set(),
    "families.checks": set(),
    "families.options": set(),
    "families.gpt2.openai_checkpoint": {"numpy"},
    "families.gpt2.presets": set(),
    "families.gpt2.tensor_bundle": {"google_crc32c", "numpy"},
    "generation.native_library": set(),
    "diagnosis.installation": {"torch"},
    "training.config": set(),
}

# Modules and functions that run code from a file. The weights of a model and the state of a run must be data
# only.
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "run_module", "run_path"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "os.system"}
ALLOWED = {
    (
        "benchmarks/nanogpt.py",
        "pickle",
    ): "written, not read: nanoGPT's train.py takes its vocabulary's size from it",
    (
        "benchmarks/nanogpt.py",
        "run_path",
    ): "the train.py of the checkout that a user names, in its own process",
    ("benchmarks/fuzz_commands.py", "run_path"): "the commands, from a table in the package",
    ("benchmarks/fuzz_seeds.py", "torch.save"): "written: the files that are then damaged",
    ("minigpt/__init__.py", "import_module"): "the public names, from a table in the same file",
    ("minigpt/lens/__init__.py", "import_module"): "the public names, from a table in the same file",
    ("minigpt/__main__.py", "run_module"): "the commands, from a table in the same file",
    ("minigpt/training/rewards.py", "run_path"): "a reward function, in a file that the user names for it",
    ("minigpt/families/gpt2/pth_file.py", "torch.load"): "an import that a user asks for; told weights_only",
}

MODEL_LINES, LINES = 500, 600  # largest number of lines of a file; a longer file probably has two subjects


# -- reading the source ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    name: str  # full name; for `from a import b`: a.b if that is one of our modules, else a
    line: int
    in_function: bool
    is_relative: bool = False


def name_of(path: Path) -> str:
    """Return a module's name: data.reader for minigpt/data/reader.py, data for minigpt/data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@functools.cache
def providers() -> Mapping[str, list[str]]:
    """Return top-level module -> the distributions that have it. Cached, because this takes a while."""
    return importlib.metadata.packages_distributions()


@functools.cache
def imports(path: Path) -> list[Import]:
    """Return every import of a file: at the top, inside functions, under `if TYPE_CHECKING`."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno, in_function)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    longer = f"{module}.{alias.name}"
                    ours = longer.removeprefix("minigpt.") in MODULES and longer.startswith("minigpt.")
                    yield Import(longer if ours else module or ".", node.lineno, in_function, level > 0)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                in_function = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return list(visit(tree(path), False))


def our_imports(module: str) -> Iterator[tuple[str, int]]:
    """Yield the modules of minigpt that a module imports, without minigpt/__init__.py."""
    for item in imports(MODULES[module]):
        if item.name.startswith("minigpt."):
            yield item.name.removeprefix("minigpt."), item.line


def folder_of(module: str) -> str:
    return module.split(".")[0]


def where(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


@functools.cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def required(group: str | None = None) -> set[str]:
    """Return the distributions that pyproject.toml requires, always or for one optional group."""
    lines = project()["project"]["dependencies" if group is None else "optional-dependencies"]
    return {re.split(r"[^\w-]", line)[0] for line in (lines if group is None else lines[group])}


@functools.cache
def tracked() -> list[Path]:
    """Return the files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no checkout: git does not say which files belong to it")
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


# -- arrows ------------------------------------------------------------------------------------------------


def test_every_module_has_a_level_and_every_level_its_modules() -> None:
    assert {folder_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    if module == "__init__":
        return  # __init__ may name everything; test_package.py checks that it imports nothing heavy
    for other, line in our_imports(module):
        same_folder = folder_of(other) == folder_of(module) and module != other
        if module == RUNS_COMMANDS and folder_of(other) in SCRIPTS:
            continue
        assert same_folder or LEVEL[folder_of(other)] < LEVEL[folder_of(module)], (
            f"{where(module, line)} imports {other}"
        )


def test_nothing_imports_a_command() -> None:
    found = [
        f"{where(module, line)}: {other}"
        for module in MODULES
        for other, line in our_imports(module)
        if folder_of(other) in (*SCRIPTS, "commands", "__main__")
        and module not in ("__init__", RUNS_COMMANDS)
    ]
    assert found == []


def test_no_circles() -> None:
    graph = {module: {other for other, _ in our_imports(module)} for module in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # its CycleError names the circle
    assert set(MODULES) <= set(order)


def test_the_front_names_things_only_for_type_checkers() -> None:
    top = [node for node in tree(MODULES["__init__"]).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all("minigpt" not in ast.unparse(node) for node in top)


@pytest.mark.parametrize("module", MODULES)
def test_of_the_front_only_the_version_is_used_inside(module: str) -> None:
    # A use of `minigpt.load_model` inside the package would be an import that this test does not see.
    for node in nodes(MODULES[module]):
        match node:
            case ast.ImportFrom(module="minigpt", names=names, lineno=line):
                wrong = {alias.name for alias in names} - {*MODULES, "__version__"}
                assert not wrong, f"{where(module, line)}: {wrong}"
            case ast.Attribute(value=ast.Name(id="minigpt"), attr=name, lineno=line):
                assert name == "__version__", f"{where(module, line)}: minigpt.{name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module: str) -> None:
    assert [item for item in imports(MODULES[module]) if item.is_relative] == []


@pytest.mark.parametrize("module", ONLY)
def test_imports_of_the_frugal(module: str) -> None:
    allowed = {*ONLY[module], *sys.stdlib_module_names} | (
        {"minigpt"} if module.split(".")[-1] != "model" else set()
    )
    wrong = {item.name for item in imports(MODULES[module]) if folder_of(item.name) not in allowed}
    assert wrong == set()


def test_each_family_s_model_is_one_file() -> None:
    """A model's file imports only torch. Code that both models need is in both files, word for word."""
    shared: dict[str, set[str]] = {}
    for module in (module for module in MODULES if module.split(".")[-1] == "model"):
        assert list(our_imports(module)) == []
        nodes = (
            node for node in tree(MODULES[module]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        )
        for node in nodes:
            if node.name in SHARED_BY_MODELS:
                shared.setdefault(node.name, set()).add(ast.unparse(node))
    assert {name: len(texts) for name, texts in shared.items()} == dict.fromkeys(SHARED_BY_MODELS, 1)


def family_names(path: Path) -> Iterator[str]:
    """Yield the identifiers and strings of a file, without docstrings, that contain a family's name."""
    prose = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree(path)):
        for field in ("id", "name", "arg", "attr", "asname", "module", "value"):
            name = getattr(node, field, None)
            if isinstance(name, str) and id(node) not in prose and FAMILY_NAMES.search(name):
                yield name


def test_only_its_own_folder_names_a_family() -> None:
    found = {
        module
        for module, path in MODULES.items()
        if folder_of(module) not in ("families", "model", "reference", "tokenization")
        and any(family_names(path))
    }
    assert found == set(MAY_NAME_A_FAMILY)


@pytest.mark.parametrize("module", [module for module in MODULES if folder_of(module) == "reference"])
def test_the_reference_stands_apart(module: str) -> None:
    foreign = {folder_of(item.name) for item in imports(MODULES[module])} - sys.stdlib_module_names
    assert foreign <= {"numpy", "jax", "minigpt"}
    assert {folder_of(name) for name, _ in our_imports(module)} <= {
        "reference",
        "errors",
        "console",
        "storage",
    }


def test_only_commands_may_import_the_reference() -> None:
    users = {
        folder_of(module)
        for module in MODULES
        for name, _ in our_imports(module)
        if folder_of(name) == "reference"
    }
    assert users <= {"reference", "commands", *SCRIPTS}


@pytest.mark.parametrize("module", MODULES)
def test_other_people_s_packages_are_required_and_optional_ones_imported_late(module: str) -> None:
    groups = (
        *("tensorboard", "plot", "jax", "constrained", "datasets", "excel", "words", "wandb", "gguf"),
        *("evaluate", "onnx"),
    )
    always, optional = required(), {name for group in groups for name in required(group)}
    for item in imports(MODULES[module]):
        top = folder_of(item.name)
        if top in sys.stdlib_module_names or top == "minigpt":
            continue
        owners = {owner.lower().replace("_", "-") for owner in providers().get(top, [top])}
        if item.name.startswith("torch.utils.tensorboard"):
            owners = {"tensorboard"}
        if owners & always:
            continue
        assert owners & optional, f"{where(module, item.line)}: pyproject.toml does not require {top}"
        assert item.in_function, f"{where(module, item.line)}: {top} is optional; import it where it is used"


def test_each_requirement_is_used() -> None:
    used = {
        owner.lower()
        for path in MODULES.values()
        for item in imports(path)
        for owner in providers().get(folder_of(item.name), ())
    }
    assert required() <= used


# -- names -------------------------------------------------------------------------------------------------


def test_no_name_shadows_another_module() -> None:
    """`python ./minigpt/train.py` puts minigpt/ first on sys.path; the same goes for a script in a folder."""
    foreign = set(providers()) - {"minigpt"}
    names = {part for module in MODULES for part in module.split(".")} - {"__init__", "__main__"}
    assert names & (sys.stdlib_module_names | foreign) == set()


def test_no_module_for_odds_and_ends() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    assert names & {"utils", "util", "common", "helpers", "helper", "misc", "tools", "core", "base"} == set()


def test_every_room_is_a_package_and_is_shipped_whole() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").is_file(), f"{folder.relative_to(ROOT)} would not be installed"
    patterns = project()["tool"]["setuptools"]["package-data"]["minigpt"]
    inside = [path.relative_to(PACKAGE).as_posix() for path in tracked() if PACKAGE in path.parents]
    others = [name for name in inside if not name.endswith(".py")]
    assert others, "at least py.typed"
    unshipped = [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert unshipped == []


def test_names_are_ascii() -> None:
    assert [str(path) for path in tracked() if not path.relative_to(ROOT).as_posix().isascii()] == []
    for path in tracked():
        if path.suffix != ".py" or path.read_bytes().isascii():
            continue
        # not `tree`, which would keep the trees of all tests in memory
        for node in ast.walk(ast.parse(path.read_bytes())):
            # fields of names, definitions, arguments, attributes, keywords, and `as` of imports
            for field in ("id", "name", "arg", "attr", "asname"):
                name = getattr(node, field, None)
                assert not isinstance(name, str) or name.isascii(), f"{path.relative_to(ROOT)}: {name}"


# -- size and words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_read_in_one_sitting(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    limit = MODEL_LINES if module.split(".")[-1] == "model" else LINES
    assert lines <= limit, f"{where(module, lines)}: which two things does it do?"


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_is(module: str) -> None:
    def silent(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[str]:
        if not (ast.get_docstring(node) or "").strip():
            yield name
        for child in node.body if not isinstance(node, ast.FunctionDef) else []:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                yield from silent(child, f"{name}.{child.name}")

    assert list(silent(tree(MODULES[module]), module)) == []


# Private words that were replaced by the usual terms of the field. No file may use them again.
WORDS = re.compile(
    r"(?i)\b(doors?|yardsticks?|knobs?|steppers?|likeliest|unfilled|singly|read_slot|give_back|stored_as"
    r"|at_precision|weight_bytes|static_step|textsofar|(write|writes) on from|(go|goes) on with"
    r"|(write|writes|written) down)\b"
)


def test_the_field_s_words() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in tracked()
        if path.suffix in (".py", ".md", ".toml", ".c", ".h", ".yml")
        and path.name not in ("LOG.md", Path(__file__).name)
        and ROOT / "data" not in path.parents
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in WORDS.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_repairs_the_path_before_it_imports(script: str) -> None:
    """Docstring, `import sys`, pathlib, then at once `if not __package__: sys.path[0] = <the repository>`."""
    docstring, *body = tree(MODULES[script]).body
    assert isinstance(docstring, ast.Expr)
    while isinstance(body[0], ast.Import | ast.ImportFrom):
        first = body.pop(0)
        assert ast.unparse(first) in ("import sys", "from pathlib import Path"), ast.unparse(first)
    repair = body[0]
    assert isinstance(repair, ast.If), f"{script}: {ast.unparse(repair)} stands before the repair of sys.path"
    assert ast.unparse(repair.test) == "not __package__"
    assert [ast.unparse(statement) for statement in repair.body] == [
        "sys.path[0] = str(Path(__file__).resolve().parents[1])"
    ]
    last = body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'", f"{script} must end in its call"
    assert len(last.body) == 1
    assert bool(last.orelse) == (script in ("train", "generate")), "an imported one gives way to the function"
    assert ast.unparse(last.body[0]).startswith("command_line.run("), f"{script} must end in command_line.run"


# -- what is never done ------------------------------------------------------------------------------------


def risky(path: Path) -> Iterator[str]:
    for item in imports(path):
        if folder_of(item.name) in FORBIDDEN_MODULES:
            yield folder_of(item.name)
    for node in nodes(path):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                yield name
            case ast.Call(func=ast.Attribute(value=value, attr=attr)):
                name = f"{ast.unparse(value)}.{attr}"
                if name in FORBIDDEN_ATTRIBUTES:
                    yield name
                elif attr in FORBIDDEN_CALLS and name.split(".")[0] in ("builtins", "importlib", "runpy"):
                    yield attr
            case ast.keyword(arg="allow_pickle" | "shell" | "trust_remote_code", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield str(node.arg)
            case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                yield "weights_only"


def test_nothing_that_was_read_is_run() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for path in {*tracked(), *MODULES.values()}
        if path.suffix == ".py" and ROOT / "tests" not in path.parents
        for what in risky(path)
    }
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "the list allows what nobody does any more"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("def f():\n  from pickle import load", "pickle"),
        ("torch.load(x)", "torch.load"),
        ("torch.save(x, y)", "torch.save"),
        ("eval(x)", "eval"),
        ("model.eval()", None),
        ("builtins.exec(x)", "exec"),
        ("re.compile(x)", None),
        ("torch.compile(x)", None),
        ("importlib.import_module(x)", "import_module"),
        ("numpy.load(x)", "numpy.load"),
        ("f(x, allow_pickle=True)", "allow_pickle"),
        ("f(x, allow_pickle=False)", None),
        ("subprocess.run(x, shell=True)", "shell"),
    ],
)
def test_the_search_for_risky_calls_finds_them(tmp_path: Path, code: str, what: str | None) -> None:
    path = tmp_path / "code.py"
    path.write_text(code)
    assert list(risky(path)) == ([] if what is None else [what])


# Modules that open files or parse JSON and TOML themselves, besides storage.regular_files and
# storage.json_files, and the calls that they may make.
MAY_READ = {
    "console.flags": {"read_text"},  # reads its own source, for --help
    "console.command_line": {"open"},  # standard streams
    "console.language": {"open"},  # of the package itself
    "data.json_values": {"JSONDecoder"},  # JSON of users: broken lines, other rules
    "data.file_formats": {"ZipFile"},  # bytes that were read before
    "data.tables": {"ZipFile"},  # bytes in memory
    "data.chat_encoding": {"loads"},  # texts that data.json_values has parsed
    "data.memory_mapped": {"memmap"},  # after a look at the file
    "families.gpt2.pth_file": {"ZipFile", "load"},  # after a look at the file
    "families.gpt2.tensor_bundle": {"memmap"},  # of an open file
    "reference.weights": {"mmap"},  # of an open file
    "storage.large_pages": {"mmap"},  # memory
    "storage.files": {"open"},  # opens a folder, to flush it
    "storage.safetensors_files": {"safe_open"},  # after its header was read
    "tokenization.bpe_training": {"loads"},  # the tokenizers library's own JSON
    "training.autosize": {"loads"},  # of another process's message
    "training.distributed": {"loads"},  # of another process's message
    "training.rewards": {"loads"},  # a model's answer
    "weights.html_file": {"read_text"},  # files of the package itself
}
_READERS = {
    *("read_text", "read_bytes", "memmap", "fromfile", "genfromtxt", "loadtxt", "safe_open", "load_file"),
    *("ZipFile", "TarFile", "mmap", "JSONDecoder"),
}
_WRITING = ("w", "wb", "a", "ab", "x", "xb")


def reads(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the calls in a file's source that open files for reading, or parse JSON or TOML."""
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="os"), attr="open"):
                if "O_RDONLY" in ast.unparse(node) or "O_RDWR" in ast.unparse(node):
                    yield node.lineno, "open"
            case ast.Attribute(value=ast.Name(id="json" | "tomllib"), attr=name) if name.startswith("load"):
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy" | "pickle"), attr="load"):
                yield node.lineno, "load"
            case ast.Attribute(attr="open") | ast.Name(id="open"):
                modes = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
                writes = any(isinstance(one, ast.Constant) and one.value in _WRITING for one in modes)
                is_path = isinstance(node.func, ast.Name) or node.args
                if is_path and not writes:
                    yield node.lineno, "open"
            case ast.Attribute(attr=name) if name in _READERS:
                yield node.lineno, name
            case ast.Name(id=name) if name in _READERS - {"read_text", "read_bytes"}:
                yield node.lineno, name


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"storage.regular_files", "storage.json_files"}))
def test_files_have_one_way_in(module: str) -> None:
    """minigpt.storage refuses pipes, devices and broken texts, with errors of one line, without waiting."""
    for line, what in reads(MODULES[module]):
        assert what in MAY_READ.get(module, ()), (
            f"{where(module, line)}: {what}() goes around minigpt.storage.regular_files and json_files"
        )


def test_modules_that_may_read_do_so() -> None:
    for module, known in MAY_READ.items():
        assert {what for _, what in reads(MODULES[module])} == known, module


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path)", "open"), ("open(path, 'rb')", "open"), ("path.open('rb')", "open"),
        ("path.open('rb+')", "open"), ("path.read_text()", "read_text"), ("json.loads(text)", "loads"),
        ("tomllib.load(file)", "load"), ("np.load(path)", "load"), ("os.open(path, os.O_RDONLY)", "open"),
        ("path.open('wb')", None), ("open(path, 'w')", None), ("logger.open()", None),
        ("read_text(path)", None), ("os.open(path, os.O_WRONLY)", None),
    ],
)  # fmt: skip
def test_the_search_for_readers_finds_them(tmp_path: Path, code: str, found: str | None) -> None:
    (tmp_path / "a.py").write_text(code)
    assert [what for _, what in reads(tmp_path / "a.py")] == ([] if found is None else [found])


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    roots = "tmp|home|root|work|Users|private|var|mnt|opt"
    absolute = re.compile(rf"(?<![\w.~*)])/(?:{roots})/[\w.]|\b[A-Z]:\\\\?Users\b|~/\.")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights
        found += [
            f"{path.relative_to(ROOT)}:{number}: {match[0]}"
            for number, line in enumerate(text.splitlines(), 1)
            for match in absolute.finditer(line)
        ]
    assert found == []


def test_text_files_end_in_one_newline_and_hold_no_tabs_or_returns() -> None:
    for path in tracked():
        if path.suffix in (".py", ".toml", ".md", ".json", ".jsonl") and (content := path.read_bytes()):
            assert b"\r" not in content, path
            assert content.endswith(b"\n"), f"{path} does not end in a newline"
            assert not content.endswith(b"\n\n"), f"{path} ends in empty lines"
            assert path.suffix != ".py" or b"\t" not in content, path
