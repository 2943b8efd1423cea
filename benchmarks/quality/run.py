"""How well the filter finds unsafe rows at its defaults, cell by cell.

python benchmarks/quality/run.py [CELL ...] --data_dir DATA [--work DIR]     all reported cells, or those named
python benchmarks/quality/run.py --table                      the table and results/f1.svg, from what is stored

A cell (cells.yaml) is built, filtered by the package as it is, reviewed once more on neutral rows as a
control, and written to results/CELL.json with seeds, versions, hashes and every row's scores (no text).
Cells that have a result are skipped; a cell cut off continues where it was. Rule (a) of the table is --trusted_rows
at --max_clean_loss 0.02, with half of the clean rows marked (49 at least), drawn 200 times; the two figures of what
needs no forgetting are AUROC against all clean rows and against safe rows of the kind.
"""

import json
import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, write_data
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.naive_bayes import MultinomialNB

from forgetfilter import ForgetFilter, ForgetFilterConfig, models
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decisions import Result
from forgetfilter.evaluation.filter_quality import filter_quality
from forgetfilter.scores import stored_signals
from forgetfilter.signals import measure
from forgetfilter.thresholds import conformal, fixed
from forgetfilter.training import train

RESULTS = Path(__file__).parent / "results"
TRUSTED, DRAWS = 49, 200
"""Trusted rows of rule (a) at least (half of the clean rows if that is more), and how often they are drawn."""
PAPER = {"bias": (0.823, 0.906, 0.911), "toxicity": (0.812, 0.847, 0.863), "harmfulness": (0.687, 0.722, 0.734)}
"""The paper's F1 with LLaMA-7B, on its own data, at 25, 50 and 75 % unsafe."""
Figures = dict[str, Any]


def run_cell(name: str, args: Namespace) -> None:
    """Build, filter, control, figures: one cell."""
    cell, work = dict(CELLS["report"][name]), args.work / name
    settings = cell.pop("settings", {})
    write_data(cell, args.data_dir, work)
    config = ForgetFilterConfig(output_dir=str(work / "run"), label_column="label", torch_compile=True, **settings)
    filter_ = ForgetFilter(config)
    result = filter_.fit(str(work / "noisy.jsonl"), str(work / "safe.jsonl"))
    rows = [json.loads(line) for line in (work / "noisy.jsonl").read_text(encoding="utf-8").splitlines()]
    safe = [json.loads(line) for line in (work / "safe.jsonl").read_text(encoding="utf-8").splitlines()]
    columns, paper = control(filter_, result, work, paper_rule=cell["unsafe_share"] == 0.5)
    columns["naive_bayes"] = naive_bayes(rows, safe)
    columns["decision"] = result.scores["decision"]
    columns["forgetting"] = result.scores["forgetting"]
    columns["group"] = [row["group"] for row in rows]
    manifest = result.run.manifest
    found = {
        "cell": name,
        "data": CELLS["report"][name],
        "device": f"{models.pick_device().type}, {models.pick_dtype('auto', frozen=True)}",
        **{key: manifest[key] for key in ("versions", "git_sha", "model", "noisy", "safe")},
        "seed": config.seed,
        "stages": {stage: stage_facts(manifest["stages"][stage]) for stage in config.looks[1:]},
        "rule": {key: manifest["decision"][key] for key in ("rule", "threshold", "says")},
        "figures": figures(columns) | paper,
        "rows": {key: rounded(value) for key, value in columns.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1).replace("\n   ", " ") + "\n", encoding="utf-8")
    print(json.dumps(found["figures"], indent=1), flush=True)


def stage_facts(entry: dict[str, Any]) -> Figures:
    """What a result keeps of a stage: its length and its first and last loss."""
    losses = list(entry["losses"].values())
    return {"steps": entry["steps"], "tokens": entry["tokens"], "first_loss": losses[0], "last_loss": losses[-1]}


def rounded(values: list) -> list:
    """Numbers to four digits."""
    return [round(value, 4) if isinstance(value, float) else value for value in values]


