"""The flow of a row, drawn: python benchmarks/architecture_picture.py writes docs/architecture.svg."""

from pathlib import Path

import matplotlib
import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 2.5, 0.95
ROOMS = {
    "your rows\nnoisy and safe": (0, 3, "white"),
    "data/\nread, check, tokenize": (3, 3, "#e8eef7"),
    "filters/NAME.py\na score a row": (6, 3, "#f7ecdc"),
    "workshop.py\ntrain, read, keep models": (6, 1.4, "#e3f1e5"),
    "scored.py\nsuspicion, columns, scale": (9, 3, "#f7ecdc"),
    "decision/\nrule, threshold, by hand": (12, 3, "#f3e3ee"),
    "the run's folder\nkept, dropped, scores": (15, 3, "white"),
    "model/\nLoRA, TRL, batches": (6, 0, "#e3f1e5"),
    "report/\nthe page": (15, 1.4, "#e8eef7"),
    "finetune\nM0 on the kept rows": (12, 0, "#e3f1e5"),
}
"""Rooms: left, bottom and colour; green ones know a model."""
ARROWS = (
    ("your rows\nnoisy and safe", "data/\nread, check, tokenize"),
    ("data/\nread, check, tokenize", "filters/NAME.py\na score a row"),
    ("filters/NAME.py\na score a row", "workshop.py\ntrain, read, keep models"),
    ("workshop.py\ntrain, read, keep models", "model/\nLoRA, TRL, batches"),
    ("filters/NAME.py\na score a row", "scored.py\nsuspicion, columns, scale"),
    ("scored.py\nsuspicion, columns, scale", "decision/\nrule, threshold, by hand"),
    ("decision/\nrule, threshold, by hand", "the run's folder\nkept, dropped, scores"),
    ("the run's folder\nkept, dropped, scores", "report/\nthe page"),
    ("the run's folder\nkept, dropped, scores", "finetune\nM0 on the kept rows"),
    ("finetune\nM0 on the kept rows", "workshop.py\ntrain, read, keep models"),
)
"""Who hands a row, or asks, whom."""


def box(axes: Axes, text: str) -> None:
    """Draw a room: its path in bold, what it does below."""
    left, bottom, colour = ROOMS[text]
    corner, style = (left, bottom), "round,pad=0.05"
    axes.add_patch(matplotlib.patches.FancyBboxPatch(corner, WIDTH, HEIGHT, style, fc=colour, ec="0.4"))
    path, does = text.split("\n")
    axes.text(left + WIDTH / 2, bottom + 0.62, path, ha="center", va="center", weight="bold", size=9)
    axes.text(left + WIDTH / 2, bottom + 0.28, does, ha="center", va="center", size=8)


def arrow(axes: Axes, start: str, end: str) -> None:
    """Draw an arrow from the side of a room that faces the other one."""
    (x0, y0, _), (x1, y1, _) = ROOMS[start], ROOMS[end]
    if y0 == y1:
        tail, head = (x0 + WIDTH + 0.08, y0 + HEIGHT / 2), (x1 - 0.1, y1 + HEIGHT / 2)
    elif x0 == x1:
        tail, head = (x0 + WIDTH / 2, y0 - 0.08), (x1 + WIDTH / 2, y1 + HEIGHT + 0.1)
    elif y0 > y1:
        tail, head = (x0, y0 - 0.02), (x1 + WIDTH + 0.1, y1 + HEIGHT)
    else:
        tail, head = (x0 - 0.08, y0 + HEIGHT / 2), (x1 + WIDTH + 0.1, y1 + HEIGHT / 2)
    axes.annotate("", head, tail, arrowprops={"arrowstyle": "-|>", "color": "0.3"})


def main() -> None:
    """Draw and write."""
    figure = Figure(figsize=(12.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for text in ROOMS:
        box(axes, text)
    for start, end in ARROWS:
        arrow(axes, start, end)
    axes.set_xlim(-0.2, 17.8)
    axes.set_ylim(-0.2, 4.2)
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "architecture"}):
        figure.savefig(DOCS / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
