"""Draw the README's picture from a demo run: `python benchmarks/demo_picture.py demo-run docs/demo.svg`."""

import json
import sys
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

WIDTH, HEIGHT, MARGIN, BINS = 720, 260, 40, 36
KINDS = (("task and safe rows", "#4c78a8"), ("unsafe rows", "#e45756"))


def main(run: Path, target: Path) -> None:
    """Stacked histograms of the probe's scores, by label, with the threshold."""
    scores = pq.read_table(run / "scores.parquet")["probe"].to_numpy()
    (rows,) = (run / "stages").glob("rows.jsonl")
    unsafe = np.array([bool(json.loads(line)["unsafe"]) for line in rows.read_text(encoding="utf-8").splitlines()])
    threshold = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["threshold"]
    edges = np.linspace(scores.min(), scores.max(), BINS + 1)
    counts = [np.histogram(scores[unsafe == kind], edges)[0] for kind in (False, True)]
    scale = (HEIGHT - 2 * MARGIN) / (counts[0] + counts[1]).max()

    def x(value: float) -> float:
        return MARGIN + (value - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(BINS):
        top = HEIGHT - MARGIN
        for count, (_, colour) in zip(counts, KINDS, strict=True):
            top -= count[i] * scale
            box = f'x="{x(edges[i]):.1f}" y="{top:.1f}" width="{x(edges[i + 1]) - x(edges[i]) - 1:.1f}"'
            parts.append(f'<rect {box} height="{count[i] * scale:.1f}" fill="{colour}"/>')
    if threshold is not None:
        parts.append(
            f'<line x1="{x(threshold):.1f}" x2="{x(threshold):.1f}" y1="20" y2="{HEIGHT - MARGIN}" stroke="#333"/>'
        )
        parts.append(f'<text x="{x(threshold) + 5:.1f}" y="30">threshold {threshold:.2f}: dropped beyond</text>')
    for i, (name, colour) in enumerate(KINDS):
        parts.append(f'<rect x="{MARGIN}" y="{14 + 18 * i}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{MARGIN + 18}" y="{24 + 18 * i}">{escape(name)}</text>')
    for value in np.linspace(edges[0], edges[-1], 7):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{value:.1f}</text>')
    label = "probe: log-odds of unsafe (0: undecided)"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{label}</text></svg>')
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
