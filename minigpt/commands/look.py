"""Look inside a model: tokens, loss, attention, layers, weights, in the terminal or in a picture.

    minigpt look attention --model output/demo/best --question "四川的省会是哪里？" --layer 1 --head 2
    minigpt look loss --question "四川的省会是哪里？" --answer "成都。" --plot loss.png
    minigpt look loss --question "四川的省会是哪里？" --along output/demo     # at each checkpoint of this run
    minigpt look --question "四川的省会是哪里？" --output page.html     # the whole model in a page
    minigpt look loss --file poem.txt

    all         the views tokens, loss, next, attention, lens and cache, of one question or text
    tokens      how a text is cut: pieces, ids, bytes, unknown characters, BPE's merges
    batch       training examples as tensors: ids, padding mask, targets, positions that count in the loss
    loss        loss and rank of each token of an answer, and the most likely other tokens
    next        the distribution of the next token with several sampling options, side by side
    answers     several answers, sampled with several options
    attention   the tokens that each head attends to
    lens        logit lens: the answer that the model would give after each layer
    ablate      the rise of the loss when heads and layers are switched off
    neighbours  the nearest vectors of a token, in the embedding and in lm_head
    cache       the content of the KV cache, and how it grows
    weights     sizes and spectra of the parameters, and their change in training
    data        the examples and the tokens with the highest loss

Layers and heads are counted from 0, as in the names of the weights.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL
from minigpt.console.language import chosen_language
from minigpt.data.field_names import DataOptions
from minigpt.errors import InputError, Message
from minigpt.generation.loading import load_to_answer, require_model
from minigpt.generation.options import GenerationOptions

if TYPE_CHECKING:
    from minigpt.data.conversation import Conversation
    from minigpt.families.registry import LanguageModel
    from minigpt.generation.generation_config import PromptFormat
    from minigpt.lens.reading import Reading
    from minigpt.lens.results import View
    from minigpt.weights.pretrained import AnyTokenizer

ViewName = Literal[
    "all", "tokens", "batch", "loss", "next", "answers", "attention", "lens", "ablate", "neighbours", "cache",
    "weights", "data",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(command_line.ModelOptions, DataOptions):
    """Look inside a model. VIEW is all (tokens, loss, next, attention, lens and cache of one question),
    tokens (how a text is cut), batch (what a training example is), loss (of each token of an answer),
    next (the distribution of the next token), answers (several, drawn at random), attention (whom each
    head looks at), lens (what each layer would answer), ablate (what heads and layers are worth),
    neighbours (the nearest tokens), cache (the keys and values that are kept), weights (sizes, spectra,
    changes), or data (the hardest examples).
    """

    RANGES = {
        "layer": (0, 10**6),
        "head": (0, 10**6),
        "count": (1, 10**6),
        "max_length": (3, 10**6),
        "seed": (0, 2**63 - 1),
        "line": (1, 10**9),
        **{
            name: GenerationOptions.RANGES[name]
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        },
    }

    view: ViewName = field(default="all", metadata=POSITIONAL)
    """what to look at"""

    # What the model reads
    question: str = ""
    """the question; for a model of texts, the beginning of a text"""
    answer: str | None = None
    """the answer; left out: the model's own"""
    text: str = ""
    """a text that is read as it is, and not answered; neighbours: the tokens"""
    file: Path | None = None
    """a text file, instead of --text: its beginning is looked at"""
    after: str = ""
    """next: the beginning of the answer"""
    along: Path | None = None
    """folder of a run: the same view at each checkpoint that it has kept, instead of --model"""

    # attention
    layer: int | None = None
    """the layer to show, from 0"""
    head: int | None = None
    """the head to show, from 0"""

    # next, answers: each value makes a distribution
    temperature: tuple[float, ...] = ()
    """values of the temperature"""
    top_k: tuple[int, ...] = ()
    """values of top_k"""
    top_p: tuple[float, ...] = ()
    """values of top_p"""
    min_p: tuple[float, ...] = ()
    """values of min_p"""
    repetition_penalty: tuple[float, ...] = ()
    """values of repetition_penalty"""
    seed: int = 0
    """answers: the same seed draws the same answers"""
    count: int = 10
    """next, neighbours, data: number of rows; answers: number of answers"""

    # weights
    against: Path | None = None
    """an earlier model, to show what training has changed"""

    # batch, data, ablate
    train_data: Path = Path("data/train.jsonl")
    """batch: file of training data"""
    line: tuple[int, ...] = ()
    """batch: line of the file, or several; left out: the first"""
    vocab_path: Path | None = None
    """tokens, batch: a vocabulary instead of a model's tokenizer"""
    max_length: int = 256
    """batch: most tokens of an example"""
    loss_on: Literal["answer", "all"] = "answer"
    """batch: targets that training counts"""
    data: Path | None = None
    """data, ablate: file of questions and answers; left out for data: data/val.jsonl"""

    # Where it is shown
    output: Path | None = None
    """all, next, attention, lens: write the whole model as a page (.html), which opens with this question
    or text, answers others, and needs no network"""
    plot: Path | None = None
    """also draw it: .png, .svg, .pdf, or .html"""


