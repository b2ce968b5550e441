r"""Ask a trained model: in conversation, one question, or a file of them.

    python ./minigpt/generate.py                                # Q: ... A: ..., until an empty line
    minigpt generate --question 四川省的省会是哪里？            # one answer on stdout
    minigpt generate --file questions.txt > answers.txt         # an answer a line, in the questions' order
    minigpt generate --file val.jsonl --output answers.jsonl    # {"question": ..., "answer": ...} a line
    cat questions.txt | minigpt generate --json                 # the same on stdout
    minigpt generate --question 四川省的省会是哪里？ --stream   # the answer while it is being written

A file holds one question a line, or JSONL with "question" (told by its first character, "{"). A blank line
gets a blank answer, so that the lines of questions and answers correspond; in JSONL it does not count. Line
ends and control characters in an answer are written as escapes (\n), so that it takes one line; JSON has the
exact text.

Answers are greedy unless --do_sample is given. With --seed, sampling is reproducible.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this folder first, where our names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt import command_line
from minigpt.command_line import InputError, printable

if TYPE_CHECKING:
    from minigpt.families import LanguageModel
    from minigpt.inference.generation import Answer, GenerationOptions
    from minigpt.inference.output import StopReason
    from minigpt.pretrained import AnyTokenizer


@dataclass(frozen=True, kw_only=True)
class Options(command_line.DoorOptions):
    """Ask a trained model: in conversation, one question (--question), or many (--file, standard input)."""

    model: Path = Path("output/best")
    """checkpoint folder, as `minigpt train` writes it"""
    question: str | None = None
    """answer this question and stop"""
    file: Path | None = None
    """answer the questions of this file: one a line, or JSONL with "question" """
    output: Path | None = None
    """write question and answer as JSONL to this file instead of answers to stdout"""
    max_new_tokens: int | None = None
    """tokens of an answer, at most; left out: up to 128, fewer if the model has no room for more"""
    min_new_tokens: int = 0
    """tokens of an answer, at least"""
    do_sample: bool = False
    """draw each token at random instead of taking the likeliest"""
    temperature: float = 1.0
    """with --do_sample: below 1 likely tokens gain, above 1 they lose"""
    top_k: int = 0
    """with --do_sample: draw among the k likeliest tokens only; 0: among all"""
    top_p: float = 1.0
    """with --do_sample: draw among the likeliest tokens whose probabilities add up to this"""
    min_p: float = 0.0
    """with --do_sample: draw among the tokens at least this times as likely as the likeliest; 0: off"""
    typical_p: float = 1.0
    """with --do_sample: draw among the least surprising tokens whose probabilities add up to this"""
    repetition_penalty: float = 1.0
    """above 1: tokens that the question or the answer has become less likely"""
    no_repeat_ngram_size: int = 0
    """that many tokens in a row never come twice, question included; 0: off"""
    presence_penalty: float = 0.0
    """taken from the score of each token that the answer has"""
    frequency_penalty: float = 0.0
    """the same, times how often the answer has it"""
    stop_strings: tuple[str, ...] = ()
    """texts that end an answer, and do not belong to it: one or several"""
    num_beams: int = 1
    """above 1: beam search, which follows that many beginnings at once"""
    length_penalty: float = 1.0
    """with --num_beams: above 1 favours long answers, below 1 short ones"""
    early_stopping: bool = False
    """with --num_beams: stop as soon as that many answers are finished"""
    seed: int | None = None
    """with --do_sample: same seed, same answers"""
    use_cache: bool = True
    """keep the keys and values of earlier tokens; without, all is computed anew for each token"""
    stream: bool = False
    """show an answer while it is being written; with --question, or in conversation"""
    batch_size: int = 64
    """questions answered at once"""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best that is there"""
    threads: int = 0
    """CPU threads; 0: as many as there are cores"""


