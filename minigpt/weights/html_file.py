"""Writes a model as one HTML file: opened in a browser, the model answers without a server or a network.

    notes = write_html("model.html", model, tokenizer, form="question", eos=[2])

The page holds the weights, the tokenizer and a program in JavaScript (the files in minigpt/weights/html),
which computes the same logits as minigpt. The program does not know the model families. Each family describes
its forward pass as a list of operations, as it does for the C code of minigpt.generation.native. The program
runs this list.

The parts of the file, in order: a security policy (no other program may run, no network access), the style,
the page's elements, a description of the model (JSON), the weights, the program. Description and weights are
compressed by gzip and written in base64. So a browser never reads a name, token or text of a model as HTML.
"""

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
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
from minigpt.weights.html_prompt import describe_prompt
from minigpt.weights.html_tokenizer import describe_tokenizer
from minigpt.weights.pretrained import AnyTokenizer
from minigpt.weights.quantized import precision_of, rounded_rows

__all__ = ["MAX_BYTES", "SCRIPTS", "HtmlDtype", "write_html"]

HtmlDtype = Literal["float32", "float16", "int8"]
MAX_BYTES = 512 * 2**20
"""Largest number of bytes of weights in a page. The browser needs about four times this memory: it holds
base64 text, decoded bytes and numbers at the same time."""

SCRIPTS = (
    "weights.js", "tokenizer.js", "sampling.js", "model.js", "prompt.js", "words.js", "views.js", "page.js",
)  # fmt: skip
_FLOAT16_MAX = 65504.0
# Largest number of bytes in one HTML element, counted before they are encoded as base64. It is a multiple of
# 3, so that base64 adds no padding.
_PART = 3 * 2**20


