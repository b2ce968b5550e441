"""Writes GGUF files, for llama.cpp and programs that use it.

    notes = write_gguf("model.gguf", model, tokenizer, dtype="q8_0")   # notes: how llama.cpp's results differ

The names of tensors, the keys of settings and the quantisation come from llama.cpp's Python package `gguf`,
which is optional and imported only here. minigpt writes GGUF but does not read it. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

llama.cpp has no tokenizer for single characters. So a character vocabulary is written as a "t5" (unigram)
vocabulary. Each token of this vocabulary is one character, so a text can be cut in only one way, and
llama.cpp finds the same ids as minigpt. There is one difference: llama.cpp turns several unknown characters
in a row into a single <unk>.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, family_of
from minigpt.storage.files import atomic_open
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenization.bpe_files import KINDS, byte_level_of
from minigpt.tokenizer import Tokenizer
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["DTYPES", "write_gguf"]

# minigpt's name of a type -> the type's name in gguf.LlamaFileType
DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}

_SPACE = "\u2581"  # stands for a space in llama.cpp's "t5" vocabularies
_FLOAT16_MAX = 65504.0


def write_gguf(
    path: str | Path, model: LanguageModel, tokenizer: AnyTokenizer, dtype: str = "f16", name: str = ""
) -> list[str]:
    """Write a model and its tokenizer as one GGUF file.

    Args:
        path: the file to write.
        model: the model, not quantised.
        tokenizer: its tokenizer.
        dtype: type of the matrices: "f32", "f16" or "q8_0". q8_0 has 8 bits per weight and a scale for each
            32 weights of a row. A matrix whose row length is not a multiple of 32 becomes f16. Vectors and
            position embeddings are always f32, as llama.cpp expects.
        name: a name of the model, which llama.cpp shows.

    Returns: sentences that say where llama.cpp's results differ from minigpt's.

    Raises:
        InputError: if the gguf package is missing, llama.cpp does not support the tokenizer, a value is too
            large for float16, or the file cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    gguf = _package()
    family = family_of(model.config)
    # llama.cpp stores matrices as (out, in), like torch's Linear; some of Hugging Face's are (in, out)
    transposed = {row.theirs for row in family.rows(model.config) if row.transposed}
    weights = {
        name: tensor.t() if name in transposed else tensor
        for name, tensor in family.to_hugging_face(model).items()
    }
    plan = list(_plan(gguf, model, weights, dtype))
    with atomic_open(path) as file:
        # GGUFWriter opens the file itself, so it gets the name of the temporary file
        writer = gguf.GGUFWriter(file.name, family.model_type)
        try:
            writer.add_type("model")
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in family.gguf_values(model.config).items():
                getattr(writer, f"add_{key}")(value)
            if isinstance(tokenizer, Tokenizer):
                notes = _add_characters(gguf, writer, tokenizer)
            elif not isinstance(tokenizer, BpeTokenizer):
                raise InputError(
                    "a WordPiece tokenizer cannot be written: llama.cpp prepares text in another way"
                )
            else:
                notes = _add_bpe(gguf, writer, tokenizer, model.config.vocab_size)
            for target, source, kind in plan:
                _announce(gguf, writer, target, tuple(weights[source].shape), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, source, kind in plan:  # convert and write one tensor at a time, to save memory
                array = np.ascontiguousarray(weights.pop(source).numpy())
                writer.write_tensor_data(gguf.quants.quantize(array, kind))
        finally:
            writer.close()
    return family.gguf_notes(model) + notes


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("GGUF files need the gguf package: pip install 'minigpt[gguf]'") from None
    return gguf


# -- weights -----------------------------------------------------------------------------------------------


def _plan(
    gguf: Any, model: LanguageModel, weights: dict[str, Tensor], dtype: str
) -> Iterator[tuple[str, str, Any]]:
    """Yield for each tensor (llama.cpp's name, Hugging Face's name, the tensor's type in the file)."""
    kinds = gguf.GGMLQuantizationType
    architectures = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[family_of(model.config).model_type]
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for source, tensor in weights.items():
        target = table.get_name(source, try_suffixes=(".weight", ".bias"))
        assert target is not None, f"llama.cpp's table has no {source}"
        if dtype == "f32" or tensor.ndim == 1 or target.startswith("position_embd"):
            kind = kinds.F32
        else:
            kind = kinds.Q8_0 if dtype == "q8_0" and tensor.shape[-1] % 32 == 0 else kinds.F16
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


# -- tokenizers --------------------------------------------------------------------------------------------


def _add_characters(gguf: Any, writer: Any, tokenizer: Tokenizer) -> list[str]:
    kinds = gguf.TokenType
    special = {tokenizer.pad_token_id: kinds.CONTROL, tokenizer.sep_token_id: kinds.CONTROL}
    special[tokenizer.unk_token_id] = kinds.UNKNOWN
    tokens, types = [], []
    for index, word in enumerate(tokenizer.id2word):
        # the character U+2581 itself is replaced, because llama.cpp would read it as a space
        tokens.append({" ": _SPACE, _SPACE: "<U+2581>"}.get(word, word))
        types.append(kinds.UNUSED if word == _SPACE else special.get(index, kinds.NORMAL))
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    # A "t5" vocabulary has a score for each token. minigpt has no scores, so all are 0. llama.cpp itself
    # gives <unk> a lower score.
    writer.add_token_scores([0.0] * len(tokens))
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
        # the embedding may have more rows than the tokenizer has tokens; each row needs a token in the file
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
    before, after = tokenizer.before_text, tokenizer.after_text
    notes = []
    if len(before) > 1 or len(after) > 1:
        notes.append("the tokenizer puts several tokens before or behind a text, llama.cpp puts at most one")
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id if not before else before[0]
    if bos is None:
        bos = eos  # as in GPT-2; without a value, llama.cpp takes an id that this vocabulary may not have
    if after and eos not in (None, after[0]):
        notes.append("llama.cpp puts the end token behind a text, the tokenizer another token")
    elif after:
        eos = after[0]
    for add, number in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, eos),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None and number < rows:
            add(number)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    match definition.frame.get("normalizer"):
        case None:
            pass
        case {"type": "NFC"}:
            notes.append(
                "llama.cpp does not compose accents (NFC) before it looks up tokens: decomposed ones differ"
            )
        case other:
            raise InputError(f"llama.cpp has no equivalent of the tokenizer's normalizer: {other}")
    if byte_level_of(definition.frame["pre_tokenizer"]).get("add_prefix_space"):
        notes.append("llama.cpp puts no space before a text: write it yourself (add_prefix_space)")
    return notes


def _cut(frame: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer.json splits text: "gpt2" or "qwen2"."""

    def expressions(step: dict[str, Any]) -> list[str]:
        parts = step.get("pretokenizers", [step])
        found = []
        for part in parts:
            if part.get("type") == "Split":
                found.append(part["pattern"].get("Regex", ""))
            elif part.get("type") != "ByteLevel" or part.get("use_regex", True):
                found.append(str(part.get("type")))
        return found

    here = expressions(frame.get("pre_tokenizer") or {})
    for kind, steps in KINDS.items():
        if expressions(steps["pre_tokenizer"]) == here:
            return kind
    raise InputError(f"the tokenizer cuts words by a rule that llama.cpp has no name for here: {here}")
