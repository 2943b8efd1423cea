"""How well the filter finds unsafe rows at its defaults, cell by cell.

python benchmarks/quality/run.py [CELL ...] --data_dir DATA [--work DIR]     all reported cells, or those named
python benchmarks/quality/run.py --table                      the tables and results/f1.svg, from what is stored

With `--config FILE.yaml --results FOLDER` another model or setting is measured: the file has flags of `filter`, such as
model_name_or_path and learning_rate. `--results FOLDER --table` then shows those figures.

A cell (cells.yaml) is built, scored and decided by the filter as it is delivered, and written to results/CELL.json with
seeds, versions, hashes and every row's scores (no text). A cell is made once, and anew if what made it has changed:
rows, settings or parameters; a cell cut off continues where it was.

Controls stand beside the filter: its witness alone (forgetting), M0's loss, words, the probe without forgetting (safe
against noisy rows), the probe of M0's loss, the probe of permuted verdicts, and the ceiling: the same hidden states
taught by the true labels, cross-fitted. Rule (a) is --trusted_rows at --max_clean_loss 0.02, with half of the clean
rows marked (49 at least), drawn 200 times. Ranges are 95 %, by 1,000 draws of the rows, the same for all scores.
"""

import json
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cells import CELLS, config_of, write_data
from sklearn.metrics import average_precision_score, roc_auc_score

from forgetfilter import ForgetFilter, ForgetFilterConfig
from forgetfilter.crossfit import CrossFit, features, verdicts_of
from forgetfilter.data.loading import load_data
from forgetfilter.decision.opened import Opened, read_scores
from forgetfilter.decision.rules import conformal
from forgetfilter.defenses import constants_of
from forgetfilter.evaluation.filter_quality import filter_quality, ranking_quality
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import sha256
from forgetfilter.filters import FILTERS
from forgetfilter.filters.probe import CLEAN_SHARE, learn_verdicts
from forgetfilter.m0 import M0
from forgetfilter.methods import arguments
from forgetfilter.model.weights import pick_device, pick_dtype
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

RESULTS = Path(__file__).parent / "results"
TRUSTED, DRAWS, RESAMPLED = 49, 200, 1000
"""Trusted rows of rule (a) at least (half of the clean rows if that is more), how often they are drawn, and how often
the rows are drawn anew for a range."""
FILTER_NAMES = ("probe", "forgetting", "m0_loss", "words")
"""The filters that score each cell; the first decides. Where the probe takes a sample of the rows, forgetting scores no
others: it is the probe's witness, and not a filter of its own, which would take hours."""
CONTROLS = ("forgetting", "m0_loss", "words", "without_forgetting", "probe_of_m0_loss", "permuted", "ceiling")
PAPER = {"bias": (0.823, 0.906, 0.911), "toxicity": (0.812, 0.847, 0.863)}
"""The paper's F1 with LLaMA-7B, on its own data, at 25, 50 and 75 % unsafe."""
Figures = dict[str, Any]


def build_cell(name: str, data_dir: Path, work: Path, **flags: Any) -> ForgetFilterConfig:
    """Write a cell's rows into a folder; returns the settings, with other flags of `filter` if any are given."""
    cell = dict(CELLS["report"][name])
    settings = cell.pop("filter_settings", {}) | flags
    write_data(cell, data_dir, work)
    names = [of for of in FILTER_NAMES if of != "forgetting" or "sample_rows" not in settings]
    return config_of(work, filter=",".join(names), **settings)


def make_cell(name: str, data_dir: Path, work: Path, results: Path = RESULTS, **flags: Any) -> Cell:
    """Build, score, decide, figures: one cell, kept in the folder of results by what made it."""
    config = build_cell(name, data_dir, work, **flags)

    def make() -> Cell:
        result = ForgetFilter(config).fit()
        columns = scores_of_rows(result.run, work)
        shown = {key: result.metrics[key] for key in ("rule", "threshold", "says")}
        about_run = about(result.run, work)
        cell = {"cell": name, "data": CELLS["report"][name], **about_run, "rule": shown}
        return {**cell, "figures": figures(columns), "rows": columns}

    return Cells(results).once(name, what_makes(name, config, work), make)


