"""Where rows come from: files, folders, Hub data sets and memory, whole or in parts.

The memory taken does not grow with the rows: in parts, what is read stays on disk, and the rows of a whole data set
are copied there. JSON arrays and packed Parquet files are held whole while they are read.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetfilter.data.folders import CHOOSE_SPLIT, TRAIN, data_files, is_saved, say_unread_splits
from forgetfilter.data.lazy import AT_ONCE
from forgetfilter.data.readers import (
    KNOWN,
    SUFFIXES,
    Parts,
    cannot_be_read,
    file_parts,
    file_suffix,
    from_lines,
    source_parts,
    unpacked_name,
)
from forgetfilter.data.source import Form, Source, from_table, put_together
from forgetfilter.errors import DataError
from forgetfilter.files import at_home, sha256

if TYPE_CHECKING:
    from datasets import Dataset

SAID = 500
"""Characters of what another library says of an error."""
SHOWN = 80
"""Characters of what should be a name and is none."""


@dataclass(frozen=True)
class Stream:
    """A data set that is read in parts.

    Attributes:
        name: What the user called it.
        read: Takes a number of rows and a place, and gives parts of at most so many rows from there on.
        file: The file, if it is one.
    """

    name: str
    read: Callable[[int, Any], Parts]
    file: Path | None = None

    def parts(self, size: int, place: Any = 0) -> Parts:
        """Parts of at most so many rows, none of them empty.

        Args:
            size: Number of rows.
            place: What an earlier part came with, to go on after it; 0 is the beginning.

        Raises:
            DataError: If the data cannot be read; damaged rows are left in the part with their errors instead.
        """
        return ((part, after) for part, after in self.read(size, place) if len(part))

    def whole(self, scratch_folder: Path | None = None) -> Source:
        """All rows. Many lie on disk: on that of the folder `beside`, or on the system's own for None."""
        return put_together(self.name, (part for part, _ in self.parts(AT_ONCE)), scratch_folder)

    def fingerprint(self) -> str:
        """SHA-256 of the file, or of the rows where they are in no file; reads everything once."""
        if self.file is not None:
            try:
                return sha256(self.file)
            except OSError as error:
                raise cannot_be_read(self.file, error) from error
        digest = hashlib.sha256()
        for part, _ in self.parts(AT_ONCE):
            digest.update(part.fingerprint().encode())
        return digest.hexdigest()

    @property
    def stem(self) -> str:
        """A name for files made of this data set: its own, without folders and kind of file."""
        path = Path(self.name)
        name = unpacked_name(path if path.name not in ("", "..") else path.resolve())
        own = next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), name).strip("<>")
        return own or "rows"


def load_source(
    name: str | os.PathLike[str] | Any,
    config_name: str | None = None,
    split: str = TRAIN,
    scratch_folder: str | os.PathLike[str] | None = None,
) -> Source:
    """Read a data set whole. Its rows then lie on disk, unless there are few.

    Args:
        name: A file, a folder, a Hub id, a datasets.Dataset, a list of dicts, or a Source, which is returned as it is.
        config_name: Configuration of a Hub data set; files and folders have none.
        split: The split to read, or a slice of it, such as train[:100].
        scratch_folder: A folder, there already or not, on whose disk the rows are to lie; None for the system's own.

    Raises:
        DataError: If there is no such data set or split, or its file is damaged as a whole. Damaged rows are left in
            the source with their errors instead.
    """
    if isinstance(name, Source):
        return name
    on = None if scratch_folder is None else Path(scratch_folder)
    return open_stream(name, config_name, split, on).whole(on)


def open_stream(
    data: Any, config_name: str | None = None, split: str = TRAIN, scratch_folder: Path | None = None
) -> Stream:
    """Open a data set, to be read in parts; arguments and errors as those of `load_source`."""
    if isinstance(data, Source):
        return Stream(data.name, partial(source_parts, data))
    if isinstance(data, list):
        return Stream("<list>", partial(source_parts, _from_list(data)))
    if not isinstance(data, (str, os.PathLike)):
        from datasets import Dataset

        if not isinstance(data, Dataset):
            raise DataError(f"data is a {type(data).__name__}: give a path, a Hub id, a datasets.Dataset or a list.")
        return Stream("<Dataset>", partial(_mapped_parts, data, "<Dataset>"))
    return _open_named(data, config_name, split, scratch_folder)


