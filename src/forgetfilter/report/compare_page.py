"""compare.html: the table and the pictures of an experiment, in the style of the report."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from forgetfilter.report.page import write_page


def write_compare_page(folder: Path, title: str, about: str, table: str | None, pictures: Sequence[Path]) -> Path:
    """Write the page of an experiment.

    Args:
        folder: Where to.
        title: Its heading.
        about: A sentence or two, as text.
        table: A Markdown table, if there is one.
        pictures: SVG files to show.
    """
    body = [f"<header><h1>{html.escape(title)}</h1><p class='quiet'>{html.escape(about)}</p></header><main>"]
    if table is not None:
        body.append(f"<div class='wide'>{_table(table)}</div>")
    for picture in pictures:
        code = base64.b64encode(picture.read_bytes()).decode()
        words = f"{html.escape(picture.stem)}: the figures, drawn"
        body.append(f"<p><img alt='{words}' src='data:image/svg+xml;base64,{code}'></p>")
    return write_page(folder / "compare.html", f"ForgetFilter: {title}", "\n".join([*body, "</main>"]))


def _table(markdown: str) -> str:
    head, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in markdown.splitlines()]
    rows = ["".join(f"<td class='number'>{html.escape(cell)}</td>" for cell in cells[1:]) for cells in lines]
    names = [f"<th scope='row'>{html.escape(cells[0])}</th>" for cells in lines]
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{name}{row}</tr>" for name, row in zip(names, rows, strict=True))
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