def what_makes(name: str, config: ForgetFilterConfig, work: Path) -> Cell:
    """What a cell's figures depend on: the rows, the settings, and every parameter of the filters."""
    return {
        "data": CELLS["report"][name],
        "files": {part: sha256(work / f"{part}.jsonl") for part in ("noisy", "safe")},
        "parameters": {of: arguments(of, FILTERS[of], config.parameters) for of in config.filters},
        "constants": {of: constants_of(of, config) for of in config.filters},
        "settings": config.identity(),
        "decision": config.decision(),
    }


def about(run: Run, work: Path) -> Figures:
    """Device, versions, hashes, and the length and losses of each stage; about.json tells of stages done elsewhere."""
    noted = {"device": f"{pick_device().type}, {pick_dtype('auto', frozen=True)}", "versions": run.manifest["versions"]}
    stages = {part: entry for part, entry in run.manifest["stages"].items() if "losses" in entry}
    if (work / "about.json").exists():
        found = json.loads((work / "about.json").read_text(encoding="utf-8"))
        noted |= {key: found[key] for key in ("device", "versions")}
        stages = found["stages"]
    return {
        **noted,
        **{key: run.manifest[key] for key in ("model", "noisy", "safe")},
        "seed": run.config().seed,
        "stages": {part.partition("-")[0]: stage_facts(entry) for part, entry in stages.items()},
    }


def stage_facts(entry: dict[str, Any]) -> Figures:
    """What a result keeps of a stage: its length and its first and last loss."""
    losses = list(entry["losses"].values())
    return {"steps": entry["steps"], "tokens": entry["tokens"], "first_loss": losses[0], "last_loss": losses[-1]}


def scores_of_rows(run: Run, work: Path) -> dict[str, list]:
    """Every row's scores by the filters and the controls, decision and group."""
    rows = [json.loads(line) for line in (work / "noisy.jsonl").read_text(encoding="utf-8").splitlines()]
    unsafe = np.array([row["label"] == "unsafe" for row in rows])
    opened = Opened.of(run)
    columns = {"forgetting": opened.scored["probe"].columns["forgetting"]}
    columns |= {name: scored.suspicion for name, scored in opened.scored.items()}
    columns |= controls(run, opened, columns["forgetting"], unsafe)
    found: dict[str, list] = {}
    for name, scores in columns.items():
        found[name] = [None if np.isnan(score) else round(float(score), 4) for score in scores]
    found |= {"decision": read_scores(run)["decision"].to_pylist(), "group": [row["group"] for row in rows]}
    return found


