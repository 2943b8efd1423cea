"""How well the filter finds unsafe rows at its defaults, cell by cell.

python benchmarks/quality/run.py [CELL ...] --data_dir DATA [--work DIR]     all reported cells, or those named
python benchmarks/quality/run.py --table                      the table and results/f1.svg, from what is stored

A cell (cells.yaml) is built, scored by the default filter and by controls (recipe `filters`), and written to
results/CELL.json with seeds, versions, hashes and every row's scores (no text). A cell is made once, and anew if what
made it has changed: rows, settings or parameters; a cell cut off continues where it was. Rule (a) of the table is
--trusted_rows at --max_clean_loss 0.02, with half of the clean rows marked (49 at least), drawn 200 times; the two
figures of what needs no forgetting are AUROC against all clean rows and against safe rows of the kind.
"""

import json
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, config_of, write_data
from sklearn.metrics import average_precision_score, roc_auc_score

from forgetfilter import ForgetFilterConfig
from forgetfilter.decision.rules import conformal
from forgetfilter.evaluation.filter_quality import best_f1, filter_quality
from forgetfilter.experiments import filters
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import sha256
from forgetfilter.filters import FILTERS
from forgetfilter.methods import arguments
from forgetfilter.model.weights import pick_device, pick_dtype
from forgetfilter.runs import Run

RESULTS = Path(__file__).parent / "results"
TRUSTED, DRAWS = 49, 200
"""Trusted rows of rule (a) at least (half of the clean rows if that is more), and how often they are drawn."""
PAPER = {"bias": (0.823, 0.906, 0.911), "toxicity": (0.812, 0.847, 0.863), "harmfulness": (0.687, 0.722, 0.734)}
"""The paper's F1 with LLaMA-7B, on its own data, at 25, 50 and 75 % unsafe."""
CONTROLS = ("m0_loss", "words", "neutral_review")
"""The filters that need no forgetting of safe data."""
FILTERS_COMPARED, PAPERS = ("forgetting", *CONTROLS), "forgetting_rouge1"
"""Those of every cell, and the paper's, which scores the cells of which half are unsafe."""
Figures = dict[str, Any]


def build_cell(name: str, data_dir: Path, work: Path) -> tuple[ForgetFilterConfig, list[str]]:
    """Write a cell's rows into a folder; returns the settings, and the filters that score it."""
    cell = dict(CELLS["report"][name])
    settings = cell.pop("settings", {})
    write_data(cell, data_dir, work)
    config = config_of(
        work, parameters={"neutral_review": {"neutral_dataset_name": str(work / "neutral.jsonl")}}, **settings
    )
    return config, [*FILTERS_COMPARED, *([PAPERS] if cell["unsafe_share"] == 0.5 else [])]


def make_cell(name: str, data_dir: Path, work: Path) -> Cell:
    """Build, score by every filter, figures: one cell, kept in results/ by what made it."""
    config, names = build_cell(name, data_dir, work)

    def make() -> Cell:
        shown, *_ = filters.compare(config, filters.Settings(filters=names))
        found = json.loads(shown.read_text(encoding="utf-8"))["cells"]
        return {"cell": name, "data": CELLS["report"][name], **about(Run.open(work / "run")), **summary(found, work)}

    return Cells(RESULTS).once(name, what_makes(name, config, names, work), make)


def what_makes(name: str, config: ForgetFilterConfig, names: list[str], work: Path) -> Cell:
    """What a cell's figures depend on: the rows, the settings, and every parameter of the filters."""
    parameters = {of: arguments(of, FILTERS[of], config.parameters) for of in names}
    parameters["neutral_review"]["neutral_dataset_name"] = "neutral.jsonl"  # its rows count, not its place
    return {
        "data": CELLS["report"][name],
        "files": {part: sha256(work / f"{part}.jsonl") for part in ("noisy", "safe", "neutral")},
        "parameters": parameters,
        "constants": {of: filters.filter_constants(of) for of in names},
        "settings": config.identity(),
        "decision": config.decision(),
    }


