"""Reads the ids of a corpus by position, from memory-mapped shards that minigpt/data/shards.py wrote."""

import hashlib
import json
import re
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.console.terminal import ProgressLine, warn
from minigpt.errors import InputError, printable
from minigpt.storage.files import atomic_write, sha256
from minigpt.storage.json_files import json_text, read_json

__all__ = ["MANIFEST", "Tokens", "read_manifest", "report", "write_manifest"]

MANIFEST = "shards.json"
_SHOWN = 5
_SHARD = re.compile(r"shard-\d{5,9}\.bin")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read shards.json. Return None if this file is missing or damaged: the shards are then written again."""
    try:
        manifest = read_json(folder / MANIFEST)
        is_whole = manifest.pop("own_sha256") == _digest(manifest) and manifest["format"] == 1
        is_whole = is_whole and _makes_sense(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if is_whole else None


def _makes_sense(manifest: dict[str, Any]) -> bool:
    """Return True if the names, types and sizes in shards.json are valid. The checksum does not prove this.

    Raises:
        KeyError, TypeError, AttributeError: if an entry is missing, or of another type.
    """
    size = {"<u2": 2, "<u4": 4}[manifest["dtype"]]
    shards = [(s["name"], s["tokens"], s["size"], s["sha256"]) for s in manifest["shards"]]
    sources = [(s["name"], s["size"], s["mtime_ns"], s["sha256"]) for s in manifest["sources"]]
    counts = [manifest[key] for key in ("documents", "tokens", "characters", "text_bytes")]
    return (
        all(_SHARD.fullmatch(name) and bytes_ == size * tokens for name, tokens, bytes_, _ in shards)
        and all(type(one) is int and one >= 0 for one in (*counts, *(row[1] for row in shards)))
        and all(type(one) is int for _, *numbers, _ in sources for one in numbers)
        and all(isinstance(one, str) for _, *_, one in (*shards, *sources))
        and all(isinstance(name, str) for name, *_ in sources)
        and isinstance(manifest["tokenizer"], str)
        and all(type(count) is int for count in manifest["unknown"].values())
        and all(isinstance(name, str) and isinstance(why, str) for name, _, why in manifest["skipped"])
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write shards.json with a SHA-256 of its other entries. Shards without this file count as incomplete."""
    content = {**manifest, "own_sha256": _digest(manifest)}
    atomic_write(folder / MANIFEST, json_text(content, indent=1) + "\n")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def report(manifest: dict[str, Any], path: Path) -> None:
    """Warn about characters that became <unk>, and about skipped lines."""
    if unknown := manifest["unknown"]:
        some = ", ".join(f"{printable(c)} ({count:,}x)" for c, count in list(unknown.items())[:_SHOWN])
        warn(
            f"{path}: {sum(unknown.values()):,} characters, {len(unknown):,} different ones, are not in the "
            f"vocabulary and became <unk>: {some}{', ...' if len(unknown) > _SHOWN else ''}"
        )
    skipped = manifest["skipped"]
    for name, line, why in skipped[:_SHOWN]:
        warn(f"{path if path.is_file() else path / name}:{line}: skipped: {why}")
    if skipped:
        warn(f"{path}: skipped {len(skipped):,} lines in all")


class Tokens:
    """The ids of a corpus as one long sequence, read from memory-mapped files.

    Args:
        folder: the folder of the shards.
        manifest: the content of its shards.json.

    Raises:
        InputError: if a shard is missing or has another size; the message names the shard and what to do.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._starts = [0]
        for shard in manifest["shards"]:
            self._starts.append(self._starts[-1] + shard["tokens"])
        # Mapping all files now keeps their content available, even if another program replaces the files.
        self._maps = [self._map(shard) for shard in manifest["shards"]]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def sentence(self) -> str:
        """Return a sentence that states the size of the corpus."""
        m = self.manifest
        return f"{m['tokens']:,} tokens of {m['documents']:,} documents, {m['characters']:,} characters"

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the ids and their order."""
        decisive = [self.manifest["tokenizer"], *(shard["sha256"] for shard in self.manifest["shards"])]
        return hashlib.sha256("\0".join(decisive).encode(errors="surrogatepass")).hexdigest()

    def verify(self) -> None:
        """Check every shard against its SHA-256.

        Raises:
            InputError: if a shard differs; the message names the shard and what to do.
        """
        size = sum(shard["size"] for shard in self.manifest["shards"]) // 1_000_000
        done = 0
        with ProgressLine("verifying shards, MB", size, patience=2.0) as progress:
            for shard in self.manifest["shards"]:
                progress.update(done // 1_000_000)
                path = self.folder / shard["name"]
                if sha256(path) != shard["sha256"]:
                    raise self._damaged(path)
                done += shard["size"]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return `count` ids from position `start` on, (count,). These ids may be in several shards."""
        assert 0 <= start <= start + count <= len(self), (start, count, len(self))
        parts = []
        while count:
            number = bisect_right(self._starts, start) - 1
            inside = start - self._starts[number]
            part = self._maps[number][inside : inside + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _map(self, shard: dict[str, Any]) -> npt.NDArray[Any]:
        path = self.folder / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["size"]:
            raise self._damaged(path)
        dtype = np.dtype(self.manifest["dtype"])
        if not shard["tokens"]:  # all lines were skipped; an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", shape=(shard["tokens"],))

    def _damaged(self, path: Path) -> InputError:
        return InputError(
            f"{path} is missing or does not match {MANIFEST}: damaged; remove {self.folder / MANIFEST} and "
            "run the command again to make it anew"
        )
