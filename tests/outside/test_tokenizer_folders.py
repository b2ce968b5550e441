"""Tokenizer folders of `transformers` and `tokenizers` give the same ids and texts here, or a refusal.

Each folder is made by these libraries or written by hand, and read by AutoTokenizer and by load_tokenizer.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from minigpt.errors import InputError
from minigpt.generation.sequence import IncrementalDetokenizer
from minigpt.tokenization.chat_template import encode_chat, encode_chat_with_mask
from minigpt.tokenization.subword import SubwordTokenizer
from minigpt.weights.pretrained import load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers, the oracle here, is not installed")

STRINGS = 200  # texts for each folder; 2,000 takes ten times as long
TEXTS = [
    "the cat sat on the mat and the dog ran to the sea, said the old man: it's 1984 isn't it?",
    "你好，世界！四川的省会是成都。今天天气很好，我们去公园。",
] * 4
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PIECES = [
    *(
        "the",
        "cat",
        " sat",
        "新词",
        "foobar",
        "你好",
        "世界！",
        "，",
        "é",
        "e\u0301",
        "Ａ",
        "ÀB",
        "😀",
        "Don't",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\u3000",
        "\u00a0",
        "12",
        "3456",
        "n't",
        "##a",
        "<",
        "|>",
        "\x00",
        "\u200b",
        "ﬁ",
    ),
    *(
        END,
        STOP,
        "<s>",
        "</s>",
        "<pad>",
        "<think>",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "<x>",
        "Z",
        "!!",
        "zq",
    ),
]


def strings(count: int) -> list[str]:
    draw = random.Random(7)
    return ["", "the cat", *("".join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(count - 2))]


# -- tokenizers as people train them -----------------------------------------------------------------------


def bpe(
    *,
    whole_alphabet: bool = True,
    size: int = 400,
    special: tuple[str, ...] = (END, START, STOP),
    **model: Any,
) -> Any:
    library = Library(models.BPE(**model))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole_alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    return library


def wordpiece(size: int = 120) -> Any:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    return library


BPE, FEW = bpe(), bpe(whole_alphabet=False)
UNKNOWN = bpe(whole_alphabet=False, special=("<unk>", END), unk_token="<unk>")
VOCABULARY = sorted(wordpiece().get_vocab().items(), key=lambda item: item[1])


def fast(library: Any, folder: Path, **more: Any) -> Any:
    """Save a tokenizer as PreTrainedTokenizerFast."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **more)
    tokenizer.save_pretrained(folder)
    return tokenizer


def changed(library: Any, **steps: Any) -> Any:
    copy = Library.from_str(library.to_str())
    for name, step in steps.items():
        setattr(copy, name, step)
    return copy


