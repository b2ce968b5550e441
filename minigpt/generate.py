r"""Ask a trained model: in a conversation, a single question, or a file of questions.

    python ./minigpt/generate.py                                # Q: ... A: ..., until an empty line
    minigpt generate --question 四川省的省会是哪里？            # one answer on stdout
    minigpt generate --file questions.txt > answers.txt         # one answer per line, in the same order
    minigpt generate --file val.jsonl --output answers.jsonl    # {"question": ..., "answer": ...} per line
    cat questions.txt | minigpt generate --json                 # the same on stdout
    minigpt generate --question 四川省的省会是哪里？ --stream   # show the answer while it is generated
    minigpt generate --model gpt2 --prompt "Once upon a time"   # continue a text; no <sep> is added
    minigpt generate --question 1+1等于几？ --choices 2 3 4     # the answer is one of these
    minigpt generate --model Qwen3-0.6B --question 你好 --system 请简短 --think off --tools tools.json
    minigpt generate --model gpt2 --prompt "Once" --window 512 --sinks 4 --max_new_tokens 5000

A file has one question per line, or is JSONL with "question" (if its first character is "{"). A blank line
gets a blank answer, so that each answer has the line number of its question; in JSONL, blank lines are
ignored. Line ends and control characters in an answer are written as escapes (\n), so that an answer is one
line. With --json, the text is exact.

The model's folder decides the prompt format: question <sep>, the chat template of its tokenizer, or plain
text. The most likely token is always chosen, unless --do_sample is given. With --seed, sampling is
reproducible.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: put the parent folder into sys.path, so that `import minigpt` works
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from minigpt.console import command_line
from minigpt.console.flags import fields_of
from minigpt.console.language import say, translated
from minigpt.errors import InputError, printable, printable_json, printable_lines
from minigpt.generation.loading import load_to_answer, require_model
from minigpt.generation.options import GenerationOptions
from minigpt.storage.json_files import parse_json
from minigpt.storage.regular_files import read_bytes, read_text

if TYPE_CHECKING:
    from minigpt.generation.api import Answer
    from minigpt.generation.conversation import QuestionAnswering
    from minigpt.generation.generation_config import PromptFormat
    from minigpt.generation.output import StopReason
    from minigpt.weights.pretrained import AnyTokenizer


_NO_FLAGS = {"logit_bias", "bad_words_ids", "eos_token_id"} | {
    *("output_scores", "output_logits", "output_hidden_states", "output_attentions", "logprobs")
}


@dataclass(frozen=True, kw_only=True)
class Options(command_line.ModelOptions):
    """Ask a trained model: in a conversation, a single question (--question), or many (--file, stdin)."""

    RANGES = {"batch_size": (1, 10**6)}

    # Questions
    question: str | None = None
    """answer this question and exit"""
    prompt: str | None = None
    """continue this text and exit; it is not a question, and nothing is added; "" begins a new text"""
    file: Path | None = None
    """answer the questions of this file: one per line, or JSONL with "question" """
    output: Path | None = None
    """write questions and answers as JSONL to this file, instead of answers to stdout"""
    stream: bool = False
    """show an answer while it is generated; with --question, or in a conversation"""
    batch_size: int = 64
    """number of questions that are answered in one batch"""
    special_tokens_in_prompt: bool = False
    """read the text of special tokens as these tokens, like transformers; default: it is plain text"""

    # Chat models
    system: str = ""
    """system message, read before all else; without a chat template it is a line above the question"""
    think: Literal["auto", "on", "off"] = "auto"
    """whether a chat model thinks before it answers; auto: its template decides"""
    tools: str | None = None
    """functions that a chat model may call: a JSON list, or a file that holds one"""

    generation: dict[str, Any] = fields_of(  # noqa: RUF009
        GenerationOptions,
        [field.name for field in dataclasses.fields(GenerationOptions) if field.name not in _NO_FLAGS],
    )

    # Other options
    bad_words: tuple[str, ...] = ()
    """texts that an answer must not contain (in the tokens that encoding them gives)"""
    assistant_model: Path | None = None
    """folder of a much smaller model with the same tokenizer, which guesses tokens: same answers, faster"""


def main(options: Options) -> dict[str, Any] | None:
    """Read the questions, load the model, answer, print."""
    questions = _questions(options)
    if (schema := options.generation.get("json_schema")) is not None:
        options.generation["json_schema"] = _json_or_file("json_schema", schema)
    chosen = GenerationOptions(**options.generation)
    require_model(options.model)
    _warn_of_ignored(options, chosen)
    asked = _load(options, chosen)
    if questions is None:
        return {"questions": _converse(asked, options.stream)}
    if options.stream:
        reason = _write(asked, questions[0])
        _warn_of_unfinished([reason], asked)
        return None
    answers = _answer(asked, questions, options.batch_size)
    keys = ("question", "answer") if options.prompt is None else ("prompt", "text")
    copies = chosen.num_return_sequences
    records = [
        {keys[0]: question, keys[1]: answer.text, "stop_reason": answer.stop_reason}
        for question, answer in zip((one for one in questions for _ in range(copies)), answers)
    ]
    if options.output is not None:
        from minigpt.storage.files import atomic_write

        atomic_write(options.output, "".join(f"{_json(record)}\n" for record in records))
        print(say("{count} answers written to {path}", count=len(records), path=options.output))
        return {"questions": len(records), "output": options.output}
    if not options.json:
        shown = printable if options.prompt is None else printable_lines
        print("\n".join(shown(answer.text) for answer in answers))
        return None
    for record in records[:-1]:
        print(_json(record))
    return records[-1]  # `command_line.run` prints this record, as the last line of output


def _json_or_file(name: str, given: str) -> Any:
    """Parse JSON that is given as text or as the name of a file."""
    text = given
    if given.lstrip()[:1] not in ("{", "[") and Path(given).is_file():
        text = read_text(given, "utf-8-sig")
    try:
        return parse_json(text)
    except ValueError as error:
        where = f"{given}: " if text is not given else f"--{name} is neither a file nor JSON: "
        raise InputError(f"{where}{error}") from None


def _json(record: dict[str, str]) -> str:
    return printable_json(json.dumps(record, ensure_ascii=False))


def _warn_of_ignored(options: Options, chosen: GenerationOptions) -> None:
    from minigpt.console.terminal import warn

    def given(*names: str) -> str:
        return ", ".join(f"--{name}" for name in names if name in options.generation)

    drawing = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
    if not chosen.do_sample and (flags := given(*drawing)):
        warn(f"without --do_sample the most likely token is taken: {flags} changes nothing")
    if chosen.num_beams == 1 and (flags := given("length_penalty", "early_stopping")):
        warn(f"without --num_beams one beginning is followed: {flags} changes nothing")
    if chosen.prompt_lookup_num_tokens is None and (flags := given("max_matching_ngram_size")):
        warn(f"without --prompt_lookup_num_tokens nothing is looked up: {flags} changes nothing")
    if options.assistant_model is None and (flags := given("num_assistant_tokens")):
        warn(f"without --assistant_model there are no guesses: {flags} changes nothing")


def _completed(
    chosen: GenerationOptions, options: Options, tokenizer: "AnyTokenizer", advised: dict[str, Any]
) -> GenerationOptions:
    """Return the user's options, completed from the model's folder.

    A flag that the user did not give gets its value from the folder's generation_config.json. Exception:
    do_sample is not taken from there. The texts in --bad_words become ids, which are added to the folder's
    bad_words_ids.
    """
    from minigpt.generation.sequence import bare_ids

    words = list(advised.get("bad_words_ids", ()))
    for word in options.bad_words:
        if not word:
            raise InputError("--bad_words must be texts of at least one character: got ''")
        words += [bare_ids(tokenizer, word), bare_ids(tokenizer, f" {word}")]
    more = {name: advised[name] for name in advised if name not in (*options.generation, "do_sample")}
    return dataclasses.replace(chosen, **{**more, "bad_words_ids": words})


def _load(options: Options, chosen: GenerationOptions) -> "QuestionAnswering":
    """Load model and tokenizer. The folder decides the prompt format and the ids that end an answer."""
    folder, model, tokenizer, assistant = load_to_answer(options, options.assistant_model)
    from minigpt.console.terminal import warn
    from minigpt.generation.conversation import QuestionAnswering
    from minigpt.generation.generation_config import notes_of, prompt_format, recommended_options, start_token
    from minigpt.generation.speculative_decoding import check_assistant

    if assistant is not None:
        check_assistant(model, chosen, assistant)
    form: PromptFormat = (
        "text" if options.prompt is not None else prompt_format(folder, tokenizer, options.adapter)
    )
    advised = recommended_options(folder)
    for note in notes_of(folder, tokenizer):
        warn(note)
    completed = _completed(chosen, options, tokenizer, advised)
    start = start_token(folder, tokenizer)
    if options.prompt == "" and start is None:
        raise InputError("--prompt is empty, and the tokenizer has no token that begins a text")
    chat = _chat_options(options, form, tokenizer)
    special = options.special_tokens_in_prompt
    return QuestionAnswering(
        model, tokenizer, form, completed, assistant, start=start, allow_special=special, **chat
    )


def _chat_options(options: Options, form: "PromptFormat", tokenizer: "AnyTokenizer") -> dict[str, Any]:
    """Return the values of --system, --think and --tools. Raise InputError if they do not fit the model."""
    given = [
        name for name in ("system", "think", "tools") if getattr(options, name) != getattr(Options, name)
    ]
    others = [name for name in given if name != "system"]
    if others and form != "chat":
        raise InputError(f"--{others[0]} is for chat models: this one has no chat_template")
    if given and form == "text":
        raise InputError("--system is for models that answer: this one continues a text")
    if options.think != "auto" and "enable_thinking" not in (getattr(tokenizer, "chat_template", "") or ""):
        raise InputError("--think is for models whose chat template can switch thinking")
    tools = None if options.tools is None else _json_or_file("tools", options.tools)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
        raise InputError("--tools must be a JSON list of objects, each a function's description")
    return {
        "before": [{"role": "system", "content": options.system}] if options.system else [],
        "thinking": None if options.think == "auto" else options.think == "on",
        "tools": tools,
    }


# -- many questions -----------------------------------------------------------------------------------------


def _questions(options: Options) -> list[str] | None:
    """Return the questions from the flags or from standard input, or None if the user will type them."""
    from minigpt.data.questions import parse_questions

    if options.question is not None and options.file is not None:
        raise InputError("--question asks one question, --file many: give one of them")
    if options.prompt is not None and (options.question is not None or options.file is not None):
        raise InputError("--prompt is not a question: leave out --question and --file, or --prompt")
    if options.stream and (options.json or options.output is not None):
        raise InputError("--stream shows text while it is being written: leave out --json and --output")
    if options.prompt is not None:
        return [options.prompt]
    if options.stream and options.question is None and (options.file is not None or not sys.stdin.isatty()):
        raise InputError("--stream shows one answer: give --question, or ask in conversation")
    if options.question is not None:
        if not options.question.strip():
            raise InputError("--question is empty")
        return [options.question]
    if options.file is not None:
        return parse_questions(read_bytes(options.file, or_pipe=True), str(options.file))
    if sys.stdin.isatty():
        if options.output is not None:
            raise InputError("--output needs questions: give --question, --file, or lines on standard input")
        return None
    return parse_questions(sys.stdin.buffer.read(), "standard input")


def _answer(asked: "QuestionAnswering", questions: list[str], batch_size: int) -> "list[Answer]":
    """Answer all questions that are not blank. Warn of answers cut short, blank questions, and the like."""
    from minigpt.console.terminal import ProgressLine, warn

    written = [question for question in questions if asked.has_answer(question)]
    total = len(written) * asked.options.num_return_sequences
    with ProgressLine("answering", total, patience=2.0) as progress:
        answers = asked.answers(questions, batch_size, progress.update)
    if blank := len(questions) - len(written):
        warn(f"{blank} of {len(questions)} lines are blank: their answers are too")
    _warn_of_unknown(asked, questions)
    _warn_of_special(asked, questions)
    asked_for = (question for question in questions for _ in range(asked.options.num_return_sequences))
    pairs = zip(asked_for, answers)
    _warn_of_unfinished(
        [answer.stop_reason for question, answer in pairs if asked.has_answer(question)], asked
    )
    return answers


def _warn_of_unfinished(reasons: "list[StopReason]", asked: "QuestionAnswering") -> None:
    from minigpt.console.terminal import warn

    unfinished = [reason for reason in reasons if reason in ("length", "context")]
    if unfinished:
        context = unfinished.count("context")
        why = (
            [f"{context} at the model's block_size={asked.model.config.max_position_embeddings}"]
            if context
            else []
        )
        if context < len(unfinished):
            why.insert(0, f"{len(unfinished) - context} at --max_new_tokens {asked.options.wanted}")
        warn(f"{len(unfinished)} of {len(reasons)} answers were cut short: {', '.join(why)}")


def _warn_of_special(asked: "QuestionAnswering", questions: list[str]) -> None:
    """Warn if questions contain a special token's name, such as <|im_end|>: it is read as plain text."""
    from minigpt.console.terminal import warn

    tokens = getattr(asked.tokenizer, "special_tokens", {})
    typed = [token for token in tokens if any(token in question for question in questions)]
    if typed and not asked.allow_special:
        shown = ", ".join(typed[:5]) + (", ..." if len(typed) > 5 else "")
        warn(f"read as plain text: {shown}; as special tokens: --special_tokens_in_prompt")


