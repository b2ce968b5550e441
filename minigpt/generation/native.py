"""Decoding on a CPU at the memory's speed: tokens through the whole model in one call of C.

    runner = runner_for(model)     # a TorchRunner where there is no compiler, or no float32 model on a CPU
    logits = runner.decode([[5], [3]], [0, 4], cache)      # a token in each of two slots -> (2, V)

`native.c` executes a list of three kinds of operations (`products.h`: what takes their time). The family's
folder writes the list from a model's own modules and weights, which it neither copies nor changes. So there
is no second model that could drift from the first: the PyTorch modules are the slow twin, and the tests hold
both together. The library is compiled at first use (.native_library).

A token's logits have the same bits whatever else is in the call: other slots, or other tokens of its own.

Letters in shapes: n slots, H heads of queries, G of keys and values, D channels of one head, V entries of the
vocabulary.
"""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minigpt.families.registry import BY_CONFIG, LanguageModel
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.model_runner import TorchRunner
from minigpt.generation.native_library import system_build
from minigpt.generation.output import Recorder
from minigpt.weights.quantized import NarrowEmbedding, QuantizedLinear

__all__ = [
    "NativeRunner",
    "NativeStepWarning",
    "OperationList",
    "dtype_to_load",
    "runner_for",
    "without_warning",
]

_FEW = 64  # with more tokens, torch's products of float32 are faster
# Multiplications for which a further thread is woken. With fewer it gains microseconds on a quiet machine; on
# a busy one each step waits for a thread that is kept waiting, for milliseconds.
_FOR_A_THREAD = 2**19

_EMBED, _PRODUCT, _ATTENTION = range(3)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_NO_NORM, _LAYER_NORM, _RMS_NORM = range(3)
_NO_ACT, _GELU_TANH, _GELU_EXACT, _SWIGLU = range(4)
_KNOWN = {nn.Linear, QuantizedLinear, NarrowEmbedding, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList}
_KNOWN.update(*(family.native_modules for family in BY_CONFIG.values()))


class _Operation(ctypes.Structure):
    """As `Operation` in native.c, field by field."""

    _ints = ("kind", "dtype", "norm", "act", "add", "wait", "wanted", "n_out", "n_in", "stride")
    _ints_of_attention = ("heads", "kv_heads", "head_dim")
    _weights = ("weight", "scale", "values", "value_scale", "bias", "norm_weight", "norm_bias")
    _places = ("input", "out", "positions", "q_norm", "k_norm", "cached_keys", "cached_values")
    _fields_ = (
        *[(name, ctypes.c_int32) for name in (*_ints, *_ints_of_attention)],
        ("eps", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in (*_weights, *_places)],
    )


class _Token(ctypes.Structure):
    """As `Token` in native.c."""

    _fields_ = (
        ("id", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("slot", "column", "wanted")],
    )


class NativeStepWarning(RuntimeWarning):
    """PyTorch computes what one call of C would compute sooner, and why."""


_was_said = False  # in this process. Python's own "once" forgets whenever a library changes the filters.


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """For a few tokens, whose time does not matter: nothing is said of a missing step; it may be later."""
    global _was_said
    before, _was_said = _was_said, True
    try:
        yield
    finally:
        _was_said = before


def _warn_once() -> None:
    global _was_said
    if _was_said:
        return
    warnings.warn(
        # the table native-step in docs/performance.md says how slow
        f"no native step ({system_build().reason}): answers come at about a third of this CPU's speed, in "
        "int8 at a fiftieth or less; install gcc or clang, with OpenMP",
        NativeStepWarning,
        stacklevel=3,
    )
    _was_said = True


def library() -> Any | None:
    """The compiled native.c, or None if it cannot be compiled here: `system_build().reason` says why."""
    return system_build().library


def dtype_to_load(device: torch.device) -> Literal["stored"] | None:
    """`load_model`'s dtype for a model that shall answer: 16 bits stay so where they are read natively.

    PyTorch would have to make them float32 anew for each product; a GPU would compute in 16 bits, too.
    """
    return "stored" if device.type == "cpu" and library() is not None else None


def runner_for(model: LanguageModel) -> "NativeRunner | TorchRunner":
    """The runner of a model. It is C for float32 activations on a CPU with a C compiler, and else PyTorch.

    A model that computes more than C knows runs in PyTorch: one with an adapter, a hook, a module of its own.
    Warns once a process, with NativeStepWarning, where only the compiler is missing.
    """
    one = next(model.parameters())
    if one.device.type != "cpu" or one.dtype != torch.float32 or not all(map(_is_known, model.modules())):
        return TorchRunner(model)
    if library() is None:
        _warn_once()
        return TorchRunner(model)
    return NativeRunner(model)


