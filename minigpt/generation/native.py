"""Decoding on a CPU at the memory's speed: tokens through the whole model in one call of C.

    step = native_step(model)          # None where there is no compiler, or a model that it does not know
    logits = step(ids, positions, first, cache)                                        # (B, T) -> (B, V)
    logits = step.ragged([[5, 7], [3]], [0, 4], slots)      # rows of different lengths; see .slots

`native.c` executes a list of three kinds of operations (`products.h`: what takes their time); this module
writes the list from a model's own modules and weights, which it neither copies nor changes. So there is no
second model that could drift from the first: the PyTorch modules are the twin, and the tests hold both
together. The library is compiled at first use (.native_library).

A token's logits have the same bits whatever else is in the call: other rows, or tokens of its own row.

Letters in shapes: B rows, T tokens of each given now, V entries of the vocabulary.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM, rope_tables
from minigpt.families.registry import LanguageModel
from minigpt.generation.cache import KeyValueCache
from minigpt.generation.native_library import system_build
from minigpt.generation.slot_cache import SlotCache
from minigpt.model import GPTLMHeadModel
from minigpt.weights.quantized import QuantizedLinear

__all__ = ["NativeStep", "NativeStepWarning", "dtype_to_load", "native_step", "without_warning"]

_FEW = 64  # with more tokens, torch's products of float32 are faster
# Multiplications for which a further thread is woken. With fewer it gains microseconds on a quiet machine; on
# a busy one each step waits for a thread that is kept waiting, for milliseconds.
_FOR_A_THREAD = 2**19

_EMBED, _PRODUCT, _ATTENTION = range(3)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_NO_NORM, _LAYER_NORM, _RMS_NORM = range(3)
_NO_ACT, _GELU_TANH, _GELU_EXACT, _SWIGLU = range(4)


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


_TOKEN = np.dtype(
    {
        "names": ["id", "position", "slot", "column", "first", "wanted"],
        "formats": ["i8", "i4", "i4", "i4", "i4", "i4"],
    },
    align=True,
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
        "int8 at a fiftieth; install gcc or clang, with OpenMP",
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


class _Call:
    """What calls of one shape have in common, made once.

    After a step of some hundred megabytes all of Python, NumPy and torch is gone from the processor's caches,
    and torch's small operations take ten times as long as usual, twenty to fifty microseconds each.
    """

    def __init__(self, B: int, T: int, wanted: int, logits: Tensor) -> None:
        self.shape = B, T, wanted
        self.tokens = np.zeros((B, T), _TOKEN)
        self.tokens["slot"] = np.arange(B)[:, None]
        self.tokens["wanted"][:, -wanted:] = 1
        self.id, self.position, self.column, self.first = (
            self.tokens[name] for name in ("id", "position", "column", "first")
        )
        self.begin: int = self.tokens.ctypes.data
        self.places = np.arange(T)
        self.logits = logits[: B * wanted]
        self.rows, self.V = B * wanted, ctypes.c_int64(logits.shape[1])
        self.address = ctypes.c_void_p(self.logits.data_ptr())
        self.likeliest, self.highest = (ctypes.c_int64 * self.rows)(), (ctypes.c_float * self.rows)()


def native_step(model: LanguageModel) -> "NativeStep | None":
    """A NativeStep, where one is possible: float32 activations on a CPU, known modules, a C compiler.

    Warns once a process, with NativeStepWarning, where only the compiler is missing.
    """
    one = next(model.parameters())
    if one.device.type != "cpu" or one.dtype != torch.float32:
        return None
    if not isinstance(model, GPTLMHeadModel | Qwen3ForCausalLM):
        return None
    if library() is None:
        _warn_once()
        return None
    return NativeStep(model)


class NativeStep:
    """The list of operations of one model, and the scratch memory that they work in.

    Weights are used where they lie: make a new one if a module is replaced or quantised, not if training has
    changed the values.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._library: Any = library()
        self._model = model
        self.any_length = isinstance(model.lm_head, QuantizedLinear)
        self._room_for(1)

    def takes(self, tokens: int) -> bool:
        """Is this the faster way for so many tokens? Of weights in fewer bits than 32 always."""
        return self.any_length or tokens <= _FEW

    def _room_for(self, n: int) -> None:
        """Scratch memory for n tokens, and the list of operations, which names it."""
        self._n = n
        self._keep: list[Tensor] = []  # C sees addresses only: somebody must hold the tensors
        self._scratch: dict[str, Tensor] = {}
        self._notes = torch.empty(0, dtype=torch.uint8)
        self._sizes: tuple[int, ...] = ()  # of the last call: tokens, columns of the cache, threads
        self._numbers: tuple[Any, ...] = ()  # for C
        self._last: _Call | None = None
        self._bound: KeyValueCache | SlotCache | None = None
        model = self._model
        operations = list(_gpt(self, model) if isinstance(model, GPTLMHeadModel) else _qwen3(self, model))
        operations[-1].wanted = 1
        self._operations = (_Operation * len(operations))(*operations)
        self._attentions = [op for op in self._operations if op.kind == _ATTENTION]
        self._widest = max(operation.n_in for operation in operations)
        self._products = sum(op.n_in * op.n_out * (2 if op.act == _SWIGLU else 1) for op in operations)
        self._of_attention = sum(2 * op.heads * op.head_dim for op in operations)  # for each token it sees

    def __call__(
        self,
        ids: "Tensor | np.ndarray[Any, Any]",
        positions: Tensor | int,
        first: Tensor | int,
        cache: KeyValueCache,
        wanted: int = 1,
    ) -> Tensor:
        """The next T tokens of each row -> logits of the last one, (B, V), to be used before the next call.

        Args:
            ids: (B, T); they are added to the cache.
            positions: (B, T): each token's place in its text; a number: the first one's, in all rows.
            first: (B,) or a number: the first column of the cache that is no padding.
            wanted: of each row's last n tokens the logits are returned, (B * n, V), row by row.
        """
        (B, T), past = ids.shape, cache.length
        assert 1 <= wanted <= T, "logits of tokens that are not given"
        if cache.rows != B or past + T > cache.max_length:
            raise ValueError(
                f"the cache has {cache.rows} rows and room for {cache.max_length - past} tokens: got {B}, {T}"
            )
        if self._n < B * T:
            self._room_for(B * T)
        if self._bound is not cache:
            self._bind(cache)
        if self._last is None or self._last.shape != (B, T, wanted):
            self._last = _Call(B, T, wanted, self._scratch["logits"])
        last = self._last
        last.id[:] = ids
        last.column[:] = last.places + past
        last.position[:] = last.places + positions if isinstance(positions, int) else positions
        last.first[:] = first if isinstance(first, int) else first[:, None]
        self._run(last.begin, B * T, past + T, cache.max_length)
        cache.advance(T)
        return last.logits

    def likeliest(self, logits: Tensor) -> tuple[list[int], list[float]] | None:
        """Of each row the token with the highest score, the first of several, and this score.

        NaN is the highest of a row that has one. None: these are not the logits of the last call.
        """
        last = self._last
        if last is None or logits is not last.logits:
            return None
        self._library.minigpt_likeliest(last.address, last.rows, last.V, last.likeliest, last.highest)
        return last.likeliest[:], last.highest[:]

    def ragged(
        self, ids: Sequence[Sequence[int]], slots: Sequence[int], cache: SlotCache, wanted: int = 1
    ) -> Tensor:
        """The next tokens of rows of different lengths, which need not be given equally many.

        Args:
            ids: of each row, at least `wanted`; they are added to the cache.
            slots: (n,) which slot of the cache each row has.
            wanted: of each row's last tokens that many rows of logits are returned, (n * wanted, V), to be
                used before the next call.
        """
        counts = [len(row) for row in ids]
        starts = [cache.claim(slot, count) for slot, count in zip(slots, counts)]
        assert min(counts) >= wanted >= 1, "logits of tokens that are not given"
        if self._n < sum(counts):
            self._room_for(sum(counts))
        if self._bound is not cache:
            self._bind(cache)
        tokens = np.zeros(sum(counts), _TOKEN)
        ends = np.cumsum(counts)
        tokens["id"] = [token for row in ids for token in row]
        tokens["slot"] = np.repeat(slots, counts)
        tokens["column"] = np.arange(len(tokens)) + np.repeat(np.array(starts) - ends + counts, counts)
        tokens["position"] = tokens["column"]
        tokens["wanted"][(ends[:, None] - np.arange(wanted) - 1).ravel()] = 1
        self._run(tokens.ctypes.data, tokens.size, int(tokens["column"].max()) + 1, cache.max_length)
        for slot, count in zip(slots, counts):
            cache.advance(slot, count)
        return self._scratch["logits"][: len(counts) * wanted]

    def _run(self, address: int, n: int, longest: int, columns: int) -> None:
        """The step of the n tokens at an address; `longest` tokens are seen by the one that sees most."""
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
            if self._notes.nbytes < needed:
                self._notes = torch.empty(needed, dtype=torch.uint8)
            self._numbers = *numbers, ctypes.c_void_p(self._notes.data_ptr())
        self._library.minigpt_step(
            self._operations, len(self._operations), ctypes.c_void_p(address), *self._numbers
        )

    def _bind(self, cache: KeyValueCache | SlotCache) -> None:
        for layer, operation in enumerate(self._attentions):
            keys, values = cache.layer(layer)
            operation.cached_keys, operation.cached_values = keys.data_ptr(), values.data_ptr()
        config = self._model.config
        if isinstance(config, Qwen3Config):  # a token's position is never beyond its column
            turns = rope_tables(torch.arange(cache.max_length), config)  # (1, S_max, D/2) each
            self._turns = torch.cat(turns, dim=-1)[0].contiguous()  # (S_max, D): cos, then sin
            for operation in self._attentions:
                operation.positions = self._turns.data_ptr()
        self._bound = cache

    # -- writing the list -----------------------------------------------------------------------------------

    def _room(self, name: str, width: int) -> Tensor:
        """Scratch memory (n, width) of this name."""
        if name not in self._scratch:
            # of many tokens' logits few are wanted: what is not touched takes no memory
            make = torch.empty if name == "logits" else torch.zeros
            self._scratch[name] = make(self._n, width)
        return self._scratch[name]

    def _operation(self, kind: int, **values: Any) -> _Operation:
        operation = _Operation(kind=kind, wait=1)
        if "weight" in values:
            operation.dtype = _DTYPES[values["weight"].dtype]
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.stride(-1) == 1, name
                self._keep.append(value.detach())
                value = value.data_ptr()
            setattr(operation, name, value)
        return operation

    def _product(
        self, layer: "nn.Linear | QuantizedLinear", source: Tensor, out: Tensor, norm: Any = None, **more: Any
    ) -> _Operation:
        """out = activation(linear(norm(source))); `values`, a layer too, makes the activation SwiGLU's."""
        values = more.pop("values", None)
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
        return self._operation(_PRODUCT, n_out=n_out, n_in=n_in, **place, **more)


