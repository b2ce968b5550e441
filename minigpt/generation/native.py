"""Runs a model on a CPU, with one call of C code per step. Only memory bandwidth then limits decoding speed.

    runner = runner_for(model)     # a TorchRunner if C cannot run this model, or cannot be compiled
    logits = runner.decode([[5], [3]], [0, 4], cache)      # a token in each of two slots -> (2, V)

`native.c` executes a list of operations of three kinds: embedding, product and attention. `products.h` has
the matrix products, which take most of the time. Each model family has a `native.py`, which builds the list
from the modules of the PyTorch model. The weights are not copied: the list has their addresses. Tests compare
the results with PyTorch's. The C code is compiled at first use (native_library.py).

A token's logits are bit for bit the same, whatever other slots and tokens are in the call.

Letters in shapes: n slots, D channels of one head, V entries of the vocabulary.
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

_FEW = 64  # with float32 weights, C is faster than PyTorch if a call reads at most this many tokens
# A step uses one more thread for each 2**19 multiplications. For less work, one more thread would save only
# microseconds on an idle machine. On a busy machine it would cost milliseconds, because each step waits for
# the slowest thread.
_FOR_A_THREAD = 2**19

_EMBED, _PRODUCT, _ATTENTION = range(3)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_NO_NORM, _LAYER_NORM, _RMS_NORM = range(3)
_NO_ACT, _GELU_TANH, _GELU_EXACT, _SWIGLU = range(4)
_KNOWN = {nn.Linear, QuantizedLinear, NarrowEmbedding, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList}
_KNOWN.update(*(family.native_modules for family in BY_CONFIG.values()))


class _Operation(ctypes.Structure):
    """The struct `Operation` of native.c, with the same fields."""

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
    """The struct `Token` of native.c, with the same fields."""

    _fields_ = (
        ("id", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("slot", "column", "wanted")],
    )


class NativeStepWarning(RuntimeWarning):
    """Warns that PyTorch runs the model because the faster C library is missing, and says why."""


# True if this process has already issued NativeStepWarning. Python's warning filter "once" is not enough:
# Python would warn again after any package has changed the filters.
_was_said = False


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """Suppress NativeStepWarning in a `with` block, for example while a few tokens are sampled.

    After the block, the warning can still appear.
    """
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
        # the numbers are from the table native-step in docs/performance.md
        f"no native step ({system_build().reason}): answers come at about a third of this CPU's speed, in "
        "int8 at a fiftieth or less; install gcc or clang, with OpenMP",
        NativeStepWarning,
        stacklevel=3,
    )
    _was_said = True


def library() -> Any | None:
    """Return the compiled native.c as a ctypes.CDLL, or None. `system_build().reason` says why it is None."""
    return system_build().library


def dtype_to_load(device: torch.device) -> Literal["stored"] | None:
    """Return the value for `load_model`'s argument dtype that is best for generation.

    If the C code runs the model, return "stored": 16-bit weights stay as they are. If PyTorch runs the model,
    return None: the weights are converted to float32. With 16-bit weights, PyTorch would convert them in each
    product on a CPU, and would compute in only 16 bits on a GPU.
    """
    return "stored" if device.type == "cpu" and library() is not None else None


def runner_for(model: LanguageModel) -> "NativeRunner | TorchRunner":
    """Return an object that runs the model: a NativeRunner (C code) if possible, else a TorchRunner.

    The C code needs float32 activations, a CPU and a C compiler. It does not support adapters, hooks and
    unknown modules. If only the compiler is missing, this function warns once per process with
    NativeStepWarning.
    """
    one = next(model.parameters())
    if one.device.type != "cpu" or one.dtype != torch.float32 or not all(map(_is_known, model.modules())):
        return TorchRunner(model)
    if library() is None:
        _warn_once()
        return TorchRunner(model)
    return NativeRunner(model)


def _is_known(module: nn.Module) -> bool:
    """Return True if the list of operations for C describes all that a module computes.

    The list is made from the weights, without calling a module. So it would miss what a wrapper, a subclass
    or a hook adds.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in _KNOWN and not hooked