def _is_known(module: nn.Module) -> bool:
    """Does a module compute what the list of operations says, and nothing else?

    The list reads weights and calls no module. A wrapper, a subclass or a hook would be left out in silence.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in _KNOWN and not hooked


class NativeRunner:
    """The list of operations of one model, and the scratch memory that they work in.

    Weights are used where they lie: make a new one if a module is replaced or quantised, not if training has
    changed the values. Arguments and results of `prefill` and `decode` are those of TorchRunner; the logits
    are to be used before the next call.
    """

    in_any_slot = True  # C gets the slot of each token: none is copied
    _workspace: Tensor
    # of the last call
    _sizes: tuple[int, ...]  # tokens, columns of the cache, threads
    _numbers: tuple[Any, ...]  # for C
    _logits: Tensor | None
    _n_logits: int
    _found: tuple[Any, Any] | None  # where C writes the most likely tokens, and their logits

    def __init__(self, model: LanguageModel) -> None:
        self._library: Any = library()
        self._model = model
        self._any_length = isinstance(model.lm_head, QuantizedLinear)
        self._allocate(1)

    @functools.cached_property
    def torch(self) -> TorchRunner:
        """For what C does not do, or not as fast."""
        return TorchRunner(self._model)

    def takes(self, tokens: int) -> bool:
        """Is C faster for so many tokens? For weights in fewer bits than 32 always."""
        return self._any_length or tokens <= _FEW

    def prefill(
        self,
        pieces: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: KeyValueCache,
        embeds: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """The next tokens of each slot -> logits of each one's last token, (n, V)."""
        if embeds is not None or recorder is not None or not self.takes(sum(map(len, pieces))):
            return self.torch.prefill(pieces, slots, cache, embeds, recorder)
        return self._run(pieces, slots, cache, every=False)

    def decode(
        self,
        rows: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: KeyValueCache,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """The next tokens of each slot -> logits of all of them, slot by slot, (tokens, V)."""
        if recorder is not None:
            return self.torch.decode(rows, slots, cache, recorder)
        return self._run(rows, slots, cache, every=True)

    def argmax(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """The token with the highest logit in each row, the first of several, and this logit.

        NaN is the highest of a row that has one.
        """
        if logits is not self._logits:  # not those of the last call
            return self.torch.argmax(logits)
        if self._found is None or len(self._found[0]) != self._n_logits:
            self._found = (ctypes.c_int64 * self._n_logits)(), (ctypes.c_float * self._n_logits)()
        address, V = ctypes.c_void_p(self._all_logits.data_ptr()), ctypes.c_int64(self._all_logits.shape[1])
        self._library.minigpt_argmax(address, self._n_logits, V, *self._found)
        return self._found[0][:], self._found[1][:]

    def _run(
        self, rows: Sequence[Sequence[int]], slots: Sequence[int], cache: KeyValueCache, every: bool
    ) -> Tensor:
        """The next tokens of each slot -> logits of every token, or of each slot's last one.

        After a step of some hundred megabytes all of Python and torch is gone from the processor's caches,
        and torch's small operations take twenty to fifty microseconds each: so there is none here.
        """
        n = sum(map(len, rows))
        if self._n < n:
            self._allocate(n)
        if self._cache is not cache:
            self._bind(cache)
        tokens, place, longest = self._tokens, 0, 0
        for row, slot in zip(rows, slots):
            column = cache.lengths[slot]
            for token in row:
                one = tokens[place]
                one.id, one.slot, one.column, one.wanted = token, slot, column, every
                place += 1
                column += 1
            one.wanted = 1
            if column > longest:
                longest = column
                cache.reserve(slot, len(row))  # raises where they do not fit
        self._step(n, longest, cache.max_length)
        for row, slot in zip(rows, slots):
            cache.lengths[slot] += len(row)
        n_logits = n if every else len(rows)
        if self._logits is None or self._n_logits != n_logits:
            self._logits, self._n_logits = self._all_logits[:n_logits], n_logits
        return self._logits

    def _step(self, n: int, longest: int, columns: int) -> None:
        """The step of the first n tokens; `longest` tokens are seen by the one that sees most."""
        of_token = self._products + self._of_attention * longest
        threads = min(1 + of_token * n // _FOR_A_THREAD, torch.get_num_threads())
        if self._sizes != (n, columns, threads):
            self._sizes = n, columns, threads
            numbers = (
                ctypes.c_int(n),
                ctypes.c_int64(columns),
                ctypes.c_int64(self._widest),
                ctypes.c_int(threads),
            )
            needed = self._library.minigpt_scratch(len(self._operations), *numbers)
            if self._workspace.nbytes < needed:
                self._workspace = torch.empty(needed, dtype=torch.uint8)
            self._numbers = *numbers, ctypes.c_void_p(self._workspace.data_ptr())
        self._library.minigpt_step(self._operations, len(self._operations), self._tokens, *self._numbers)

    def _allocate(self, n: int) -> None:
        """Scratch memory for n tokens, and the list of operations, which names it."""
        self._n = n
        self._tokens = (_Token * n)()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._sizes, self._numbers, self._logits, self._n_logits, self._found = (), (), None, 0, None
        self._cache: KeyValueCache | None = None
        self._list = OperationList(n)
        family = BY_CONFIG[type(self._model.config)]  # no call: what an answer enters is kept short
        family.list_operations(self._list, self._model)
        self._rotary_table = family.rotary_table
        operations = self._list.operations
        operations[-1].wanted = 1
        self._all_logits = self._list.scratch["logits"]  # (n, V)
        self._operations: Any = (_Operation * len(operations))(*operations)
        self._attentions = [op for op in self._operations if op.kind == _ATTENTION]
        self._widest: int = max(operation.n_in for operation in operations)
        self._products: int = sum(op.n_in * op.n_out * (2 if op.act == _SWIGLU else 1) for op in operations)
        self._of_attention: int = sum(
            2 * op.heads * op.head_dim for op in operations
        )  # for each token it sees

    def _bind(self, cache: KeyValueCache) -> None:
        for layer, operation in enumerate(self._attentions):
            keys, values = cache.layer(layer)
            operation.cached_keys, operation.cached_values = keys.data_ptr(), values.data_ptr()
        if self._rotary_table is not None:
            self._rotations = self._rotary_table(self._model.config, cache.max_length)  # (S_max, D)
            for operation in self._attentions:
                operation.positions = self._rotations.data_ptr()
        self._cache = cache


class OperationList:
    """A list that a family's `native.py` fills with a model's operations, for calls of up to n tokens."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.operations: list[_Operation] = []
        self.scratch: dict[str, Tensor] = {}  # name -> (n, width)
        self._keep: list[Tensor] = []  # C sees addresses only: the tensors must stay

    def buffer(self, name: str, width: int) -> Tensor:
        """Scratch memory (n, width); the last operation's is called "logits"."""
        # few of many tokens' logits are wanted: what is not touched takes no memory
        make = torch.empty if name == "logits" else torch.zeros
        self.scratch[name] = make(self._n, width)
        return self.scratch[name]

    def embed(self, table: Tensor, out: Tensor, positions: Tensor | None = None) -> None:
        """out = table[ids], and the positions' vectors, if there are any."""
        more = {} if positions is None else {"positions": positions}
        self._add(_EMBED, n_out=table.shape[1], weight=table, out=out, **more)

    def attention(
        self, qkv: Tensor, out: Tensor, heads: int, kv_heads: int, head_dim: int, **more: Any
    ) -> None:
        """out = attention of qkv: H queries, G keys, G values of each token, side by side.

        Args:
            more: q_norm and k_norm, weights of RMSNorm (D,), with its eps.
        """
        self._add(_ATTENTION, heads=heads, kv_heads=kv_heads, head_dim=head_dim, input=qkv, out=out, **more)

    def product(
        self,
        layer: "nn.Linear | QuantizedLinear",
        source: Tensor,
        out: Tensor,
        norm: Any = None,
        act: Literal["gelu_tanh", "gelu_exact"] | None = None,
        **more: Any,
    ) -> None:
        """out = activation(linear(norm(source))).

        Args:
            more: `values`, a second layer: the activation is SwiGLU's, and `layer` gives its gates; `add=1`:
                out += ...; `wait=0`: the next operation does not read out.
        """
        values = more.pop("values", None)
        if act is not None:
            more["act"] = _GELU_TANH if act == "gelu_tanh" else _GELU_EXACT
        more["weight"] = layer.weight
        if isinstance(layer, QuantizedLinear) and layer.scale is not None:
            more["scale"] = layer.scale
        if values is not None:
            assert values.weight.dtype == layer.weight.dtype, "both or none are quantised"
            more |= {"act": _SWIGLU, "values": values.weight}
            if more.get("scale") is not None:
                more["value_scale"] = values.scale
        if layer.bias is not None:
            more["bias"] = layer.bias
        if norm is not None:
            more |= {"norm_weight": norm.weight, "eps": norm.eps, "norm": _RMS_NORM}
            if isinstance(norm, nn.LayerNorm):
                more |= {"norm_bias": norm.bias, "norm": _LAYER_NORM}
        n_out, n_in = layer.weight.shape
        place = {"input": source, "out": out, "stride": out.stride(0)}
        self._add(_PRODUCT, n_out=n_out, n_in=n_in, **place, **more)

    def _add(self, kind: int, **values: Any) -> None:
        operation = _Operation(kind=kind, wait=1)
        if "weight" in values:
            operation.dtype = _DTYPES[values["weight"].dtype]
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.stride(-1) == 1, name
                self._keep.append(value.detach())
                value = value.data_ptr()
            setattr(operation, name, value)
        self.operations.append(operation)
