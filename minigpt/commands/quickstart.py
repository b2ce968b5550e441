r"""Makes a model to talk to from a file: vocabulary, split, statistics, training, evaluation, chat.

    minigpt quickstart faq.xlsx
    minigpt quickstart novel.txt --minutes 10 --output output/novel
    minigpt quickstart faq.xlsx                    # after Ctrl-C: the same command continues

Each step is a minigpt command. The command is printed as a user would type it, and its output follows. The
output folder gets vocab.json, train.jsonl, val.jsonl, and the training run.
"""

import contextlib
import hashlib
import shlex
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minigpt import build_vocab, dataset_stats, split_data
from minigpt.commands import chat, evaluate
from minigpt.console import command_line
from minigpt.console.flags import POSITIONAL, parse
from minigpt.console.language import say, translated
from minigpt.data.field_names import FIELDS, DataOptions
from minigpt.data.tables import suffix_of
from minigpt.errors import InputError, Message, printable_lines
from minigpt.storage.files import atomic_write
from minigpt.storage.json_files import json_text, read_json
from minigpt.storage.regular_files import open_regular
from minigpt.training.config import RUN_FILE, TrainConfig

if TYPE_CHECKING:
    from minigpt.data.conversation import Conversation
    from minigpt.data.corpus import TextOptions
    from minigpt.data.documents import Source
    from minigpt.data.file_formats import DataFile
    from minigpt.data.reader import ReadReport
    from minigpt.evaluation.answers import Row

_RECORD = "quickstart.json"  # file in the output folder that says which data the folder is made from
_FEW_PAIRS, _GOOD_PAIRS = 30, 300
# If at least this share of the answers occurs only once, no model can learn to answer new questions.
_ONCE = 0.9
# If the share _ONCE is reached with at most this many pairs, no pairs are held out for validation.
_BY_HEART = 1000
_FEW_CHARACTERS, _GOOD_CHARACTERS = 20_000, 500_000
_RECALLED = 500  # the training part is evaluated, too, if there are at most this many pairs
_MEASURED = 2000  # largest number of conversations in the validation part
_SHOWN = 4  # largest number of right answers, and of wrong answers, to show after the evaluation
_OF_RECORDS = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".parquet")  # suffixes of tables and JSON
_NAMES = ("question_field", "answer_field", "speaker")  # options that name a field or a speaker
_READING = ("encoding", *_NAMES, "strict")  # options that say how a data file is read
# For plain text: the largest number of characters of a prompt, and of tokens that the model writes after it.
_PROMPT, _CONTINUED = 12, 60
Given = TypeVar("Given")


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions, command_line.MachineOptions):
    """From any file of questions and answers, conversations or text to a model that talks, in one command."""

    RANGES = {"minutes": (0.01, 14400.0)}

    file: Path = field(metadata=POSITIONAL)
    """questions and answers, conversations, or text: a table, JSON, Parquet, a text file, in any encoding"""
    minutes: float = 3.0
    """how long to train, about; model and steps are chosen for that"""
    output: Path | None = None
    """folder for all that is made; left out: output/NAME, with the file's name without its suffix"""
    text_field: str = ""
    """of texts: name of the field that holds them; left out: a usual name such as text, or the longest"""


def main(options: Options) -> dict[str, Any]:
    """Prepare the data, train, evaluate, and start a conversation."""
    return _Quickstart(options).run()