_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_FILE = ("strict", "encoding", "question_field", "answer_field", "speaker")
_MODEL = ("model", "adapter", "precision", "device", "threads")
_ASK = ("question", *_MODEL, "along")
_TEXT = ("text", "file", "encoding")
_MOST_BYTES = 2**20  # largest number of bytes that are read from the file of --file
_MOST_CHARACTERS = 2000  # largest number of characters of a text that the table of tokens shows
USES: dict[str, tuple[str, ...]] = {  # view -> flags of the view, besides --json, --plot, --language
    "all": ("answer", "question", "output", *_TEXT, *_MODEL),
    "tokens": (*_TEXT, "model", "vocab_path"),
    "batch": ("train_data", "line", "model", "vocab_path", "max_length", "loss_on", *_FILE),
    "loss": ("answer", "count", *_TEXT, *_ASK),
    "next": ("after", "count", "output", *_DRAWING, *_ASK),
    "answers": ("count", "seed", *_DRAWING, *_ASK),
    "attention": ("answer", "layer", "head", "output", *_TEXT, *_ASK),
    "lens": ("answer", "output", *_TEXT, *_ASK),
    "ablate": ("answer", "data", "count", *_FILE, *_ASK),
    "neighbours": ("text", "count", *_MODEL, "along"),
    "cache": ("answer", *_TEXT, *_ASK),
    "weights": ("against", *_MODEL, "along"),
    "data": ("data", "count", *_FILE, *_MODEL, "along"),
}


def build(given: dict[str, Any]) -> Options:
    """Make the options. Raises InputError for a flag that the view does not use, and for a missing flag."""
    view = given.get("view", "all")
    for name in given:
        if name not in ("view", "json", "plot", "language", *USES[view]):
            users = [one for one in get_args(ViewName) if name in USES[one]]
            raise InputError(f"look {view} does not use --{name}: it is for {', '.join(users)}")
    options = Options(**given)
    ways = [name for name in ("question", "text", "file") if name in USES[view]]
    chosen = [name for name in ways if getattr(options, name)]
    if ways and not chosen and not (view == "ablate" and options.data is not None):
        raise InputError(f"look {view} needs --{ways[0]}: give a {ways[0]} in quotes")
    if len(chosen) > 1:
        raise InputError(f"look {view} reads one thing: give --{chosen[0]} or --{chosen[1]}")
    if options.answer is not None and chosen and chosen != ["question"]:
        raise InputError(f"--answer belongs to a --question: a --{chosen[0]} is only read")
    if options.output is not None:
        _check_page(options, given)
    if options.along is not None and ({"model", "adapter", "precision"} & given.keys()):
        raise InputError(
            "--along looks at the checkpoints of a run: leave out --model, --adapter and --precision"
        )
    if options.head is not None and options.layer is None:
        raise InputError("--head needs --layer: heads are counted in each layer")
    return options


def _check_page(options: Options, given: dict[str, Any]) -> None:
    assert options.output is not None
    if options.output.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f"--output must end in .html, for a browser: got {options.output}; --plot draws pictures"
        )
    for name in ("plot", "along", "precision", "after", *_DRAWING):
        if name in given:
            why = "its sliders do that" if name in _DRAWING else "it shows one model as it is stored"
            raise InputError(f"--output writes a page of the whole model, without --{name}: {why}")


def main(options: Options) -> dict[str, Any]:
    """Compute the view, and print it or write it to a file."""
    from minigpt.errors import printable_lines

    if options.file is not None:  # read the file here, only once, because it may be a pipe
        options = replace(options, text=_beginning(options.file, options.encoding), file=None)
    language = chosen_language(options.language)
    if options.output is not None:
        return _write_page(options, options.output)
    if options.plot is not None:
        from minigpt.lens.pictures import check_picture

        check_picture(options.plot)
    views = _views(options)
    from minigpt.lens.results import in_terminal

    width = shutil.get_terminal_size().columns
    for view in views.values():
        print(printable_lines(in_terminal(view, language, width)))
    if options.plot is not None:
        from minigpt.lens.pictures import write_picture

        write_picture(list(views.values()), options.plot, language)
        command_line.show(Message("picture: {path}", path=options.plot))
    if options.view == "all":
        return {"view": "all", **{name: view.as_dict() for name, view in views.items()}}
    return {"view": options.view, **views[options.view].as_dict()}


