"""The parameters of a model: sizes, norms, singular values, and the change from an earlier model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.layers import AdaptedLayer
from minigpt.lens.results import Bars, Part, Table, View
from minigpt.lens.vectors import float_matrix
from minigpt.lens.words import Say

__all__ = ["Weights", "weights"]


class PartOfModel(NamedTuple):
    """One weight of the model: a matrix or a vector."""

    name: str  # name in minigpt, such as transformer.blocks.0.attn.qkv_proj.weight
    group: str  # part of the model that has the weight: "embedding", "block 0", "final norm", "lm_head"
    shape: tuple[int, ...]
    number: int  # number of parameters
    rms: float  # root of the mean square: the usual size of a parameter
    norm: float  # root of the sum of squares
    largest: float  # largest singular value; for a vector, its L2 norm
    rank: float  # stable rank norm^2 / largest^2: about how many singular values are large
    change: float | None  # ||new - old|| / ||old||; None without an earlier model


@dataclass(frozen=True)
class Weights(View):
    """A view of all weights of a model."""

    matrices: list[PartOfModel]
    against: str = ""

    @property
    def count(self) -> int:
        """The number of parameters. A tied lm_head is not counted again."""
        return sum(part.number for part in self.matrices)

    def as_dict(self) -> dict[str, object]:
        """Return the numbers of this view as a dict for JSON."""
        return {**super().as_dict(), "count": self.count}

    def groups(self) -> dict[str, list[PartOfModel]]:
        """Return a dict: group ("block 0") -> its weights."""
        found: dict[str, list[PartOfModel]] = {}
        for part in self.matrices:
            found.setdefault(part.group, []).append(part)
        return found

    def parts(self, say: Say) -> list[Part]:
        """Return the tables and charts of this view, translated by `say`."""
        groups = {_said(name, say): parts for name, parts in self.groups().items()}
        sums = {name: sum(part.number for part in parts) for name, parts in groups.items()}
        rows = [(name, f"{count:,}", f"{count / self.count:.1%}") for name, count in sums.items()]
        rows.append((say("all"), f"{self.count:,}", "100%"))
        details = []
        for name, parts in groups.items():
            for part in parts:
                # the end of the weight's name without ".weight", such as "attn.qkv_proj"
                short = re.sub(r"^.*\.(?=\w+\.\w+$)|\.weight$", "", part.name)
                size = "x".join(map(str, part.shape))
                more = [] if part.change is None else [f"{part.change:.1%}"]
                details.append(
                    (name, short, size, f"{part.rms:.3g}", f"{part.largest:.3g}", f"{part.rank:.1f}", *more)
                )
                name = ""
        columns = [say("part"), say("weight"), say("shape"), "RMS", say("largest"), say("stable rank")]
        title = say("size and spectrum: usual size, largest singular value, stable rank")
        if self.against:
            title += say("; change since {model}", model=self.against)
            columns.append(say("change"))
        charts: list[Part] = [Bars(say("parameters"), list(sums), [float(count) for count in sums.values()])]
        if self.against:
            # names such as "0.q_proj": the number of the block, and the end of the weight's name
            names = [
                ".".join(re.findall(r"(?<=\.)\d+(?=\.)|\w+$", part.name.removesuffix(".weight")))
                for part in self.matrices
            ]
            charts.append(Bars(say("relative change"), names, [part.change or 0.0 for part in self.matrices]))
        numbers = Table(say("parameters"), (say("part"), say("number"), say("share")), rows, (1, 2))
        return [numbers, Table(title, columns, details, range(3, 7)), *charts]

    def headline(self, say: Say) -> dict[str, str]:
        """Return a summary of this view: one table row, as a dict {column title: cell}."""
        largest = max(self.matrices, key=lambda part: part.largest)
        total = sum(part.norm**2 for part in self.matrices) ** 0.5
        return {say("norm"): f"{total:.2f}", say("largest"): f"{largest.largest:.2f}"}


def _said(group: str, say: Say) -> str:
    kind, _, number = group.partition(" ")
    return say("block {layer}", layer=number) if kind == "block" else say(group)


@torch.inference_mode()
def weights(model: LanguageModel, against: LanguageModel | None = None, name: str = "") -> Weights:
    """Measure all weights of a model.

    Args:
        model: the model. Quantised weights are dequantised; adapters are added to the weights of their
            layers.
        against: an earlier model of the same shape, to measure the change.
        name: name of the earlier model in the view.

    Raises:
        InputError: if a weight is missing in the earlier model, or has another shape there.
    """
    before = {} if against is None else dict(_matrices(against))
    found = []
    for key, matrix in _matrices(model):
        change = None
        if against is not None:
            old = before.get(key)
            if old is None or old.shape != matrix.shape:
                raise InputError(f"the models differ in shape: {key} is {_shape(matrix)} and {_shape(old)}")
            change = float((matrix - old).norm() / old.norm().clamp(min=torch.finfo(old.dtype).tiny))
        norm, largest = float(matrix.norm()), _largest(matrix)
        found.append(
            PartOfModel(
                key,
                _group(key, model),
                tuple(matrix.shape),
                matrix.numel(),
                norm / matrix.numel() ** 0.5,
                norm,
                largest,
                (norm / largest) ** 2 if largest else 0.0,
                change,
            )
        )
    return Weights(found, name if against is not None else "")


def _shape(matrix: Tensor | None) -> str:
    return "absent" if matrix is None else "x".join(map(str, matrix.shape))


def _matrices(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) in the order of the model. A weight with two names (tied lm_head) comes once."""
    family = family_of(model.config)
    modules, seen = dict(model.named_modules()), set[int]()
    for key in family.weight_names(model.config):
        path, _, kind = key.rpartition(".")
        module = modules[path]
        linear = module.linear if isinstance(module, AdaptedLayer) else module
        tensor = getattr(linear, kind, None)
        if tensor is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield key, (float_matrix(module) if kind == "weight" else tensor.float()).cpu()


def _group(key: str, model: LanguageModel) -> str:
    if found := re.search(r"\.(?:blocks|layers)\.(\d+)\.", key):
        return f"block {found[1]}"
    if key.startswith(family_of(model.config).final_norm):
        return "final norm"
    return "lm_head" if key.startswith("lm_head") else "embedding"


def _largest(matrix: Tensor) -> float:
    """Return the largest singular value: the root of the largest eigenvalue of M M^T or M^T M.

    The two products have the same largest eigenvalue; the smaller product is less work.
    """
    if matrix.dim() < 2:
        return float(matrix.norm())
    narrow = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return float(torch.linalg.eigvalsh(narrow.T.double() @ narrow.double())[-1].clamp(min=0).sqrt())
