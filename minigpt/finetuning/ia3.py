"""IA3 (https://arxiv.org/abs/2205.05638): learned factors for the channels of some layers, as in PEFT.

    add_adapter(model, IA3Config())

Each layer in `target_modules` gets a learned vector, which multiplies the layer's outputs. If the layer is
also in `feedforward_modules`, the vector multiplies the layer's inputs instead. All vectors begin as ones, so
at first the model's output does not change. By default, as in PEFT, the vectors multiply the outputs of
GPT-2's c_attn or Qwen3's q_proj and v_proj, and the inputs of the last layer of each MLP.

Letters in shapes: N outputs, K inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.layers import AdaptedLayer, AdapterConfig, pattern_of, targeted

__all__ = ["IA3Config", "IA3Layer"]


@dataclass(frozen=True)
class IA3Config(AdapterConfig):
    """Options of IA3. Names and defaults are PEFT's."""

    target_modules: str | tuple[str, ...] = ()
    """layers that get a vector: names, all-linear, or a regular expression; empty: PEFT's default"""
    feedforward_modules: str | tuple[str, ...] | None = None
    """layers whose inputs are multiplied, not their outputs; None: the last layer of each MLP"""
    modules_to_save: tuple[str, ...] = ()
    """names of modules that are trained whole, such as lm_head"""

    def of_family(self, model: LanguageModel) -> "IA3Config":
        """Return this configuration with the defaults of the model's family filled in."""
        family = family_of(model.config)
        inputs = family.rescaled_inputs if self.feedforward_modules is None else self.feedforward_modules
        outputs = (*family.rescaled_outputs, *family.rescaled_inputs)
        return IA3Config(self.target_modules or outputs, inputs, self.modules_to_save)

    def chosen_layers(self, model: LanguageModel) -> dict[str, str]:
        """Return the layers that get an adapter: minigpt's name -> Hugging Face's name."""
        target = self.of_family(model).target_modules
        return targeted(model, target, modules_to_save=self.modules_to_save)

    def new_layer(self, base: Any, theirs: str, adapter: str, draw: bool) -> AdaptedLayer:
        """Return the linear layer `base` with IA3's vector. `theirs` is the layer's Hugging Face name."""
        some = self.feedforward_modules
        assert some is not None, "of_family has named them"
        if isinstance(some, str):
            is_feedforward = pattern_of(some, "feedforward_modules").fullmatch(theirs) is not None
        else:
            # As in PEFT, a name means all layers whose full Hugging Face name ends with it.
            is_feedforward = any(theirs.endswith(name) for name in some)
        return IA3Layer(base, is_feedforward, adapter, draw)


class IA3Layer(AdaptedLayer):
    """A frozen linear layer whose inputs or outputs are multiplied by a vector.

    Args:
        base: an nn.Linear, a quantised layer, or a layer that has an adapter already.
        is_feedforward: True: the vector multiplies the inputs; False: the outputs.
        adapter: name of the adapter.
        draw: False: do not initialise the vector, because its values will be set later.
    """

    def __init__(self, base: Any, is_feedforward: bool, adapter: str, draw: bool = True) -> None:
        super().__init__(base, adapter)
        self.is_feedforward = is_feedforward
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        self.ia3_l = self.new_parameter(*shape)
        if draw:
            nn.init.ones_(self.ia3_l)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return a dict: end of the parameter's name in an adapter file -> the adapter's parameter."""
        return {"ia3_l": self.ia3_l}

    def entering(self, x: Tensor) -> Tensor:
        """Return the layer's inputs x (..., K), multiplied by the vector if `is_feedforward`."""
        return (x * self.ia3_l.flatten()).to(x.dtype) if self.is_feedforward else x

    def leaving(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the layer's outputs `out` (..., N), multiplied by the vector unless `is_feedforward`."""
        return out if self.is_feedforward else (out * self.ia3_l.flatten()).to(out.dtype)

    def merged_with(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `weight` (N, K) and `bias` (N,) with this adapter merged into them."""
        if not self.is_feedforward and bias is not None:
            bias = bias * self.ia3_l.flatten()
        return torch.mul(weight, self.ia3_l), bias
