"""minigpt trains a GPT on a file of questions and answers, and lets it answer new questions.

    model = minigpt.load_model("output/best")
    tokenizer = minigpt.load_tokenizer("output/best")
    print(minigpt.generate(model, tokenizer, "四川省的省会是哪里？"))

docs/api.md describes the public names. A name is imported when it is first used, so `import minigpt` does not
import torch. This folder has the scripts train.py and generate.py, but `minigpt.train` and `minigpt.generate`
must be functions. So when Python imports one of these scripts as a module, the script replaces itself in
sys.modules by the function of the same name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.console.fonts import chinese_font as chinese_font
    from minigpt.errors import InputError as InputError
    from minigpt.evaluation.api import evaluate as evaluate
    from minigpt.evaluation.task_command import evaluate_task as evaluate_task
    from minigpt.families.qwen3.model import Qwen3Config as Qwen3Config
    from minigpt.families.qwen3.model import Qwen3ForCausalLM as Qwen3ForCausalLM
    from minigpt.generation.api import generate as generate
    from minigpt.generation.api import stream as stream
    from minigpt.generation.engine import Engine as Engine
    from minigpt.generation.options import GenerationOptions as GenerationOptions
    from minigpt.model import GPTConfig as GPTConfig
    from minigpt.model import GPTLMHeadModel as GPTLMHeadModel
    from minigpt.tokenization.bpe import BpeTokenizer as BpeTokenizer
    from minigpt.tokenization.wordpiece import WordPieceTokenizer as WordPieceTokenizer
    from minigpt.tokenizer import Tokenizer as Tokenizer
    from minigpt.training.config import TrainConfig as TrainConfig
    from minigpt.training.run import finetune as finetune
    from minigpt.training.run import train as train
    from minigpt.weights.pretrained import load_model as load_model
    from minigpt.weights.pretrained import load_tokenizer as load_tokenizer
    from minigpt.weights.pretrained import save_pretrained as save_pretrained

__version__ = "0.1.0"

_MODULES = {
    "BpeTokenizer": "minigpt.tokenization.bpe",
    "Engine": "minigpt.generation.engine",
    "GPTConfig": "minigpt.model",
    "GPTLMHeadModel": "minigpt.model",
    "GenerationOptions": "minigpt.generation.options",
    "InputError": "minigpt.errors",
    "Qwen3Config": "minigpt.families.qwen3.model",
    "Qwen3ForCausalLM": "minigpt.families.qwen3.model",
    "Tokenizer": "minigpt.tokenizer",
    "TrainConfig": "minigpt.training.config",
    "WordPieceTokenizer": "minigpt.tokenization.wordpiece",
    "chinese_font": "minigpt.console.fonts",
    "evaluate": "minigpt.evaluation.api",
    "evaluate_task": "minigpt.evaluation.task_command",
    "finetune": "minigpt.training.run",
    "generate": "minigpt.generation.api",
    "load_model": "minigpt.weights.pretrained",
    "load_tokenizer": "minigpt.weights.pretrained",
    "save_pretrained": "minigpt.weights.pretrained",
    "stream": "minigpt.generation.api",
    "train": "minigpt.training.run",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value
    raise AttributeError(f"module 'minigpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
