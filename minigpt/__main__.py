"""`minigpt VERB ...`, or `python -m minigpt VERB ...`: a table from verb to command, and nothing else.

A command is run as the script that it is: `minigpt train` and `python ./minigpt/train.py` are one thing. This
module loads neither torch nor a command before a verb is known: `minigpt --help` answers at once.
"""

import runpy
import sys

from minigpt.console import command_line
from minigpt.errors import InputError, unknown_name

COMMANDS = {
    "quickstart": (
        "minigpt.commands.quickstart",
        "all of it in one command: from any file to a conversation",
    ),
    "vocab": ("minigpt.build_vocab", "build vocab.json: one token per character of your data"),
    "split": ("minigpt.split_data", "split a JSONL file into train.jsonl and val.jsonl"),
    "stats": ("minigpt.dataset_stats", "token lengths, what a max_length would cut, unknown characters"),
    "train": ("minigpt.train", "train a GPT on questions and answers"),
    "finetune": ("minigpt.commands.finetune", "continue to train a model on your own conversations, or LoRA"),
    "eval": ("minigpt.commands.evaluate", "loss, perplexity, exact match and character F1 of a checkpoint"),
    "doctor": ("minigpt.commands.doctor", "what looks wrong with a training run, and what to try"),
    "generate": ("minigpt.generate", "ask a checkpoint: in conversation, one question, or a file of them"),
    "chat": ("minigpt.commands.chat", "a conversation in the terminal, with any model"),
    "quantize": ("minigpt.commands.quantize", "save a checkpoint in int8, int4 or float16"),
    "import": ("minigpt.commands.import_checkpoint", "turn a .pth of torch.save into a checkpoint folder"),
    "convert": ("minigpt.commands.convert", "turn a checkpoint folder into a GGUF file, for llama.cpp"),
    "env": ("minigpt.commands.environment", "what is installed, and what machine this is: for a bug report"),
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<12}{text}" for verb, (_, text) in COMMANDS.items())
    return (
        "usage: minigpt VERB [flags]\n\n"
        "From a file of questions and answers to a GPT that answers.\n\n"
        f"verbs, in the order of the work:\n{verbs}\n\n"
        "minigpt VERB --help lists a verb's flags."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns the process's exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    verb, rest = arguments[0] if arguments else "", arguments[1:]
    if verb not in COMMANDS:
        code = command_line.exit_code("minigpt", lambda: _answer(arguments))
        return code if arguments else code or 2
    before = sys.argv
    sys.argv = [f"minigpt {verb}", *rest]
    try:
        runpy.run_module(COMMANDS[verb][0], run_name="__main__")
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise  # a text, which Python prints
        return stop.code or 0
    except KeyboardInterrupt:  # before the command had taken over, while its modules were loaded
        print(f"minigpt {verb}: interrupted", file=sys.stderr)
        return 130
    finally:
        sys.argv = before
    return 0


def _answer(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
    elif arguments[0] == "--version":
        from minigpt import __version__

        print(f"minigpt {__version__}")
    else:
        raise InputError(unknown_name("verb", arguments[0], COMMANDS))


if __name__ == "__main__":
    sys.exit(main())
