"""Stored results of recipes and benchmarks: a cell is computed once, and again if its inputs have changed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forgetfilter.changes import SETTINGS, as_json, changes, defaults_of, flat
from forgetfilter.files import sha256, write_text

Cell = dict[str, Any]
"""A result: anything that JSON can hold, by name."""
MADE_OF, FILES, CONSTANTS, QUESTIONS = "made_of", "files", "constants", "questions"
VERSIONS = (".VERSION", ".CHANGED")
"""Ends of the constants that say that code gives other results than it once did."""


class Cells:
    """Results in a folder, KEY.json each.

    A cell records its inputs: data, settings, constants and every parameter, including those left at their defaults. If
    any of them changes, the cell is computed again.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        """Write nothing yet."""
        self.folder = folder

    def path(self, key: str) -> Path:
        """A cell's file."""
        return self.folder / f"{key}.json"

    def once(self, key: str, made_of: Mapping[str, Any], make: Callable[[], Cell], *endings: str) -> Cell:
        """Give the stored cell if it has the same inputs and its files are intact; otherwise make it now.

        Args:
            key: Its name.
            made_of: Its inputs: anything that JSON can hold.
            make: Makes it; writes the files beside it, too.
            endings: Endings of files that belong to it, KEY + ending, such as ".jsonl".
        """
        if not self.done(key, made_of):
            self.store(key, made_of, make(), *endings)
        return self.load(key)

    def done(self, key: str, made_of: Mapping[str, Any]) -> bool:
        """Whether a cell with these inputs is stored, and its files are as they were written."""
        try:
            found = self.load(key)
        except (OSError, ValueError, TypeError):
            return False
        files: Mapping[str, str] = found.get(FILES, {})
        whole = all(_is(self.folder / name, digest) for name, digest in files.items())
        return whole and same(found.get(MADE_OF), as_json(made_of))

    def store(self, key: str, made_of: Mapping[str, Any], cell: Cell, *endings: str) -> None:
        """Write a cell that has been made, or one that has been added to."""
        files = {f"{key}{ending}": sha256(self.folder / f"{key}{ending}") for ending in endings}
        whole = {**cell, MADE_OF: dict(made_of), **({FILES: files} if files else {})}
        write_text(self.path(key), text(whole))

    def load(self, key: str) -> Cell:
        """A stored cell, whatever its inputs."""
        return dict(json.loads(self.path(key).read_text(encoding="utf-8")))

    def all(self) -> list[Cell]:
        """Every stored cell, whatever its inputs, sorted by name."""
        return [self.load(path.stem) for path in sorted(self.folder.glob("*.json"))]


def same(noted: Any, asked: Cell) -> bool:
    """Whether a cell was made of what is asked for.

    A setting that did not exist then counts as its default; a constant that did not exist then, or no longer does,
    counts as unchanged unless it is one of VERSIONS, and so do the questions where they were not noted. All else must
    be equal.
    """
    if not isinstance(noted, dict):
        return False
    if any(changes(noted.get(part), asked.get(part), defaults_of(part)) for part in SETTINGS):
        return False
    before, now = (flat(made_of.get(CONSTANTS)) for made_of in (noted, asked))
    if any(before.get(name, value) != value for name, value in now.items()):
        return False
    if any(name.endswith(VERSIONS) for name in now.keys() - before.keys()):
        return False
    others = (noted.keys() | asked.keys()) - {*SETTINGS, CONSTANTS, *({QUESTIONS} - noted.keys())}
    return all(noted.get(part) == asked.get(part) for part in others)


def text(value: Any) -> str:
    """JSON of a cell: a line an entry, lists of numbers and texts in one line."""
    return json.dumps(value, indent=1, ensure_ascii=False).replace("\n   ", " ") + "\n"


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
