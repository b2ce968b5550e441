"""Encodes a corpus once, in parallel, into files of token ids that are memory-mapped for training.

    tokens = prepare(Path("books"), Path("output/shards"), tokenizer)
    tokens.read(1_000_000, 65)  # 65 ids from position 1,000,000 on, (65,) int64

The folder holds the shards `shard-00000.bin`, ...: ids as little-endian uint16 (uint32 if the vocabulary has
more than 65,536 entries). The documents follow each other, and each ends with the tokenizer's end-of-text id.
`shards.json`, which is written last, lists the shards and the source files with their sizes and SHA-256.

Each shard is made from its own part of the corpus, so several processes can work in parallel. Each process
needs only a few megabytes of memory. A shard is first written under a temporary name. When shard-00000.bin is
complete, shard-00000.json is written. After an interruption, complete shards are verified and kept.

This module does not form training examples: minigpt/data/windows.py decides which ids are read, and when.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minigpt.console.command_line import show
from minigpt.console.terminal import ProgressLine
from minigpt.data.corpus import END_OF_TEXT, TextOptions, decode_sources, find_sources
from minigpt.data.documents import Piece, Source, plan_pieces, read_document, read_lines
from minigpt.data.memory_mapped import MANIFEST, Tokens, read_manifest, report, write_manifest
from minigpt.data.worker_pool import run_in_processes
from minigpt.errors import InputError, printable
from minigpt.storage.files import atomic_open, atomic_write, sha256
from minigpt.storage.json_files import json_text, read_json
from minigpt.tokenizer import Tokenizer, build_vocabulary

__all__ = ["VOCABULARY", "TextTokenizer", "collect_characters", "end_of_text", "prepare"]

VOCABULARY = "vocab.json"  # file in the folder of shards: the vocabulary that --tokenizer char makes
DECODED = "decoded"  # folder of UTF-8 copies of source files, if these cannot be read in pieces
PIECE = 16 << 20  # approximate number of bytes of text per shard
CHUNK = 1 << 16  # characters that the tokenizer encodes at a time: more would need much more memory
_OURS = re.compile(r"shard-\d{5,}\.(bin|json)|\.(shard-\d{5,}\.(bin|json)|shards\.json)\.tmp-\d+")


class TextTokenizer(Protocol):
    """The tokenizer interface for encoding a corpus. Tokenizer and SubwordTokenizer implement it."""

    @property
    def fingerprint(self) -> str:
        """Return a text that is the same for equal tokenizers."""

    def get_vocab_size(self) -> int:
        """Return the number of entries of the vocabulary."""

    def encode_array(self, text: str, /) -> npt.NDArray[np.int32]:
        """Encode a text without adding special tokens."""


def end_of_text(tokenizer: TextTokenizer) -> int:
    """Return the id that ends a document: `eos_token_id`, or <sep> of the character vocabulary.

    Raises:
        InputError: if the tokenizer has neither.
    """
    for name in ("eos_token_id", "sep_token_id"):
        if (index := getattr(tokenizer, name, None)) is not None:
            return int(index)
    raise InputError("the tokenizer has no end-of-text token (eos_token) to put between documents")


@dataclass
class _Counts:
    """Counts of the texts of one shard, made while these texts are encoded."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    text_bytes: int = 0  # number of bytes in UTF-8
    unknown: dict[str, int] = field(default_factory=dict)  # unknown character -> number of occurrences
    # For each piece (a part of a file): its number of JSONL lines or Parquet rows; 0 for plain text.
    lines: list[int] = field(default_factory=list)
    # For each skipped line: (index of its piece, line in this piece, reason).
    skipped: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """A part of a corpus. One process writes it as a shard, or collects its characters."""

    number: int
    sources: list[Source]
    pieces: list[Piece]
    key: str  # a hash of everything that determines the shard