def _open_named(
    data: str | os.PathLike[str], config_name: str | None, split: str, scratch_folder: Path | None
) -> Stream:
    """A file, a folder, or a data set of the Hub."""
    name = str(data)
    path = Path(at_home(name))
    if not name.strip():  # would be the folder that the command runs in
        raise DataError("the name of a data set is empty: give a file, a folder or a Hub id.")
    if _lies_here(path) and config_name is not None:
        raise DataError(
            f"{name}: --dataset_config {config_name} names a part of a data set on the Hub, and this lies here. "
            "Give the file or the subfolder itself."
        )
    if path.is_dir():
        chosen = split.partition("[")[0]
        try:
            if is_saved(path):
                return _sliced(Stream(name, _saved_parts(path, chosen)), split, chosen, scratch_folder)
            files, found = data_files(path, chosen)
        except OSError as error:
            raise cannot_be_read(path, error) from error
        return _sliced(Stream(name, partial(_files_parts, name, files)), split, found, scratch_folder)
    if path.is_file():
        return _sliced(Stream(name, partial(file_parts, path), path), split, TRAIN, scratch_folder)
    if file_suffix(path) or len(path.parts) > 2 or path.is_absolute():
        raise DataError(f"{name}: no such file. Give a file ({KNOWN}), a folder or a Hub id.")
    return Stream(name, partial(_mapped_parts, _load_hub(name, config_name, split), name))


def is_of_hub(data: Any) -> bool:
    """Whether data are named, and do not lie here: configurations and splits are those of a data set on the Hub."""
    return isinstance(data, (str, os.PathLike)) and not _lies_here(Path(at_home(data)))


def _lies_here(path: Path) -> bool:
    """Whether there is such a file or folder; raises DataError for what cannot be the name of one."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"{str(path)[:SHOWN]!r}...: too long for the name of a data set.") from error
        raise cannot_be_read(path, error) from error


def _sliced(stream: Stream, split: str, name: str, scratch_folder: Path | None) -> Stream:
    """The rows of a stream that a slice such as train[:100] or train[-10%:] takes; `name` is the split it has."""
    if split == name:
        return stream
    from datasets import ReadInstruction

    whole = stream.whole(scratch_folder)
    try:
        taken = ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{stream.name}: --dataset_train_split {split}: {error} Rows that are not parted into splits are {name!r}."
        ) from error
    rows = [row for part in taken for row in range(part.from_, part.to)]
    return Stream(stream.name, partial(source_parts, whole.select(rows)))


def _files_parts(name: str, files: Sequence[Path], size: int, place: Any) -> Parts:
    """The rows of several files, one after the other, in the one form that fits them all."""
    firsts = (next((part for part, _ in file_parts(file, 1) if len(part)), None) for file in files)
    forms = [first.form for first in firsts if first is not None]
    if not forms:
        return
    form = Form.common(forms)
    begin, inside = place or (0, 0)
    for number, file in enumerate(files[begin:], begin):
        for part, after in file_parts(file, size, inside):
            yield replace(part.put(form), name=name, files=[str(file)] * len(part)), [number, after]
        inside = 0


def _mapped_parts(dataset: "Dataset", name: str, size: int, place: int) -> Parts:
    """Places are rows; they stay on disk until they are read."""
    tables = dataset.with_format("arrow")
    for first in range(place, len(dataset), min(size, len(dataset)) or 1):
        part = from_table(tables[first : first + size], name, first + 1)
        yield part, first + len(part)


def _from_list(data: list[Any]) -> Source:
    lines = []
    for number, record in enumerate(data, 1):
        try:
            lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"<list>, row {number}: JSON cannot hold it ({error}). Give texts, numbers, lists and dicts."
            ) from error
    return from_lines(lines, "<list>")


def _saved_parts(folder: Path, split: str) -> Callable[[int, Any], Parts]:
    """The reader of a folder that `save_to_disk` of the datasets library has written.

    Raises:
        DataError: If it cannot be read, leads out of itself, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        for state in folder.rglob("state.json"):
            names = [file["filename"] for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
            if any(Path(name).name != name for name in names):
                raise ValueError(f"{state} leads out of the folder")
        found = load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds, all meaning that the folder is damaged
        raise DataError(f"{folder}: not a readable folder of save_to_disk ({error}).") from error
    splits = dict(found) if isinstance(found, DatasetDict) else {TRAIN: found}
    if split not in splits:
        raise DataError(f"{folder}: has no split {split!r}, but {', '.join(splits)}. {CHOOSE_SPLIT}")
    say_unread_splits(folder, split, splits)
    return partial(_mapped_parts, splits[split], str(folder))


def _load_hub(name: str, config_name: str | None, split: str) -> "Dataset":
    """A data set of the Hub; its rows stay on disk.

    Raises:
        DataError: If it cannot be had.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split)
    except Exception as error:  # the library raises dozens of kinds, all meaning "cannot be had"
        cause = error.__cause__ or error  # it hides what went wrong in a file behind an error that says nothing
        raise DataError(
            f"{name}: neither a file here nor a data set that could be loaded "
            f"({type(cause).__name__}: {' '.join(str(cause).split())[:SAID]}). "
            f"Check the name, --dataset_config and --dataset_train_split ({split})."
        ) from error
