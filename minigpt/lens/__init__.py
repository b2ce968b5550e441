"""Shows what a model reads, computes and predicts: in the terminal, in a picture, in a notebook.

    from minigpt import lens

    lens.attention(model, tokenizer, "四川的省会是哪里？").probabilities[1, 2]      # layer 1, head 2: (T, T)
    lens.record(model, ids, ["blocks.*.attn"])                                  # activations by name

Most functions return a view: numbers that can be shown as tables and charts. The commands `minigpt look`,
`plot` and `experiment` print views. Modules in this folder may import only these parts of minigpt: `errors`,
`devices`, `tokenizer`, and the folders console, storage, tokenization, families, data, finetuning, weights,
generation, evaluation, training and diagnosis.

The modules in reading order:

    recorder        activations by name, ablation, patching
    results         tables and charts of a view: terminal, notebook, page, JSON
    words           the texts of views in Chinese
    reading         a question and an answer as ids
    text            tokens, and BPE's merges
    examples        training examples as tensors; the examples with the highest loss
    predictions     loss of each token, the next token, sampled answers
    heads           attention, and the loss without each head
    layers          the logit lens
    vectors         the tokens with the most similar vectors
    memory          the KV cache
    parameters      sizes and norms of the parameters, and their change in training
    growth          the same view for each checkpoint of a run
    curves          several runs beside each other
    experiments     runs that fail on purpose
    pictures        PNG, SVG, HTML
    live            an HTML page that runs a model, and shows one question at its start
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.lens.curves import compare_runs as compare_runs
    from minigpt.lens.examples import batch as batch
    from minigpt.lens.examples import data as data
    from minigpt.lens.experiments import experiment as experiment
    from minigpt.lens.growth import along as along
    from minigpt.lens.heads import ablate as ablate
    from minigpt.lens.heads import attention as attention
    from minigpt.lens.layers import logit_lens as logit_lens
    from minigpt.lens.memory import cache as cache
    from minigpt.lens.parameters import weights as weights
    from minigpt.lens.predictions import loss as loss
    from minigpt.lens.predictions import next_token as next_token
    from minigpt.lens.predictions import sampled_answers as sampled_answers
    from minigpt.lens.reading import read_text as read_text
    from minigpt.lens.recorder import activation_names as activation_names
    from minigpt.lens.recorder import record as record
    from minigpt.lens.recorder import switched_off as switched_off
    from minigpt.lens.text import tokens as tokens
    from minigpt.lens.vectors import neighbours as neighbours

# Name of a function -> its module. A module is imported when one of its functions is first used, because a
# view needs only few of the modules.
_MODULES = {
    "ablate": "heads",
    "activation_names": "recorder",
    "along": "growth",
    "attention": "heads",
    "batch": "examples",
    "cache": "memory",
    "compare_runs": "curves",
    "data": "examples",
    "experiment": "experiments",
    "logit_lens": "layers",
    "loss": "predictions",
    "neighbours": "vectors",
    "next_token": "predictions",
    "read_text": "reading",
    "record": "recorder",
    "sampled_answers": "predictions",
    "switched_off": "recorder",
    "tokens": "text",
    "weights": "parameters",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(f"minigpt.lens.{_MODULES[name]}"), name)
        return value
    raise AttributeError(f"module 'minigpt.lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
