"""Rows of a Parquet file, as Hugging Face's data sets are stored. Needs pyarrow, an optional package.

A `datasets.Dataset` in memory is already something that gives rows: `read_pairs(dataset)` takes it as it is;
for `--text`, `dataset.to_parquet("texts.parquet")` makes the file. Nothing is fetched from the network.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt.errors import InputError

__all__ = ["parquet_rows"]

_ROWS = 256  # read at a time


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as dictionaries, a few at a time.

    Raises:
        InputError: without pyarrow, or if the file is no Parquet file.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'minigpt[datasets]'")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is damaged or no Parquet file: {error}") from None