def edited(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
    change(content)
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def two_files(folder: Path, model_type: str = "gpt2", library: Any = BPE, **config: Any) -> None:
    """Write vocab.json and merges.txt, like the published GPT-2 and Qwen."""
    model = json.loads(library.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bert(folder: Path, tokens: list[str] | None = None, **config: Any) -> None:
    """Write vocab.txt, like the published Chinese GPT-2 models."""
    lines = [token for token, _ in VOCABULARY] if tokens is None else tokens
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def bos(pattern: str = f"{END} $A", library: Any = BPE) -> Any:
    known = [(token, library.token_to_id(token)) for token in (END, STOP)]
    template = processors.TemplateProcessing(single=pattern, pair=f"{pattern} $B", special_tokens=known)
    return changed(library, post_processor=template)


def words_added(folder: Path) -> None:
    tokenizer = fast(BPE, folder, eos_token=STOP)
    tokenizer.add_tokens(
        ["新词", "foobar", AddedToken("zq", single_word=True), AddedToken("12", lstrip=True)]
    )
    tokenizer.save_pretrained(folder)


def words_added_to_few(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["新词"])
    tokenizer.save_pretrained(folder)


def stripping(folder: Path) -> None:
    tokenizer = fast(BPE, folder)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<x>", lstrip=True), "pad_token": "<pad>"})
    tokenizer.add_tokens(
        [AddedToken("<s>", rstrip=True, special=True), AddedToken("</s>", single_word=True, special=True)]
    )
    tokenizer.save_pretrained(folder)


def gap(folder: Path) -> None:
    fast(BPE, folder)
    edited(folder, "tokenizer.json", lambda file: file["model"]["vocab"].pop("Z"))


def foreign_entries(folder: Path) -> None:
    fast(BPE, folder)
    more = {"中国": 400, "a b": 402, "": 403}
    edited(folder, "tokenizer.json", lambda file: file["model"]["vocab"].update(more))


def old_style(folder: Path) -> None:
    """Write special_tokens_map.json and added_tokens.json, as transformers did before 4.34."""
    two_files(folder, "qwen3", tokenizer_class="Qwen2Tokenizer", eos_token=None)
    size = BPE.get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": size, "foobar": size + 1}))
    special = {"eos_token": {"content": STOP, "lstrip": False}, "pad_token": "<think>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def digits() -> Any:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return changed(BPE, pre_tokenizer=pre_tokenizers.Sequence(steps))


Make = Callable[[Path], object]


def steps(*makes: Make) -> Make:
    """Return a function that applies these functions one after another."""
    return lambda folder: [make(folder) for make in makes]


def saved(library: Any, **more: Any) -> Make:
    return lambda folder: fast(library, folder, **more)


def config(**values: Any) -> Make:
    """Return a function that changes tokenizer_config.json."""
    return lambda folder: edited(folder, "tokenizer_config.json", lambda content: content.update(values))


def whole(step: str, key: str, value: object) -> Make:
    """Change one key of one step in tokenizer.json."""
    return lambda folder: edited(folder, "tokenizer.json", lambda all: all[step].update({key: value}))


def published(model_type: str = "gpt2", **more: Any) -> Make:
    return lambda folder: two_files(folder, model_type, **more)


def berts(tokens: list[str] | None = None, **more: Any) -> Make:
    return lambda folder: bert(folder, tokens, **more)


def resaved(folder: Path) -> None:
    """Let transformers read vocab.txt and save it as tokenizer.json."""
    bert(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.txt").unlink()


def roles_with_flags(folder: Path) -> None:
    two_files(folder)
    flags = {"content": "<x>", "lstrip": True, "rstrip": False, "normalized": False}
    special = {"mask_token": flags, "additional_special_tokens": ["<s>", STOP]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def gpt2_class(folder: Path) -> None:
    model = json.loads(BPE.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    transformers.GPT2Tokenizer(
        vocab=model["vocab"], merges=merges, add_prefix_space=True, pad_token="<pad>"
    ).save_pretrained(folder)


def id_with_a_gap(folder: Path) -> None:
    fast(BPE, folder)
    more = {**AT_THE_END, "id": 900, "content": "<s>"}
    edited(folder, "tokenizer.json", lambda content: content["added_tokens"].append(more))


AT_THE_END = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
PREFIXED = changed(BPE, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
NORMALISED = changed(BPE, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
SPLIT = changed(
    BPE,
    pre_tokenizer=pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
)
FUSED = bpe(whole_alphabet=False, special=("<unk>", END), unk_token="<unk>", fuse_unk=True)
CLS = changed(
    wordpiece(),
    post_processor=processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)]),
    decoder=decoders.WordPiece(cleanup=False),
)
WORDS = changed(
    Library(models.WordLevel({"<pad>": 0, "<unk>": 1, "<sep>": 2, "a": 3}, "<unk>")),
    pre_tokenizer=pre_tokenizers.Whitespace(),
)
NEW_ROLES = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
FEW_LINES = ["你", "好", "[UNK]", "cat", "the", "##t", "a"]
ODD_LINES = [*(token for token, _ in VOCABULARY), "ſ", "the", "", "zq\u3000"]

AS_IT_IS, WITH_CLS = saved(wordpiece(), unk_token="[UNK]"), saved(CLS, unk_token="[UNK]")

SAME: dict[str, Make] = {
    "bpe": saved(BPE, eos_token=STOP),
    "bpe-bos": saved(bos(), bos_token=END, eos_token=STOP),
    "bpe-bos-eos": saved(bos(f"{END} $A {STOP}"), bos_token=END, eos_token=STOP),
    "bpe-eos-twice": saved(bos(f"$A {STOP} {STOP}")),
    "bpe-roberta": saved(changed(BPE, post_processor=processors.RobertaProcessing((STOP, 2), (END, 0)))),
    "bpe-bert-processing": saved(changed(BPE, post_processor=processors.BertProcessing((STOP, 2), (END, 0)))),
    "bpe-processors": saved(
        changed(BPE, post_processor=processors.Sequence([processors.ByteLevel(), bos().post_processor]))
    ),
    "bpe-words": words_added,
    "bpe-words-bytes-lacking": steps(saved(FEW), words_added_to_few),
    "bpe-stripping": stripping,
    "bpe-few-bytes": saved(FEW, eos_token=END),
    "bpe-unknown": saved(UNKNOWN, unk_token="<unk>", eos_token=END),
    "bpe-unknown-fused": saved(FUSED, unk_token="<unk>"),
    "bpe-gap": gap,
    "bpe-foreign-entries": foreign_entries,
    "bpe-prefix-space": saved(PREFIXED),
    "bpe-prefix-space-in-config": saved(BPE, add_prefix_space=True),
    "bpe-digits": saved(digits()),
    "bpe-lowercase": saved(NORMALISED),
    "bpe-split": saved(SPLIT),
    "bpe-pad-is-a-symbol": saved(BPE, pad_token="!", eos_token="Z"),
    "bpe-pad-is-made-by-merges": saved(BPE, pad_token="the"),
    "bpe-eos-is-a-line-end": saved(BPE, eos_token="\n"),
    "bpe-roles-of-new-tokens": saved(BPE, additional_special_tokens=["<x>"], **NEW_ROLES),
    "gpt2-two-files": published(),
    "gpt2-two-files-bos": published(add_bos_token=True),
    "gpt2-two-files-bos-eos": published(
        add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token=STOP
    ),
    "gpt2-two-files-prefix-space": published(add_prefix_space=True),
    "gpt2-two-files-without-its-end": published(library=bpe(special=("<s>",))),
    "gpt2-class": gpt2_class,
    "gpt2-class-bos-in-config-only": steps(
        saved(BPE), config(tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    ),
    "gpt2-class-with-template": steps(saved(bos()), config(tokenizer_class="GPT2TokenizerFast")),
    "qwen-two-files": published("qwen3"),
    "qwen-two-files-eos": published("qwen3", eos_token=STOP, add_eos_token=True),
    "qwen-old-style": old_style,
    "roberta-two-files": roles_with_flags,
    "roles-and-a-list-that-is-none": steps(
        roles_with_flags,
        lambda folder: edited(
            folder, "special_tokens_map.json", lambda content: content.update(added_tokens_decoder=1.5)
        ),
    ),
    "bert": bert,
    "bert-cased": berts(do_lower_case=False),
    "bert-accents-kept": berts(strip_accents=False),
    "bert-chinese-together": berts(tokenize_chinese_chars=False),
    "bert-cleaned": berts(clean_up_tokenization_spaces=True),
    "bert-saved": resaved,
    "bert-saved-cased-in-config": steps(resaved, config(do_lower_case=False)),
    "bert-few-special": berts(FEW_LINES),
    "bert-odd-lines": berts(ODD_LINES, mask_token=None),
    "bert-other-names": berts(
        ["<unk>", "<s>", "</s>", "你", "好", "the"], unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    ),
    "wordpiece-as-it-is": AS_IT_IS,
    "wordpiece-template": WITH_CLS,
}

REFUSED: dict[str, tuple[Make, str]] = {
    "class-against-file": (
        steps(saved(digits()), config(tokenizer_class="GPT2TokenizerFast")),
        r"tokenizer.json: its pre_tokenizer is not GPT2Tokenizer's",
    ),
    "unigram": (saved(Library(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))), "its model is 'Unigram'"),
    "metaspace": (
        saved(changed(BPE, pre_tokenizer=pre_tokenizers.Metaspace())),
        "its pre_tokenizer does not end in ByteLevel",
    ),
    "words": (saved(WORDS), "tokenizer.json: its pre_tokenizer is not that of a character vocabulary"),
    "decoder-that-strips": (
        saved(changed(BPE, decoder=decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]))),
        "its decoder changes the text after ByteLevel",
    ),
    "decoder-of-another-kind": (
        saved(changed(BPE, decoder=decoders.Metaspace())),
        "its decoder changes the text after ByteLevel",
    ),
    "no-decoder": (saved(changed(BPE, decoder=None)), "has no decoder, so transformers prints"),
    "dropout": (saved(bpe(dropout=0.5)), "dropout is 0.5"),
    "id-with-a-gap": (id_with_a_gap, "'<s>' has id 900, but 361 is the next one"),
    "vocab-txt-without-a-class": (
        steps(bert, config(), lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}')),
        r"tokenizer_config.json: no tokenizer_class says how vocab.txt is read",
    ),
    "wordpiece-without-a-vocabulary": (
        steps(AS_IT_IS, whole("model", "vocab", None)),
        "tokenizer.json has no `model` with a `vocab`",
    ),
    "wordpiece-with-another-decoder": (
        steps(AS_IT_IS, whole("decoder", "type", "Metaspace")),
        "its decoder is not BERT's, 'WordPiece' with the prefix '##': got {'type': 'Metaspace'",
    ),
    "wordpiece-with-another-prefix": (
        steps(AS_IT_IS, whole("model", "continuing_subword_prefix", "@@")),
        "its model has no prefix '##', or an unk_token that its vocabulary lacks",
    ),
    "wordpiece-whose-unknown-is-a-list": (
        steps(AS_IT_IS, whole("model", "unk_token", ["[UNK]"])),
        "its model has no prefix '##', or an unk_token that its vocabulary lacks",
    ),
    "template-whose-tokens-are-a-number": (
        steps(WITH_CLS, whole("post_processor", "special_tokens", 7)),
        "its post_processor is not understood",
    ),
    "template-whose-ids-are-a-number": (
        steps(WITH_CLS, whole("post_processor", "special_tokens", {"[CLS]": {"ids": 2}})),
        "its post_processor is not understood",
    ),
    "template-whose-token-is-a-list": (
        steps(WITH_CLS, whole("post_processor", "single", [{"SpecialToken": {"id": ["[CLS]"]}}])),
        "its post_processor is not understood",
    ),
    "added-tokens-that-are-a-list": (
        steps(AS_IT_IS, config(added_tokens_decoder=["a"])),
        "tokenizer_config.json: `added_tokens_decoder` is not an object",
    ),
    "added-tokens-that-are-texts": (
        steps(
            AS_IT_IS,
            lambda folder: edited(folder, "tokenizer.json", lambda all: all.update(added_tokens=["a"])),
        ),
        "tokenizer.json: `added_tokens` is not a list of objects",
    ),
    "special-tokens-that-are-a-number": (
        steps(AS_IT_IS, config(extra_special_tokens=7)),
        "extra_special_tokens must be a list of tokens: got 7",
    ),
    "a-role-without-a-text": (
        steps(AS_IT_IS, config(mask_token={"content": ""})),
        "tokenizer_config.json: mask_token must be a token's text: got ''",
    ),
    "an-id-that-is-no-number": (
        steps(AS_IT_IS, config(added_tokens_decoder={"two": {"content": "[CLS]"}})),
        r"the id of '\[CLS\]' is 'two', not a whole number",
    ),
    "an-id-against-the-file": (
        steps(AS_IT_IS, config(added_tokens_decoder={"7": {"content": "[CLS]"}})),
        r"'\[CLS\]' has id 7, in tokenizer.json 2",
    ),
    "merges-that-are-ignored": (
        steps(saved(BPE), config(tokenizer_class="GPT2Tokenizer"), whole("model", "ignore_merges", True)),
        "ignore_merges is true, which GPT2Tokenizer",
    ),
    "template-with-the-text-twice": (saved(bos(f"{END} $A $A")), "its post_processor is not understood"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tokenizers")

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            (SAME[name] if name in SAME else REFUSED[name][0])(folder)
        return folder

    return made


def first_difference(texts: list[str], ours: list[Any], theirs: list[Any]) -> object:
    assert len(texts) == len(ours) == len(theirs)
    return next((row for row in zip(texts, ours, theirs) if row[1] != row[2]), None)


@pytest.mark.parametrize("name", SAME)
def test_ids_and_texts_are_transformers(name: str, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert isinstance(ours, SubwordTokenizer)
    texts = strings(STRINGS)
    rows = theirs(texts, return_attention_mask=False)["input_ids"]
    read = [ours.encode_text(text, allow_special=True) for text in texts]
    assert first_difference(texts, read, rows) is None
    plain = [text for text in texts if not any(token in text for token in ours.special_tokens)]
    assert len(plain) > len(texts) // 4
    assert (
        first_difference(plain, [ours.encode_text(text) for text in plain], theirs(plain)["input_ids"])
        is None
    )
    around = {*ours.before_text, *ours.after_text, theirs.unk_token_id}
    for text in texts:
        typed = set(ours.encode_text(text, add_special_tokens=False)) & ours.special_ids
        assert typed <= around, text
    assert first_difference(texts, [ours.decode(row) for row in rows], theirs.batch_decode(rows)) is None
    for role in ("eos", "pad", "sep", "bos"):
        assert getattr(ours, f"{role}_token_id") == getattr(theirs, f"{role}_token_id")


@pytest.mark.parametrize("name", SAME)
def test_what_is_saved_again_is_the_same(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    ours = load_tokenizer(folders(name))
    assert isinstance(ours, SubwordTokenizer)
    ours.save(tmp_path)
    back, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert back.fingerprint == ours.fingerprint
    texts = strings(40)
    expected = [ours.encode_text(text, allow_special=True) for text in texts]
    assert first_difference(texts, expected, theirs(texts)["input_ids"]) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused(name: str, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    with pytest.raises(InputError, match=REFUSED[name][1]) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_decoder_that_a_message_names_gives_the_texts_of_transformers(tmp_path: Path) -> None:
    fast(changed(BPE, decoder=None), tmp_path)
    spelled = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert spelled.decode(spelled("the cat").input_ids) != "the cat"  # which is why the folder is refused
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    (advice,) = re.findall(r"`(\"decoder\".*)`", str(caught.value))
    edited(tmp_path, "tokenizer.json", lambda content: content.update(json.loads(f"{{{advice}}}")))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    rows = theirs(strings(STRINGS))["input_ids"]
    assert [ours.decode(row) for row in rows] == theirs.batch_decode(rows)


@pytest.mark.parametrize("name", SAME)
def test_what_is_shown_piece_by_piece_is_the_text(name: str, folders: Callable[[str], Path]) -> None:
    ours = load_tokenizer(folders(name))
    draw = random.Random(3)
    words = ours.encode_text("don't isn't the cat , n't said: it's")
    for _ in range(20):
        ids = [draw.choice([*words, draw.randrange(ours.get_vocab_size())]) for _ in range(25)]
        text = IncrementalDetokenizer(ours.decode)
        pieces = [*map(text.push, ids), text.finish()]
        assert "".join(pieces) == ours.decode(ids)
        stopping = IncrementalDetokenizer(ours.decode, ["n't"])
        assert "".join([*map(stopping.push, ids), stopping.finish()]) == ours.decode(ids).split("n't")[0]


# -- chat templates ----------------------------------------------------------------------------------------

HEAD = "{% for m in messages %}"
SAID = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
SAID_DASHES = "{%- generation -%} {{ m.content }}<|im_end|>{%- endgeneration -%}"
TEMPLATES = {
    "chatml": HEAD + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "role": HEAD + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}",
    "tilde": HEAD + "{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}",
    "halves": "{% set a = '<|im_' %}" + HEAD + "{{ a + 'start|>' + m.content }}<|im_end|>{% endfor %}",
    "percent": HEAD + "{{ '<|%s|>%s' % (m.role, m.content) }}{% endfor %}",
    "braces": HEAD + "{{ '<|{}|>{}'.format(m.role, m.content) }}{% endfor %}",
    "text": HEAD + "<|{{ m.role }}|>{{ m.content }}{% endfor %}",
    "macro": "{% macro f(r) %}{{ '<|' ~ r ~ '|>' }}{% endmacro %}"
    + HEAD
    + "{{ f(m.role) }}{{ m.content }}{% endfor %}",
    "generation": HEAD
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + SAID
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "generation-dashes": HEAD
    + "<|im_start|>{% if m.role == 'assistant' -%}  "
    + SAID_DASHES
    + "{%- else -%}{{ m.content }}{%- endif -%}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ bos_token }}" + HEAD + "{{ m.content }}{% endfor %}",
    "filters": "{{ 3.7|round|int }}{{ [1, 2]|sum }}{{ 'a'|center(5) }}{{ '<b>x</b>'|striptags }}"
    "{{ 'a b'|urlencode }}{{ 'the cat sat'|wordwrap(5) }}{{ 1024|filesizeformat }}{{ '7'.zfill(3) }}"
    "{{ messages[0]|attr('role') is defined }}{{ {'a': 1}|xmlattr }}{{ [1]|pprint }}{{ '<'|forceescape }}"
    "{% for b in messages|batch(2) %}{{ b|length }}{% endfor %}"
    "{% for b in messages|slice(2) %}{{ b|length }}{% endfor %}",
    "helpers": "{% set c = joiner(', ') %}"
    + HEAD
    + "{{ c() }}{{ m.content }}{% endfor %}{% set k = cycler('a', 'b') %}{{ k.next() }}{{ k.current }}",
    "stripping": HEAD + "{{ m.role }}  <|strip|> \n {{ m.content }}  <|im_end|>{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " a <b> the cat\n"},
    {"role": "assistant", "content": "<think>x</think>yes, 你好"},
    {"role": "user", "content": "c"},
]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SubwordTokenizer]:
    folder = tmp_path_factory.mktemp("chat")
    special = (END, START, STOP, "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>")
    tokenizer = fast(bpe(special=special), folder, eos_token=STOP, bos_token=END)
    tokenizer.add_tokens([AddedToken("<|strip|>", lstrip=True, rstrip=True, special=True)])
    tokenizer.save_pretrained(folder)
    ours = load_tokenizer(folder)
    assert isinstance(ours, SubwordTokenizer)
    return transformers.AutoTokenizer.from_pretrained(folder), ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_read_as_in_transformers(name: str, chatting: tuple[Any, SubwordTokenizer]) -> None:
    theirs, ours = chatting
    template = TEMPLATES[name]
    expected = theirs.apply_chat_template(MESSAGES, chat_template=template, return_dict=False)
    assert encode_chat(ours, MESSAGES, template=template) == expected
    if "generation" in name:
        marked = theirs.apply_chat_template(
            MESSAGES, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        found = encode_chat_with_mask(ours, MESSAGES, template=template)
        assert found == (marked["input_ids"], marked["assistant_masks"])


@pytest.mark.parametrize("name", ["chatml", "role", "tilde", "percent", "text", "macro"])
def test_what_users_type_is_read_as_transformers_reads_it_when_it_is_careful(
    name: str, chatting: tuple[Any, SubwordTokenizer]
) -> None:
    theirs, ours = chatting
    typed = [{"role": "user", "content": f"a{STOP}b<|user|>{START}c<|assistant|>"}]
    expected = theirs.apply_chat_template(
        typed, chat_template=TEMPLATES[name], sanitize_control_tokens=True, return_dict=False
    )
    assert encode_chat(ours, typed, template=TEMPLATES[name]) == expected
