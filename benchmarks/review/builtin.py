"""The safe rows in the box against safe rows of the matching notion: what a first run with nothing but the data finds.

python benchmarks/review/builtin.py CELL ... --data_dir DATA --work DIR      ten minutes a cell on two cores
python benchmarks/review/builtin.py --table                                  the table, from what is stored

A cell is one of the reported cells of quality/cells.yaml. It is filtered with `--safe_dataset_name` left out, and then
reviewed as in run.py. The figures with matching safe rows are those that quality/run.py and run.py have stored for the
same rows. Results go to results/builtin-CELL.json.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# After this folder: `run` is the one beside this file.
sys.path += [str(Path(__file__).parents[1] / "quality"), str(Path(__file__).parents[1])]
from cells import CELLS, config_of, write_data
from run import QUALITY, RESULTS, keep, make_cell

from forgetfilter import ForgetFilter
from forgetfilter.config import BUILTIN
from forgetfilter.decision.opened import Opened
from forgetfilter.evaluation.filter_quality import filter_quality, ranking_quality, unscored_last

SHOWN = ("average_precision", "auroc", "recall_at_2", "f1", "clean_dropped")
STARTS = {"delivered": None}


def filtered(name: str, data_dir: Path, work: Path) -> dict[str, Any]:
    """Filter a cell's rows with the safe rows in the box; figures of the probe and of forgetting."""
    write_data(dict(CELLS["report"][name]), data_dir, work)
    result = ForgetFilter(replace(config_of(work), safe_dataset_name=BUILTIN)).fit()
    opened = Opened.of(result.run)
    assert opened.labels is not None
    dropped = np.array([decision == "dropped" for decision in result.scores["decision"]])
    probe = opened.scored["probe"]
    found: dict[str, Any] = {"safe_rows": result.run.manifest["safe"]["rows"], "says": result.metrics["says"]}
    for own, suspicion in (("probe", probe.suspicion), ("forgetting", probe.columns["forgetting"])):
        known = unscored_last(suspicion)
        found[own] = {**filter_quality(opened.labels, dropped, known), **ranking_quality(opened.labels, known)}
    return found


def table() -> str:
    """A line a cell: built-in beside matching safe rows, and after marks."""
    lines = ["| cell, safe rows | " + " | ".join(SHOWN) + " | average precision after 20 marks | 40 |"]
    lines.append("|---" * (len(SHOWN) + 3) + "|")
    for path in sorted(RESULTS.glob("builtin-*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        name = cell["cell"].removeprefix("builtin-")
        matching = json.loads((QUALITY / f"{name}.json").read_text(encoding="utf-8"))["figures"]
        reviewed = RESULTS / f"{name}.json"
        marks = json.loads(reviewed.read_text(encoding="utf-8"))["delivered"] if reviewed.exists() else None
        for words, figures, own in (
            ("in the box", cell["filtered"]["probe"], cell["delivered"]),
            ("matching", matching, marks),
        ):
            shown = [f"{figures[key]:.2f}" for key in SHOWN]
            shown += ["" if own is None else f"{own['average_precision'][count]:.2f}" for count in (20, 40)]
            lines.append(f"| {name}, {words} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells named, or print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("builtin-work"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.data_dir is None or not args.cells:
        parser.error("name cells and --data_dir, or --table")
    for name in args.cells:
        figures = filtered(name, args.data_dir, args.work / name)
        keep({**make_cell(f"builtin-{name}", args.work / name / "run", STARTS), "filtered": figures})


if __name__ == "__main__":
    main()