def _jobs(sources: list[Source], pieces: list[Piece], key: str) -> list[_Job]:
    """Group neighbouring pieces (parts of files) into jobs of similar size. A job makes one shard."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        size = piece.stop - piece.start
        if filled + size > PIECE * 3 // 2:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size
    jobs = []
    for number, group in enumerate(filter(None, groups)):
        # A job lists only the source files that it needs, because it is sent to another process.
        used = sorted({piece.source for piece in group})
        place = {index: i for i, index in enumerate(used)}
        own = [piece._replace(source=place[piece.source]) for piece in group]
        jobs.append(_Job(number, [sources[index] for index in used], own, key))
    return jobs


def _size(job: _Job) -> int:
    return sum(piece.stop - piece.start for piece in job.pieces)


# -- in each process ---------------------------------------------------------------------------------------


def _documents(job: _Job, counts: _Counts, tokenizer: TextTokenizer | None) -> Iterator[tuple[str, bool]]:
    """Yield (chunk of text, True if a document ends there). Also fill `counts.lines` and `counts.skipped`."""
    any_place = tokenizer is None or isinstance(tokenizer, Tokenizer)
    check = partial(_joins, tokenizer)
    for index, piece in enumerate(job.pieces):
        source = job.sources[piece.source]
        counts.lines.append(0)
        if source.kind != "text":
            for line, text in read_lines(source, piece):
                counts.lines[-1] = line
                if isinstance(text, str):
                    yield text, True
                else:
                    counts.skipped.append((index, line, str(text)))
        else:
            ends = False  # True: the last item that `read_document` yielded marks the end of a document
            for text, ends in read_document(source, piece, CHUNK, any_place=any_place, check=check):
                yield text, ends
            if piece.stop == source.size and not ends:
                yield "", True


def _joins(tokenizer: TextTokenizer | None, left: str, right: str) -> bool:
    """Return True if the ids of `left` followed by the ids of `right` are the ids of the whole text."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return True
    parts = np.concatenate([tokenizer.encode_array(left), tokenizer.encode_array(right)])
    return np.array_equal(tokenizer.encode_array(left + right), parts)


def _make(shared: tuple[Path, TextTokenizer], job: _Job) -> dict[str, Any]:
    """Write one shard, and a JSON file with its record (name, size, counts). Return the record."""
    folder, tokenizer = shared
    end, dtype = end_of_text(tokenizer), _dtype(tokenizer)
    counts, digest = _Counts(), hashlib.sha256()
    name = f"shard-{job.number:05d}"
    with atomic_open(folder / f"{name}.bin") as file:
        for text, is_end in _documents(job, counts, tokenizer):
            ids = tokenizer.encode_array(text)
            if isinstance(tokenizer, Tokenizer):
                _count_unknown(text, ids, tokenizer, counts)
            if is_end:
                ids = np.append(ids, np.int32(end))
                counts.documents += 1
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            counts.tokens += len(ids)
            counts.characters += len(text)
            counts.text_bytes += len(text.encode())
    record = {
        "name": f"{name}.bin",
        "size": counts.tokens * np.dtype(dtype).itemsize,
        "sha256": digest.hexdigest(),
        "key": job.key,
        **asdict(counts),
    }
    atomic_write(folder / f"{name}.json", json_text(record))
    return record


def _count_unknown(text: str, ids: npt.NDArray[np.int32], tokenizer: Tokenizer, counts: _Counts) -> None:
    for position in np.flatnonzero(ids == tokenizer.unk_token_id).tolist():
        character = text[position]
        counts.unknown[character] = counts.unknown.get(character, 0) + 1


