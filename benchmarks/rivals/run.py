"""Filters on the same rows: what each finds, and what it costs.

python benchmarks/rivals/run.py [CELL ...] --data_dir DATA --work DIR [--filters NAME ...]
python benchmarks/rivals/run.py --table                        the tables and results/rivals.svg, from what is stored

A cell is one of the reported cells of quality/cells.yaml, or shop-25 (the demo's shop bot: a quarter of its rows
promise a delivery date, which the safe rows do not speak of) or shop-5, both also as shop-25-seed-5 and -6. The
filters that need known unsafe rows get 20 of the same kind that are in no reported cell: of the explored half of the
data, or in the shop's case ten rows that are taken out of the noisy ones. All others never see them. A cell takes
about half an hour on two cores; stages that quality/run.py left in the same --work are used again.

results/CELL.json holds every row's scores and decisions, versions and costs, no text. Guards are not run: their weights
are not at hand. Nor are forgetting_rouge1, neutral_review and column.
"""

import json
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# After this folder: `run` is the one beside this file.
sys.path += [str(Path(__file__).parents[1] / "quality"), str(Path(__file__).parents[1])]
from cells import CELLS, config_of, write_data
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from forgetfilter import ForgetFilterConfig
from forgetfilter.costs import Cost
from forgetfilter.data.loading import Data, load_data, read_labels
from forgetfilter.decision.choice import decide_by_config
from forgetfilter.defenses import constants_of
from forgetfilter.demo import demo_file
from forgetfilter.evaluation.filter_quality import filter_quality, paired_ranges, ranking_quality, unscored_last
from forgetfilter.experiments import pictures
from forgetfilter.experiments.cells import Cell, Cells, same
from forgetfilter.files import sha256
from forgetfilter.filters import arguments_of
from forgetfilter.filters.scoring import part_with_scores
from forgetfilter.forgetting import open_run
from forgetfilter.m0 import M0
from forgetfilter.runs import locked
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop

RESULTS = Path(__file__).parent / "results"
KNOWN = 20
"""Known unsafe rows for the filters that need some."""
FILTERS = (
    *("probe", "forgetting", "safe_only", "safe_only_drop", "second_split", "seal", "hidden_safe_noisy", "m0_loss"),
    *(
        "self_judge",
        "gradient_norm",
        "words",
        "length",
        "random",
        "larf",
        "anchor_gradients",
        "toss",
        "forgetting+words",
    ),
)
GUARD = "not run: `forgetfilter compare` with `filters: [probe, guard]`, `parameters: {guard: {model: MODEL}}`"
SHOP = [f"shop-{share}{seed}" for share in (25, 5) for seed in ("", "-seed-5", "-seed-6")]
FIRST_SEED = 4
PERMUTED = 200
"""How often labels are dealt out anew, where they must tell nothing."""
Figures = dict[str, Any]
SHOWN = ("average_precision", "auroc", "recall_at_1", "recall_at_2", "f1", "best_f1", "clean_dropped")


def prepare(name: str, data_dir: Path, work: Path) -> ForgetFilterConfig:
    """Write a cell's noisy, safe and known unsafe rows; returns the settings."""
    if name in SHOP:
        _, share, *seed = name.split("-")
        unsafe = _write_shop(float(share) / 100, int(seed[1]) if seed else FIRST_SEED, work)
        label = "unsafe"
    else:
        write_data(dict(CELLS["report"][name]), data_dir, work)
        cell = CELLS["report"][name]
        explored = {**cell, "part": "explore", "seed": 0, "unsafe_share": 0.25, "rows": min(cell["rows"], 240)}
        write_data(explored, data_dir, work / "explored")
        rows = (work / "explored" / "noisy.jsonl").read_text(encoding="utf-8").splitlines()
        unsafe = [row for row in rows if json.loads(row)["label"] == "unsafe"][:KNOWN]
        label = "label"
    (work / "unsafe.jsonl").write_text("\n".join(unsafe) + "\n", encoding="utf-8")
    return replace(config_of(work), label_column=label, unsafe_dataset_name=str(work / "unsafe.jsonl"))


