"""Tables of recipes, in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from forgetfilter.files import write_text


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with these heads of its columns; a line is the text of each of its cells."""
    head, *rest = ("| " + " | ".join(cells) + " |" for cells in (heads, *lines))
    return "\n".join([head, "|---" * len(heads) + "|", *rest])


def write(path: Path, text: str) -> Path:
    """Print a table, and write it to a file; the file's path is returned."""
    print(f"\n{text}\n")
    write_text(path, text + "\n")
    return path
