"""What marks are worth: a simulated reviewer marks the rows that `forgetfilter review` asks about.

python benchmarks/review/run.py [CELL ...] --work DIR      cells that benchmarks/quality/run.py has scored in DIR
python benchmarks/review/run.py --table                    the tables and results/marks.svg, from what is stored

The reviewer knows the labels. In each cell the review starts from the filter as it is delivered (forgetting and the
probe), from M0's loss, at random, and from the probe without forgetting (safe against noisy rows); and once the
reviewer errs in one mark of ten. Each is done under three random orders of the rows. Rows that are marked rank as
marked. Beside it stands the ceiling: the same hidden states taught by the true labels, cross-fitted.
"""

import json
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from forgetfilter.data.loading import stored_labels
from forgetfilter.evaluation.filter_quality import ranking_quality
from forgetfilter.experiments.cells import text
from forgetfilter.files import write_text
from forgetfilter.marks import Marks, word
from forgetfilter.review.session import open_review
from forgetfilter.scored import Scored

RESULTS = Path(__file__).parent / "results"
QUALITY = Path(__file__).parents[1] / "quality" / "results"
MARKS, ORDERS, ERRORS = 60, 3, 0.1
SHOWN = (0, 10, 20, 30, 40, 60)
EASY = ("bias-5", "toxicity-5", "mixed-5")
"""The kinds and shares that are shown together."""
STARTS = {
    "delivered": "forgetting and the probe, as delivered",
    "m0_loss": "M0's loss",
    "random": "at random",
    "without_forgetting": "the probe without forgetting",
    "errs": "as delivered; one mark of ten is wrong",
}


def figures(suspicion: np.ndarray, dropped: np.ndarray, unsafe: np.ndarray, said: dict[int, bool]) -> dict[str, float]:
    """How good ranking and decision are after some marks; marked rows rank as marked."""
    ranked = np.nan_to_num(suspicion, nan=np.nanmin(suspicion))
    least, most = ranked.min() - 1, ranked.max() + 1
    for row, marked in said.items():
        ranked[row] = most if marked else least
    recall = ranking_quality(unsafe, ranked)["recall_at_2"]
    assert recall is not None
    return {
        "average_precision": float(average_precision_score(unsafe, ranked)),
        "recall_at_2": recall,
        "recall": float(dropped[unsafe].mean()),
        "clean_dropped": float(dropped[~unsafe].mean()),
        "found": sum(bool(unsafe[row]) for row in said),
    }


def reviewed(folder: Path, start: np.ndarray | None, errors: float, order: int) -> list[dict[str, float]]:
    """Figures after each mark of one simulated review.

    Args:
        folder: The run's.
        start: (rows,) scores that the review starts from; None for the run's own.
        errors: Share of the marks that are wrong.
        order: Seed of the random order of the rows, and of the errors.
    """
    review = open_review(folder)
    unsafe = stored_labels(review.opened.source, review.config)
    assert unsafe is not None
    if start is not None:
        review.base = review.opened.scored[review.name] = Scored(start)
    wrong = np.random.default_rng(order).random(MARKS) < errors
    found = []
    with tempfile.TemporaryDirectory() as place:
        review.marks = Marks(Path(place), review.marks.ids, order)
        for number in range(MARKS + 1):
            said = {row: mark.unsafe for row, mark in review.marks.all().items()}
            said_found = review.status().found
            estimate = float("nan") if said_found is None else said_found
            reached = figures(review.scored().suspicion, review.dropped(), unsafe, said)
            found.append(reached | {"said_found": estimate})
            if number < MARKS:
                (question,) = review.ask(1)
                review.mark({question.row: word(bool(unsafe[question.row]) == bool(wrong[number]))})
    return found