def controls(run: Run, opened: Opened, forgetting: np.ndarray, unsafe: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by probes that learn from something else than forgetting's verdicts."""
    m0 = M0.named(opened.config)
    data = load_data(opened.config, m0.chat)
    workshop = Workshop(m0, opened.config, run)
    noisy, safe = (features(states) for states in workshop.states_of(data))
    judge = CrossFit(noisy, safe)
    loss = opened.scored["m0_loss"]
    mixed = np.random.default_rng(0).permutation(verdicts_of(forgetting, 0.25, CLEAN_SHARE))
    verdicts = {"without_forgetting": np.ones(len(noisy))}
    if unsafe.any():
        verdicts["ceiling"] = unsafe.astype(float)
    judged = {name: judge(own) for name, own in verdicts.items()}
    judged["permuted"] = CrossFit(noisy, safe[:0])(mixed)  # safe rows would teach it something all the same
    found = {name: own.noisy for name, own in judged.items() if own is not None}
    return found | {"probe_of_m0_loss": learn_verdicts(loss.suspicion, loss.scale, judge).suspicion}


def figures(columns: dict[str, list]) -> Figures:
    """All figures of a cell, from its rows' scores."""
    groups = np.array(columns["group"])
    unsafe = np.array([group.endswith("/unsafe") for group in groups])
    task = np.array([group.startswith("task/") for group in groups])
    suspicion = np.array(columns["probe"], float)
    dropped = np.array(columns["decision"]) == "dropped"
    found: Figures = filter_quality(unsafe, dropped, suspicion)
    found["dropped"] = round(float(dropped.mean()), 4)
    found["dropped_by_group"] = {group: round(float(dropped[groups == group].mean()), 4) for group in sorted({*groups})}
    scored = ~np.isnan(suspicion)
    suspicion, unsafe, task = suspicion[scored], unsafe[scored], task[scored]
    found["trusted"] = trusted_rule(suspicion, unsafe)
    if not unsafe.any():
        return found
    found |= ranking_quality(unsafe, suspicion)
    found["auroc_against_safe"] = auroc(unsafe, suspicion, unsafe | ~task)
    found["auroc_against_task"] = auroc(unsafe, suspicion, unsafe | task)
    own = {name: np.array(columns[name], float)[scored] for name in ("probe", *CONTROLS) if name in columns}
    found["controls"] = {name: ranking(unsafe, scores) for name, scores in own.items() if name != "probe"}
    found["ranges"] = ranges(unsafe, dropped[scored], {name: own[name] for name in ("probe", "forgetting")})
    return found


def ranking(unsafe: np.ndarray, scores: np.ndarray) -> Figures:
    """AUROC, average precision, best F1, recall at 1 and 2 % of the clean rows lost, of the rows that have a score."""
    unsafe, scores = unsafe[~np.isnan(scores)], scores[~np.isnan(scores)]
    precision = round(float(average_precision_score(unsafe, scores)), 4)
    return {"auroc": auroc(unsafe, scores), "average_precision": precision, **ranking_quality(unsafe, scores)}


def auroc(labels: np.ndarray, scores: np.ndarray, among: np.ndarray | None = None) -> float:
    """AUROC among some of the rows."""
    chosen = np.ones(len(labels), bool) if among is None else among
    return round(float(roc_auc_score(labels[chosen], scores[chosen])), 4)


def ranges(unsafe: np.ndarray, dropped: np.ndarray, scores: dict[str, np.ndarray]) -> Figures:
    """95 % ranges of AUROC and average precision by each score, of F1, and of the first score's lead."""
    rng = np.random.default_rng(0)
    first, second = scores
    known = {name: ~np.isnan(own) for name, own in scores.items()}
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLED):
        rows = rng.integers(0, len(unsafe), len(unsafe))
        labels = unsafe[rows]
        if not 0 < labels.sum() < len(labels):
            continue
        made = {"f1": 2 * (labels & dropped[rows]).sum() / max(1, labels.sum() + dropped[rows].sum())}
        for name, own in scores.items():
            has = known[name][rows]
            made[f"auroc by {name}"] = roc_auc_score(labels[has], own[rows][has])
            made[f"average precision by {name}"] = average_precision_score(labels[has], own[rows][has])
        for figure in ("auroc", "average precision") if known[second].all() else ():
            made[f"{figure}, {first} - {second}"] = made[f"{figure} by {first}"] - made[f"{figure} by {second}"]
        for key, value in made.items():
            drawn.setdefault(key, []).append(float(value))
    return {key: [round(float(q), 3) for q in np.quantile(own, [0.025, 0.975])] for key, own in drawn.items()}