def _views(options: Options) -> "dict[str, View]":
    if options.view in ("tokens", "batch"):
        return {options.view: _view_of_tokenizer(options)}
    if options.along is not None:
        return {options.view: _view_along(options, options.along)}
    loaded = load_to_answer(options, None)
    names: tuple[str, ...] = (options.view,)
    if options.view == "all":
        names = ("tokens", "loss", "next", "attention", "lens", "cache")
        names = names if options.question else tuple(name for name in names if "text" in USES[name])
    prompt_form = _form(loaded.folder, loaded.tokenizer, options.adapter)
    asked = _asked(options, loaded.model, loaded.tokenizer)
    _say_what_is_cut(asked)
    _warn_of_unknown(options, loaded.tokenizer)
    return {
        name: _view_of_model(options, name, loaded.model, loaded.tokenizer, prompt_form, asked)
        for name in names
    }


def _warn_of_unknown(options: Options, tokenizer: "AnyTokenizer") -> None:
    read = options.question + (options.answer or "") + options.after
    if options.view != "neighbours":  # the view `neighbours` raises its own error for unknown characters
        read += options.text[:_MOST_CHARACTERS]
    if unknown := tokenizer.unknown_characters(read):
        command_line.warn(f"not in the vocabulary, {tokenizer.unknown_read_as}: {' '.join(unknown)}")


def _write_page(options: Options, path: Path) -> dict[str, Any]:
    """Write an HTML page that contains the whole model and shows the model's answer to the question."""
    from minigpt.lens.live import LiveView, Opened, write_live_page
    from minigpt.lens.pictures import check_picture
    from minigpt.lens.reading import read_question
    from minigpt.lens.recorder import require_head

    check_picture(path, "--output")
    loaded = load_to_answer(options, None)
    form = _form(loaded.folder, loaded.tokenizer, options.adapter)
    asked = _asked(options, loaded.model, loaded.tokenizer)
    _say_what_is_cut(asked)
    reading = read_question(loaded.model, loaded.tokenizer, asked, options.answer, form)
    view: LiveView = {"next": "distribution", "lens": "lens"}.get(options.view, "attention")  # type: ignore[assignment]
    require_head(loaded.model, options.layer, options.head)
    said = options.question or options.text[:_MOST_CHARACTERS]
    opened = Opened(said, reading, view, options.layer, options.head)
    notes = write_live_page(path, loaded.folder, loaded.model, loaded.tokenizer, opened=opened)
    for note in notes:
        command_line.warn(note)
    size = path.stat().st_size
    command_line.show(f"page: {path}, {size:,} bytes; open it in a browser")
    return {"view": options.view, "output": str(path), "bytes": size, "notes": notes}