class NativeRunner:
    """Runs one model in C. It holds the model's list of operations and memory for intermediate results.

    The list holds the addresses of the weights. So the values of the weights may change, for example by
    training. But if a module is replaced or quantised, make a new runner. `prefill` and `decode` have the
    same arguments and results as in TorchRunner, but the next call overwrites the returned logits.
    """

    in_any_slot = True  # True: the used slots need not be adjacent
    _workspace: Tensor
    # The attributes below describe the last call into C.
    _sizes: tuple[int, ...]  # (number of tokens, columns of the cache, number of threads)
    _numbers: tuple[Any, ...]  # the arguments that were passed to C
    _logits: Tensor | None
    _n_logits: int
    _found: tuple[Any, Any] | None  # memory into which C writes the most likely tokens and their logits

    def __init__(self, model: LanguageModel) -> None:
        self._library: Any = library()
        self._model = model
        self._any_length = isinstance(model.lm_head, QuantizedLinear)
        self._allocate(1)

    @functools.cached_property
    def torch(self) -> TorchRunner:
        """The PyTorch runner, for calls that C does not support or runs more slowly."""
        return TorchRunner(self._model)

    def takes(self, tokens: int) -> bool:
        """Return True if C reads this number of tokens in one call faster than PyTorch.

        With weights of fewer than 32 bits, C is always faster.
        """
        return self._any_length or tokens <= _FEW

    def prefill(
        self,
        pieces: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: KeyValueCache,
        embeds: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Read pieces[i], the next tokens of slots[i]. Return the logits after each piece, (n, V)."""
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
        """Read rows[i], the next tokens of slots[i]. Return the logits after each token, (tokens, V)."""
        if recorder is not None:
            return self.torch.decode(rows, slots, cache, recorder)
        return self._run(rows, slots, cache, every=True)

    def argmax(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """Return the token with the highest logit in each row (in a tie the first one), and this logit.

        In a row with a NaN, the NaN counts as the highest.
        """
        if logits is not self._logits:  # C's argmax can only process the logits of C's last call
            return self.torch.argmax(logits)
        if self._found is None or len(self._found[0]) != self._n_logits:
            self._found = (ctypes.c_int64 * self._n_logits)(), (ctypes.c_float * self._n_logits)()
        address, V = ctypes.c_void_p(self._all_logits.data_ptr()), ctypes.c_int64(self._all_logits.shape[1])
        self._library.minigpt_argmax(address, self._n_logits, V, *self._found)
        return self._found[0][:], self._found[1][:]

    def _run(
        self, rows: Sequence[Sequence[int]], slots: Sequence[int], cache: KeyValueCache, every: bool
    ) -> Tensor:
        """Read rows[i], the next tokens of slots[i]. Return logits.

        every=True: the logits after each token, (tokens, V); every=False: only after each row, (n, V).

        This method calls no torch operation, because here each would take 20 to 50 microseconds: the step
        before has read hundreds of megabytes of weights, which have pushed the code of Python and torch out
        of the processor's caches.
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
                cache.reserve(slot, len(row))  # raises an error if the slot has no space for these tokens
        self._step(n, longest, cache.max_length)
        for row, slot in zip(rows, slots):
            cache.lengths[slot] += len(row)
        n_logits = n if every else len(rows)
        if self._logits is None or self._n_logits != n_logits:
            self._logits, self._n_logits = self._all_logits[:n_logits], n_logits
        return self._logits

    def _step(self, n: int, longest: int, columns: int) -> None:
        """Run the first n of `_tokens` through the model. A token attends to at most `longest` tokens."""
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
        """Allocate memory for the intermediate results of n tokens, and build the list of operations."""
        self._n = n
        self._tokens = (_Token * n)()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._sizes, self._numbers, self._logits, self._n_logits, self._found = (), (), None, 0, None
        self._cache: KeyValueCache | None = None
        self._list = OperationList(n)
        family = BY_CONFIG[type(self._model.config)]
        family.list_operations(self._list, self._model)
        self._rotary_table = family.rotary_table
        operations = self._list.operations
        operations[-1].wanted = 1
        self._all_logits = self._list.scratch["logits"]  # (n, V)
        self._operations: Any = (_Operation * len(operations))(*operations)
        self._attentions = [op for op in self._operations if op.kind == _ATTENTION]
        self._widest: int = max(operation.n_in for operation in operations)
        self._products: int = sum(op.n_in * op.n_out * (2 if op.act == _SWIGLU else 1) for op in operations)
        # number of multiplications in the attention of all layers, for one pair of query token and key token
        self._of_attention: int = sum(2 * op.heads * op.head_dim for op in operations)

    def _bind(self, cache: KeyValueCache) -> None:
        for layer, operation in enumerate(self._attentions):
            keys, values = cache.layer(layer)
            operation.cached_keys, operation.cached_values = keys.data_ptr(), values.data_ptr()
        if self._rotary_table is not None:
            # (columns of the cache, D)
            self._rotations = self._rotary_table(self._model.config, cache.max_length)
            for operation in self._attentions:
                operation.positions = self._rotations.data_ptr()
        self._cache = cache


class OperationList:
    """The operations of one forward pass of a model, in order. A family's `native.py` adds them.

    Args:
        n: largest number of tokens of a forward pass.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self.operations: list[_Operation] = []
        self.scratch: dict[str, Tensor] = {}  # name -> memory for an intermediate result, (n, width)
        self._keep: list[Tensor] = []  # keeps the tensors alive, because C has their addresses only

    def buffer(self, name: str, width: int) -> Tensor:
        """Allocate memory (n, width) for an intermediate result. `name` must be "logits" for the logits."""
        # The logits (n, V) would take much memory, but often only a few tokens need them. With torch.empty,
        # the operating system provides no memory for rows that are never written.
        make = torch.empty if name == "logits" else torch.zeros
        self.scratch[name] = make(self._n, width)
        return self.scratch[name]

    def embed(self, table: Tensor, out: Tensor, positions: Tensor | None = None) -> None:
        """Append the operation out = table[ids].

        Args:
            positions: learned vectors of the positions, which the operation also adds to out. None: nothing
                is added.
        """
        more = {} if positions is None else {"positions": positions}
        self._add(_EMBED, n_out=table.shape[1], weight=table, out=out, **more)

    def attention(
        self, qkv: Tensor, out: Tensor, heads: int, kv_heads: int, head_dim: int, **more: Any
    ) -> None:
        """Add the operation out = attention(qkv).

        For each token, qkv holds `heads` queries, `kv_heads` keys and `kv_heads` values.

        Args:
            more: only for models that normalise queries and keys: the weights q_norm and k_norm of the two
                RMSNorms, (D,) each, and their epsilon `eps`.
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
        """Add the operation out = activation(linear(norm(source))).

        Args:
            layer: the linear layer.
            norm: a module, applied to source first; None: no norm.
            act: the activation; None: no activation.
            more: optional:
                values: a second linear layer. The activation is then SwiGLU, and `layer` computes the gates.
                add=1: the result is added to `out`, instead of overwriting `out`.
                wait=0: threads do not wait until the operation is finished. The next operation must not read
                    `out`.
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