class _Quickstart:
    """Runs the steps of the command one after another. `commands` lists the commands that were printed."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = options.output or Path("output") / options.file.stem
        self.vocab = self.folder / "vocab.json"
        self.run_folder = self.folder / "run"
        self.best = self.run_folder / "best"
        self.commands: list[str] = []
        self.minutes = options.minutes  # increased later if the training needs more time

    def run(self) -> dict[str, Any]:
        with self._explains_interruption():
            is_text, opened = build_vocab.recognised(self._vocabulary(is_typed=False))
            self._set_machine()
            found, *more = self._text(opened) if is_text else self._pairs(opened)
        result = {"file": self.options.file, "output": self.folder, **found}
        talks = sys.stdin.isatty() and not self.options.json
        if not talks:
            print("\n" + say("to talk to it:"))
        talk = self._typed("chat", chat.Options, "--model", self.best, *more, *self._machine)
        if talks:
            chat.main(talk)
        return {**result, "commands": self.commands}

    # -- two kinds of data -----------------------------------------------------------------------------------

    def _pairs(self, opened: "DataFile | None") -> tuple[Any, ...]:
        """Train on questions and answers, or conversations. Returns the result, and flags for `chat`."""
        from minigpt.data.reader import read_conversations

        options = self.options
        conversations, report = read_conversations(
            options.file, options.strict, options.encoding, options.field_names, opened
        )
        report.print_summary()
        print(f"{options.file}: {translated(report.counted)}")
        by_heart = _by_heart(conversations)
        train, val = (self.folder / f"{name}.jsonl" for name in ("train", "val"))
        reading: Sequence[object] = ()  # no flags: the split files have the default fields, in UTF-8
        if by_heart:
            _note(by_heart)
            train = val = options.file  # no split: the original file is used for training and for validation
            reading = self._flags(*_NAMES, encoding=_encoding(opened))
        found: dict[str, Any] = {"kind": "pairs", "read": report.as_dict()}
        if self._begun(report.sha256) is None:
            self._begin(report.sha256)
            texts = [text for conversation in conversations for text in conversation.texts()]
            build_vocab.build(self._vocabulary(), texts, report.counted)
            found["split"] = self._divided(conversations, report, is_needed=not by_heart)
            statistics = ("--train_data", train, "--vocab_path", self.vocab, *reading, "--brief")
            found["statistics"] = dataset_stats.main(self._typed("stats", dataset_stats.Options, *statistics))
        data = ("--train_data", train, "--val_data", val, "--vocab_path", self.vocab)
        found["training"] = self._train(*data, *reading)
        found["evaluation"], rows = self._evaluated(val, reading)
        right = [row for row in rows if row[0] == "✓"]
        wrong = [row for row in rows if row[0] != "✓"]
        found["right"], found["wrong"] = (
            [dict(zip(("question", "expected", "given"), row[1:])) for row in evaluate.spread(some, _SHOWN)]
            for some in (right, wrong)
        )
        if rows:
            evaluate.show_rows(
                say("{right:,} of {count:,} questions are answered right", right=len(right), count=len(rows)),
                [*evaluate.spread(right, _SHOWN), *evaluate.spread(wrong, _SHOWN)],
            )
        size = found["training"].get("size", {})
        if len(right) < 0.5 * len(rows) and size and not size["because"]["limited_by_data"]:
            text = (
                "it read the data {epochs:g} times in {minutes:g} minutes; ten times as many would help most "
                "(with another --output)"
            )
            print(say(text, epochs=size["because"]["epochs"], minutes=self.minutes))
        if not by_heart and report.answers <= _RECALLED:
            print("\n" + say("and the questions that it learned from:"))
            found["recall"], _ = self._evaluated(train, reading)
        several = any(len(each.exchanges) > 1 for each in conversations)
        return found, *(["--history"] if several else [])

    def _divided(
        self, conversations: "Sequence[Conversation]", report: "ReadReport", is_needed: bool
    ) -> dict[str, Any] | None:
        """Split the data into train.jsonl and val.jsonl. Return the counts.

        If the data cannot be split: raise InputError (is_needed=True), or return None (is_needed=False).
        """
        words: tuple[object, ...] = ("--input", self.options.file, "--output_dir", self.folder)
        count = len(conversations)
        if count > 10 * _MEASURED:  # with a validation part of 10 %, evaluations would take too long
            words += ("--train_ratio", f"{1 - _MEASURED / count:.6f}")
        elif 1 < count < 10:  # a validation part of 10 % would be less than one conversation
            words += ("--train_ratio", f"{1 - 1 / count:.2f}")
        split = self._typed("split", split_data.Options, *words, *self._flags(*_READING))
        try:
            return split_data.divide(split, list(conversations), report)
        except InputError as error:
            if is_needed:
                raise
            self.commands.pop()
            print(say("not divided: {error}", error=translated(error.args[0])))
            return None

    def _text(self, opened: "DataFile | None") -> tuple[Any, ...]:
        """Train on plain text. Returns a tuple with the result alone, because `chat` needs no flags."""
        from minigpt.data.corpus import TextOptions, find_sources

        options = self.options
        reading = TextOptions(encoding=options.encoding, text_field=options.text_field)
        sources = find_sources(options.file, reading)
        sha256 = _sha256(source.origin for source in sources)
        record = self._begun(sha256)
        if record is None:
            record = self._counted(sources, reading, opened)
            self._begin(sha256, **record)
        flags = self._flags(text_field=record["text_field"], encoding=_encoding(opened))
        training = self._train("--text", options.file, "--tokenizer", self.vocab, *flags)
        if (loss := training.get("val_loss")) is not None:
            text = "loss on the last tenth of the text, which it did not learn from: {loss:.4f} per character"
            print(say(text, loss=loss))
        continued = [self._continued(prompt) for prompt in record["prompts"]]
        found = {"kind": "text", "characters": record["characters"], "training": training}
        return ({**found, "continuations": continued},)

    def _counted(
        self, sources: "list[Source]", reading: "TextOptions", opened: "DataFile | None"
    ) -> dict[str, Any]:
        """Count the characters of the texts, write their vocabulary. Return entries for quickstart.json."""
        from minigpt.data.corpus import decode_sources, read_sources

        options = self.options
        with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
            sources = decode_sources(sources, Path(folder), reading, opened)
            counted = _Counted(read_sources(sources, options.strict, options=reading))
        for line in counted.lines(options.file):
            command_line.show(line)
        if suffix_of(options.file) in _OF_RECORDS and not options.text_field:
            text = (
                "{file} is read as text; if it holds questions and answers, name their columns: "
                "--question_field NAME --answer_field NAME"
            )
            _note(Message(text, file=options.file))
        if counted.characters < _FEW_CHARACTERS:
            text = (
                "only {count:,} characters: the model will learn pieces of them by heart; {good:,} (a novel) "
                "and more are good"
            )
            _note(Message(text, count=counted.characters, good=_GOOD_CHARACTERS))
        build_vocab.build(self._vocabulary(), counted.kinds, str(options.file))
        names = {source.field for source in sources if source.kind != "text"}
        # The field with the text was guessed, with a warning. Its name is given to `train` as a flag, so
        # `train` does not guess and warn again.
        guessed = names if len(names) == 1 else set()
        return {
            "characters": counted.characters,
            "prompts": counted.prompts(),
            "text_field": next((name for name in guessed if name.strip().lower() not in FIELDS["text"]), ""),
        }

    # -- the steps -------------------------------------------------------------------------------------------

    @property
    def _machine(self) -> list[object]:
        """Return the command-line flags for device and threads."""
        return self._flags("device", "threads")

    def _set_machine(self) -> None:
        """Set the number of threads, and check the device before anything is written."""
        if self.options.device != "auto":
            from minigpt.devices import pick_device

            pick_device(self.options.device)
        if self.options.threads:
            import torch

            torch.set_num_threads(self.options.threads)

    def _flags(self, *names: str, **found: object) -> list[object]:
        """Return options as flags, to be passed to another command.

        A flag has the user's value, or else the value in `found`. A flag without a value is left out.
        """
        words: list[object] = []
        for name in (*names, *found):
            value = getattr(self.options, name)
            if value == getattr(Options, name):
                value = found.get(name)
            if value:
                words += [f"--{name}"] if value is True else [f"--{name}", value]
        return words

    def _vocabulary(self, is_typed: bool = True) -> build_vocab.Options:
        words = ("--data", self.options.file, "--output", self.vocab, *self._flags(*_READING, "text_field"))
        return self._typed("vocab", build_vocab.Options, *words, is_typed=is_typed)

    def _typed(
        self, verb: str, kind: type[Given], *words: object, also: Sequence[object] = (), is_typed: bool = True
    ) -> Given:
        """Print a command line as a user would type it. Return the command's options, parsed from this line.

        Args:
            verb: name of the command.
            kind: dataclass of the command's options.
            words: flags and values. The same words are printed and parsed.
            also: words that are printed after `words`, but not parsed, because `kind` has no fields for them.
            is_typed: False: print nothing.
        """
        argv = [str(word) for word in words]
        if is_typed:
            self.commands.append(shlex.join(["minigpt", verb, *argv, *map(str, also)]))
            print(f"\n$ {self.commands[-1]}", flush=True)
        return kind(**parse(kind, argv))

    def _begun(self, sha256: str) -> dict[str, Any] | None:
        """Return the content of quickstart.json of a run on the same data; None if the folder has no run.

        Raises:
            InputError: if the folder holds a run on other data.
        """
        if not (self.run_folder / RUN_FILE).exists():
            return None
        path = self.folder / _RECORD
        try:
            record: dict[str, Any] = read_json(path) if path.exists() else {}
        except ValueError:
            record = {}
        if record.get("sha256") != sha256:
            what = "was made from other data" if record else "holds a run of another command"
            raise InputError(f"{self.folder} {what}: choose another folder with --output, or move it away")
        text = "{folder} was begun earlier: its vocabulary and its parts are used again"
        print(say(text, folder=self.folder))
        return record

    def _begin(self, sha256: str, **more: object) -> None:
        """Write quickstart.json, which says which data the folder is made from."""
        record = {"file": str(self.options.file), "sha256": sha256, "minutes": self.minutes, **more}
        atomic_write(self.folder / _RECORD, json_text(record, indent=2) + "\n")

    def _train(self, *words: object) -> dict[str, Any]:
        from minigpt.training.autosize import TooShortError
        from minigpt.training.loop import RunFinishedError
        from minigpt.training.run import train

        begun = (self.run_folder / RUN_FILE).exists()
        size = () if begun else ("--size", f"{self.minutes:.3g}min", *words)
        argv = (*size, "--output", self.run_folder, *(["--resume"] if begun else []), *self._machine)
        self._typed("train", TrainConfig, *argv)
        try:
            return train(**parse(TrainConfig, [str(word) for word in argv]))
        except RunFinishedError:
            text = (
                "training is finished; for more: minigpt train --output {folder} --resume --max_steps N, or "
                "quickstart with another --output and more --minutes"
            )
            print(say(text, folder=self.run_folder))
            return {"model": str(self.best)}
        except TooShortError as error:
            least = -(-error.seconds // 6) / 10  # seconds -> minutes, rounded up to tenths of a minute
            self.commands.pop()
            self.minutes = max(least, 1.2 * self.minutes)
            text = (
                "{error}: the time is raised from --minutes {before:g} to {after:g} for this data on this "
                "machine, as busy as it is"
            )
            values = {
                "error": translated(error.args[0]),
                "before": self.options.minutes,
                "after": self.minutes,
            }
            _note(Message(text, **values))
            return self._train(*words)

    def _evaluated(self, data: Path, reading: Sequence[object]) -> "tuple[dict[str, Any], list[Row]]":
        words = ("--model", self.best, "--data", data, *reading, "--show", 0, *self._machine)
        return evaluate.measure_pairs(self._typed("eval", evaluate.Options, *words))

    def _continued(self, prompt: str) -> dict[str, str]:
        """Print a prompt and its continuation. Return a dict with these two texts."""
        from minigpt.generation.conversation import QuestionAnswering
        from minigpt.generation.loading import load_to_answer
        from minigpt.generation.options import GenerationOptions

        numbers = {"max_new_tokens": _CONTINUED, "temperature": 0.8, "seed": 1}
        drawing = [f"--{name}={number}" for name, number in numbers.items()]
        words = (f"--prompt={prompt}", "--do_sample", *drawing)
        flags = ("--model", self.best, *self._machine)
        model = self._typed("generate", command_line.ModelOptions, *flags, also=words)
        loaded = load_to_answer(model, None)
        options = GenerationOptions(do_sample=True, **dict[str, Any](numbers))
        asked = QuestionAnswering(loaded.model, loaded.tokenizer, "text", options)
        text = asked.answers([prompt])[0].text
        print(printable_lines(text))
        return {"prompt": prompt, "text": text}

    @contextlib.contextmanager
    def _explains_interruption(self) -> Iterator[None]:
        """Replace the error of Ctrl-C or SIGTERM with a line that tells how to continue."""
        from minigpt.training.stop_request import Stopped

        try:
            yield
            return
        except Stopped as stopped:
            code = stopped.code
        except KeyboardInterrupt:
            code = 130
        text = "minigpt quickstart: interrupted; the same command continues in {folder}"
        print(say(text, folder=self.folder), file=sys.stderr)
        sys.exit(code)


def _note(sentence: str) -> None:
    from minigpt.console.terminal import note  # imported here, because importing rich takes time

    note(sentence)


def _by_heart(conversations: "Sequence[Conversation]") -> str:
    """Return why no pairs are kept for validation, as a text for the user; "" if some should be kept."""
    answers = Counter(exchange.answer for each in conversations for exchange in each.exchanges)
    pairs = answers.total()
    if pairs < _FEW_PAIRS:
        text = (
            "only {pairs} pairs: the model learns all of them by heart and is measured on them; to answer "
            "new questions it needs about {good}, with several phrasings of each question"
        )
        return Message(text, pairs=pairs, good=_GOOD_PAIRS)
    once = sum(count == 1 for count in answers.values()) / pairs
    if pairs <= _BY_HEART and once >= _ONCE:
        text = (
            "{once:.0%} of the answers come once, so nothing tells what a new phrasing means: the model "
            "learns all pairs by heart and is measured on them; to answer new phrasings it needs several of "
            "each question"
        )
        return Message(text, once=once)
    return ""


def _encoding(opened: "DataFile | None") -> str:
    """Return the detected encoding, for the flag --encoding; "" for UTF-8, which needs no flag."""
    return opened.encoding if opened is not None and opened.encoding not in ("utf-8", "ascii") else ""


def _sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of all bytes of some files."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class _Counted:
    """Counts the characters of texts. Keeps the last three texts, from which prompts are taken."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.kinds: Counter[str] = Counter()
        self._last: deque[str] = deque(maxlen=3)
        for text in texts:
            self.kinds.update(text)
            self._last.append(text)

    @property
    def characters(self) -> int:
        return self.kinds.total()

    def lines(self, file: Path) -> list[str]:
        """Return three lines with statistics for the user."""
        often = " ".join(repr(character) for character, _ in self.kinds.most_common(12))
        once = sum(count == 1 for count in self.kinds.values())
        return [
            f"{file}: text, {self.characters:,} characters",
            f"different characters: {len(self.kinds):,}, {once:,} of them come once",
            f"the most frequent: {often}",
        ]

    def prompts(self) -> list[str]:
        """Return two prompts: beginnings of lines near the end of the text. (The end is for validation.)"""
        lines = [line.strip() for text in self._last for line in text.splitlines()]
        lines = [line for line in lines if len(line) >= _PROMPT] or [line for line in lines if line]
        lines = lines[-max(2, len(lines) // 4) :]
        return list(dict.fromkeys(line[:_PROMPT] for line in (lines[:1] + lines[-1:])))


if __name__ == "__main__":
    command_line.run(Options, main)