def _beginning(path: Path, encoding: str) -> str:
    """Return the text of a file; of a long file, only the beginning: no view shows more."""
    from minigpt.storage.regular_files import open_regular

    try:
        with open_regular(path, or_pipe=True) as file:
            data = file.read(_MOST_BYTES)
    except OSError as error:
        raise InputError(f"--file {path} cannot be read: {error.strerror or error}") from None
    text = _decoded(data, str(path), encoding)
    if not text.strip():
        raise InputError(f"--file {path} is empty: there is nothing to look at")
    return text[: _MOST_BYTES // 8].replace("\r\n", "\n").removesuffix("\n")


def _decoded(data: bytes, name: str, encoding: str) -> str:
    from minigpt.data.text_encoding import decode

    if len(data) < _MOST_BYTES:
        return decode(data, name, encoding)[0]
    found: InputError | None = None
    for codec in (encoding,) if encoding else ("utf-8", ""):
        for cut in range(4):  # the part that was read may end inside a character, so drop up to three bytes
            try:
                return decode(data[: len(data) - cut], name, codec)[0]
            except InputError as error:
                found = error
    assert found is not None
    raise found


def _asked(options: Options, model: "LanguageModel", tokenizer: "AnyTokenizer") -> "str | Reading":
    """Return the user's question. Without a question: the user's text, cut to what the model can read."""
    if options.question or not options.text or options.view == "neighbours":
        return options.question
    from minigpt.lens.reading import read_text

    return read_text(model, tokenizer, options.text)


def _say_what_is_cut(asked: "str | Reading") -> None:
    if not isinstance(asked, str) and asked.left_out:
        from minigpt.console.terminal import note

        note(f"the text is long: its first {len(asked.ids):,} tokens are looked at")


def _view_along(options: Options, run: Path) -> "View":
    import torch

    from minigpt.console.terminal import ProgressLine
    from minigpt.devices import pick_device
    from minigpt.lens.growth import along, kept_checkpoints

    if options.threads:
        torch.set_num_threads(options.threads)

    is_first = True

    def look(model: "LanguageModel", tokenizer: "AnyTokenizer") -> "View":
        nonlocal is_first
        asked = _asked(options, model, tokenizer)
        if is_first:
            _say_what_is_cut(asked)
        is_first = False
        return _view_of_model(options, options.view, model, tokenizer, _form(run, tokenizer), asked)

    with ProgressLine("checkpoints", len(kept_checkpoints(run)), patience=2.0) as progress:
        return along(run, look, pick_device(options.device), progress.update)


def _form(folder: Path, tokenizer: "AnyTokenizer", adapter: Path | None = None) -> "PromptFormat":
    from minigpt.generation.generation_config import prompt_format
    from minigpt.training.checkpoint import list_checkpoints

    return prompt_format((list_checkpoints(folder) or [folder])[0], tokenizer, adapter)


def _view_of_tokenizer(options: Options) -> "View":
    from minigpt.console.terminal import note
    from minigpt.weights.pretrained import load_tokenizer

    usual = Path("data/vocab.json")
    source = options.vocab_path or (options.model if options.model.exists() or not usual.exists() else usual)
    if options.vocab_path is None:
        require_model(source)
    tokenizer = load_tokenizer(source)
    if options.view == "tokens":
        from minigpt.lens.text import tokens

        if len(options.text) > _MOST_CHARACTERS:
            note(f"the text is long: its first {_MOST_CHARACTERS:,} characters are looked at")
        return tokens(tokenizer, options.text[:_MOST_CHARACTERS])
    from minigpt.lens.examples import batch

    found = {each.line: each for each in _read(options, options.train_data)}
    lines = options.line or tuple(found)[:1]
    if missing := [line for line in lines if line not in found]:
        raise InputError(
            f"{options.train_data} has no example in line {missing[0]}: it has {len(found):,} examples"
        )
    return batch([found[line] for line in lines], tokenizer, options.max_length, options.loss_on)


def _read(options: Options, path: Path) -> "list[Conversation]":
    from minigpt.data.reader import read_conversations

    return read_conversations(path, options.strict, options.encoding, options.field_names)[0]


def _view_of_model(
    options: Options,
    name: str,
    model: "LanguageModel",
    tokenizer: "AnyTokenizer",
    form: "PromptFormat",
    asked: "str | Reading",
) -> "View":
    from minigpt import lens

    answer, question = options.answer, options.question
    makers: dict[str, Callable[[], View]] = {
        "tokens": lambda: lens.tokens(tokenizer, question or options.text[:_MOST_CHARACTERS]),
        "loss": lambda: lens.loss(model, tokenizer, asked, answer, form, min(options.count, 5)),
        "next": lambda: lens.next_token(
            model, tokenizer, question, options.after, form, _variants(options), options.count
        ),
        "answers": lambda: lens.sampled_answers(
            model, tokenizer, question, _variants(options) or _variants(Options(temperature=(1.0,))),
            options.count, options.seed, form,
        ),
        "attention": lambda: lens.attention(
            model, tokenizer, asked, answer, form, options.layer, options.head
        ),
        "lens": lambda: lens.logit_lens(model, tokenizer, asked, answer, form),
        "ablate": lambda: lens.ablate(model, tokenizer, _pairs(options), form),
        "neighbours": lambda: lens.neighbours(model, tokenizer, options.text, options.count),
        "cache": lambda: lens.cache(model, tokenizer, asked, answer, form),
        "weights": lambda: lens.weights(model, _against(options), str(options.against)),
        "data": lambda: _data(options, model, tokenizer),
    }  # fmt: skip
    return makers[name]()


def _variants(options: Options) -> "list[GenerationOptions]":
    """Return one GenerationOptions for each value that the user gave to a flag such as --temperature."""
    pairs = [(name, value) for name in _DRAWING for value in getattr(options, name)]
    return [GenerationOptions(do_sample=True, **{name: value}) for name, value in pairs]


def _pairs(options: Options) -> list[tuple[str, str | None]]:
    if options.data is None:
        return [(options.question, options.answer)]
    exchanges = [each.exchanges[0] for each in _read(options, options.data)[: options.count]]
    return [(exchange.question, exchange.answer) for exchange in exchanges]


def _against(options: Options) -> "LanguageModel | None":
    from minigpt.weights.pretrained import load_model

    return None if options.against is None else load_model(options.against)


def _data(options: Options, model: "LanguageModel", tokenizer: "AnyTokenizer") -> "View":
    from minigpt import lens
    from minigpt.console.terminal import ProgressLine

    conversations = _read(options, options.data or Path("data/val.jsonl"))
    with ProgressLine("measuring", len(conversations), patience=2.0) as progress:
        return lens.data(model, tokenizer, conversations, options.count, on_progress=progress.update)


if __name__ == "__main__":
    command_line.run(Options, main, build)
