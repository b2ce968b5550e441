"""Writes a model as an ONNX file, for onnxruntime and other programs that run ONNX files.

    write_onnx("model.onnx", model, tokenizer)
    session = onnxruntime.InferenceSession("model.onnx")

Inputs and outputs have the names that Optimum gives them:

    input_ids                       int64 (B, T)          the new tokens
    attention_mask                  int64 (B, S)          1 = token, 0 = padding; cached tokens included
    position_ids                    int64 (B, T)          positions of the new tokens
    past_key_values.0.key, .value   float32 (B, K, P, D)  the cache of layer 0; P is 0 at first
    logits                          float32 (B, T, V)
    present.0.key, .value           float32 (B, K, S, D)  the same cache with the new tokens at its end

Each family describes its forward pass as a list of operations, which generation.native uses, too. This module
writes one or several nodes for each operation, so it works for every family. Tracing the PyTorch model
(torch.onnx.export) would need one more package. A trace would also record the branches that Python takes for
one example, although other shapes need other branches. All operators are standard ones of opset 20, which
onnxruntime has supported since version 1.17.

Letters in shapes: B rows; T new tokens; P cached tokens; S = P + T; C channels; H heads of queries,
K of keys and values; D channels of a head; V entries of the vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.families.strict_loading import require_finite
from minigpt.finetuning.layers import adapter_names
from minigpt.finetuning.masked_lm import mask_token_id
from minigpt.storage.files import atomic_open
from minigpt.weights.pretrained import AnyTokenizer
from minigpt.weights.quantized import precision_of

__all__ = ["OnnxDtype", "write_onnx"]

OnnxDtype = Literal["float32", "float16"]

# Versions of the operators and of the file format, which belong together. They are not the newest ones, so
# that older programs can read the file, too.
_OPSET, _IR_VERSION = 20, 9
# If the weights together have more bytes than this, they go to a second file, because protobuf limits the
# ONNX file to 2 GiB.
_INLINE = 2**30
_FLOAT16_MAX = 65504.0
_B, _T, _P, _S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def write_onnx(
    path: str | Path,
    model: LanguageModel,
    tokenizer: AnyTokenizer | None = None,
    *,
    dtype: OnnxDtype = "float32",
    inline: int = _INLINE,
) -> list[Path]:
    """Write a model as one ONNX file, or with its weights in a second file beside it.

    Args:
        path: the file to write.
        model: the model, not quantised.
        tokenizer: its tokenizer, which shows whether the model is a masked language model (fills gaps).
        dtype: type of the matrices in the file. The arithmetic is always float32. Vectors are always float32.
        inline: if the weights have more bytes than this, they go to a second file, NAME.data.

    Returns: the paths of the files.

    Raises:
        InputError: if the onnx package is missing; if the model has adapters or quantised weights, or fills
            gaps; if a value is too large for float16; if a file cannot be written.
    """
    if dtype not in get_args(OnnxDtype):
        raise InputError(
            f"dtype must be float32 or float16 for ONNX: got {dtype!r}; of a float32 file, "
            "onnxruntime.quantization.quantize_dynamic makes one of int8"
        )
    onnx = _package()
    if names := adapter_names(model):
        raise InputError(f"the model has adapters beside its weights ({', '.join(names)}): merge them first")
    if (precision := precision_of(model)) in ("int8", "int4"):
        raise InputError(f"the model is stored in {precision}: give it unquantised")
    if tokenizer is not None and mask_token_id(tokenizer) is not None:
        raise InputError(
            "the model was trained to fill gaps (minigpt fill); an ONNX file only continues texts"
        )
    graph = _Graph(onnx, model, dtype)
    family_of(model.config).list_operations(graph, model)
    return _write(onnx, Path(path), graph, inline)


def _package() -> Any:
    try:
        import onnx
    except ImportError:
        raise InputError("ONNX files need the onnx package: pip install 'minigpt[onnx]'") from None
    return onnx


def _write(onnx: Any, path: Path, graph: "_Graph", inline: int) -> list[Path]:
    """Write the weights and the graph. Return the paths: one file, or two if the weights exceed `inline`."""
    proto = graph.proto()
    sizes = [tensor.numel() * (2 if narrow else 4) for tensor, narrow in graph.weights.values()]
    beside = path.with_name(f"{path.name}.data") if sum(sizes) > inline else None
    entries, place = [], 0
    for (name, (tensor, narrow)), size in zip(graph.weights.items(), sizes):
        kind = onnx.TensorProto.FLOAT16 if narrow else onnx.TensorProto.FLOAT
        entry = proto.graph.initializer.add(name=name, dims=tensor.shape, data_type=kind)
        if beside is None:
            entry.raw_data = _bytes(name, tensor, narrow)
        else:
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", beside.name), ("offset", place), ("length", size)):
                entry.external_data.add(key=key, value=str(value))
        entries.append(entry)
        place += size
    if beside is not None:
        with atomic_open(beside) as file:
            for name, (tensor, narrow) in graph.weights.items():
                file.write(_bytes(name, tensor, narrow))
    with atomic_open(path) as file:
        file.write(proto.SerializeToString(deterministic=True))
    return [path] if beside is None else [path, beside]


def _bytes(name: str, tensor: Tensor, narrow: bool) -> bytes:
    require_finite(name, tensor)
    exact = tensor.detach().float().cpu()
    if narrow and float(exact.abs().max()) > _FLOAT16_MAX:
        raise InputError(f"{name} holds values too large for float16: convert with --dtype float32")
    array = (exact.half() if narrow else exact).numpy()
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


class _Graph:
    """Collects the operations of a model as ONNX nodes.

    A model family calls the methods of this class, which have the names and arguments of
    native.OperationList. The activations of all tokens are the rows of a matrix, (B * T, C). The operations
    write into buffers, but a node of ONNX cannot change a value. So each write makes a new value, and
    `_values` holds the name of the newest value of each buffer.

    Attributes:
        weights: name -> (the tensor, True if it is stored in float16).
    """

    def __init__(self, onnx: Any, model: LanguageModel, dtype: OnnxDtype) -> None:
        self._onnx, self._is_narrow = onnx, dtype == "float16"
        self._config: Any = model.config
        self._nodes: list[Any] = []
        # (operator, inputs, attributes) of each node so far -> its outputs. If the same node is needed again,
        # these outputs are used.
        self._known: dict[tuple[Any, ...], list[str]] = {}
        self._constants: dict[str, Any] = {}
        self.weights: dict[str, tuple[Tensor, bool]] = {}
        self._names = {(one.data_ptr(), one.shape): name for name, one in model.named_parameters()}
        self._values: dict[tuple[str, int], str] = {}  # (buffer, first column) -> name of the newest value
        self._buffers: dict[int, str] = {}  # address of a buffer's storage -> the buffer's name
        self._keep: list[Tensor] = []
        self._layers = 0
        self._shape = self._node("Shape", "input_ids")  # the shape (B, T) as a value of the graph
        self._T = self._node("Shape", "input_ids", start=1, end=2)
        self._P = self._node("Shape", "past_key_values.0.key", start=2, end=3)
        self._S = self._node("Add", self._P, self._T)
        rotary = family_of(model.config).rotary_frequencies
        self._rotations = None if rotary is None else self._cos_and_sin(*rotary(model.config))

    # -- what a family calls ---------------------------------------------------------------------------------

    def buffer(self, name: str, width: int) -> Tensor:
        """Return a tensor that stands for the buffer `name` with `width` columns. Its values are not used."""
        tensor = torch.empty(1, width)
        self._buffers[tensor.untyped_storage().data_ptr()] = name
        self._keep.append(tensor)
        return tensor

    def embed(self, table: Tensor, out: Tensor, positions: Tensor | None = None) -> None:
        """Add the operation out = table[ids]. `positions`: a table of position embeddings, added to out."""
        x = self._rows(table, "input_ids")
        if positions is not None:
            x = self._node("Add", x, self._rows(positions, "position_ids"))
        self._values[self._place(out)] = self._node("Reshape", x, self._ints(-1, table.shape[1]))

    def product(
        self,
        layer: Any,
        source: Tensor,
        out: Tensor,
        norm: Any = None,
        act: Literal["gelu_tanh", "gelu_exact"] | None = None,
        **more: Any,
    ) -> None:
        """Add the operation out = activation(linear(norm(source)))."""
        x = self._values[self._place(source)]
        if isinstance(norm, nn.LayerNorm):
            weights = self._weight(norm.weight), self._weight(norm.bias)
            x = self._node("LayerNormalization", x, *weights, epsilon=norm.eps)
        elif norm is not None:
            x = self._rms_norm(x, norm.weight, norm.eps)
        y = self._linear(layer, x)
        if more.get("values") is not None:  # SwiGLU: the activation is multiplied by the output of `values`
            silu = self._node("Mul", y, self._node("Sigmoid", y))
            y = self._node("Mul", silu, self._linear(more["values"], x))
        elif act is not None:
            y = self._node("Gelu", y, approximate="tanh" if act == "gelu_tanh" else "none")
        if more.get("add"):
            y = self._node("Add", self._values[self._place(out)], y)
        self._values[self._place(out)] = y

    def attention(
        self, qkv: Tensor, out: Tensor, heads: int, kv_heads: int, head_dim: int, **more: Any
    ) -> None:
        """Add the operation out = attention(qkv)."""
        H, K, D, layer = heads, kv_heads, head_dim, self._layers
        self._layers += 1
        q, k, v = self._queries_keys_values(qkv, H * D, K * D)
        q = self._heads(q, H, D, more.get("q_norm"), more.get("eps"))  # (B, H, T, D)
        k = self._heads(k, K, D, more.get("k_norm"), more.get("eps"))  # (B, K, T, D)
        v = self._heads(v, K, D)
        if self._rotations is not None:
            q, k = self._rotate(q), self._rotate(k)
        # k and v of all S tokens, cached and new, (B, K, S, D) each
        k, v = (
            self._node(
                "Concat", f"past_key_values.{layer}.{name}", new, axis=2, result=f"present.{layer}.{name}"
            )
            for name, new in (("key", k), ("value", v))
        )
        q = self._node("Mul", q, self._float(1 / math.sqrt(D)))
        # Grouped-query attention: H / K query heads use the same keys. So the queries of these heads become
        # the rows of one matrix: (B, K, H / K * T, D).
        if H > K:
            q = self._node("Reshape", q, self._ints(0, K, -1, D))
        scores = self._node("MatMul", q, self._node("Transpose", k, perm=(0, 1, 3, 2)))
        if H > K:
            scores = self._node(
                "Reshape", scores, self._node("Concat", self._ints(0, H), self._T, self._S, axis=0)
            )
        scores = self._node("Where", self._visible(layer), scores, self._float(-math.inf))  # (B, H, T, S)
        weights = self._node("Softmax", scores, axis=-1)
        if H > K:
            weights = self._node(
                "Reshape", weights, self._node("Concat", self._ints(0, K, -1), self._S, axis=0)
            )
        mixed = self._node("MatMul", weights, v)
        if H > K:
            mixed = self._node("Reshape", mixed, self._ints(0, H, -1, D))
        mixed = self._node("Transpose", mixed, perm=(0, 2, 1, 3))  # (B, T, H, D)
        self._values[self._place(out)] = self._node("Reshape", mixed, self._ints(-1, H * D))

    # -- parts of these operations ---------------------------------------------------------------------------

    def _rows(self, table: Tensor, numbers: str) -> str:
        """Add nodes that look up rows of a table: ids (B, T) -> float32 (B, T, C)."""
        rows = self._node("Gather", self._weight(table), numbers)
        return self._node("Cast", rows, to=self._onnx.TensorProto.FLOAT) if self._is_narrow else rows

    def _linear(self, layer: Any, x: str) -> str:
        weight = self._weight(layer.weight)
        if self._is_narrow:
            weight = self._node("Cast", weight, to=self._onnx.TensorProto.FLOAT)
        bias = [] if layer.bias is None else [self._weight(layer.bias)]
        return self._node("Gemm", x, weight, *bias, transB=1)

    def _rms_norm(self, x: str, weight: Tensor, eps: float) -> str:
        """Add an RMSNorm as several simple nodes. Opset 20 has no operator RMSNormalization."""
        mean = self._node("ReduceMean", self._node("Pow", x, self._float(2.0)), self._ints(-1))
        root = self._node("Sqrt", self._node("Add", mean, self._float(eps)))
        return self._node("Mul", self._node("Div", x, root), self._weight(weight))

    def _queries_keys_values(self, qkv: Tensor, queries: int, keys: int) -> list[str]:
        """Return the names of the newest values of q, k and v.

        Some models compute q, k and v with one product: its result is split here. Others use three products.
        """
        name, at = self._place(qkv)
        places = [(name, at + offset) for offset in (0, queries, queries + keys)]
        if all(place in self._values for place in places):
            return [self._values[place] for place in places]
        return self._split(self._values[name, at], queries, keys, keys)

    def _heads(self, x: str, heads: int, D: int, norm: Tensor | None = None, eps: float | None = None) -> str:
        """Split rows into heads, (B * T, heads * D) -> (B, heads, T, D). `norm`: an RMSNorm's weight."""
        x = self._node("Reshape", x, self._node("Concat", self._shape, self._ints(heads, D), axis=0))
        if norm is not None and eps is not None:
            x = self._rms_norm(x, norm, eps)
        return self._node("Transpose", x, perm=(0, 2, 1, 3))

    def _cos_and_sin(self, frequencies: Tensor, factor: float) -> tuple[str, str]:
        """Add RoPE's cos and sin at the positions of the new tokens, (B, 1, T, D / 2). Return their names."""
        positions = self._node("Cast", "position_ids", to=self._onnx.TensorProto.FLOAT)
        positions = self._node("Unsqueeze", positions, self._ints(1, 3))  # (B, 1, T, 1)
        angles = self._node("Mul", positions, self._constant(frequencies.float().numpy()))
        cos, sin = self._node("Cos", angles), self._node("Sin", angles)
        return self._node("Mul", cos, self._float(factor)), self._node("Mul", sin, self._float(factor))

    def _rotate(self, x: str) -> str:
        """Rotate channels i and i + D / 2 together, as RoPE does: (B, heads, T, D) -> (B, heads, T, D)."""
        assert self._rotations is not None
        (cos, sin), half = self._rotations, self._config.head_dim // 2
        first, second = self._split(x, half, half)
        products = [
            self._node("Mul", *pair) for pair in ((first, cos), (second, sin), (second, cos), (first, sin))
        ]
        turned = self._node("Sub", *products[:2]), self._node("Add", *products[2:])
        return self._node("Concat", *turned, axis=-1)

    def _visible(self, layer: int) -> str:
        """Add the mask of attention, (B, 1, T, S): True where a query may see a key.

        The mask is the same as that of the PyTorch models (functions causal_mask and window_mask).
        """
        start, end = self._node("Squeeze", self._P), self._node("Squeeze", self._S)
        zero, one = self._int(0), self._int(1)
        key = self._node("Range", zero, end, one)  # (S,): index of each key, cached or new
        # (T, 1): index of each new query; the cached tokens come before
        query = self._node("Unsqueeze", self._node("Range", start, end, one), self._ints(1))
        held = self._node("Cast", "attention_mask", to=self._onnx.TensorProto.BOOL)  # (B, S): False: padding
        visible = self._node("LessOrEqual", key, query)  # (T, S)
        visible = self._node("And", visible, self._node("Unsqueeze", held, self._ints(1)))  # (B, T, S)
        # A softmax over no key would give NaN. So every token attends to itself, even a padding token.
        visible = self._node("Or", visible, self._node("Equal", key, query))
        window = getattr(self._config, "sliding_window", None)
        if window is not None and self._config.is_sliding(layer):
            # The window counts tokens, not padding. As in window_mask, each of the T new tokens counts as a
            # token, even if attention_mask calls it padding. So only cached padding is not counted.
            held = self._node("Or", held, self._node("GreaterOrEqual", key, start))
            number = self._node("Cast", held, to=self._onnx.TensorProto.INT64)
            # (B, S): for each token, the number of counted tokens up to and including this one
            place = self._node("CumSum", number, one)
            # (B, T): the same numbers for the queries
            own = self._node("Slice", place, self._P, self._S, self._ints(1))
            pair = self._node("Unsqueeze", own, self._ints(2)), self._node("Unsqueeze", place, self._ints(1))
            near = self._node("Less", self._node("Sub", *pair), self._int(window))
            visible = self._node("And", visible, near)
        return self._node("Unsqueeze", visible, self._ints(1))

    # -- nodes and tensors -----------------------------------------------------------------------------------

    def _node(self, operator: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the output's name. An equal node is added only once."""
        return self._add(operator, inputs, [result or f"{operator}_{len(self._nodes)}"], attributes)[0]

    def _split(self, x: str, *sizes: int) -> list[str]:
        """Cut the last dimension into parts of these sizes. Return their names."""
        names = [f"Split_{len(self._nodes)}_{part}" for part in range(len(sizes))]
        return self._add("Split", (x, self._ints(*sizes)), names, {"axis": -1})

    def _add(
        self, operator: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        key = (operator, *inputs, *attributes.items())
        if key not in self._known:
            self._known[key] = outputs
            name = f"{operator}_{len(self._nodes)}"
            self._nodes.append(self._onnx.helper.make_node(operator, inputs, outputs, name, **attributes))
        return self._known[key]

    def _place(self, view: Tensor) -> tuple[str, int]:
        """Return (name of the buffer that `view` is a part of, index of the view's first column)."""
        return self._buffers[view.untyped_storage().data_ptr()], int(view.storage_offset())

    def _weight(self, tensor: Tensor) -> str:
        """Return the name of a weight. A tensor with two uses, such as a tied lm_head, is stored once."""
        name = self._names[tensor.data_ptr(), tensor.shape]
        self.weights[name] = (tensor, self._is_narrow and tensor.ndim == 2)
        return name

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _int(self, value: int) -> str:
        return self._constant(np.array(value, np.int64))

    def _float(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: npt.NDArray[Any]) -> str:
        """Add an array that is not a weight, such as RoPE's frequencies. Return its name."""
        shown = "_".join(map(str, array.ravel().tolist())) if array.size < 6 else f"array_{array.size}"
        name = f"{array.dtype}_{shown}" + ("" if array.ndim else "_scalar")
        self._constants[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    # -- the result ------------------------------------------------------------------------------------------

    def proto(self) -> Any:
        """Return the graph without its weights, as a ModelProto."""
        helper, config, kinds = self._onnx.helper, self._config, self._onnx.TensorProto
        shape = self._node("Concat", self._shape, self._ints(config.vocab_size), axis=0)
        self._node("Reshape", self._values["logits", 0], shape, result="logits")

        def port(name: str, kind: int, *shape: int | str) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        def cache(name: str, length: str) -> list[Any]:
            shape = _B, config.num_key_value_heads, length, config.head_dim
            names = (f"{name}.{n}.{kind}" for n in range(self._layers) for kind in ("key", "value"))
            return [port(one, kinds.FLOAT, *shape) for one in names]

        inputs = [
            port("input_ids", kinds.INT64, _B, _T),
            port("attention_mask", kinds.INT64, _B, _S),
            port("position_ids", kinds.INT64, _B, _T),
            *cache("past_key_values", _P),
        ]
        outputs = [port("logits", kinds.FLOAT, _B, _T, config.vocab_size), *cache("present", _S)]
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, "minigpt", inputs, outputs, constants)
        opset = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="minigpt")