def make_cell(name: str, folder: Path, starts: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """All reviews of a run, averaged over the random orders, and what the true labels teach.

    Args:
        name: What the cell is called.
        folder: The run's.
        starts: Start -> (rows,) scores to start from; None for the run's own, or for new ones at random.
    """
    review = open_review(folder)
    unsafe = stored_labels(review.opened.source, review.config)
    assert unsafe is not None
    taught = review.ranking.judge(unsafe.astype(float))
    ceiling = float("nan") if taught is None else float(average_precision_score(unsafe, taught.noisy))
    cell: dict[str, Any] = {"cell": name, "rows": len(unsafe), "unsafe": int(unsafe.sum()), "marks": MARKS}
    for start, scores in starts.items():
        runs = []
        for order in range(ORDERS):
            own = np.random.default_rng(order).random(len(unsafe)) if start == "random" else scores
            runs.append(reviewed(folder, own, ERRORS if start == "errs" else 0, order))
        cell[start] = {figure: mean_of(figure, runs) for figure in runs[0][0]}
    return {**cell, "ceiling": {"average_precision": round(ceiling, 4)}}


def starts_of(name: str) -> dict[str, np.ndarray | None]:
    """The scores that reviews of a quality cell start from."""
    rows = json.loads((QUALITY / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {start: np.array(rows[start], float) if start in rows else None for start in STARTS}


def keep(cell: dict[str, Any]) -> None:
    """Write a cell's figures to results/, and show some."""
    write_text(RESULTS / f"{cell['cell']}.json", text(cell))
    shown = {count: cell["delivered"]["average_precision"][count] for count in SHOWN}
    print(cell["cell"], shown, flush=True)


def mean_of(figure: str, runs: list[list[dict[str, float]]]) -> list[float]:
    """A figure after each mark, averaged over reviews."""
    values = np.array([[step[figure] for step in run] for run in runs])
    return [round(float(value), 4) for value in values.mean(0)]


def stored() -> list[dict[str, Any]]:
    """All results of quality cells."""
    names = sorted(path.name for path in RESULTS.glob("*.json") if (QUALITY / path.name).exists())
    return [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names]


def kind(cell: dict[str, Any]) -> str:
    """A cell's kind and share, with -large where it has 2,000 rows."""
    return cell["cell"].partition("-seed")[0]


def table(cells: list[dict[str, Any]]) -> str:
    """Average precision by marks, start and kind; then what a decision taken after 30 marks would be."""
    kinds = sorted({kind(cell) for cell in cells})
    easy = [name for name in kinds if name in EASY]
    lines = [
        "| average precision after | " + " | ".join(f"{count} marks" for count in SHOWN) + " | unsafe rows found |",
        "|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for start, words in STARTS.items() if easy else ():
        lines.append(_line(f"{', '.join(easy)}: {words}", [cell for cell in cells if kind(cell) in easy], start))
    for name in kinds:
        own = [cell for cell in cells if kind(cell) == name]
        ceiling = np.mean([cell["ceiling"]["average_precision"] for cell in own])
        lines.append(_line(f"{name} ({len(own)} cells; taught by the true labels {ceiling:.2f})", own, "delivered"))
    lines += ["", "| a decision after 30 marks | recall | clean rows dropped | marks until 9 of 10 found at 2 % |"]
    lines.append("|---|---|---|---|")
    for name in kinds:
        own = [cell["delivered"] for cell in cells if kind(cell) == name]
        recall, lost, at_2 = (
            np.mean([cell[figure] for cell in own], 0) for figure in ("recall", "clean_dropped", "recall_at_2")
        )
        enough = np.flatnonzero(at_2 >= 0.9)
        needed = str(enough[0]) if len(enough) else f"more than {MARKS}"
        lines.append(f"| {name} | {recall[30]:.2f} | {lost[30]:.3f} | {needed} |")
    return "\n".join(lines)


def _line(words: str, cells: list[dict[str, Any]], start: str) -> str:
    mean = np.mean([cell[start]["average_precision"] for cell in cells], 0)
    found = np.mean([cell[start]["found"] for cell in cells], 0)
    return f"| {words} | " + " | ".join(f"{mean[count]:.2f}" for count in SHOWN) + f" | {found[30]:.1f} after 30 |"


def picture(cells: list[dict[str, Any]], path: Path) -> None:
    """Average precision against marks, a line a start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    easy = [cell for cell in cells if kind(cell) in EASY]
    for number, (start, words) in enumerate(STARTS.items()):
        mean = np.mean([cell[start]["average_precision"] for cell in easy], 0)
        panel.plot(mean, "--" if start == "errs" else "-", color=f"C{number}", label=words)
    panel.set(xlabel="marks by a person", ylabel="average precision", ylim=(0, 1), xlim=(0, MARKS))
    panel.set_title("5 % unsafe: bias, toxicity, mixed", fontsize="medium")
    panel.legend(fontsize="small", title="the review starts from", title_fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Review the cells named, or all at 5 % that are scored; or print the tables."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(stored()))
        picture(stored(), RESULTS / "marks.svg")
        return
    scored = sorted(path.parents[1].name for path in args.work.glob("*-5-seed-*/run/metrics.json"))
    for name in args.cells or scored:
        keep(make_cell(name, args.work / name / "run", starts_of(name)))


if __name__ == "__main__":
    main()
