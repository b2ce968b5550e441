"""GGUF files, which llama.cpp and what is built on it read: writing them.

    notes = write_gguf("model.gguf", model, tokenizer, dtype="q8_0")   # what a reader of the file should know

Names, keys and the quantisation are those of the `gguf` package, llama.cpp's own; it is an optional one and
imported late. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here reads GGUF.

For single characters llama.cpp has no tokenizer. The vocabulary is written as one of its "t5" kind, which
looks for the most probable pieces of a text: of pieces with one character each there is one way only, so that
the ids are ours, except that several unknown characters in a row become a single <unk> there.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.gpt2.state_dict import WEIGHTS as GPT2_WEIGHTS
from minigpt.families.registry import LanguageModel, naming_of
from minigpt.model import GPTLMHeadModel
from minigpt.storage.files import atomic_open
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.bpe_files import KINDS
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["DTYPES", "gelu_difference", "write_gguf"]

DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # here -> LlamaFileType

# Hugging Face's GPT-2 keeps these (in, out), llama.cpp (out, in), as torch's Linear.
_TRANSPOSED = {row.theirs for row in GPT2_WEIGHTS if row.transposed}
_SPACE = "\u2581"  # how "t5" writes a space
_FLOAT16_MAX = 65504.0


def write_gguf(
    path: str | Path, model: LanguageModel, tokenizer: AnyTokenizer, dtype: str = "f16", name: str = ""
) -> list[str]:
    """Write a model and its tokenizer as one GGUF file.

    Args:
        dtype: of the matrices: "f32", "f16", or "q8_0", which is 8 bits and a scale for each 32 values of a
            row (rows of another length become f16). Vectors and position embeddings stay f32, as llama.cpp
            expects.
        name: the model's, for people.

    Returns: sentences about what a program that reads the file does otherwise than minigpt.

    Raises:
        InputError: if the gguf package is missing, the tokenizer is none that llama.cpp knows, a value is too
            large for float16, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    gguf = _package()
    values = naming_of(model.config).config_to_hugging_face(
        model.config, eos_token_id=None, pad_token_id=None
    )
    weights = naming_of(model.config).to_hugging_face(model)
    plan = list(_plan(gguf, values, weights, dtype))
    with atomic_open(path) as file:
        # it opens by name: the temporary file, which takes the goal's place afterwards
        writer = gguf.GGUFWriter(file.name, values["model_type"])
        try:
            writer.add_type("model")
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_sizes(writer, values)
            if isinstance(tokenizer, Tokenizer):
                notes = _add_characters(gguf, writer, tokenizer)
            else:
                notes = _add_bpe(gguf, writer, tokenizer, model.config.vocab_size)
            for target, source, kind in plan:
                shape = weights[source].shape[:: -1 if _is_transposed(source) else 1]
                _announce(gguf, writer, target, tuple(shape), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, source, kind in plan:  # one tensor at a time
                tensor = weights.pop(source)
                tensor = tensor.t() if _is_transposed(source) else tensor
                writer.write_tensor_data(_encoded(gguf, np.ascontiguousarray(tensor.numpy()), kind))
        finally:
            writer.close()
    return _notes_on_gelu(model) + notes


def gelu_difference(model: GPTLMHeadModel, tokens: int = 64) -> tuple[float, float]:
    """What GELU's tanh form changes in a model with the exact one, on random tokens.

    Returns: the largest difference between logits, and the share of positions whose likeliest token changes.
    """
    length = min(tokens, model.config.block_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)  # (1, T)
    ids = ids.to(model.lm_head.weight.device)
    before = [block.mlp.approximate for block in model.blocks]
    with torch.no_grad():
        logits = []
        for form in ("none", "tanh"):
            for block in model.blocks:
                block.mlp.approximate = form
            logits.append(model(ids)[0].float())  # (T, V)
    for block, form in zip(model.blocks, before):
        block.mlp.approximate = form
    exact, approximate = logits
    changed = (exact.argmax(-1) != approximate.argmax(-1)).float().mean()
    return float((exact - approximate).abs().max()), float(changed)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the gguf package: pip install 'minigpt[gguf]'") from None
    return gguf


def _notes_on_gelu(model: LanguageModel) -> list[str]:
    if not isinstance(model, GPTLMHeadModel) or model.config.gelu == "tanh":
        return []
    largest, share = gelu_difference(model)
    return [
        "this model was trained with the exact GELU, llama.cpp computes GPT-2 with its tanh form: on random "
        f"tokens logits differ by up to {largest:.2g}, and {share:.1%} of the likeliest tokens change"
    ]


# -- weights -----------------------------------------------------------------------------------------------


def _is_transposed(name: str) -> bool:
    return re.sub(r"\.\d+\.", ".*.", name) in _TRANSPOSED


def _plan(
    gguf: Any, values: dict[str, Any], weights: dict[str, Tensor], dtype: str
) -> Iterator[tuple[str, str, Any]]:
    """For each tensor its name there, its name here, and the type it is stored in."""
    kinds = gguf.GGMLQuantizationType
    architecture = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}[values["model_type"]]
    blocks = values.get("num_hidden_layers", values.get("n_layer"))
    table = gguf.get_tensor_name_map(architecture, blocks)
    for source, tensor in weights.items():
        target = table.get_name(source, try_suffixes=(".weight", ".bias"))
        assert target is not None, f"llama.cpp's table has no {source}"
        row = tensor.shape[0 if _is_transposed(source) else -1]
        if dtype == "f32" or tensor.ndim == 1 or target.startswith("position_embd"):
            kind = kinds.F32
        else:
            kind = kinds.Q8_0 if dtype == "q8_0" and row % 32 == 0 else kinds.F16
        if kind == kinds.F16 and float(tensor.abs().max()) > _FLOAT16_MAX:
            raise InputError(f"{source} holds values too large for float16: convert with --dtype f32")
        yield target, source, kind


