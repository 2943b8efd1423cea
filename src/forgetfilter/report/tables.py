"""A table of figures, as Markdown and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table, and what is said below it.

    Attributes:
        heads: The heads of its columns.
        lines: For each line the text of its cells; the first one names the line.
        notes: Sentences of plain text.
    """

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Table and notes in Markdown."""
        head, *lines = ("| " + " | ".join(cells) + " |" for cells in (self.heads, *self.lines))
        table = "\n".join([head, "|---" * len(self.heads) + "|", *lines])
        return "\n\n".join([table, *self.notes])

    def html(self) -> str:
        """Table and notes as HTML, with nothing in them but text."""
        top = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in self.heads)
        body = "".join(f"<tr>{_cells(*line)}</tr>" for line in self.lines)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{notes}"


def _cells(name: str, *figures: str) -> str:
    numbers = "".join(f"<td class='number'>{html.escape(figure)}</td>" for figure in figures)
    return f"<th scope='row'>{html.escape(name)}</th>{numbers}"
