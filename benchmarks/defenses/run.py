"""What a model is worth after each defense: the paper's table 2 and its interleaved sessions, on the small model.

python benchmarks/defenses/run.py [STUDY ...] --data_dir DATA [--work DIR] [--defenses none ...] [--seeds 1 ...]

A study (cells.yaml) builds its data, makes M0 by finetuning the model on safe rows of the explored half, and runs
`forgetfilter compare` on the reported half; questions are those no training file holds. Its figures and pictures go
to results/. Cells that are done in --work are not done again; a cell takes about five minutes on two cores.
`--seeds 1` or `--defenses none` is a look at some of the cells, which touches no results.
"""

import json
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from argparse import Namespace as Cell
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_noisy
from questions import bbq_rows, some, write_questions

from forgetfilter import experiments
from forgetfilter.evaluation import bias

STUDIES = yaml.safe_load((Path(__file__).parent / "cells.yaml").read_text(encoding="utf-8"))
RESULTS = Path(__file__).parent / "results"
DATA = {"heldout_rows": 0}
ALIGNMENT_ROWS = 120
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
    return write_questions(kinds, data, taught, folder)


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
    if args.defenses or args.seeds:
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
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("defenses-work"))
    parser.add_argument("--defenses", nargs="+", help="these alone, for a look; results/ stays as it is")
    parser.add_argument("--seeds", nargs="+", type=int, help="likewise")
    args = parser.parse_args()
    for name in args.studies or STUDIES:
        study(name, args)


if __name__ == "__main__":
    main()