def _warn_of_unknown(asked: "QuestionAnswering", questions: list[str]) -> None:
    from minigpt.console.terminal import warn

    unknown = [asked.tokenizer.unknown_characters(question) for question in questions]
    characters = list(dict.fromkeys(character for some in unknown for character in some))
    if characters:
        shown = " ".join(map(repr, characters[:20])) + (" ..." if len(characters) > 20 else "")
        if len(unknown) > 1:
            shown = f"{shown}; in {sum(map(bool, unknown))} of {len(unknown)} questions"
        warn(f"not in the vocabulary, {asked.tokenizer.unknown_read_as}: {shown}")


# -- one answer, shown while it is generated ----------------------------------------------------------------


def _write(asked: "QuestionAnswering", question: str, before: str = "") -> "StopReason":
    """Print `before`, then the answer piece by piece. Return the reason why the answer ended."""
    pieces = asked.pieces(question)
    _warn_of_unknown(asked, [question])
    _warn_of_special(asked, [question])
    shown = printable_lines if asked.form == "text" else printable
    print(before, end="", flush=True)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            print()
            reason: StopReason = end.value
            return reason
        print(shown(piece), end="", flush=True)


# -- a conversation -----------------------------------------------------------------------------------------


def _converse(asked: "QuestionAnswering", in_pieces: bool) -> int:
    """Answer what the user types, until an empty line or the end of input. Return the number of questions.

    Args:
        in_pieces: True: print each answer while it is generated.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() line editing and a history
    print(translated("An empty line ends the conversation."))
    count = 0
    while True:
        try:
            question = input("Q: ").strip()
        except EOFError:
            print()
            return count
        except UnicodeDecodeError:
            print(f"   {translated('(that was not UTF-8: please set the terminal to it)')}", file=sys.stderr)
            continue
        if not question:
            return count
        count += 1
        try:
            if in_pieces:
                _write(asked, question, before="A: ")
            else:
                print(f"A: {printable(_answer(asked, [question], 1)[0].text)}")
        except InputError as error:  # for example, the question is too long; the conversation continues
            print(f"   ({translated(error.args[0])})", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(Options, main)
# When this module is imported as minigpt.generate, the function `generate` takes the module's place.
elif __name__ == "minigpt.generate":
    from minigpt.generation.api import generate

    sys.modules[__name__] = generate  # type: ignore[assignment]
