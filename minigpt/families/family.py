"""Family: all that differs between model families, and what is done with it in the same way for each.

    family = family_of(model.config)                              # from .registry
    weights = family.from_hugging_face(WeightFiles(folder), config)
    model = family.on_meta(config)
    family.load_state(model, weights, assign=True)

Reading is strict: what is missing, unexpected, of another shape, or not finite is an error that names it.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.checks import differences, full_names, require_layers
from minigpt.families.strict_loading import (
    cast,
    on_meta,
    parameter_shapes,
    require_finite,
    tensor_kind,
    two_at_a_time,
)
from minigpt.storage.large_pages import LargePages
from minigpt.storage.safetensors_files import described, has_own_memory

__all__ = ["HEAD", "Family", "Weight"]

HEAD = "lm_head.weight"  # in every family


class Weight(NamedTuple):
    """One weight. `*` is the block's number; the transposed ones are stored as (in, out) by Hugging Face."""

    ours: str
    theirs: str
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. C is its configuration's class, M its model's."""

    model_type: str  # config.json's
    config_class: type[Any]  # C
    model_class: type[Any]  # M
    # C from the contents of a config.json; InputError naming the key
    config_from_hugging_face: Callable[[Mapping[str, Any]], Any]
    # (C, eos_token_id, pad_token_id) -> the contents of config.json
    config_to_hugging_face: Callable[..., dict[str, Any]]

    weights: tuple[Weight, ...]  # all but lm_head
    prefix: str  # of all of these; files of the model without its head leave it out
    layer_prefix: str  # Hugging Face's, of a block's weights: the text before its number
    layers_key: str  # of config.json: how many blocks there are
    embedding: str  # our name of the matrix that a tied lm_head shares
    ignored: re.Pattern[str] = re.compile(r"(?!)")  # tensors of old files that are no weights
    # The configuration with every weight that files have. Those that `config` lacks are zeros there.
    with_all_weights: Callable[[Any], Any] = lambda config: config

    residual_projections: tuple[str, ...]  # the last matrices of attention and MLP, which add to the stream
    fused: Mapping[str, int] = field(
        default_factory=dict
    )  # end of a name -> matrices stacked in the parameter
    block_weights: Callable[[Any], int]  # C -> values in the matrices of all blocks
    gguf_values: Callable[[Any], dict[str, float]]  # C -> GGUFWriter's add_NAME -> value
    gguf_notes: Callable[[Any], list[str]] = lambda model: []  # M -> what llama.cpp computes differently
    # of generation.native: (OperationList, M), adds the operations of a forward; (C, columns) -> the table of
    # rotary embeddings, (columns, D), of a model that has them
    list_operations: Callable[[Any, Any], None]
    native_modules: tuple[type[nn.Module], ...]  # the family's classes that these operations stand for
    rotary_table: Callable[[Any, int], Tensor] | None = None

    # -- weights ---------------------------------------------------------------------------------------------

    def on_meta(self, config: Any) -> Any:
        """M on the "meta" device: shapes without memory."""
        return on_meta(self.model_class, config)

    def parameter_shapes(self, config: Any) -> dict[str, torch.Size]:
        """The shape of each parameter; kept, so that the second call costs nothing."""
        shapes: dict[str, torch.Size] = parameter_shapes(self.model_class, config)  # type: ignore[arg-type]
        return shapes

    def rows(self, config: Any) -> Iterator[Weight]:
        """The table with each block's number filled in, block by block; lm_head last, if it is not tied.

        Left out are weights that a model of this configuration has not, and files of it neither.
        """
        every = self.parameter_shapes(self.with_all_weights(config))
        for in_block, rows in itertools.groupby(self.weights, lambda row: "*" in row.ours):
            together = list(rows)
            for block in map(str, range(config.num_hidden_layers if in_block else 1)):
                for ours, theirs, transposed in together:
                    name = ours.replace("*", block)
                    if name in every:
                        yield Weight(name, theirs.replace("*", block), transposed)
        if HEAD in self.parameter_shapes(config):
            yield Weight(HEAD, HEAD)

    def weight_names(self, config: Any) -> dict[str, tuple[str, bool]]:
        """Our name of each weight, lm_head's too -> Hugging Face's, and whether it is stored as (in, out)."""
        return {row.ours: (row.theirs, row.transposed) for row in self.rows(config)} | {HEAD: (HEAD, False)}

    def to_hugging_face(self, model: Any) -> dict[str, Tensor]:
        """A model's weights under Hugging Face's names: float32 copies on the CPU, without a tied lm_head.

        Raises:
            InputError: naming the tensor, if one holds NaN or infinity: no program could use the file.
        """
        state, own = dict(model.named_parameters()), self.parameter_shapes(model.config)
        assert state.keys() == own.keys(), "a wrapped model: give the model inside"
        every = self.parameter_shapes(self.with_all_weights(model.config))
        written = {}
        for ours, theirs, transposed in self.rows(model.config):
            tensor = state[ours].detach() if ours in own else torch.zeros(every[ours])
            require_finite(ours, tensor)
            tensor = tensor.t() if transposed else tensor
            written[theirs] = tensor.to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )
        return written

    def from_hugging_face(
        self, tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Weights under our names, copied to `dtype`: every parameter of M, a tied lm_head not twice.

        Args:
            tensors: under Hugging Face's names, those of the model without its head, too. Of `WeightFiles`,
                two tensors at a time are held besides the result.

        Raises:
            InputError: in one line, all that is missing, unexpected, or of the wrong shape or type; or the
                first tensor with a value that is not finite in `dtype`, that the configuration says does not
                exist, or with an lm_head of its own where it is tied.
        """
        name_of, twice = full_names(tensors, self.prefix, "lm_head.")
        require_layers(name_of, self.layer_prefix, config.num_hidden_layers, self.layers_key)
        own = self.parameter_shapes(config)
        every = self.parameter_shapes(self.with_all_weights(config))
        head = None if HEAD in own else name_of.pop(HEAD, None)
        forms = described(tensors)
        found = {full: forms[name] for full, name in name_of.items() if not self.ignored.fullmatch(full)}
        rows = list(self.rows(config))
        wrong = differences(
            {name: tensor_kind(form) for name, form in found.items()},
            {row.theirs: f"float {tuple(every[row.ours][:: -1 if row.transposed else 1])}" for row in rows},
            optional=[row.theirs for row in rows if row.ours not in own],
            complaints=twice,
            in_file=name_of,
        )
        if wrong:
            raise InputError(f"the weights do not fit the configuration; {wrong}")

        pages = LargePages()

        def read(row: Weight) -> Tensor | None:
            name = name_of[row.theirs]
            tensor = tensors[name]  # files are read here, each tensor once
            if row.ours in own:
                ordered = tensor.t() if row.transposed else tensor
                return cast(row.theirs, ordered, dtype, pages, own=has_own_memory(tensors, name))
            require_finite(row.theirs, tensor)
            if tensor.any():
                raise InputError(f"{row.theirs} is not zero, but the configuration has no such weight")
            return None

        present = [row for row in rows if row.theirs in found]
        copies = zip(present, two_at_a_time(read, present))
        weights = {row.ours: copy for row, copy in copies if copy is not None}
        if head is not None and not torch.equal(tensors[head].to(dtype), weights[self.embedding]):
            theirs = self.weight_names(config)[self.embedding][0]
            raise InputError(f"{HEAD} differs from {theirs}: tie_word_embeddings means that they are one")
        return weights

    def load_state(self, model: Any, weights: dict[str, Tensor], *, assign: bool) -> None:
        """Put what `from_hugging_face` returned into a model: copied, or (assign) used as they are."""
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=assign)
        assert missing in ([], [HEAD]), missing
        assert unexpected == [], unexpected
        if missing:
            model.lm_head.weight = model.get_parameter(self.embedding)  # assignment unties it

    # -- training --------------------------------------------------------------------------------------------

    def matrix_parameters(self, model: Any) -> Iterator[tuple[nn.Parameter, int]]:
        """The matrices inside the blocks, each with how many matrices are stacked in it (3 for fused QKV)."""
        for name, parameter in model.blocks.named_parameters():
            if parameter.dim() == 2:
                yield parameter, next((n for end, n in self.fused.items() if name.endswith(end)), 1)

    def flops(self, config: Any, tokens: float, targets: float, length: float) -> float:
        """Forward and backward: 6 for each weight of a matrix and token, and attention.

        Attention has two products of each query with T keys or values of D channels, in each head and layer:
        4 T D forward, twice that backward. (Half of it lies in the future; usually that is counted, too.)
        Where every token is a target this is the field's 6 N + 12 L H D T a token.

        Args:
            tokens: in rows of `length` tokens.
            targets: those of them that the loss counts; lm_head is computed for these only.
        """
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
        head = config.vocab_size * config.hidden_size
        return float(tokens * (6 * self.block_weights(config) + attention) + targets * 6 * head)
