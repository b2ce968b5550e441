"""OpenAI's release is read without TensorFlow: files that TensorFlow wrote, and all ways to damage them."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from minigpt.errors import InputError
from minigpt.families.gpt2.family import FAMILY
from minigpt.families.gpt2.openai_checkpoint import NAMES, read_checkpoint
from minigpt.families.gpt2.presets import Sizes
from minigpt.families.gpt2.tensor_bundle import read_bundle
from minigpt.model import GPTLMHeadModel

FIXTURE = Path(__file__).parent / "golden" / "openai_gpt2_tiny"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", "hparams.json", INDEX, DATA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a copy that a test may damage."""
    for name in FILES:
        shutil.copy(FIXTURE / name, tmp_path)
    return tmp_path


# -- what TensorFlow wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.ckpt", "sharded.ckpt"])
def test_every_bit_is_what_tensorflow_held(prefix: str) -> None:
    expected = load_file(FIXTURE / "expected.safetensors")
    del expected["logits"]
    tensors = read_bundle(FIXTURE / prefix)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (np.dtype("<f4"), expected[name].shape)
        assert tensor.tobytes() == expected[name].tobytes(), name


def test_the_model_computes_what_tensorflow_computed() -> None:
    """The logits equal those of a GPT-2 in TensorFlow, in double precision, so names and shapes are right."""
    sizes, weights = read_checkpoint(FIXTURE)
    config = sizes.config()
    model = GPTLMHeadModel(config).double().eval()
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    state = FAMILY.from_hugging_face(tensors, config, torch.float64)
    model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    ids = json.loads((FIXTURE / "expected.json").read_text())["prompt_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].numpy()
    # logits of up to 40 from sums of fewer than 100 terms in double precision: rounding of about 1e-13
    np.testing.assert_allclose(logits, load_file(FIXTURE / "expected.safetensors")["logits"], atol=1e-11)


def test_the_table_names_what_hugging_face_names() -> None:
    assert {theirs for _, theirs in NAMES} == {weight.theirs for weight in FAMILY.weights}
    assert len(dict(NAMES)) == len(NAMES)


def test_sizes() -> None:
    sizes, weights = read_checkpoint(str(FIXTURE))
    assert sizes == Sizes(n_vocab=271, n_ctx=48, n_embd=8, n_head=2, n_layer=2)
    assert sum(array.size for array in weights.values()) == sizes.config().parameter_count()


def test_changing_an_array_changes_no_file(folder: Path) -> None:
    before = (folder / DATA).read_bytes()
    _, weights = read_checkpoint(folder)
    weights["transformer.wte.weight"][:] = 7.0
    assert (folder / DATA).read_bytes() == before


def test_a_path_of_the_machine_of_training_counts_by_its_end(folder: Path) -> None:
    (folder / "checkpoint").write_text('model_checkpoint_path: "C:\\\\gpt/run1/model.ckpt"\n')
    assert len(read_checkpoint(folder)[1]) == 28


def test_checksums_are_crc32c() -> None:
    # https://www.rfc-editor.org/rfc/rfc3720#appendix-B.4
    assert google_crc32c.value(bytes(32)) == 0x8A9136AA
    assert google_crc32c.value(b"\xff" * 32) == 0x62A8AB43
    assert google_crc32c.value(bytes(range(32))) == 0x46DD794E


# -- damage -------------------------------------------------------------------------------------------------


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert complaint(folder).startswith(f"{folder / name} is missing")
    (folder / name).mkdir()
    assert str(folder / name) in complaint(folder)


def test_a_flipped_bit_or_a_cut_of_the_index_is_noticed(folder: Path) -> None:
    """Checksums cover all rows and handles, so a flipped bit is noticed or has no effect."""
    original = (FIXTURE / INDEX).read_bytes()
    expected = {name: array.tobytes() for name, array in read_checkpoint(FIXTURE)[1].items()}
    rng = random.Random(0)
    complaints: list[str] = []
    for number in range(400):
        content = bytearray(original)
        if number % 4 == 0:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / INDEX).write_bytes(content)
        try:
            _, weights = read_checkpoint(folder)
        except InputError as error:
            complaints.append(str(error))
        else:
            assert {name: array.tobytes() for name, array in weights.items()} == expected
    assert all(text.startswith(str(folder / INDEX)) for text in complaints)
    assert (
        len(complaints) >= 390
    )  # what lies in the block of statistics, which nobody reads, may go unnoticed


