"""Shows what a model sees and does: the learner's own model, in the terminal, in a picture, in a notebook.

    from minigpt import lens

    lens.attention(model, tokenizer, "四川的省会是哪里？").probabilities[1, 2]      # layer 1, head 2: (T, T)
    lens.record(model, ids, ["blocks.*.attn"])                                  # activations by name

May import every folder below it: diagnosis, training, evaluation, generation, weights, finetuning, data,
families, tokenization, storage, console. `minigpt look`, `plot` and `experiment` print its results.

In reading order:

    recorder        activations by name, ablation, patching
    results         tables and charts of a view: terminal, notebook, page, JSON
    words           the texts of views in Chinese
    reading         a question and an answer as ids
    text            tokens, and BPE's merges
    examples        training examples as tensors; the examples with the highest loss
    predictions     loss of each token, the next token, sampled answers
    heads           attention, and the loss without each head
    layers          the logit lens
    vectors         nearest tokens
    memory          the KV cache
    parameters      sizes and norms of the parameters, and their change in training
    growth          a view along the checkpoints of a run
    curves          several runs beside each other
    experiments     runs that fail on purpose
    pictures        PNG, SVG, HTML
"""

from minigpt.lens.curves import compare_runs
from minigpt.lens.examples import batch, data
from minigpt.lens.experiments import experiment
from minigpt.lens.growth import along
from minigpt.lens.heads import ablate, attention
from minigpt.lens.layers import logit_lens
from minigpt.lens.memory import cache
from minigpt.lens.parameters import weights
from minigpt.lens.predictions import loss, next_token, sampled_answers
from minigpt.lens.recorder import activation_names, record, switched_off
from minigpt.lens.text import tokens
from minigpt.lens.vectors import neighbours

__all__ = [
    "ablate", "activation_names", "along", "attention", "batch", "cache", "compare_runs", "data",
    "experiment", "logit_lens", "loss", "neighbours", "next_token", "record", "sampled_answers",
    "switched_off", "tokens", "weights",
]  # fmt: skip