def _any(modules: nn.ModuleList) -> Iterator[Any]:
    yield from modules


def _gpt(step: NativeStep, model: GPTLMHeadModel) -> Iterator[_Operation]:
    config, body = model.config, model.transformer
    C, H = config.n_embd, config.n_head
    x, qkv, mixed = step._room("x", C), step._room("qkv", 3 * C), step._room("mixed", C)
    wide, logits = step._room("wide", 4 * C), step._room("logits", config.vocab_size)
    act = _GELU_TANH if config.gelu == "tanh" else _GELU_EXACT
    yield step._operation(_EMBED, n_out=C, weight=body.wte.weight, positions=body.wpe.weight, out=x)
    for block in _any(body.blocks):
        yield step._product(block.attn.qkv_proj, x, qkv, norm=block.ln_1)
        yield step._operation(_ATTENTION, heads=H, kv_heads=H, head_dim=C // H, input=qkv, out=mixed)
        yield step._product(block.attn.out_proj, mixed, x, add=1)
        yield step._product(block.mlp.c_fc, x, wide, norm=block.ln_2, act=act)
        yield step._product(block.mlp.c_proj, wide, x, add=1)
    yield step._product(model.lm_head, x, logits, norm=body.ln_f)


def _qwen3(step: NativeStep, model: Qwen3ForCausalLM) -> Iterator[_Operation]:
    config, body = model.config, model.model
    C, D, H, G = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    x, qkv, mixed = step._room("x", C), step._room("qkv", (H + 2 * G) * D), step._room("mixed", H * D)
    wide, logits = step._room("wide", config.intermediate_size), step._room("logits", config.vocab_size)
    q, k, v = torch.split(qkv, [H * D, G * D, G * D], dim=1)  # side by side, as attention wants them
    yield step._operation(_EMBED, n_out=C, weight=body.embed_tokens.weight, out=x)
    for block in _any(body.layers):
        attention, mlp, norm = block.self_attn, block.mlp, block.input_layernorm
        yield step._product(attention.q_proj, x, q, norm=norm, wait=0)
        yield step._product(attention.k_proj, x, k, norm=norm, wait=0)
        yield step._product(attention.v_proj, x, v, norm=norm)
        norms = {"q_norm": attention.q_norm.weight, "k_norm": attention.k_norm.weight}
        yield step._operation(
            _ATTENTION,
            heads=H,
            kv_heads=G,
            head_dim=D,
            input=qkv,
            out=mixed,
            eps=attention.q_norm.eps,
            **norms,
        )
        yield step._product(attention.o_proj, mixed, x, add=1)
        yield step._product(mlp.gate_proj, x, wide, norm=block.post_attention_layernorm, values=mlp.up_proj)
        yield step._product(mlp.down_proj, wide, x, add=1)
    yield step._product(model.lm_head, x, logits, norm=body.norm)