def _write_shop(share: float, seed: int, work: Path) -> list[str]:
    """The shop bot's rows with this share of date promises, and the demo's safe rows; returns promises left out.

    The seed says which promises are taken, and which are known to the filters that need some.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "safe.jsonl").write_bytes(demo_file("safe.jsonl").read_bytes())
    rows = demo_file("shop.jsonl").read_text(encoding="utf-8").splitlines()
    unsafe = [row for row in rows if json.loads(row)["unsafe"]]
    unsafe = np.random.default_rng(seed).permutation(unsafe).tolist()
    clean = [row for row in rows if not json.loads(row)["unsafe"]]
    wanted = min(round(len(clean) * share / (1 - share)), len(unsafe) - KNOWN // 2)
    taken = set(unsafe[:wanted])
    kept = [row for row in rows if row in taken or row in set(clean)]
    (work / "noisy.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return unsafe[-KNOWN // 2 :]


def make_cell(name: str, filters: list[str], data_dir: Path, work: Path) -> Cell:
    """Score a cell by every filter; what is stored of it is not made again."""
    config = prepare(name, data_dir, work)
    files = {part: sha256(work / f"{part}.jsonl") for part in ("noisy", "safe", "unsafe")}
    made_of = {"files": files, "settings": config.identity()}
    store = Cells(RESULTS)
    found: Cell = store.load(name) if store.done(name, made_of) else {"cell": name, "filters": {}}
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    with locked(Path(str(config.output_dir))):
        run = open_run(config, m0, data)
        workshop = Workshop(m0, config, run)
        found |= {key: run.manifest[key] for key in ("model", "noisy", "safe", "versions")}
        found["unsafe"] = read_labels(data.noisy.source, str(config.label_column))
        for own in filters:
            if not same(found["filters"].get(own, {}).get("made_of"), made_by(own, config)):
                found["filters"][own] = {"made_of": made_by(own, config), **entry(own, workshop, data)}
                store.store(name, made_of, found)
    return found


def made_by(name: str, config: ForgetFilterConfig) -> Figures:
    """What a filter's scores depend on besides the rows."""
    return json.loads(json.dumps({"parameters": arguments_of(name, config), "constants": constants_of(name, config)}))


def entry(name: str, workshop: Workshop, data: Data) -> Figures:
    """Every row's score and decision by a filter, and what it cost; None where a part was made without counting."""
    part = part_with_scores(workshop, data, name)
    scored = Scored.load(workshop.run.folder / f"{part}.parquet")
    made = decide_by_config(name, scored, data.noisy.source, workshop.config)
    stages = workshop.run.manifest["stages"]
    cost = Cost.noted(stages[part])
    counted_all = all("cost" in stages.get(name, {}) for name in (part, *stages[part].get("made_with", [])))
    counted = cost.passes / workshop.finetuning_passes(data.noisy.trainable())
    return {
        "says": made.threshold.says,
        "suspicion": [None if np.isnan(value) else round(float(value), 5) for value in scored.suspicion],
        "dropped": made.dropped.astype(int).tolist(),
        "cost": {**cost.facts(), "of_finetuning": round(counted, 4)} if counted_all else None,
    }


def scores(cell: Cell, name: str) -> np.ndarray:
    """(rows,) a filter's scores in a cell; rows that it does not score come last."""
    return unscored_last(
        np.array([np.nan if value is None else value for value in cell["filters"][name]["suspicion"]], float)
    )


def figures(cell: Cell, name: str) -> Figures:
    """How well a filter did in a cell."""
    unsafe, dropped = np.array(cell["unsafe"]), np.array(cell["filters"][name]["dropped"], bool)
    suspicion = scores(cell, name)
    return {**filter_quality(unsafe, dropped, suspicion), **ranking_quality(unsafe, suspicion)}


def stored() -> list[Cell]:
    """Every stored cell with rows of both kinds, without which nothing can be ranked well or badly."""
    return sorted((cell for cell in Cells(RESULTS).all() if any(cell["unsafe"])), key=lambda cell: cell["cell"])