def control(filter_: ForgetFilter, result: Result, work: Path, *, paper_rule: bool) -> tuple[dict[str, list], Figures]:
    """Log-likelihoods of every model, also of one reviewed on neutral rows; figures of the paper's rule if asked."""
    config, run = filter_.config, result.run
    stored = stored_signals(run, "log_likelihood")
    learner = models.load_learner(filter_.folder, filter_.tokenizer, config)
    learner.prepare(1e9)
    examples = filter_.noisy.examples
    paper: Figures = {}
    if paper_rule:
        scores = []
        for stage in ("noisy", "review"):
            learner.restore(run.stage(stage) / "model")
            scores.append(measure(learner, examples, ["rouge1"], stage)["rouge1"].to_numpy().astype(float))
        labels = np.array([row["label"] == "unsafe" for row in result.run.rows().rows()])
        forgetting = scores[0] - scores[1]
        quality = filter_quality(labels, fixed(0.1).drops(forgetting), forgetting)
        paper = {"paper_rule": {key: quality[key] for key in ("precision", "recall", "f1", "auroc", "clean_dropped")}}
    learner.restore(run.stage("noisy") / "model")
    chat = ChatTokenizer(filter_.tokenizer, config.max_length)
    neutral = load_rows(work / "neutral.jsonl", "neutral", chat, config).examples
    with tempfile.TemporaryDirectory() as checkpoints:
        train(learner, neutral, filter_.stage("review"), Path(checkpoints), "neutral review")
    after = measure(learner, examples, ["log_likelihood"], "neutral")["log_likelihood"].to_pylist()
    return {
        "base": stored.base.tolist(),
        "noisy": stored.before.tolist(),
        "review": stored.after.tolist(),
        "firm": stored.firm.tolist(),
        "neutral": after,
    }, paper


def naive_bayes(rows: list[dict], safe: list[dict]) -> list[float]:
    """Log-odds that a row is noisy rather than safe data, by its words alone; each row's from the other four fifths."""
    texts = [f"{row['prompt']} {row['completion']}" for row in [*rows, *safe]]
    counts = CountVectorizer().fit_transform(texts)
    sides = np.array([1] * len(rows) + [0] * len(safe))
    odds = cross_val_predict(MultinomialNB(), counts, sides, cv=5, method="predict_log_proba")
    return (odds[:, 1] - odds[:, 0])[: len(rows)].tolist()


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
    base, noisy, neutral, words = (
        np.array(columns[name], float)[scored] for name in ("base", "noisy", "neutral", "naive_bayes")
    )
    found["oracle_f1"] = round(oracle_f1(unsafe, forgetting), 4)
    found["auroc_against_safe"] = auroc(unsafe, forgetting, unsafe | ~task)
    found["auroc_against_task"] = auroc(unsafe, forgetting, unsafe | task)
    without = {"m0_loss": -base, "naive_bayes": words, "neutral_review": noisy - neutral}
    for name, scores in without.items():
        found[name] = {
            "auroc": auroc(unsafe, scores),
            "auroc_against_safe": auroc(unsafe, scores, unsafe | ~task),
            "average_precision": round(float(average_precision_score(unsafe, scores)), 4),
        }
    return found


def oracle_f1(unsafe: np.ndarray, scores: np.ndarray) -> float:
    """F1 at the best of all thresholds."""
    precision, recall, _ = precision_recall_curve(unsafe, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9)))


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
    results = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    kinds = [cell["kind"] for cell in CELLS["report"].values()]

    def place(result: dict[str, Any]) -> tuple:
        data = result["data"]
        return kinds.index(data["kind"]), data["one_source"], data["unsafe_share"], data["seed"]

    return sorted(results, key=place)


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
        controls = [f.get(name, {}) for name in ("m0_loss", "naive_bayes", "neutral_review")]
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
    figure.savefig(path)


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
        if (RESULTS / f"{name}.json").exists():
            print(f"{name}: has a result; remove results/{name}.json to run it again.")
        else:
            run_cell(name, args)


if __name__ == "__main__":
    main()
