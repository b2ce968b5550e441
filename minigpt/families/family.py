"""Family: the description of a model family. Its methods convert, check and load the weights of any family.

    family = family_of(model.config)                              # from .registry
    weights = family.from_hugging_face(WeightFiles(folder), config)
    model = family.on_meta(config)
    family.load_state(model, weights, assign=True)

Reading is strict: a tensor that is missing, unexpected, of another shape or not finite is an error.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.checks import differences, full_names, listed, require_layers
from minigpt.families.options import FamilyName
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

HEAD = "lm_head.weight"  # name of the output matrix in every family


class Weight(NamedTuple):
    """A weight's name in our model (`ours`) and at Hugging Face (`theirs`). `*` stands for the block number.

    `transposed`: True if Hugging Face stores the matrix as (in, out). torch's Linear stores (out, in).
    """

    ours: str
    theirs: str
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Describes a model family, such as GPT-2: its classes, its weight names, and how files are converted."""

    model_type: str  # model_type in config.json
    name: FamilyName  # the value of --family that selects this family
    config_class: type[Any]  # class of the configuration
    model_class: type[Any]  # class of the model
    # (content of a config.json) -> configuration; raises InputError that names the wrong key
    config_from_hugging_face: Callable[[Mapping[str, Any]], Any]
    # (configuration, eos_token_id, pad_token_id) -> content of a config.json
    config_to_hugging_face: Callable[..., dict[str, Any]]

    weights: tuple[Weight, ...]  # names of all weights except lm_head
    # Every weight name except lm_head's begins with this. Files of a model without lm_head, such as
    # GPT2Model, may leave it out.
    prefix: str
    layer_prefix: str  # beginning of the Hugging Face names of a block's weights, before the block number
    layers_key: str  # key of config.json that holds the number of blocks
    embedding: str  # our name of the embedding matrix; a tied lm_head shares this matrix
    classifier: str  # name of Hugging Face's class with a classification head
    head: str = HEAD  # name of the output layer's weight: lm_head.weight, or a classifier's score.weight
    # names of tensors, such as masks, that are ignored if a file holds them; the default matches no name
    ignored: re.Pattern[str] = re.compile(r"(?!)")
    # Configuration of our model -> configuration of the same model with every weight of Hugging Face's file.
    # Our model may lack some of these weights, such as biases. The file that we write has zeros for them.
    with_all_weights: Callable[[Any], Any] = lambda config: config

    # names of two weights of a block: the last matrix of attention, and the last matrix of the MLP. Their
    # outputs are added to the residual stream.
    residual_projections: tuple[str, ...]
    # Layers that an IA3 adapter of PEFT changes by default, under Hugging Face's names. IA3 multiplies the
    # outputs of the layers in `rescaled_outputs`, and the inputs of the layers in `rescaled_inputs`.
    rescaled_outputs: tuple[str, ...]
    rescaled_inputs: tuple[str, ...]
    # name that minigpt.lens gives to a part of a block ("norm_1") -> name of its module in the block ("ln_1")
    block_parts: Mapping[str, str]
    final_norm: str  # our name of the norm before lm_head
    # end of a weight's name -> number of matrices that are stacked in this weight (3 for Q, K and V)
    fused: Mapping[str, int] = field(default_factory=dict)
    block_weights: Callable[[Any], int]  # configuration -> number of weights in the matrices of all blocks
    # configuration -> {NAME: value}. For each entry, the GGUF export calls GGUFWriter.add_NAME(value).
    gguf_values: Callable[[Any], dict[str, float]]
    # model -> sentences that tell the user where llama.cpp's results differ from minigpt's
    gguf_notes: Callable[[Any], list[str]] = lambda model: []
    # list_operations(operation_list, model) adds the operations of a forward pass to `operation_list`, which
    # the C code runs.
    list_operations: Callable[[Any, Any], None]
    native_modules: tuple[type[nn.Module], ...]  # classes of modules that the C code can compute
    # (configuration, columns) -> table (columns, D) for the C code: RoPE's cos and sin for the first
    # `columns` positions. D is the number of channels of a head. None for a family without RoPE.
    rotary_table: Callable[[Any, int], Tensor] | None = None
    # configuration -> (angles, factor). `angles` (D / 2,): by how much RoPE rotates each pair of channels
    # from one position to the next. `factor` multiplies cos and sin. None for a family without RoPE.
    rotary_frequencies: Callable[[Any], tuple[Tensor, float]] | None = None

    # -- weights ---------------------------------------------------------------------------------------------

    def on_meta(self, config: Any) -> Any:
        """Make a model on the "meta" device: its parameters have shapes, but no values and no memory."""
        return on_meta(self.model_class, config)

    def parameter_shapes(self, config: Any) -> dict[str, torch.Size]:
        """Return the shape of each parameter. The result is cached."""
        shapes: dict[str, torch.Size] = parameter_shapes(self.model_class, config)  # type: ignore[arg-type]
        return shapes

    def rows(self, config: Any) -> Iterator[Weight]:
        """Yield the names of all weights in a model's Hugging Face file, block by block; lm_head is last.

        A tied lm_head is left out. Weights that the file has, but our model lacks, are included: see
        `with_all_weights`.
        """
        every = self.parameter_shapes(self.with_all_weights(config))
        for in_block, rows in itertools.groupby(self.weights, lambda row: "*" in row.ours):
            together = list(rows)
            for block in map(str, range(config.num_hidden_layers if in_block else 1)):
                for ours, theirs, transposed in together:
                    name = ours.replace("*", block)
                    if name in every:
                        yield Weight(name, theirs.replace("*", block), transposed)
        if self.head in self.parameter_shapes(config):
            yield Weight(self.head, self.head)

    def weight_names(self, config: Any) -> dict[str, tuple[str, bool]]:
        """Return a dict: our name of a weight -> (Hugging Face's name, `transposed`).

        `transposed`: True if Hugging Face stores the matrix as (in, out). lm_head is included even if tied.
        """
        return {row.ours: (row.theirs, row.transposed) for row in self.rows(config)} | {HEAD: (HEAD, False)}

    def to_hugging_face(self, model: Any) -> dict[str, Tensor]:
        """Return a model's weights under Hugging Face's names, as float32 copies on the CPU.

        A tied lm_head is left out.

        Raises:
            InputError: if a tensor holds NaN or infinity, or a parameter has no Hugging Face name; the
                message names the tensor.
        """
        state, own = dict(model.named_parameters()), self.parameter_shapes(model.config)
        if other := sorted(state.keys() ^ own.keys()):
            raise InputError(
                f"a {self.model_type} folder cannot hold {listed(other, 2)}: merge adapters first, or give "
                "the model inside a wrapper"
            )
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

    def names_in(self, tensors: Collection[str], config: Any) -> tuple[dict[str, str], list[str]]:
        """Add the family's prefix to those names of a file's tensors that lack it.

        Returns: a dict, complete name -> name in the file; and a list of complaints about names that the file
        has twice, with and without the prefix.

        Raises:
            InputError: if the configuration has far more layers than the file.
        """
        name_of, twice = full_names(tensors, self.prefix, f"{self.head.partition('.')[0]}.")
        require_layers(name_of, self.layer_prefix, config.num_hidden_layers, self.layers_key)
        return name_of, twice

    def from_hugging_face(
        self, tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Convert tensors under Hugging Face's names to weights under our names, as copies in `dtype`.

        The result has every parameter of the model. A tied lm_head is left out, because the embedding is
        the same parameter.

        Args:
            tensors: tensors under Hugging Face's names, with or without the family's prefix. A WeightFiles
                reads each tensor from its file when it is needed, so at most two are in memory besides the
                result.
            config: configuration of the model.
            dtype: dtype of the result.

        Raises:
            InputError: if tensors are missing, unexpected, or of a wrong shape or type (the message lists all
                of them); if a tensor is not finite in `dtype`; if a weight that the configuration leaves out
                (GPT-2's biases with bias=False) is in the file and not zero; or if lm_head differs from the
                embedding although the configuration says that the two are tied.
        """
        name_of, twice = self.names_in(tensors, config)
        own = self.parameter_shapes(config)
        every = self.parameter_shapes(self.with_all_weights(config))
        head = None if self.head in own else name_of.pop(self.head, None)
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
            tensor = tensors[name]  # if `tensors` is a WeightFiles, this look-up reads the file
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
        """Put the result of `from_hugging_face` into a model.

        Args:
            model: the model.
            weights: name -> tensor.
            assign: True: these tensors become the model's parameters. False: their values are copied into
                the parameters that the model has.
        """
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=assign)
        assert missing in ([], [HEAD]), missing
        assert unexpected == [], unexpected
        if missing:
            # tie lm_head again, because load_state_dict(assign=True) has untied it
            model.lm_head.weight = model.get_parameter(self.embedding)

    # -- training --------------------------------------------------------------------------------------------

    def matrix_parameters(self, model: Any) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield each 2-D parameter of the blocks, and the number of matrices stacked in it (QKV: 3)."""
        for name, parameter in model.blocks.named_parameters():
            if parameter.dim() == 2:
                yield parameter, next((n for end, n in self.fused.items() if name.endswith(end)), 1)

    def flops(self, config: Any, tokens: float, targets: float, length: float) -> float:
        """Return the FLOPs of forward and backward: 6 for each matrix weight and token, plus attention.

        In each head and layer, a query is multiplied with T keys and T values of D channels: 4 T D forward,
        and twice that backward. The masked half of attention is counted, too, as is usual. If every token is
        a target, this is the well-known 6 N + 12 L H D T per token: N weights in matrices, L layers, H heads.

        Args:
            config: configuration of the model.
            tokens: number of tokens.
            targets: number of tokens that the loss counts; lm_head is computed for these only.
            length: T, the number of tokens of a row.
        """
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
        head = config.vocab_size * config.hidden_size
        return float(tokens * (6 * self.block_weights(config) + attention) + targets * 6 * head)