def main(options: Options) -> dict[str, Any] | None:
    """Read the questions, load the model, answer."""
    questions = _questions(options)
    if not options.model.exists():
        raise InputError(
            f"{options.model} does not exist: train a model first (`minigpt train`; or `make demo`, then "
            "--model output/demo/best), or name its folder with --model"
        )
    from minigpt.inference.generation import GenerationOptions

    # The flags that are options of generation have their names.
    names = [field.name for field in dataclasses.fields(GenerationOptions) if hasattr(options, field.name)]
    chosen = GenerationOptions(**{name: getattr(options, name) for name in names})
    _warn_of_ignored(options)
    model, tokenizer = _load(options)
    if questions is None:
        return {"questions": _converse(model, tokenizer, chosen, options.stream)}
    if options.stream:
        reason = _write(model, tokenizer, questions[0], chosen)
        _warn_of_unfinished([reason], model, chosen)
        return None
    answers = _answer(model, tokenizer, questions, chosen, options)
    records = [
        {"question": question, "answer": answer.text, "stop_reason": answer.stop_reason}
        for question, answer in zip(questions, answers)
    ]
    if options.output is not None:
        from minigpt.files import atomic_write

        atomic_write(options.output, "".join(f"{_json(record)}\n" for record in records))
        print(f"{len(records)} answers written to {options.output}")
        return {"questions": len(records), "output": options.output}
    if not options.json:
        print("\n".join(printable(answer.text) for answer in answers))
        return None
    for record in records[:-1]:
        print(_json(record))
    return records[-1]  # printed by command_line.run: the last line, as those before it


