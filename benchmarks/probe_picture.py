"""What the probe makes of forgetting's scores, drawn: python benchmarks/probe_picture.py writes docs/probe.svg."""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
CELL = "toxicity-50-seed-5"
"""A reported cell, drawn as it is stored."""


def main() -> None:
    """Draw the rows of a stored cell, by forgetting and by the probe."""
    stored = json.loads((ROOT / "benchmarks" / "quality" / "results" / f"{CELL}.json").read_text(encoding="utf-8"))
    rows, threshold = stored["rows"], stored["rule"]["threshold"]
    unsafe = np.array([group.endswith("/unsafe") for group in rows["group"]])
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"forgetting": "forgetting: nats lost, scaled", "probe": "probe: log-odds of unsafe"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        scores = np.array(rows[name], float)
        bins = np.linspace(scores.min(), scores.max(), 40)
        panel.hist(scores[~unsafe], bins, alpha=0.6, color="C0", label="clean")
        panel.hist(scores[unsafe], bins, alpha=0.6, color="C3", label="unsafe")
        panel.set_xlabel(title)
    panels[1].axvline(threshold, color="black", linestyle="--", label="auto")
    panels[0].set_ylabel("rows")
    panels[1].legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "probe"}):  # the same figure gives the same file
        figure.savefig(ROOT / "docs" / "probe.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
