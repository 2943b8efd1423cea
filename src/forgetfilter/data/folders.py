"""Which files of a folder are read: all of them, in the order of their names, or those of one split."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from forgetfilter.data.readers import KNOWN, file_suffix
from forgetfilter.errors import DataError
from forgetfilter.progress import say

TRAIN = "train"
"""The split that a file is, and the rows of a folder whose files name no splits."""
MANIFEST = "manifest.json"
"""What a run's folder has. Where one lies inside of a folder of data, nothing in it is read."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Files beside data sets that say what these are: of the Hub, and of LLaMA-Factory."""
WRITTEN = ("", ".md", ".py", ".yaml", ".yml", ".html", ".png", ".svg")
"""Suffixes of files that no rows are looked for in: documentation, scripts and settings."""
SPLIT = re.compile(
    r"(?:.*?[-._ 0-9])?(train|training|test|testing|validation|valid|val|dev|eval|evaluation)(?:[-._ 0-9].*)?",
    re.IGNORECASE,
)
"""A name with that of a split in it, as the datasets library finds it: train.jsonl, my-test_1.jsonl, dev-v1.1.json."""
CALLED = {"training": TRAIN, "testing": "test", "eval": "test", "evaluation": "test"}
CALLED |= {"valid": "validation", "val": "validation", "dev": "validation"}
"""Other names of splits -> what the datasets library calls these."""
CHOOSE_SPLIT = "--dataset_train_split chooses that of --dataset_name; of any other data, name the file."
SHARD = re.compile(r"((?:train|test|validation|valid|val|dev|eval)\w*)-\d+-of-\d+(?:-[0-9a-f]+)?", re.IGNORECASE)
"""How the Hub names the shards of a split: train_sft-00000-of-00003.parquet."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library has written a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_read_whole(folder: Path) -> bool:
    """Whether every file of a folder counts as data: not so in that of a run, or of `save_to_disk`."""
    return folder.is_dir() and not _holds_run(folder) and not is_saved(folder)


def _holds_run(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and _is_of_run(folder / MANIFEST)


def data_files(folder: Path, split: str) -> tuple[list[Path], str]:
    """The files of a folder and its subfolders whose rows are read, in the order of their names, and their split.

    Of a run's folder it is the file of its kept rows. Where the name of every file, or of a folder it is in, has that
    of a split in it, it is those of the split that is asked for; if that is train and all are of one other split, all
    of them. All others are the split train. Hidden files are left out.

    Args:
        folder: The folder.
        split: Name of a split.

    Raises:
        DataError: If there are none, or the folder has a file that cannot be read.
    """
    everything = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts)
    shown = [path for path in everything if _is_shown(path.relative_to(folder))]
    found = [path for path in shown if path.is_file()]
    runs = {path.parent for path in found if path.parent != folder and _is_of_run(path)}
    found = [path for path in found if not runs.intersection(path.parents)]
    if runs:
        names = ", ".join(sorted(str(run.relative_to(folder)) for run in runs))
        say(f"{folder}: what runs have written there is not read: {names}.")
    files = [path for path in found if file_suffix(path)]
    if _holds_run(folder):
        kept = [path for path in files if path.parent == folder and path.stem == "kept"]
        if kept:
            return kept, TRAIN
    unread = [path for path in found if path not in files and path.suffix.lower() not in WRITTEN]
    links = [path for path in shown if path.is_symlink() and not path.is_file()]  # to other folders, or to nothing
    closed = [path for path in shown if path.is_dir() and not os.access(path, os.R_OK | os.X_OK)]
    unread += [path for path in (*links, *closed) if not runs.intersection(path.parents)]
    if unread:
        names = ", ".join(str(path.relative_to(folder)) for path in unread[:5])
        raise DataError(
            f"{folder}: {len(unread)} of its files, folders and links cannot be read: {names}. Known kinds: {KNOWN}. "
            "Move them away, or give the files to read one by one."
        )
    if not files:
        raise DataError(f"{folder}: has no file with rows. Known kinds: {KNOWN}.")
    return _of_split(folder, files, split)


def _is_of_run(path: Path) -> bool:
    """Whether a file is what a run, or `score`, notes about its folder."""
    return path.name == MANIFEST and '"stages"' in path.read_text(encoding="utf-8", errors="replace")


def _is_shown(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts) and path.name not in DESCRIPTIONS


def _of_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], str]:
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if None in splits.values():
        _say_unnamed(folder, splits)
        return files, TRAIN
    found = {str(name) for name in splits.values()}
    chosen = [path for path in files if split in (splits[path], CALLED.get(str(splits[path])))]
    if not chosen and split == TRAIN and len(found) == 1:
        say(f"{folder}: all of its files are of split {found.pop()}, and are read.")
        return files, TRAIN
    if not chosen:
        names = ", ".join(sorted(found))
        raise DataError(f"{folder}: has no split {split!r}, but {names}. {CHOOSE_SPLIT}")
    say_unread_splits(folder, split, found - {str(splits[path]) for path in chosen})
    return chosen, split


def _say_unnamed(folder: Path, splits: Mapping[Path, str | None]) -> None:
    """Say that all splits are read, since some files name none."""
    named = sorted({str(name) for name in splits.values() if name is not None})
    unnamed = next(path for path, name in splits.items() if name is None)
    if set(named) - {TRAIN}:
        say(f"{folder}: all of its files are read, of {', '.join(named)}, too, since {unnamed.name} names no split.")


def say_unread_splits(folder: Path, split: str, splits: Iterable[str]) -> None:
    """Say which of a folder's splits are not read."""
    others = sorted({*splits} - {split})
    if others:
        say(f"{folder}: split {split} is read, {', '.join(others)} not (--dataset_train_split).")


def _split_of(path: Path) -> str | None:
    """The split that a file belongs to by its name, or by that of a folder it is in."""
    shard = SHARD.fullmatch(path.name.partition(".")[0])
    if shard:
        return shard[1]
    named = (SPLIT.fullmatch(name) for name in (path.name, *path.parent.parts))
    return next((match[1].lower() for match in named if match), None)