def about(run: Run) -> Figures:
    """Device, versions, hashes, and the length and losses of each stage."""
    stages = {part.partition("-")[0]: entry for part, entry in run.manifest["stages"].items() if "losses" in entry}
    return {
        "device": f"{pick_device().type}, {pick_dtype('auto', frozen=True)}",
        **{key: run.manifest[key] for key in ("versions", "git_sha", "model", "noisy", "safe")},
        "seed": run.config().seed,
        "stages": {name: stage_facts(entry) for name, entry in stages.items()},
    }


def summary(found: dict[str, list[Cell]], work: Path) -> Figures:
    """Rule, figures and every row's scores, from what the recipe made of each filter."""
    rows = [json.loads(line) for line in (work / "noisy.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {name: own["suspicion"] for name, (own,) in found.items()}
    (forgetting,) = found["forgetting"]
    columns |= {"decision": forgetting["decision"], "group": [row["group"] for row in rows]}
    made = figures(columns)
    if PAPERS in found:
        paper = found[PAPERS][0]["figures"]
        made["paper_rule"] = {key: paper[key] for key in ("precision", "recall", "f1", "auroc", "clean_dropped")}
    return {
        "rule": {key: forgetting["figures"][key] for key in ("rule", "threshold", "says")},
        "figures": made,
        "rows": columns,
    }


def stage_facts(entry: dict[str, Any]) -> Figures:
    """What a result keeps of a stage: its length and its first and last loss."""
    losses = list(entry["losses"].values())
    return {"steps": entry["steps"], "tokens": entry["tokens"], "first_loss": losses[0], "last_loss": losses[-1]}


def figures(columns: dict[str, list]) -> Figures:
    """All figures of a cell, from its rows' scores."""
    groups = np.array(columns["group"])
    unsafe = np.array([group.endswith("/unsafe") for group in groups])
    task = np.array([group.startswith("task/") for group in groups])
    forgetting = np.array(columns["forgetting"], float)
    dropped = np.array(columns["decision"]) == "dropped"
    found: Figures = filter_quality(unsafe, dropped, forgetting)
    found["dropped"] = round(float(dropped.mean()), 4)
    found["dropped_by_group"] = {group: round(float(dropped[groups == group].mean()), 4) for group in sorted({*groups})}
    scored = ~np.isnan(forgetting)
    forgetting, unsafe, task = forgetting[scored], unsafe[scored], task[scored]
    found["trusted"] = trusted_rule(forgetting, unsafe)
    if not unsafe.any():
        return found
    found["oracle_f1"] = round(best_f1(unsafe, forgetting), 4)
    found["auroc_against_safe"] = auroc(unsafe, forgetting, unsafe | ~task)
    found["auroc_against_task"] = auroc(unsafe, forgetting, unsafe | task)
    for name in CONTROLS:
        scores = np.array(columns[name], float)[scored]
        found[name] = {
            "auroc": auroc(unsafe, scores),
            "auroc_against_safe": auroc(unsafe, scores, unsafe | ~task),
            "average_precision": round(float(average_precision_score(unsafe, scores)), 4),
        }
    return found


def auroc(labels: np.ndarray, scores: np.ndarray, among: np.ndarray | None = None) -> float:
    """AUROC among some of the rows."""
    chosen = np.ones(len(labels), bool) if among is None else among
    return round(float(roc_auc_score(labels[chosen], scores[chosen])), 4)


def trusted_rule(forgetting: np.ndarray, unsafe: np.ndarray) -> Figures | None:
    """Rule (a): clean rows lost and recall, over many draws of the trusted rows; None with too few clean rows."""
    clean = np.flatnonzero(~unsafe)
    count = max(TRUSTED, len(clean) // 2)
    if count >= len(clean):
        return None
    rng, lost, recall = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        trusted = np.isin(np.arange(len(unsafe)), rng.choice(clean, count, replace=False))
        drops = conformal(forgetting, trusted, 0.02).drops(forgetting)
        lost.append(drops[~unsafe & ~trusted].mean())
        recall.append(drops[unsafe].mean() if unsafe.any() else np.nan)
    return {
        "trusted_rows": count,
        "clean_dropped": round(float(np.mean(lost)), 4),
        "recall": round(float(np.mean(recall)), 4) if unsafe.any() else None,
    }


def stored() -> list[dict[str, Any]]:
    """Every stored result: by kind, those of one source last, then by share and seed."""
    kinds = [cell["kind"] for cell in CELLS["report"].values()]

    def place(result: dict[str, Any]) -> tuple:
        data = result["data"]
        return kinds.index(data["kind"]), data["one_source"], data["unsafe_share"], data["seed"]

    return sorted(Cells(RESULTS).all(), key=place)


def table(results: list[dict[str, Any]]) -> str:
    """Every result in a line of Markdown, and averages."""
    head = "cell | F1 | best F1 | drop all | the paper, LLaMA-7B | AUROC | against safe | against task"
    head += " | average precision | clean dropped | rule (a): clean dropped / recall | paper's rule: F1"
    head += " | M0's loss | naive Bayes | neutral review"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}".removeprefix("0")

    for result in results:
        f, data = result["figures"], result["data"]
        papers = dict(zip((0.25, 0.5, 0.75), PAPER.get(data["kind"], ()), strict=False))
        cells = [f["f1"], f.get("oracle_f1"), f["flag_all_f1"]]
        cells += [None if data["one_source"] else papers.get(data["unsafe_share"])]
        cells += [f["auroc"], f.get("auroc_against_safe"), f.get("auroc_against_task")]
        shown = [show(value) for value in (*cells, f["average_precision"], f["clean_dropped"])]
        trusted = f["trusted"] or {}
        shown.append(f"{show(trusted.get('clean_dropped'))} / {show(trusted.get('recall'))}" if trusted else "")
        shown.append(show(f.get("paper_rule", {}).get("f1")))
        controls = [f.get(name, {}) for name in CONTROLS]
        shown += [
            " / ".join(show(own[key]) for key in ("auroc", "auroc_against_safe")) if own else "" for own in controls
        ]
        lines.append(f"| {result['cell']} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *averages(results)])


def averages(results: list[dict[str, Any]]) -> list[str]:
    """How far F1 lies below the best threshold's where a quarter of the rows or more are unsafe, and rule (a)."""
    gaps: dict[str, list[float]] = {}
    for result in results:
        f, data = result["figures"], result["data"]
        if data["unsafe_share"] >= 0.25:
            name = data["kind"] + ", one source" * data["one_source"]
            gaps.setdefault(name, []).append(100 * (f["oracle_f1"] - f["f1"]))
    lines = [
        f"{name}: F1 below the best threshold by {statistics.mean(own):.1f} points on average of {len(own)} cells"
        for name, own in gaps.items()
    ]
    lost = [result["figures"]["trusted"]["clean_dropped"] for result in results if result["figures"]["trusted"]]
    return [*lines, f"rule (a): {statistics.mean(lost):.3f} of the clean rows on average, {max(lost):.3f} at most"]


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """F1 over the share of unsafe rows, a panel a kind."""
    import matplotlib
    from matplotlib.figure import Figure

    marks = {"f1": "o", "oracle_f1": "^", "flag_all_f1": "_"}
    names = {"f1": "auto", "oracle_f1": "best threshold", "flag_all_f1": "dropping everything"}
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, len(PAPER), sharey=True)
    for panel, (kind, paper) in zip(panels, PAPER.items(), strict=True):
        cells = [r for r in results if r["data"]["kind"] == kind and not r["data"]["one_source"]]
        cells = [r for r in cells if r["data"]["unsafe_share"] > 0]
        shares = [100 * r["data"]["unsafe_share"] for r in cells]
        for number, (name, mark) in enumerate(marks.items()):
            values = [r["figures"][name] for r in cells]
            panel.plot(shares, values, mark, color=f"C{number}", label=names[name], markersize=8)
        panel.plot([25, 50, 75], paper, "x", color="black", label="the paper, LLaMA-7B")
        panel.set_title(kind)
        panel.set_xlabel("% unsafe")
    panels[0].set_ylabel("F1")
    panels[0].set_ylim(0, 1)
    panels[-1].legend(loc="lower right", fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same figure gives the same file
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the cells that have no result yet, or print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(stored()))
        picture(stored(), RESULTS / "f1.svg")
        return
    if args.data_dir is None:
        sys.exit("error: --data_dir is missing: the folder of the public data sets.")
    for name in args.cells or CELLS["report"]:
        print(name, json.dumps(make_cell(name, args.data_dir, args.work / name)["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
