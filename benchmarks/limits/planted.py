"""Planted rows: do they tell how much of the user's own is found, and do they leave the run as it is?

python benchmarks/limits/planted.py [CASE ...] --data_dir DATA [--work DIR]     seven minutes a case on two cores
python benchmarks/limits/planted.py --table                                     the table, from what is stored

A case is a reported cell of quality/cells.yaml (240 rows), filtered at its defaults with 12 rows planted, six unsafe
and six clean. By default they are rows of the cell's kind from another seed, as a log of incidents would give them;
in a "box" case they are rows in the box of the cell's own notion. In an "uncovered" case the safe rows are those of
another cell. The figures without planted rows are those that quality/run.py has stored for the same rows. Results go to
results/planted/CASE.json.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from cells import CELLS, config_of, write_data

from forgetfilter import ForgetFilter
from forgetfilter.defenses import constants_of
from forgetfilter.experiments.cells import Cells
from forgetfilter.files import sha256
from forgetfilter.filters import FILTERS
from forgetfilter.methods import arguments

RESULTS = Path(__file__).parent / "results" / "planted"
QUALITY = Path(__file__).parents[1] / "quality" / "results"
NOTIONS = {"bias": "stereotypes", "toxicity": "insults", "harmfulness": "harmful_requests"}
OTHER = {"bias": "toxicity-25", "toxicity": "bias-25", "harmfulness": "bias-25"}
"""Cell whose safe rows an uncovered case takes."""
CASES = (
    *("bias-25", "bias-25-uncovered", "bias-25-box", "bias-25-uncovered-box", "toxicity-25", "toxicity-25-uncovered"),
    *("bias-5", "toxicity-50", "harmfulness-25", "toxicity-5", "bias-50", "harmfulness-25-uncovered"),
)
LOG_SEED = 21
"""Seed of the rows that stand for a log of incidents; no cell has it."""
FIGURES = ("recall", "clean_dropped", "f1", "auroc", "average_precision")


def in_the_box(notion):
    """The rows in the box of a notion, unsafe and clean, and the ordinary clean ones."""
    lines = (files("forgetfilter.safe") / "planted.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["notion"] in (notion, "tasks")]


def of_a_log(cell, data_dir, work):
    """Rows of the cell's kind from another seed, that none of the cell's rows equals."""
    write_data({**CELLS["report"][cell], "seed": LOG_SEED, "unsafe_share": 0.5}, data_dir, work / "log")
    own = set((work / "noisy.jsonl").read_text(encoding="utf-8").splitlines())
    lines = [
        line for line in (work / "log" / "noisy.jsonl").read_text(encoding="utf-8").splitlines() if line not in own
    ]
    rows = [json.loads(line) for line in lines]
    return [{"prompt": r["prompt"], "completion": r["completion"], "unsafe": r["label"] == "unsafe"} for r in rows]


def build(case, data_dir, work):
    """Write a case's files; returns the settings."""
    cell = case.removesuffix("-box").removesuffix("-uncovered")
    kind = cell.partition("-")[0]
    work.mkdir(parents=True, exist_ok=True)
    write_data(dict(CELLS["report"][cell]), data_dir, work)
    rows = in_the_box(NOTIONS[kind]) if case.endswith("-box") else of_a_log(cell, data_dir, work)
    planted = work / "planted.jsonl"
    planted.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    config = replace(config_of(work), planted_rows=str(planted))
    if "-uncovered" in case:
        write_data(dict(CELLS["report"][OTHER[kind]]), data_dir, work / "other")
        config = replace(config, safe_dataset_name=str(work / "other" / "safe.jsonl"))
    return cell, config


def make(case, data_dir, work):
    """Filter a case; kept by what made it."""
    cell, config = build(case, data_dir, work)
    named = {"noisy": config.dataset_name, "safe": config.safe_dataset_name, "planted": config.planted_rows}
    made_of = {
        "files": {part: sha256(Path(path)) for part, path in named.items()},
        "parameters": {of: arguments(of, FILTERS[of], None) for of in ("probe", "forgetting")},
        "constants": constants_of("probe", config),
        "settings": config.identity(),
    }

    def filtered():
        result = ForgetFilter(config).fit()
        metrics, manifest = result.metrics, result.run.manifest
        about = {key: manifest[key] for key in ("versions", "git_sha", "model")}
        figures = {key: metrics[key] for key in FIGURES}
        return {"case": case, "cell": cell, **about, "planted": metrics["planted"], "figures": figures}

    return Cells(RESULTS).once(case, made_of, filtered)


def table():
    """A line a case, and the rank correlations over all of them."""
    lines = [
        "| case | planted unsafe found | clean dropped | AUROC | true recall | clean lost | AUROC | AP | AP without |"
    ]
    lines.append("|---" * 9 + "|")
    found = Cells(RESULTS).all()
    for one in found:
        planted, own = one["planted"], one["figures"]
        stored = QUALITY / f"{one['cell']}.json"
        before = json.loads(stored.read_text(encoding="utf-8"))["figures"] if stored.exists() else {}
        before = {} if "-uncovered" in one["case"] else before
        numbers = [planted["auroc"], own["recall"], own["clean_dropped"], own["auroc"], own["average_precision"]]
        numbers.append(before.get("average_precision"))
        counts = f"{planted['found']} of {planted['unsafe']} | {planted['clean_dropped']} of {planted['clean']}"
        shown = " | ".join("" if number is None else f"{number:.2f}" for number in numbers)
        lines.append(f"| {one['case']} | {counts} | {shown} |")
    for name, chosen in (("log", [one for one in found if not one["case"].endswith("-box")]), ("all", found)):
        if len(chosen) > 2:
            planted, own = [one["planted"] for one in chosen], [one["figures"] for one in chosen]
            recall = spearmanr([one["found"] for one in planted], [one["recall"] for one in own])[0]
            auroc = spearmanr([one["auroc"] for one in planted], [one["auroc"] for one in own])[0]
            lines.append(f"rank correlation over {len(chosen)} cases ({name}): recall {recall:.2f}, AUROC {auroc:.2f}")
    return "\n".join(lines)


def main():
    """Run the cases named, or all of them, or print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("planted-work"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.data_dir is None:
        parser.error("give --data_dir")
    for case in args.cases or CASES:
        print(case, json.dumps(make(case, args.data_dir, args.work / case)["figures"]), flush=True)


if __name__ == "__main__":
    main()
