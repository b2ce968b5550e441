"""A classifier: the body of a language model, and `score`, a linear layer, on its last real token's vector.

    model = SequenceClassifier(config, Labels(("bad", "good")), pad_token_id=0)
    logits = model(input_ids)                     # (B, K), one row a text

It is what transformers calls GPT2ForSequenceClassification, Qwen3ForSequenceClassification: same names of
weights, same logits. Only the last token of a causal model has read the whole text.

Letters in shapes: B rows, T tokens, C channels, K labels.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt.data.records import ProblemType
from minigpt.errors import InputError
from minigpt.families.family import Family
from minigpt.families.registry import FAMILIES, ModelConfig, family_of

__all__ = [
    "SCORE", "Labels", "SequenceClassifier", "classifier_config", "classifier_family", "labels_of",
    "probabilities", "summed_loss",
]  # fmt: skip

SCORE = "score"
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Labels:
    """The outputs of a classifier."""

    names: tuple[str, ...]  # of each output
    problem_type: ProblemType = "single_label_classification"

    def __len__(self) -> int:
        return len(self.names)


class SequenceClassifier(nn.Module):
    """A body and `score`.

    Args:
        config: of the body.
        labels: one output each.
        pad_token_id: the id that fills rows up; None: rows are never filled up.
        body: `base_model` of a language model of this configuration; left out: a new one.
    """

    def __init__(
        self, config: ModelConfig, labels: Labels, pad_token_id: int | None, body: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, self.labels, self.pad_token_id = config, labels, pad_token_id
        family = family_of(config)
        self._body = family.prefix.removesuffix(".")  # named as in the language model
        setattr(self, self._body, family.model_class(config).base_model if body is None else body)
        self.score = nn.Linear(config.hidden_size, len(labels), bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    base_model = property(lambda self: getattr(self, self._body))  # ids -> hidden vectors

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks: the one list of modules in a body."""
        return next(each for each in self.base_model.modules() if isinstance(each, nn.ModuleList))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, K).

        attention_mask, position_ids: as of the language model. Right padding needs none; rows padded on the
        left need both.
        last (B,): the positions of the last real tokens. Left out, as in transformers: the last id of a row
        that is not pad_token_id.
        """
        hidden = self.base_model(input_ids, attention_mask, position_ids)  # (B, T, C)
        if last is None:
            last = self.last_tokens(input_ids)
        rows = torch.arange(len(hidden), device=hidden.device)
        logits: Tensor = self.score(hidden[rows, last])  # (B, C) -> (B, K)
        return logits

    def last_tokens(self, input_ids: Tensor) -> Tensor:
        """The position of each row's last id that is not pad_token_id, (B, T) -> (B,)."""
        B, T = input_ids.shape
        if self.pad_token_id is None:
            return torch.full((B,), T - 1, device=input_ids.device)
        real = (input_ids != self.pad_token_id).to(torch.int32)
        return (torch.arange(T, device=input_ids.device) * real).argmax(-1)


def summed_loss(logits: Tensor, labels: Tensor, weights: Tensor, problem_type: ProblemType) -> Tensor:
    """The loss, summed over rows and outputs, in float32. Divided by their number it is transformers' loss.

    Args:
        logits: (B, K).
        labels: (B,) int64, the right outputs; or (B, K) float32, ones and zeros, or numbers.
        weights: (B,): what a row's loss is multiplied by.
    """
    logits = logits.float()
    if problem_type == "single_label_classification":
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    if problem_type == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        each = F.mse_loss(logits, labels, reduction="none")
    return (each * weights[:, None]).sum()


def probabilities(logits: Tensor, problem_type: ProblemType) -> Tensor:
    """Logits (B, K) -> probabilities: of one label, of each label, or the numbers themselves, in float64."""
    logits = logits.double()
    if problem_type == "single_label_classification":
        return logits.softmax(-1)
    return logits.sigmoid() if problem_type == "multi_label_classification" else logits


# -- Hugging Face ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _family(model_type: str, labels: Labels, pad_token_id: int | None) -> Family:
    maker = functools.partial(SequenceClassifier, labels=labels, pad_token_id=pad_token_id)
    return replace(FAMILIES[model_type], model_class=maker, head=f"{SCORE}.weight")  # type: ignore[arg-type]


def classifier_family(config: ModelConfig, labels: Labels, pad_token_id: int | None) -> Family:
    """The family of a configuration, with a classifier in place of its language model."""
    return _family(family_of(config).model_type, labels, pad_token_id)


def classifier_config(model: SequenceClassifier, eos_token_id: int | None) -> dict[str, Any]:
    """The contents of config.json. Without pad_token_id there transformers reads one text at a time only."""
    family = family_of(model.config)
    content = family.config_to_hugging_face(
        model.config, eos_token_id=eos_token_id, pad_token_id=model.pad_token_id
    )
    return {
        **content,
        "architectures": [family.classifier],
        "problem_type": model.labels.problem_type,
        "id2label": {str(number): name for number, name in enumerate(model.labels.names)},
        "label2id": {name: number for number, name in enumerate(model.labels.names)},
    }


def labels_of(content: Mapping[str, Any]) -> Labels:
    """The labels in the contents of a config.json; without names LABEL_0 and so on, as in transformers.

    Raises:
        InputError: naming the key, if it does not say what each output is.
    """
    named = content.get("id2label")
    if named is None:
        count = content.get("num_labels", 2)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 10**6:
            raise InputError(f"num_labels must be a whole number of at least 1: got {count!r}")
        named = {str(number): f"LABEL_{number}" for number in range(count)}
    if (
        not isinstance(named, Mapping)
        or set(map(str, named)) != {str(n) for n in range(len(named))}
        or not named
    ):
        raise InputError(f"id2label must name the outputs 0, 1, ...: got {str(named)[:80]}")
    names = tuple(str(named.get(str(number), named.get(number))) for number in range(len(named)))
    kind = content.get("problem_type") or ("regression" if len(names) == 1 else _PROBLEMS[0])
    if kind not in _PROBLEMS:
        raise InputError(f"problem_type must be one of {', '.join(_PROBLEMS)}: got {kind!r}")
    return Labels(names, kind)  # type: ignore[arg-type]
