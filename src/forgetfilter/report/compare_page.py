"""compare.html: the table and the pictures of an experiment, in the style of the report."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from forgetfilter.files import write_text
from forgetfilter.report.page import write_page
from forgetfilter.report.tables import Table


def write_compare_page(folder: Path, title: str, about: str, table: Table | None, pictures: Sequence[Path]) -> Path:
    """Write the page of an experiment.

    Args:
        folder: Where to.
        title: Its heading.
        about: A sentence or two, as text.
        table: Its figures, if it has a table.
        pictures: Files of pictures; those that are SVG are shown.
    """
    body = [f"<header><h1>{html.escape(title)}</h1><p class='quiet'>{html.escape(about)}</p></header><main>"]
    if table is not None:
        body.append(table.html())
    for picture in pictures:
        if picture.suffix != ".svg":
            continue
        code = base64.b64encode(picture.read_bytes()).decode()
        words = f"{html.escape(picture.stem)}: the figures, drawn"
        body.append(f"<p><img alt='{words}' src='data:image/svg+xml;base64,{code}'></p>")
    return write_page(folder / "compare.html", f"ForgetFilter: {title}", "\n".join([*body, "</main>"]))


def show_table(path: Path, table: Table) -> Path:
    """Print a table, and write it to a Markdown file; the file's path is returned."""
    text = table.markdown()
    print(f"\n{text}\n")
    write_text(path, text + "\n")
    return path
