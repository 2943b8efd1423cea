"""Tables of all rows, made shard by shard, so that an interruption costs one shard; each process makes its share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import processes
from forgetfilter.files import whole_file
from forgetfilter.progress import progress

SHARD_ROWS = 4096
"""Largest number of rows in a shard."""
SHARDS = ".shards"
"""Ends the name of the folder that holds a file's shards."""


def write_in_shards(path: Path, rows: int, make: Callable[[slice, Any], pa.Table], what: str) -> None:
    """Write a Parquet file of so many rows.

    Shards found beside the file were made before an interruption, and are taken as they are. They stay until
    `remove_shards`.

    Args:
        path: The file.
        rows: Its number of rows.
        make: Makes the table of some rows: takes them as a slice, and the progress bar that counts rows.
        what: Name for the progress bar.
    """
    shards = path.with_suffix(SHARDS)
    size = max(1, min(SHARD_ROWS, -(-rows // processes.count())))
    files = [(start, shards / f"{start:09}-{size:06}.parquet") for start in range(0, rows, size)]
    mine = files
    if not processes.sharded():  # else all make every shard together, and the first one writes it
        mine = mine[processes.rank() :: processes.count()]
    missing = [(start, file) for start, file in mine if not _readable(file)]
    total, left = (sum(min(size, rows - start) for start, _ in some) for some in (mine, missing))
    with progress(what, total, "rows", total - left) as bar:
        for start, file in missing:
            table = make(slice(start, start + size), bar)
            left -= len(table)
            bar.update(total - left - bar.n)  # rows that cannot be read are done, too
            if processes.is_main_process() or not processes.sharded():
                with whole_file(file) as temporary:
                    pq.write_table(table, temporary, write_page_checksum=True)
    processes.wait_for_everyone()
    if processes.is_main_process():
        join([file for _, file in files], path)
    processes.wait_for_everyone()


def remove_shards(path: Path) -> None:
    """Remove what `write_in_shards` has left beside a file (the first process does)."""
    if processes.is_main_process():
        shutil.rmtree(path.with_suffix(SHARDS), ignore_errors=True)


def join(files: list[Path], path: Path) -> None:
    """One Parquet file of all shards, one in memory at a time."""
    tables = (pq.read_table(file) for file in files)
    with whole_file(path) as temporary:
        first = next(tables)
        with pq.ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)


def _readable(shard: Path) -> bool:
    """Whether a shard is there and as it was written."""
    try:
        pq.read_table(shard, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return True
