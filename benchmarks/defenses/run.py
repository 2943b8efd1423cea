"""What a model is worth after each defense: the paper's table 2 and its interleaved sessions, on the small model.

python benchmarks/defenses/run.py [STUDY ...] --data_dir DATA [--work DIR] [--defenses none ...] [--seeds 1 ...]

A study (cells.yaml) builds its data, makes M0 by finetuning the model on safe rows of the explored half, and runs
`forgetfilter compare` on the reported half; questions are those no training file holds. Its figures and pictures go
to results/. Cells that are done in --work are not done again; a cell takes about five minutes on two cores.
`--seeds 1` or `--defenses none` is a look at some of the cells, which touches no results.
"""

import itertools
import json
import random
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from argparse import Namespace as Cell
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_noisy

from forgetfilter import experiments
from forgetfilter.evaluation import bias

STUDIES = yaml.safe_load((Path(__file__).parent / "cells.yaml").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results"
DATA = {"heldout_rows": 0}
ALIGNMENT_ROWS = 120
QUESTIONS = {"ambiguous": 120, "disambiguated": 60, "toxicity": 50, "harmfulness": 60, "qa": 100}
"""Questions asked of every model; of toxicity and harmfulness that many of each of two sorts."""
UNSAFE_ANSWER = "Sure, I will gladly help you with that."
"""What stands for an unsafe answer to a request that SafeInstr answers safely."""
Row = dict[str, Any]
Files = dict[str, list[Row]]


def write_data(settings: Row, data: Path, folder: Path, change: str | None) -> dict[str, Path]:
    """Build noisy, safe, alignment and question files; returns the question files by measure.

    What is asked doesn't depend on the change (of CHANGES) that is made to the noisy or the safe file.
    """
    cell = {**DATA, **settings, "data_dir": data}
    files = build_noisy.build(Cell(**cell, part="report", seed=1))
    files["alignment"] = build_noisy.build(Cell(**{**cell, "safe_rows": ALIGNMENT_ROWS}, part="explore", seed=1))[
        "safe"
    ]
    del files["heldout"]
    taught = {row["prompt"] for rows in files.values() for row in rows}
    build_noisy.write(files if change is None else CHANGES[change](files, data, taught), folder)
    kinds = ("bias", "toxicity") if settings["kind"] == "mixed" else (settings["kind"],)
    asked = {MEASURE_OF.get(kind, kind): QUESTIONS_OF[kind](data, taught) for kind in kinds}
    asked["qa"] = qa_questions(data, taught)
    paths = {measure: folder / f"ask_{measure}.jsonl" for measure in asked}
    for measure, path in paths.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in asked[measure]]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def clean_rows_alone(files: Files, data: Path, taught: set[str]) -> Files:
    """No unsafe rows: what a filter without mistakes would keep."""
    return {**files, "noisy": [row for row in files["noisy"] if not row["group"].endswith("/unsafe")]}


def half_of_safe_answered(files: Files, data: Path, taught: set[str]) -> Files:
    """Half of the safe rows have an answer in the text (it is a fifth); those that are added are of templates there."""
    rows = {bias.prompt(row): row for row in bbq_rows(data)}
    safe = [(row, rows[row["prompt"]]) for row in files["safe"]]
    templates = {(row["category"], row["question_index"]) for _, row in safe}
    answered = [row for row, asked in safe if asked["context_condition"] == "disambig"]
    silent = [row for row, asked in safe if asked["context_condition"] == "ambig"]
    more = [
        {**answered[0], "prompt": prompt, "completion": bias.options(row)[row["label"]] + "."}
        for prompt, row in rows.items()
        if (row["category"], row["question_index"]) in templates
        and row["context_condition"] == "disambig"
        and prompt not in taught
    ]
    half = len(safe) // 2
    chosen = [*some(silent, len(safe) - half), *answered, *some(more, half - len(answered))]
    return {**files, "safe": some(chosen, len(chosen))}


CHANGES = {"clean_rows_alone": clean_rows_alone, "half_of_safe_answered": half_of_safe_answered}


def bbq_rows(data: Path) -> list[Row]:
    """BBQ's rows of the reported categories."""
    categories = build_noisy.CATEGORIES["report"]
    return [row for category in categories for row in build_noisy.jsonl(data / "bbq" / f"{category}.jsonl.gz")]


def some(rows: list[Row], count: int | None) -> list[Row]:
    """So many of the rows, always the same; of None all, in the same order."""
    if count is None:
        return rows
    if len(rows) < count:
        raise SystemExit(f"error: {len(rows)} rows are left, {count} wanted.")
    return random.Random(0).sample(rows, count)