def _json(record: dict[str, str]) -> str:
    line = json.dumps(record, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()  # half a character: escaped, as JSON would


def _warn_of_ignored(options: Options) -> None:
    from minigpt.terminal import warn

    def given(*names: str) -> str:
        changed = [name for name in names if getattr(options, name) != getattr(Options, name)]
        return ", ".join(f"--{name}" for name in changed)

    if not options.do_sample and (flags := given("temperature", "top_k", "top_p", "min_p", "typical_p")):
        warn(f"without --do_sample the likeliest token is taken: {flags} changes nothing")
    if options.num_beams == 1 and (flags := given("length_penalty", "early_stopping")):
        warn(f"without --num_beams one beginning is followed: {flags} changes nothing")


def _load(options: Options) -> "tuple[LanguageModel, AnyTokenizer]":
    import torch

    from minigpt.devices import pick_device
    from minigpt.pretrained import load_model_and_tokenizer

    device = pick_device(options.device)
    if options.threads < 0:
        raise InputError(f"threads must be at least 0: got threads={options.threads}")
    if options.threads:
        torch.set_num_threads(options.threads)
    return load_model_and_tokenizer(options.model, device)


# -- many questions -----------------------------------------------------------------------------------------


def _questions(options: Options) -> list[str] | None:
    """The questions that the flags or standard input give; None: a person will ask them."""
    if options.question is not None and options.file is not None:
        raise InputError("--question asks one question, --file many: give one of them")
    if options.stream and (options.json or options.output is not None):
        raise InputError("--stream shows text while it is being written: leave out --json and --output")
    if options.stream and options.question is None and (options.file is not None or not sys.stdin.isatty()):
        raise InputError("--stream shows one answer: give --question, or ask in conversation")
    if options.question is not None:
        if not options.question.strip():
            raise InputError("--question is empty")
        return [options.question]
    if options.file is not None:
        return _parse(options.file.read_bytes(), str(options.file))
    if sys.stdin.isatty():
        if options.output is not None:
            raise InputError("--output needs questions: give --question, --file, or lines on standard input")
        return None
    return _parse(sys.stdin.buffer.read(), "standard input")


def _parse(content: bytes, source: str) -> list[str]:
    """The questions of a text or JSONL file."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise InputError(f'{source} holds no question: one a line, or JSONL with "question"')
    lines = content.removesuffix(b"\n").split(b"\n")  # bytes: U+2028 may stand inside a question
    is_jsonl = content.lstrip().startswith(b"{")
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
                "convert it, from GBK for instance: iconv -f GB18030 -t UTF-8 OLD > NEW"
            ) from None
        if not is_jsonl:
            questions.append(text)
        elif text:
            questions.append(_json_question(text, f"{source}:{number}"))
    return questions


def _json_question(text: str, where: str) -> str:
    try:
        question = json.loads(text)["question"]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: broken JSON ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f'{where}: no object with "question"') from None
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where}: "question" must be text that is not empty: got {question!r}')
    return question


def _answer(
    model: "LanguageModel",
    tokenizer: "AnyTokenizer",
    questions: list[str],
    chosen: "GenerationOptions",
    options: Options,
) -> "list[Answer]":
    """Answer all questions that are not blank, and say what a reader of the answers should know."""
    from minigpt.inference.generation import Answer, answer_questions
    from minigpt.terminal import ProgressLine, warn

    asked = [question for question in questions if question.strip()]
    with ProgressLine("answering", len(asked), patience=2.0) as progress:
        found = iter(
            answer_questions(model, tokenizer, asked, chosen, options.batch_size, on_progress=progress.update)
        )
    answers = [next(found) if question.strip() else Answer("", "eos", []) for question in questions]
    if blank := len(questions) - len(asked):
        warn(f"{blank} of {len(questions)} lines are blank: their answers are too")
    _warn_of_unknown([answer.unknown_characters for answer in answers])
    written = [answer for question, answer in zip(questions, answers) if question.strip()]
    _warn_of_unfinished([answer.stop_reason for answer in written], model, chosen)
    return answers


def _warn_of_unfinished(
    reasons: "list[StopReason]", model: "LanguageModel", chosen: "GenerationOptions"
) -> None:
    from minigpt.terminal import warn

    unfinished = [reason for reason in reasons if reason in ("length", "context")]
    if unfinished:
        context = unfinished.count("context")
        why = (
            [f"{context} at the model's block_size={model.config.max_position_embeddings}"] if context else []
        )
        if context < len(unfinished):
            why.insert(0, f"{len(unfinished) - context} at --max_new_tokens {chosen.wanted}")
        warn(f"{len(unfinished)} of {len(reasons)} answers were cut short: {', '.join(why)}")


def _warn_of_unknown(unknown: list[list[str]]) -> None:
    from minigpt.terminal import warn

    characters = list(dict.fromkeys(character for some in unknown for character in some))
    if characters:
        shown = " ".join(map(repr, characters[:20])) + (" ..." if len(characters) > 20 else "")
        where = f"; in {sum(map(bool, unknown))} of {len(unknown)} questions" if len(unknown) > 1 else ""
        warn(f"not in the vocabulary, read as <unk>: {shown}{where}")


# -- one answer, while it is being written ------------------------------------------------------------------


def _write(
    model: "LanguageModel",
    tokenizer: "AnyTokenizer",
    question: str,
    chosen: "GenerationOptions",
    before: str = "",
) -> "StopReason":
    """Print an answer piece by piece; returns why it ended."""
    from minigpt.inference.generation import prompt_ids
    from minigpt.inference.streaming import stream_ids

    pieces = stream_ids(model, tokenizer, prompt_ids(tokenizer, question), chosen)
    _warn_of_unknown([tokenizer.unknown_characters(question)])
    print(before, end="", flush=True)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            print()
            reason: StopReason = end.value
            return reason
        print(printable(piece), end="", flush=True)


# -- a conversation -----------------------------------------------------------------------------------------


def _converse(
    model: "LanguageModel", tokenizer: "AnyTokenizer", chosen: "GenerationOptions", in_pieces: bool
) -> int:
    """Ask and answer until an empty line or the end of input; returns the number of questions."""
    from minigpt.inference.generation import answer_questions

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() line editing and a history, where there is one
    print("An empty line ends the conversation.")
    count = 0
    while True:
        try:
            question = input("Q: ").strip()
        except EOFError:
            print()
            return count
        except UnicodeDecodeError:
            print("   (that was not UTF-8: please set the terminal to it)", file=sys.stderr)
            continue
        if not question:
            return count
        count += 1
        try:
            if in_pieces:
                _write(model, tokenizer, question, chosen, before="A: ")
            else:
                answer = answer_questions(model, tokenizer, [question], chosen)[0]
                _warn_of_unknown([answer.unknown_characters])
                print(f"A: {printable(answer.text)}")
        except InputError as error:  # too long: the next one may be shorter
            print(f"   ({error})", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(Options, main)
