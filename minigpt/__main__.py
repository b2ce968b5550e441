"""Runs `minigpt VERB ...` or `python -m minigpt VERB ...`. A table tells which script each verb runs.

A command is run as a script, so `minigpt train` and `python ./minigpt/train.py` do the same. This module
imports neither torch nor a command before the verb is known, so `minigpt --help` is quick.
"""

import runpy
import shutil
import signal
import sys
import threading

# If Python's own handler of Ctrl-C is active, switch it off during the imports below. Ctrl-C then ends the
# process without a traceback. (Only the main thread can change handlers.)
_is_ours = threading.current_thread() is threading.main_thread()
_is_ours = _is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _is_ours:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from minigpt.console import command_line
from minigpt.console.language import language_of, say, set_language, translated, wrapped
from minigpt.errors import InputError, unknown_name

if _is_ours:
    signal.signal(signal.SIGINT, signal.default_int_handler)

COMMANDS = {
    "quickstart": (
        "minigpt.commands.quickstart",
        "all of it in one command: from any file to a conversation",
    ),
    "vocab": ("minigpt.build_vocab", "build vocab.json: one token per character of your data"),
    "split": ("minigpt.split_data", "split a file of questions and answers into train.jsonl and val.jsonl"),
    "stats": (
        "minigpt.dataset_stats",
        "print token lengths, what a max_length would cut, unknown characters",
    ),
    "train": ("minigpt.train", "train a GPT on questions and answers"),
    "finetune": ("minigpt.commands.finetune", "continue to train a model on your own conversations, or LoRA"),
    "classify": ("minigpt.commands.classify", "label texts with a classifier: labels and probabilities"),
    "eval": (
        "minigpt.commands.evaluate",
        "measure a checkpoint: loss, perplexity, exact match, character F1",
    ),
    "look": ("minigpt.commands.look", "look inside a model: tokens, loss, attention, layers, weights"),
    "plot": ("minigpt.commands.plot", "show the curves of training runs, and compare their answers"),
    "experiment": ("minigpt.commands.experiment", "train a model that fails on purpose, and see why"),
    "compare": ("minigpt.commands.compare", "compare two models: which is better, and is it chance?"),
    "doctor": ("minigpt.commands.doctor", "find what looks wrong with a training run, and what to try"),
    "generate": ("minigpt.generate", "ask a checkpoint: in conversation, one question, or a file of them"),
    "fill": ("minigpt.commands.fill", "name the missing tokens of a text"),
    "chat": ("minigpt.commands.chat", "talk with any model in the terminal"),
    "merge": ("minigpt.commands.merge", "merge an adapter into the weights of its model"),
    "quantize": ("minigpt.commands.quantize", "save a checkpoint in int8, int4 or float16"),
    "import": ("minigpt.commands.import_checkpoint", "turn a .pth of torch.save into a checkpoint folder"),
    "convert": ("minigpt.commands.convert", "turn a checkpoint folder into a GGUF or ONNX file, or a page"),
    "env": (
        "minigpt.commands.environment",
        "print what is installed and what machine this is, for a bug report",
    ),
}


def _usage() -> str:
    width = max(40, shutil.get_terminal_size().columns)
    lines = [say("usage: {command} [flags]", command="minigpt VERB"), ""]
    lines += [translated("From a file of questions and answers to a GPT that answers.")]
    lines += ["", translated("verbs, in the order of the work:")]
    for verb, (_, text) in COMMANDS.items():
        first, *more = wrapped(translated(text), width - 14)
        lines += [f"  {verb:<12}{first}", *(f"{'':14}{line}" for line in more)]
    last = wrapped(translated("minigpt VERB --help lists a verb's flags."), width)
    return "\n".join([*lines, "", *last])


def main(argv: list[str] | None = None) -> int:
    """Run the command of the verb, which is the first argument. Returns the exit code of the process."""
    arguments = sys.argv[1:] if argv is None else argv
    verb, rest = arguments[0] if arguments else "", arguments[1:]
    if verb not in COMMANDS:
        set_language(language_of(arguments))
        code = command_line.exit_code("minigpt", lambda: _answer(arguments))
        return code if arguments else code or 2
    before = sys.argv
    sys.argv = [f"minigpt {verb}", *rest]
    try:
        # `exit_code` is called here without work, only for the standard streams: it opens /dev/null in place
        # of each closed stream, and returns an error code if stdout was closed. This must happen before the
        # command is imported: otherwise a file that the import opens could get the file descriptor of a
        # closed stream (0, 1 or 2), and prints would go into that file.
        if code := command_line.exit_code(f"minigpt {verb}", lambda: None):
            return code
        runpy.run_module(COMMANDS[verb][0], run_name="__main__")
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise  # the exit "code" is a text. Python prints it as an error message
        return stop.code or 0
    except KeyboardInterrupt:  # Ctrl-C while the command's modules were imported
        print(f"minigpt {verb}: {translated('interrupted')}", file=sys.stderr)
        return 130
    finally:
        sys.argv = before
    return 0


def _answer(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & {*arguments} or arguments[0].startswith("--language"):
        print(_usage())
    elif arguments[0] == "--version":
        from minigpt import __version__

        print(f"minigpt {__version__}")
    else:
        raise InputError(unknown_name("verb", arguments[0], COMMANDS))


if __name__ == "__main__":
    sys.exit(main())