def _announce(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    if kind == gguf.GGMLQuantizationType.Q8_0:
        shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
        return
    stored = np.dtype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32)
    writer.add_tensor_info(name, shape, stored, int(np.prod(shape)) * stored.itemsize)


def _encoded(gguf: Any, array: npt.NDArray[np.float32], kind: Any) -> npt.NDArray[Any]:
    encoded: npt.NDArray[Any] = gguf.quants.quantize(array, kind)
    return encoded


def _add_sizes(writer: Any, values: dict[str, Any]) -> None:
    """The hyper-parameters, from the keys of a config.json."""
    if values["model_type"] == "gpt2":
        writer.add_block_count(values["n_layer"])
        writer.add_context_length(values["n_positions"])
        writer.add_embedding_length(values["n_embd"])
        writer.add_feed_forward_length(4 * values["n_embd"])
        writer.add_head_count(values["n_head"])
        writer.add_layer_norm_eps(values["layer_norm_epsilon"])
        return
    rows: list[tuple[Callable[[Any], None], str]] = [
        (writer.add_block_count, "num_hidden_layers"),
        (writer.add_context_length, "max_position_embeddings"),
        (writer.add_embedding_length, "hidden_size"),
        (writer.add_feed_forward_length, "intermediate_size"),
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_key_length, "head_dim"),
        (writer.add_value_length, "head_dim"),
        (writer.add_layer_norm_rms_eps, "rms_norm_eps"),
    ]
    for add, key in rows:
        add(values[key])
    turning = values.get("rope_parameters") or values  # transformers 5 keeps it one level deeper
    writer.add_rope_freq_base(turning["rope_theta"])


# -- tokenizers --------------------------------------------------------------------------------------------


def _add_characters(gguf: Any, writer: Any, tokenizer: Tokenizer) -> list[str]:
    kinds = gguf.TokenType
    special = {tokenizer.pad_token_id: kinds.CONTROL, tokenizer.sep_token_id: kinds.CONTROL}
    special[tokenizer.unk_token_id] = kinds.UNKNOWN
    tokens, types = [], []
    for index, word in enumerate(tokenizer.id2word):
        # U+2581 itself gets a text that nobody types: it would be taken for the space
        tokens.append({" ": _SPACE, _SPACE: "<U+2581>"}.get(word, word))
        types.append(kinds.UNUSED if word == _SPACE else special.get(index, kinds.NORMAL))
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))  # the unknown token's score is lower by itself
    writer.add_token_types([int(kind) for kind in types])
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_sep_token_id(tokenizer.sep_token_id)
    writer.add_eos_token_id(tokenizer.sep_token_id)
    for switch in (
        writer.add_add_space_prefix,
        writer.add_remove_extra_whitespaces,
        writer.add_add_bos_token,
        writer.add_add_eos_token,
    ):
        switch(False)
    notes = [
        "llama.cpp has no tokenizer for single characters; its 't5' gives the same ids, but one <unk> for "
        "several unknown characters in a row",
        "a prompt there is the question with <sep> behind it, which minigpt adds by itself",
    ]
    if _SPACE in tokenizer.word2id:
        notes.append("U+2581 stands for the space there: typed, it is not read as the character that it is")
    return notes


def _add_bpe(gguf: Any, writer: Any, tokenizer: BpeTokenizer, rows: int) -> list[str]:
    kinds = gguf.TokenType
    definition = tokenizer.definition
    cut = _cut(definition.frame)
    text_of = {index: token for token, index in definition.tokens.items()}
    flags = {
        entry.get("id"): entry.get("special", True) for entry in definition.frame.get("added_tokens") or []
    }
    tokens, types = [], []
    for index in range(rows):
        # rows that no token has, by which a vocabulary is filled up to a round number
        tokens.append(text_of.get(index, f"[PAD{index}]"))
        if index not in text_of:
            types.append(kinds.UNUSED)
        elif index in flags:
            types.append(kinds.CONTROL if flags.get(index, True) else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"gpt2": "gpt-2", "qwen2": "qwen2"}[cut])
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    writer.add_token_merges([" ".join(pair) for pair in definition.merges])
    writer.add_add_bos_token(False)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_bos_token_id(tokenizer.eos_token_id)  # GPT-2's own; llama.cpp's default is no id of ours
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    if definition.frame.get("normalizer"):
        return ["llama.cpp does not compose accents (NFC) before it looks up tokens: decomposed ones differ"]
    return []


def _cut(frame: dict[str, Any]) -> str:
    """The kind of a tokenizer.json's pre-tokenizer: how it cuts text into words."""

    def expressions(step: dict[str, Any]) -> list[str]:
        parts = step.get("pretokenizers", [step])
        found = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
        return found + [
            "ByteLevel" for part in parts if part.get("use_regex", part.get("type") == "ByteLevel")
        ]

    here = expressions(frame.get("pre_tokenizer") or {})
    for kind, steps in KINDS.items():
        if expressions(steps["pre_tokenizer"]) == here:
            return kind
    raise InputError(f"the tokenizer cuts words by a rule that llama.cpp has no name for here: {here}")
