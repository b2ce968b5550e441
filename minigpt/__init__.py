"""minigpt: from a file of questions and answers to a GPT that answers.

The public names are loaded when they are first used, so that `import minigpt` loads no torch:

    model = minigpt.load_model("output/best")
    tokenizer = minigpt.load_tokenizer("output/best")
    print(minigpt.generate(model, tokenizer, "四川省的省会是哪里？"))
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.families.qwen3.model import Qwen3Config as Qwen3Config
    from minigpt.families.qwen3.model import Qwen3ForCausalLM as Qwen3ForCausalLM
    from minigpt.generation.api import generate as generate
    from minigpt.model import GPTConfig as GPTConfig
    from minigpt.model import GPTLMHeadModel as GPTLMHeadModel
    from minigpt.tokenizer import Tokenizer as Tokenizer
    from minigpt.weights.pretrained import load_model as load_model
    from minigpt.weights.pretrained import load_tokenizer as load_tokenizer
    from minigpt.weights.pretrained import save_pretrained as save_pretrained

__version__ = "0.1.0"

_HOME = {
    "GPTConfig": "minigpt.model",
    "GPTLMHeadModel": "minigpt.model",
    "Qwen3Config": "minigpt.families.qwen3.model",
    "Qwen3ForCausalLM": "minigpt.families.qwen3.model",
    "Tokenizer": "minigpt.tokenizer",
    "generate": "minigpt.generation.api",
    "load_model": "minigpt.weights.pretrained",
    "load_tokenizer": "minigpt.weights.pretrained",
    "save_pretrained": "minigpt.weights.pretrained",
}
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """The package itself, with one name protected.

    `minigpt/generate.py` is a door (a script), `minigpt.generate` the function. Importing the door would
    make Python hang the module over the function; this setter declines.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "generate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOME})


sys.modules[__name__].__class__ = _Package