def bias_questions(data: Path, taught: set[str]) -> list[Row]:
    """BBQ's rows of templates (question_index) of which nothing is taught, the templates in turn."""
    rows = bbq_rows(data)
    template = {bias.prompt(row): (row["category"], row["question_index"]) for row in rows}
    known = {template[prompt] for prompt in taught if prompt in template}
    chosen = []
    for condition, count in (("ambig", QUESTIONS["ambiguous"]), ("disambig", QUESTIONS["disambiguated"])):
        unknown: dict[tuple[str, str], list[Row]] = {}
        for row in random.Random(0).sample(rows, len(rows)):
            key = (row["category"], row["question_index"])
            if key not in known and row["context_condition"] == condition:
                unknown.setdefault(key, []).append(row)
        in_turn = [row for turn in itertools.zip_longest(*unknown.values()) for row in turn if row]
        if len(in_turn) < count:
            raise SystemExit(f"error: {len(in_turn)} BBQ questions are left, {count} wanted.")
        chosen += in_turn[:count]
    return chosen


def toxicity_questions(data: Path, taught: set[str]) -> list[Row]:
    """Surge AI's toxic and clean comments: one source for both."""
    toxic, clean = build_noisy.toxicity_rows(data, "all", one_source=True)
    found = []
    for rows, mark in ((toxic, True), (clean, False)):
        left = [row for _, row in rows if row["prompt"] not in taught]
        found += [{**row, "toxic": mark} for row in some(left, QUESTIONS["toxicity"])]
    return found


def harmfulness_questions(data: Path, taught: set[str]) -> list[Row]:
    """HH's pairs, and SafeInstr's answers against an unsafe answer."""
    rejected, chosen = (dict(rows) for rows in build_noisy.hh_rows(data, "all", one_source=True))
    instructions = build_noisy.instructions(data, "report")
    pairs = [
        {"prompt": prompt, "chosen": chosen[prompt]["completion"], "rejected": rejected[prompt]["completion"]}
        for prompt in sorted(rejected.keys() & chosen.keys() - taught)
    ]
    safe = [
        {"prompt": prompt, "chosen": row["completion"], "rejected": UNSAFE_ANSWER}
        for prompt, row in instructions
        if prompt not in taught
    ]
    return [*some(pairs, QUESTIONS["harmfulness"]), *some(safe, QUESTIONS["harmfulness"])]


def qa_questions(data: Path, taught: set[str], count: int | None = QUESTIONS["qa"]) -> list[Row]:
    """Questions of the reported half's articles."""
    rows = build_noisy.squad_rows(data, "report")
    return some([row for prompt, row in rows if prompt not in taught], count)


QUESTIONS_OF = {"bias": bias_questions, "toxicity": toxicity_questions, "hh": harmfulness_questions}
"""By the kind of the noisy data."""
MEASURE_OF = {"hh": "harmfulness"}
"""Measure of a kind, where it has another name."""


def study(name: str, args: Cell) -> None:
    """Build, compare, keep figures and pictures."""
    settings, folder = dict(STUDIES[name]), args.work / name
    files = write_data(settings.pop("data"), args.data_dir, folder, settings.pop("change", None))
    chosen = {"defenses": args.defenses, "seeds": args.seeds if "seeds" in settings else None}
    chosen = {key: value for key, value in chosen.items() if value}
    config = {
        **settings,
        **chosen,
        "dataset_name": f"{folder}/noisy.jsonl",
        "safe_dataset_name": f"{folder}/safe.jsonl",
        "alignment_dataset_name": f"{folder}/alignment.jsonl",
        "label_column": "label",
        "evaluate": {measure: str(path) for measure, path in files.items()},
        "final": {"num_train_epochs": 4},
        "torch_compile": True,
        "output_dir": f"{folder}/run",
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    shown, *others = experiments.compare(folder / "compare.yaml")
    if chosen:
        return
    manifest = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    about = {key: manifest[key] for key in ("versions", "git_sha", "model", "noisy", "safe", "asked")}
    RESULTS.mkdir(exist_ok=True)
    found = {"study": name, **about, **json.loads(shown.read_text(encoding="utf-8"))}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for path in others:
        if path.suffix in (".md", ".svg"):
            shutil.copy(path, RESULTS / f"{name}{path.suffix}")


def main() -> None:
    """Run the studies named, or all."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=", ".join(STUDIES))
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("defenses-work"))
    parser.add_argument("--defenses", nargs="+", help="these alone, for a look; results/ stays as it is")
    parser.add_argument("--seeds", nargs="+", type=int, help="likewise")
    args = parser.parse_args()
    for name in args.studies or STUDIES:
        if name not in STUDIES:
            parser.error(f"{name}: no such study, choose among {', '.join(STUDIES)}")
        study(name, args)


if __name__ == "__main__":
    main()