def trusted_rule(suspicion: np.ndarray, unsafe: np.ndarray) -> Figures | None:
    """Rule (a): clean rows lost and recall, over many draws of the trusted rows; None with too few clean rows."""
    clean = np.flatnonzero(~unsafe)
    count = max(TRUSTED, len(clean) // 2)
    if count >= len(clean):
        return None
    rng, lost, recall = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        trusted = np.isin(np.arange(len(unsafe)), rng.choice(clean, count, replace=False))
        drops = conformal(suspicion, trusted, 0.02).drops(suspicion)
        lost.append(drops[~unsafe & ~trusted].mean())
        recall.append(drops[unsafe].mean() if unsafe.any() else np.nan)
    return {
        "trusted_rows": count,
        "clean_dropped": round(float(np.mean(lost)), 4),
        "recall": round(float(np.mean(recall)), 4) if unsafe.any() else None,
    }


def stored(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every stored result, in the order of cells.yaml."""
    order = list(CELLS["report"])
    return sorted(Cells(results).all(), key=lambda result: order.index(result["cell"]))


def show(value: float | None) -> str:
    """A figure as the tables show it; empty for none."""
    return "" if value is None or np.isnan(value) else f"{value:.3f}".removeprefix("0")


def table(results: list[dict[str, Any]]) -> str:
    """A line of Markdown for every result: the filter, its controls, and averages."""
    head = "cell | F1 (95 %) | best F1 | clean dropped | recall at 1, 2 % | rule (a): clean dropped, recall | AUROC"
    head += " | average precision (95 %) | " + " | ".join(f"{name}: AUROC, AP" for name in CONTROLS)
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for result in results:
        f = result["figures"]
        if f["f1"] is None:
            cells = ["", "", show(f["clean_dropped"])]
        else:
            low, high = (f["ranges"][key] for key in ("f1", "average precision by probe"))
            trusted = f["trusted"] or {}
            cells = [f"{show(f['f1'])} ({show(low[0])}-{show(low[1])})", show(f["best_f1"]), show(f["clean_dropped"])]
            cells += [f"{show(f['recall_at_1'])}, {show(f['recall_at_2'])}"]
            cells += [f"{show(trusted.get('clean_dropped'))}, {show(trusted.get('recall'))}", show(f["auroc"])]
            cells += [f"{show(f['average_precision'])} ({show(high[0])}-{show(high[1])})"]
            beside = [f["controls"].get(name, {}) for name in CONTROLS]
            cells += [f"{show(own['auroc'])}, {show(own['average_precision'])}" if own else "" for own in beside]
        cells += [""] * (head.count("|") - len(cells))
        lines.append(f"| {result['cell']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *averages(results)])


def averages(results: list[dict[str, Any]]) -> list[str]:
    """By kind: how far F1 lies below the best threshold's from a quarter of unsafe rows on; rule (a); clean data."""
    gaps: dict[str, list[float]] = {}
    idle: dict[str, int] = {}
    for result in results:
        f, kind = result["figures"], result["data"]["kind"]
        if result["data"]["unsafe_share"] >= 0.25:
            own = gaps.setdefault(kind, [])
            if f["dropped"]:
                own.append(100 * (f["best_f1"] - f["f1"]))
            else:
                idle[kind] = idle.get(kind, 0) + 1
    lines = []
    for kind, own in gaps.items():
        said = [f"nothing dropped in {idle[kind]} cells"] if kind in idle else []
        if own:
            said.insert(
                0, f"F1 below the best threshold by {statistics.mean(own):.1f} points on average of {len(own)} cells"
            )
        lines.append(f"{kind}: {'; '.join(said)}")
    lost = [result["figures"]["trusted"]["clean_dropped"] for result in results if result["figures"]["trusted"]]
    clean = [r["figures"]["clean_dropped"] for r in results if r["figures"]["f1"] is None]
    if lost:
        lines.append(f"rule (a): {statistics.mean(lost):.3f} of the clean rows on average, {max(lost):.3f} at most")
    if clean:
        lines.append(f"clean data: {max(clean):.3f} dropped at most, in {len(clean)} cells")
    return lines


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """F1 over the share of unsafe rows, a panel a kind."""
    import matplotlib
    from matplotlib.figure import Figure

    marks = {"f1": "o", "best_f1": "^", "flag_all_f1": "_"}
    names = {"f1": "auto", "best_f1": "best threshold", "flag_all_f1": "dropping everything"}
    kinds = ("bias", "toxicity", "mixed")
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        cells = [r for r in results if r["data"]["kind"] == kind and r["data"]["unsafe_share"] > 0]
        shares = [100 * r["data"]["unsafe_share"] for r in cells]
        for number, (name, mark) in enumerate(marks.items()):
            panel.plot(shares, [r["figures"][name] for r in cells], mark, color=f"C{number}", label=names[name])
        if kind in PAPER:
            panel.plot([25, 50, 75], PAPER[kind], "x", color="black", label="the paper, LLaMA-7B")
        panel.set_title(kind)
        panel.set_xlabel("% unsafe")
        panel.set_ylim(0, 1)
    figure.axes[0].set_ylabel("F1")
    figure.axes[0].legend(loc="lower right", fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same figure gives the same file
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the cells that have no result yet, or print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS["report"], []], metavar="CELL")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.table:
        print(table(stored(args.results)))
        picture(stored(args.results), args.results / "f1.svg")
        return
    if args.data_dir is None:
        sys.exit("error: --data_dir is missing: the folder of the public data sets.")
    if args.config is not None and args.results == RESULTS:
        sys.exit("error: --config needs --results FOLDER: the stored figures are those of the defaults.")
    flags = {} if args.config is None else yaml.safe_load(args.config.read_text(encoding="utf-8"))
    for name in args.cells or CELLS["report"]:
        cell = make_cell(name, args.data_dir, args.work / name, args.results, **flags)
        print(name, json.dumps(cell["figures"], indent=1), flush=True)


if __name__ == "__main__":
    main()