def test_each_bit_of_the_data_is_covered(folder: Path) -> None:
    original = (FIXTURE / DATA).read_bytes()
    rng = random.Random(0)
    for _ in range(50):
        content = bytearray(original)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / DATA).write_bytes(content)
        assert re.search(
            rf"{re.escape(DATA)} cannot be used: model/\S+ does not match its", complaint(folder)
        )


@pytest.mark.parametrize("length", [0, 1, 17_247])
def test_data_cut_short(folder: Path, length: int) -> None:
    (folder / DATA).write_bytes((FIXTURE / DATA).read_bytes()[:length])
    assert f"but the file has {length:,}" in complaint(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    for path in FIXTURE.glob("sharded.ckpt.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "sharded.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(InputError, match=r"sharded\.ckpt\.data-00001-of-00002 is missing"):
        read_bundle(tmp_path / "sharded.ckpt")


# Damage with right checksums: a simple writer makes the index.


def number(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def field(tag: int, value: int | bytes) -> bytes:
    """Return a field of a protocol buffer: a number, or bytes with their length."""
    if isinstance(value, int):
        return number(tag << 3) + number(value % 2**64)
    return number(tag << 3 | 2) + number(len(value)) + value


def checksum(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return (((value >> 15 | value << 17) + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def block(content: bytes, kind: int = 0) -> bytes:
    content += bytes(4) + (1).to_bytes(4, "little") + bytes([kind])  # one place of a full key: at 0
    return content + checksum(content)


def row(key: bytes, value: bytes) -> bytes:
    return number(0) + number(len(key)) + number(len(value)) + key + value


def without_checksum(rows: bytes) -> bytes:
    """Return a row of a tensor without the field of its checksum, which is the last one."""
    key, value = rows[3 : 3 + rows[1]], rows[3 + rows[1] : -5]
    return row(key, value)


def with_a_cut_block() -> bytes:
    """Return an index whose only block of rows is shorter than the list of its restarts."""
    short = (9).to_bytes(4, "little") + b"\0"  # it claims nine restarts
    file = short + checksum(short)
    handles = block(row(b"!", number(0) + number(4)))
    footer = number(0) + number(4) + number(len(file)) + number(len(handles) - 5)
    return file + handles + footer.ljust(40, b"\0") + table(b"")[-8:]


def table(*contents: bytes, kind: int = 0) -> bytes:
    """Return an index file with a block of rows for each of the contents."""
    file, places = b"", b""
    for index, content in enumerate(contents):
        places += row(bytes([index + 33]), number(len(file)) + number(len(block(content)) - 5))
        file += block(content, kind)
    statistics, handles = block(b""), block(places)
    footer = number(len(file)) + number(len(statistics) - 5)
    footer += number(len(file) + len(statistics)) + number(len(handles) - 5)
    return file + statistics + handles + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


HEADER = row(b"", field(1, 1))


def entry(
    name: str,
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    offset: int = 0,
    dtype: int = 1,
    size: int | None = None,
    shape: tuple[int, ...] | None = None,
    more: bytes = b"",
) -> bytes:
    shape = array.shape if shape is None else shape
    sides = b"".join(field(2, field(1, side)) for side in shape)
    value = (
        field(1, dtype)
        + field(2, sides)
        + field(4, offset)
        + field(5, array.nbytes if size is None else size)
    )
    return row(name.encode(), value + number(6 << 3 | 5) + checksum(array.tobytes()) + more)


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(index: bytes) -> Path:
        (tmp_path / "x.index").write_bytes(index)
        (tmp_path / "x.data-00000-of-00001").write_bytes(ARRAY.tobytes())
        return tmp_path / "x"

    return write


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_what_the_simple_writer_writes_can_be_read(bundle: Callable[[bytes], Path], blocks: int) -> None:
    rows = [HEADER, entry("a", ARRAY), entry("b", ARRAY[1], offset=12)]
    tensors = read_bundle(bundle(table(*rows[: blocks - 1], b"".join(rows[blocks - 1 :]))))
    assert list(tensors) == ["a", "b"]
    np.testing.assert_array_equal(tensors["a"], ARRAY)
    np.testing.assert_array_equal(tensors["b"], ARRAY[1])


def test_a_tensor_may_start_at_any_byte(tmp_path: Path) -> None:
    (tmp_path / "x.index").write_bytes(table(HEADER + entry("a", ARRAY, offset=1)))
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"?" + ARRAY.tobytes())
    tensor = read_bundle(tmp_path / "x")["a"]
    np.testing.assert_array_equal(tensor, ARRAY)
    assert tensor.flags.aligned


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (b"", "does not end as a checkpoint's index"),
        (bytes(48), "does not end as a checkpoint's index"),
        (table(b""), "no header"),
        (table(entry("a", ARRAY)), "no header"),
        (table(HEADER, kind=1), "compressed (kind 1)"),
        (table(row(b"", field(1, 0))), "0 data files"),
        (table(row(b"", field(1, -1))), "-1 data files"),
        (table(row(b"", field(1, 1) + field(2, 1))), "big-endian"),
        (table(HEADER + entry("b", ARRAY) + entry("a", ARRAY)), "not in order"),
        (table(HEADER + entry("a", ARRAY) * 2), "not in order"),
        (table(HEADER + row(b"\xff", b"")), "not UTF-8"),
        (table(HEADER + row(b"a", b"")), "a: its numbers are of TensorFlow's type 0"),
        (table(HEADER + entry("a", ARRAY, dtype=2)), "a: its numbers are of TensorFlow's type 2"),
        (table(HEADER + entry("a", ARRAY, offset=4)), "should be at bytes 4 to 28, but the file has 24"),
        (table(HEADER + entry("a", ARRAY, offset=2**62)), "but the file has 24"),
        (table(HEADER + entry("a", ARRAY, offset=-4)), "impossible place"),
        (table(HEADER + entry("a", ARRAY, more=field(3, 1))), "impossible place or shape: data file 1"),
        (table(HEADER + entry("a", ARRAY, shape=(-2, -3))), "impossible place or shape"),
        (table(HEADER + entry("a", ARRAY, shape=(1,) * 9)), "impossible place or shape"),
        (table(HEADER + entry("a", ARRAY, size=20)), "20 bytes are not those of float32 (2, 3)"),
        (table(HEADER + entry("a", ARRAY, shape=(2**62, 2**62))), "24 bytes are not those of"),
        (table(HEADER + entry("a", ARRAY, shape=(2**62, 0), size=0)), "0 bytes are not those of"),
        (table(HEADER + entry("a", ARRAY, more=field(7, b""))), "slices"),
        (table(HEADER + entry("a", ARRAY, more=field(9, b""))), "unknown field (9"),
        (table(HEADER + entry("a", ARRAY, more=b"\x0b")), "unknown kind (3)"),
        (table(HEADER + entry("a", ARRAY, more=b"\x35\0\0")), "ends inside a value"),
        (table(HEADER + entry("a", ARRAY, more=b"\x28\xff")), "ends inside a number"),
        (table(HEADER + entry("a", ARRAY, more=b"\x28" + b"\xff" * 10)), "more than 64 bits"),
        (table(HEADER + entry("a", ARRAY, more=b"\x28" + b"\xff" * 9 + b"\x02")), "more than 64 bits"),
        (table(HEADER + b"\0\x05\0a"), "leads out of its block"),
        (table(b"\x01\0\0"), "leads out of its block"),
        (table(HEADER + b"\x80"), "leads out of its block"),
        (table(HEADER)[:-48] + b"\xff" * 40 + table(b"")[-8:], "more than 64 bits"),
        (
            table(HEADER)[:-48] + (number(0) * 2 + number(2**40) * 2).ljust(40, b"\0") + table(b"")[-8:],
            "beyond",
        ),
        (table(HEADER)[:-9] + b"x" + table(b"")[-8:], "last 48 bytes"),
        (table(HEADER + without_checksum(entry("a", ARRAY))), "a: it has no checksum"),
        (with_a_cut_block(), "a block is too short"),
    ],
)
def test_damage_that_no_checksum_tells(bundle: Callable[[bytes], Path], index: bytes, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)) as caught:
        read_bundle(bundle(index))
    assert "x.index cannot be used" in str(caught.value) or "x.data-00000-of-00001" in str(caught.value)


def test_random_rows_with_right_checksums_never_crash(bundle: Callable[[bytes], Path]) -> None:
    """The checksums are corrected after each damage, so the parser itself must be robust."""
    rng = random.Random(0)
    original = HEADER + entry("a", ARRAY) + entry("b", ARRAY[1], offset=12)
    refused = 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            tensors = read_bundle(bundle(table(bytes(content))))
        except InputError:
            refused += 1
        else:  # another name, or a checksum that fits by chance: never beyond the file
            assert all(4 * math.prod(tensor.shape) <= ARRAY.nbytes for tensor in tensors.values())
    assert refused > 200


# -- files that do not belong together ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_layer": 3}, "missing: model/h2/ln_1/g, "),
        ({"n_layer": 1}, "unexpected: model/h1/attn/c_attn/b, "),
        ({"n_layer": 10**18}, "n_layer=1000000000000000000, but"),
        ({"n_embd": 4}, "unfit: model/wte is (271, 8), not (271, 4)"),
        ({"n_vocab": 270}, "unfit: model/wte is (271, 8), not (270, 8)"),
        ({"n_ctx": 49}, "unfit: model/wpe is (48, 8), not (49, 8)"),
        ({"n_head": 3}, "n_head must divide n_embd: got 3 and 8"),
        ({"n_head": 0}, "n_head must be a whole number of at least 1: got n_head=0"),
        ({"n_embd": -8}, "n_embd must be a whole number of at least 1: got n_embd=-8"),
        ({"n_ctx": 48.0}, "n_ctx must be a whole number of at least 1: got n_ctx=48.0"),
        ({"n_vocab": None}, "n_vocab must be a whole number of at least 1: got n_vocab=None"),
        ({"n_layer": True}, "n_layer must be a whole number of at least 1: got n_layer=True"),
        ({"n_inner": 32}, "must have the keys n_ctx, n_embd, n_head, n_layer, n_vocab"),
    ],
)
def test_sizes_that_do_not_fit(folder: Path, changes: dict[str, object], text: str) -> None:
    sizes = json.loads((folder / "hparams.json").read_text())
    (folder / "hparams.json").write_text(json.dumps(sizes | changes))
    found = complaint(folder)
    assert text in found
    assert "hparams.json" in found


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3", b"{}", b"[" * 100_000])
def test_no_sizes(folder: Path, content: bytes) -> None:
    (folder / "hparams.json").write_bytes(content)
    assert complaint(folder).startswith(str(folder / "hparams.json"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b'model_checkpoint_path: ""',
        b'model_checkpoint_path: ".."',
        b'x: "model.ckpt"',
        b'a: "\0"',
    ],
)
def test_no_name(folder: Path, content: bytes) -> None:
    (folder / "checkpoint").write_bytes(content)
    assert complaint(folder).startswith(f"{folder / 'checkpoint'} is damaged")


def test_a_checkpoint_of_another_name(folder: Path) -> None:
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    assert complaint(folder).startswith(f"{folder / 'model-7.index'} is missing")