def _look(shared: None, job: _Job) -> dict[str, Any]:
    """Return a dict with all characters of a job's texts as one string, under the key "characters"."""
    met = np.zeros(0x110000, dtype=np.bool_)  # met[c]: True if c occurs; six times faster than a set
    for text, _ in _documents(job, _Counts(), None):
        met[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")] = True
    return {"characters": "".join(map(chr, np.flatnonzero(met).tolist()))}


def _dtype(tokenizer: TextTokenizer) -> str:
    return "<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4"


# -- in the parent process ---------------------------------------------------------------------------------


def collect_characters(sources: list[Source], workers: int = 0) -> set[str]:
    """Return all characters of a corpus, which is read in parallel.

    Raises:
        InputError: for bytes that are not text.
    """
    jobs = _jobs(sources, plan_pieces(sources, PIECE, any_place=True), "")
    found: set[str] = set()
    sizes = [_size(job) for job in jobs]
    work = run_in_processes(_look, None, jobs, sizes, workers=workers, title="looking for characters")
    for result in work:
        found.update(result["characters"])
    return found


def prepare(
    path: Path,
    folder: Path,
    tokenizer: TextTokenizer | None,
    *,
    options: TextOptions = TextOptions(),  # noqa: B008 -- this default is frozen, so it cannot change
    workers: int = 0,
    lock: Callable[[Path], None] = lambda folder: None,
) -> Tokens:
    """Return the ids of a corpus. If the folder has no shards of this corpus, the corpus is encoded first.

    A printed line says whether existing shards were used or new shards were written.

    Args:
        path: a text file, or a folder of text files.
        folder: the folder of the shards.
        tokenizer: the tokenizer; None: make a character tokenizer, and save it as `folder`/vocab.json.
        options: options for reading the files.
        workers: number of processes; 0: one per core. The shards do not depend on this number.
        lock: a function that is called with the folder before the first write; it returns when no other
            process writes there. It is not called if the folder already has the shards of this corpus.

    Raises:
        InputError: if the corpus cannot be read or has no text, or if the shards cannot be written.
    """
    sources = find_sources(path, options)
    if tokens := _as_prepared(path, sources, options, folder, tokenizer):
        return tokens
    lock(folder)
    # Another process may have written the shards before the lock was free.
    if tokens := _as_prepared(path, sources, options, folder, tokenizer):
        return tokens
    folder.mkdir(parents=True, exist_ok=True)
    described = _described(sources)
    sources = decode_sources(sources, folder / DECODED, options)
    if tokenizer is None:
        tokenizer = Tokenizer.from_word2id(build_vocabulary(collect_characters(sources, workers)))
        tokenizer.save(folder / VOCABULARY)
    any_place = isinstance(tokenizer, Tokenizer)
    pieces = plan_pieces(sources, PIECE, any_place=any_place, check=partial(_joins, tokenizer))
    read = [asdict(options), [(s["name"], s["sha256"]) for s in described], pieces]
    key = hashlib.sha256(json.dumps([2, tokenizer.fingerprint, *read]).encode()).hexdigest()
    jobs = _jobs(sources, pieces, key)
    (folder / MANIFEST).unlink(missing_ok=True)  # the old manifest does not describe the new shards
    records = {job.number: record for job in jobs if (record := _finished(folder, job))}
    if records:
        show(f"{folder}: {len(records)} of {len(jobs)} shards were finished before, and are kept")
    _clear(folder, {name for r in records.values() for name in _names(r)})
    left = [job for job in jobs if job.number not in records]
    try:
        sizes, title = [_size(job) for job in left], f"encoding {printable(path.name)}"
        for record in run_in_processes(_make, (folder, tokenizer), left, sizes, workers=workers, title=title):
            records[int(record["name"][6:-4])] = record
    except BaseException:
        _clear(folder, {name for r in records.values() for name in _names(r)}, temporary_only=True)
        raise
    for source in sources:
        status = source.origin.stat()
        if (status.st_size, status.st_mtime_ns) != (source.origin_size, source.mtime_ns):
            raise InputError(f"{source.origin} was changed while it was read; run the command again")
    manifest = {
        **_manifest(tokenizer, [records[job.number] for job in jobs], jobs),
        "reading": asdict(options),
        "sources": described,
    }
    if not manifest["tokens"] - manifest["documents"]:
        fields = sorted({source.field for source in sources if source.kind != "text"})
        where = f" under {', '.join(fields)}; another field: --text_field NAME" if fields else ""
        raise InputError(f"{path} holds no text to learn from{where}")
    write_manifest(folder, manifest)
    for job in jobs:
        (folder / f"shard-{job.number:05d}.json").unlink()
    shutil.rmtree(folder / DECODED, ignore_errors=True)
    tokens = Tokens(folder, manifest)
    show(f"{path}: {tokens.sentence}; prepared in {folder}")
    report(manifest, path)
    return tokens


def _as_prepared(
    path: Path, sources: list[Source], options: TextOptions, folder: Path, tokenizer: TextTokenizer | None
) -> Tokens | None:
    """Return the ids in existing shards if corpus, options and tokenizer have not changed, else None."""
    old = read_manifest(folder)
    if not old or not _same_reading(options, old) or not _same_sources(sources, old["sources"]):
        return None
    if tokenizer is None and (folder / VOCABULARY).is_file():
        tokenizer = Tokenizer(folder / VOCABULARY)
    if tokenizer is None or old["tokenizer"] != tokenizer.fingerprint:
        return None
    tokens = Tokens(folder, old)
    tokens.verify()
    show(f"{path}: {tokens.sentence}, as prepared in {folder}")
    report(old, path)
    return tokens


def _same_reading(options: TextOptions, manifest: dict[str, Any]) -> bool:
    """Return True if the shards were made with these options.

    A manifest of an older minigpt version does not record the options, but only the separator of each source
    file. With such a manifest, the result is True only if these separators and `options` are the defaults.
    """
    if "reading" in manifest:
        return bool(manifest["reading"] == asdict(options))
    usual = all(source.get("separator") in (None, END_OF_TEXT) for source in manifest["sources"])
    return usual and options == TextOptions()


def _described(sources: list[Source]) -> list[dict[str, Any]]:
    result = []
    with ProgressLine("hashing, files", len(sources), patience=2.0) as progress:
        for number, source in enumerate(sources):
            progress.update(number)
            entry = {"name": source.name, "size": source.origin_size, "mtime_ns": source.mtime_ns}
            result.append({**entry, "sha256": sha256(source.origin)})
    return result


def _same_sources(sources: list[Source], described: list[dict[str, Any]]) -> bool:
    """Return True if the source files are unchanged.

    Their names and sizes must be the same. For each file, the modification time or the SHA-256 must be the
    same, too.
    """
    if [(s.name, s.origin_size) for s in sources] != [(d["name"], d["size"]) for d in described]:
        return False
    return all(
        s.mtime_ns == d["mtime_ns"] or sha256(s.origin) == d["sha256"] for s, d in zip(sources, described)
    )


def _names(record: dict[str, Any]) -> tuple[str, str]:
    return record["name"], record["name"][:-3] + "json"


def _clear(folder: Path, keep: set[str], temporary_only: bool = False) -> None:
    """Remove minigpt's temporary files and shards. Files whose names are in `keep` stay.

    With `temporary_only`, all shards stay.
    """
    for path in folder.iterdir():
        is_ours = _OURS.fullmatch(path.name) and path.name not in keep and path.is_file()
        if is_ours and (path.name.startswith(".") or not temporary_only):
            path.unlink(missing_ok=True)


def _finished(folder: Path, job: _Job) -> dict[str, Any] | None:
    """Return a shard's record (the content of its JSON file) if the shard is complete, else None.

    None is also returned if the shard was made from other data, with other options or another tokenizer.
    """
    try:
        record = read_json(folder / f"shard-{job.number:05d}.json")
        path = folder / f"shard-{job.number:05d}.bin"
        if record["key"] == job.key and path.stat().st_size == record["size"]:
            return record if sha256(path) == record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _manifest(tokenizer: TextTokenizer, records: list[dict[str, Any]], jobs: list[_Job]) -> dict[str, Any]:
    unknown: dict[str, int] = {}
    for record in records:
        for character, count in record["unknown"].items():
            unknown[character] = unknown.get(character, 0) + count
    before: dict[str, int] = {}  # source file -> number of its lines in earlier pieces
    skipped = []
    for job, record in zip(jobs, records):
        base = []
        for piece, lines in zip(job.pieces, record["lines"]):
            name = job.sources[piece.source].name
            base.append((name, before.get(name, 0)))
            before[name] = base[-1][1] + lines
        skipped += [(base[index][0], base[index][1] + line, why) for index, line, why in record["skipped"]]
    return {
        "format": 1,
        "tokenizer": tokenizer.fingerprint,
        "dtype": _dtype(tokenizer),
        "end_of_text": end_of_text(tokenizer),
        **{key: sum(r[key] for r in records) for key in ("documents", "tokens", "characters", "text_bytes")},
        "unknown": dict(sorted(unknown.items(), key=lambda item: -item[1])),
        "skipped": skipped,
        "shards": [{key: r[key] for key in ("name", "tokens", "size", "sha256")} for r in records],
    }