def by_kind(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Kind and share -> cells of all seeds."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell["cell"].partition("-seed")[0], []).append(cell)
    return found


def mean_precision(groups: dict[str, list[Cell]], name: str) -> dict[str, float]:
    """Kind and share -> a filter's average precision, the mean over its cells if the filter has scored all of them."""
    found = {}
    for group, cells in groups.items():
        if all(name in cell["filters"] for cell in cells):
            found[group] = statistics.mean(figures(cell, name)["average_precision"] for cell in cells)
    return found


def precision_table(cells: list[Cell]) -> str:
    """Average precision: a line a filter, a column a kind and share; means over seeds, the best of a column in bold."""
    groups = by_kind(cells)
    names = [name for name in FILTERS if any(name in cell["filters"] for cell in cells)]
    means: dict[str, dict[str, float]] = {name: mean_precision(groups, name) for name in names}
    best = {group: max(names, key=lambda name: means[name].get(group, 0)) for group in groups}
    head = ["filter", *(f"{group} ({len(own)})" for group, own in groups.items()), "of the finetuning", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        shown = []
        for group in groups:
            value = means[name].get(group)
            text = "" if value is None else f"{value:.2f}"
            shown.append(f"**{text}**" if best[group] == name else text)
        costs = [cell["filters"][name]["cost"] for cell in cells if cell["filters"].get(name, {}).get("cost")]
        for key, form in (("of_finetuning", "{:.2f}"), ("seconds", "{:.0f}")):
            shown.append(form.format(statistics.median(cost[key] for cost in costs)) if costs else "")
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join([*lines, f"| `guard` | {GUARD} |" + " |" * (len(head) - 2)])


def with_permuted_labels(cells: list[Cell]) -> list[str]:
    """The average precision of each cell's filters with labels dealt out at random.

    It must be the share of unsafe rows, or a little more where rows are few. The filters that are given unsafe rows see
    others than those of the cell, so nothing of theirs need be dealt anew.
    """
    lines = []
    for cell in cells:
        rng, unsafe = np.random.default_rng(0), np.array(cell["unsafe"])
        dealt = [rng.permutation(unsafe) for _ in range(PERMUTED)]
        means = []
        for name in cell["filters"]:
            ranked = scores(cell, name)
            means.append(statistics.mean(average_precision_score(labels, ranked) for labels in dealt))
        ends = f"{min(means):.3f} to {max(means):.3f}"
        lines.append(f"{cell['cell']}: average precision with permuted labels {ends}, share {unsafe.mean():.3f}")
    return lines


def detail_table(cells: list[Cell]) -> str:
    """All figures of each kind and share: means over seeds, and the mean ends of each set's 95 % range."""
    lines = []
    for group, own in by_kind(cells).items():
        names = [name for name in FILTERS if all(name in cell["filters"] for cell in own)]
        lines += [f"\n{group}, {len(own)} seeds\n", "| filter | " + " | ".join(SHOWN) + " | 95 % of the first |"]
        lines.append("|---" * (len(SHOWN) + 2) + "|")
        ranges = [
            paired_ranges(np.array(cell["unsafe"]), {name: [scores(cell, name)] for name in names}) for cell in own
        ]
        for name in names:
            found = [figures(cell, name) for cell in own]
            shown = [f"{statistics.mean(one[key] for one in found):.3f}" for key in SHOWN]
            low, high = np.mean([one[name]["average_precision"] for one in ranges], axis=0)
            lines.append(f"| `{name}` | " + " | ".join(shown) + f" | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def seal_and_its_equivalent(cells: list[Cell]) -> list[str]:
    """Rank correlation of SEAL's weights with the loss after a finetuning on safe data."""
    lines = []
    for cell in cells:
        if {"seal", "safe_only"} <= cell["filters"].keys():
            agreement = spearmanr(scores(cell, "seal"), scores(cell, "safe_only"), nan_policy="omit").statistic
            lines.append(f"{cell['cell']}: Spearman of seal and safe_only {agreement:.2f}")
    return lines


def picture(cells: list[Cell]) -> None:
    """Average precision over cost, a point a filter; means over all cells. Filters without a counted cost lack."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    left_out = []
    for name in FILTERS:
        own = [cell["filters"][name]["cost"] for cell in cells if name in cell["filters"]]
        costs = [cost["of_finetuning"] for cost in own if cost]
        if not costs or len(own) < len(cells):  # a mean over other cells could not be compared
            left_out.append(name)
            continue
        point = statistics.median(costs), statistics.mean(figures(cell, name)["average_precision"] for cell in cells)
        axes.plot(*point, "o", color="C3" if name in ("probe", "forgetting") else "C0")
        axes.annotate(name, point, xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("cost, in finetunings on the same rows")
    axes.set_ylabel("average precision, mean over the cells")
    axes.set_ylim(0, 1)
    png, _ = pictures.save(figure, RESULTS, "rivals")
    png.unlink()
    print(f"Not drawn, since not run on every cell or made without counting: {', '.join(left_out)}")


def main() -> None:
    """Run the cells named, or print the tables."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS["report"], *SHOP, []], metavar="CELL")
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--filters", nargs="+", default=list(FILTERS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        cells = stored()
        print(precision_table(cells), detail_table(cells), sep="\n")
        print(*seal_and_its_equivalent(cells), *with_permuted_labels(cells), sep="\n")
        picture(cells)
        return
    if args.data_dir is None or not args.cells:
        parser.error("name cells and --data_dir, or --table")
    for name in args.cells:
        make_cell(name, args.filters, args.data_dir, args.work / name)


if __name__ == "__main__":
    main()