def write_html(
    path: str | Path,
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    *,
    form: Literal["chat", "question", "text"],
    eos: Sequence[int],
    dtype: HtmlDtype = "float16",
    name: str = "",
    options: Mapping[str, Any] | None = None,
    start: int | None = None,
    opened: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """Write a model and its tokenizer as one HTML file.

    Args:
        path: the file to write.
        model: the model, not quantised.
        tokenizer: its tokenizer.
        form: the model's prompt format.
        eos: ids that end an answer.
        dtype: type of the matrices. int8 has a scale for each row. Vectors are always float32.
        name: a name of the model, which the page shows.
        options: name of a field of GenerationOptions -> initial value of its slider in the page.
        start: the id with which the model begins if the text is empty; only for the format "text".
        opened: what the page shows when it opens: {"said": the question, "prompt": its ids, "ids": the
            answer's ids, "isOwn": true if the model wrote the answer, "view": the tab, "layer" and "head":
            those that the tab shows}. `Page.open` in page.js reads this dict.
        max_bytes: largest number of bytes of weights, before compression.

    Returns: sentences that say where the page's results differ from minigpt's.

    Raises:
        InputError: if the model has adapters or quantised weights, or is a masked language model, which fills
            gaps; if the weights are too large for a page; if a value is too large for float16; if the page
            does not support the tokenizer.
    """
    if dtype not in get_args(HtmlDtype):
        raise InputError(f"dtype must be one of {', '.join(get_args(HtmlDtype))}: got {dtype!r}")
    if names := adapter_names(model):
        raise InputError(f"the model has adapters beside its weights ({', '.join(names)}): merge them first")
    if (precision := precision_of(model)) in ("int8", "int4"):
        raise InputError(f"the model is stored in {precision}: give it unquantised, and dtype='int8'")
    if mask_token_id(tokenizer) is not None:
        raise InputError("the model was trained to fill gaps (minigpt fill); the page only continues texts")
    plan = _Plan()
    family = family_of(model.config)
    family.list_operations(plan, model)
    plan.set_windows(model.config)
    entries, size = plan.entries(dtype)
    if size > max_bytes:
        raise InputError(
            f"the model has {size / 2**20:,.0f} MiB of weights as {dtype}; a page holds at most "
            f"{max_bytes / 2**20:,.0f}: {_smaller(dtype)}"
        )
    prompt, notes = describe_prompt(tokenizer, form)
    about: dict[str, Any] = {
        "name": name,
        "form": form,
        "context": model.config.max_position_embeddings,
        "parameters": model.config.parameter_count(),
        "dtype": dtype,
        "tokens": min(model.config.vocab_size, tokenizer.get_vocab_size()),
        "eos": [int(one) for one in eos],
        "start": start,
        "options": dict(options or {}),
        "opened": None if opened is None else dict(opened),
        **prompt,
        "tokenizer": describe_tokenizer(tokenizer),
        "rotary": _rotary(family, model.config),
        "buffers": plan.widths,
        "operations": plan.operations,
        "tensors": entries,
        "bytes": size,
    }
    if dtype == "float16":
        plan.require_float16()
    description = json.dumps(about, separators=(",", ":")).encode()
    with atomic_open(path) as file:
        before, after = _page(name, len(description))
        file.write(before)
        _write_parts(file, "description", [description])
        _write_parts(file, "weights", plan.content(dtype))
        file.write(after)
    return notes


def _smaller(dtype: HtmlDtype) -> str:
    other = {"float32": "float16 or int8", "float16": "int8"}.get(dtype)
    return (
        f"convert with --dtype {other}"
        if other
        else "convert a smaller model, or run this one with minigpt chat"
    )


def _rotary(family: Any, config: Any) -> dict[str, Any] | None:
    if family.rotary_frequencies is None:
        return None
    frequencies, factor = family.rotary_frequencies(config)
    return {"frequencies": frequencies.tolist(), "factor": factor}


# -- the page ----------------------------------------------------------------------------------------------


def _text_of(name: str) -> str:
    return (resources.files("minigpt.weights") / "html" / name).read_text(encoding="utf-8")


def _page(name: str, description_size: int) -> tuple[bytes, bytes]:
    """Return the part of the page before the description and the weights, and the part after them."""
    script = '"use strict";\n' + "\n".join(_text_of(file) for file in SCRIPTS)
    style = _text_of("page.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = {
        "{{policy}}": policy,
        "{{title}}": html.escape(name) or "minigpt",
        "{{style}}": style,
        "{{size}}": str(description_size),
    }
    page = _text_of("page.html")
    for mark, text in filled.items():
        # the title is inserted last, because a model's name could contain a mark such as {{size}}
        if mark != "{{title}}":
            page = page.replace(mark, text)
    before, after = page.split("{{model}}")
    before = before.replace("{{title}}", filled["{{title}}"])
    # "replace" writes a question mark for a lone surrogate, which UTF-8 cannot hold
    return before.encode("utf-8", "replace"), after.replace("{{script}}", script).encode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write_parts(file: Any, kind: str, pieces: Iterable[bytes]) -> None:
    """Compress bytes and write them as base64 into HTML elements of limited size.

    One element could be too long, because browsers limit the length of a text.
    """
    # 6: the level (9 would be slower, and the result not smaller); 31: gzip format
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    waiting = bytearray()

    def flush(least: int) -> None:
        while len(waiting) >= least and waiting:
            part = base64.b64encode(waiting[:_PART])
            file.write(b'<script type="text/plain" class="%s">' % kind.encode() + part + b"</script>\n")
            del waiting[:_PART]

    for piece in pieces:
        waiting += compressor.compress(piece)
        flush(_PART)
    waiting += compressor.flush()
    flush(1)


# -- the computation and the weights -----------------------------------------------------------------------


class _Plan:
    """Collects the operations of a model as JSON for the page.

    A model family calls the methods of this class. Their names and arguments are those of
    native.OperationList.

    Attributes:
        widths: name of each buffer -> its number of columns.
        operations: the operations in order. An operation refers to a tensor by its index in `tensors`.
        tensors: the weights, each once.
    """

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}
        self.operations: list[dict[str, Any]] = []
        self.tensors: list[Tensor] = []
        self._numbers: dict[tuple[int, torch.Size], int] = {}
        self._buffers: dict[int, str] = {}  # address of a buffer's storage -> the buffer's name
        self._keep: list[Tensor] = []

    # -- what a family calls --------------------------------------------------------------------------------

    def buffer(self, name: str, width: int) -> Tensor:
        """Return a tensor that stands for the buffer `name` with `width` columns. Its values are not used."""
        tensor = torch.empty(1, width)
        self._buffers[tensor.untyped_storage().data_ptr()] = name
        self._keep.append(tensor)
        self.widths[name] = width
        return tensor

    def embed(self, table: Tensor, out: Tensor, positions: Tensor | None = None) -> None:
        """Add the operation out = table[ids]. `positions`: a table of position embeddings, added to out."""
        more = {"weight": self._number(table), "positions": self._number(positions)}
        self.operations.append({"kind": "embed", **more, **self._place("output", out)})

    def attention(
        self, qkv: Tensor, out: Tensor, heads: int, kv_heads: int, head_dim: int, **more: Any
    ) -> None:
        """Add the operation out = attention(qkv)."""
        norms = {"queryNorm": more.get("q_norm"), "keyNorm": more.get("k_norm")}
        self.operations.append(
            {
                "kind": "attention",
                "heads": heads,
                "kvHeads": kv_heads,
                "headDim": head_dim,
                "eps": more.get("eps"),
                "window": None,
                **{key: self._number(tensor) for key, tensor in norms.items()},
                **self._place("input", qkv),
                **self._place("output", out),
            }
        )

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
        values = more.get("values")
        rows, columns = layer.weight.shape
        self.operations.append(
            {
                "kind": "product",
                "rows": rows,
                "columns": columns,
                "weight": self._number(layer.weight),
                "bias": self._number(layer.bias),
                "values": None if values is None else self._number(values.weight),
                "activation": act if values is None else "swiglu",
                "norm": self._norm(norm),
                "add": bool(more.get("add", False)),
                **self._place("input", source),
                **self._place("output", out),
            }
        )

    def _norm(self, norm: Any) -> dict[str, Any] | None:
        if norm is None:
            return None
        kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
        bias = self._number(getattr(norm, "bias", None))
        return {"kind": kind, "weight": self._number(norm.weight), "bias": bias, "eps": norm.eps}

    def _place(self, key: str, view: Tensor) -> dict[str, Any]:
        name = self._buffers[view.untyped_storage().data_ptr()]
        return {key: name, f"{key}At": view.storage_offset()}

    def _number(self, tensor: Tensor | None) -> int | None:
        """Return a tensor's index in `tensors`; None for None. A tensor that is used twice has one index."""
        if tensor is None:
            return None
        key = (tensor.data_ptr(), tensor.shape)
        if key not in self._numbers:
            self._numbers[key] = len(self.tensors)
            self.tensors.append(tensor.detach())
        return self._numbers[key]

    # -- what is written ------------------------------------------------------------------------------------

    def set_windows(self, config: Any) -> None:
        """Set `window` in the attention operation of each layer with a sliding window."""
        attentions = [one for one in self.operations if one["kind"] == "attention"]
        for layer, operation in enumerate(attentions):
            if getattr(config, "sliding_window", None) is not None and config.is_sliding(layer):
                operation["window"] = config.sliding_window

    def entries(self, dtype: HtmlDtype) -> tuple[list[dict[str, Any]], int]:
        """Return shape, dtype and offset of each tensor, and the total number of bytes."""
        found, place = [], 0
        for tensor in self.tensors:
            stored = dtype if tensor.ndim == 2 else "float32"
            found.append({"shape": list(tensor.shape), "dtype": stored, "offset": place})
            place += tensor.numel() * {"float32": 4, "float16": 2, "int8": 1}[stored]
            place += 4 * len(tensor) if stored == "int8" else 0
        return found, place

    def require_float16(self) -> None:
        """Raise InputError if a matrix has a value that float16 cannot hold."""
        for tensor in self.tensors:
            if tensor.ndim == 2 and float(tensor.abs().max()) > _FLOAT16_MAX:
                raise InputError(
                    "the weights hold values too large for float16: convert with --dtype float32"
                )

    def content(self, dtype: HtmlDtype) -> Iterator[bytes]:
        """Yield the bytes of all tensors, in order."""
        for tensor in self.tensors:
            require_finite("the weights", tensor)
            exact = tensor.float().cpu()
            if tensor.ndim != 2 or dtype == "float32":
                yield _planes(exact.numpy())
            elif dtype == "float16":
                yield _planes(exact.half().numpy())
            else:
                numbers, scale = rounded_rows(exact)
                yield numbers.numpy().tobytes()
                yield _planes(scale.numpy())


def _planes(array: npt.NDArray[Any]) -> bytes:
    """Return the bytes of an array in another order, which gzip compresses better.

    First comes the lowest byte of each number, then the second byte of each number, and so on.
    """
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
