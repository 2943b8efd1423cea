"""How sure a study's figures are: 95 % ranges over questions, after all questions of SQuAD that are left were asked.

python benchmarks/defenses/margins.py STUDY --data_dir DATA [--work DIR] [--defenses NAME ...] [--also STUDY/NAME ...]

After run.py, whose models in --work are asked again (two minutes a model on two cores; what was asked is kept).
Questions are drawn with replacement, the same for every model, 1,000 times (BBQ's by template: those of one are
answered alike); figures are means over the seeds, which are not drawn.
Prints each defense's figures and its differences from none, and writes results/STUDY-margins.json.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import run

from forgetfilter.evaluation import bias
from forgetfilter.evaluation.ask import MEASURES, evaluate, write_records
from forgetfilter.evaluation.questions import Question, user
from forgetfilter.experiments.defenses import SAFER

DRAWS = 1000
Records = list[dict[str, Any]]


def records(cell: Path, folder: Path, questions: Path) -> Records:
    """A cell's answers; in place of its answers of SQuAD those to all questions, asked once."""
    model = json.loads(cell.read_text(encoding="utf-8"))["model"]
    where = cell.parents[1] / model if model else Path(m0(cell.parents[1]))
    kept = folder / f"{where.parent.name if model else where.name}.jsonl"  # a stage's name tells what it was made of
    if not kept.exists():
        write_records(kept, evaluate(str(where), {"qa": str(questions)})[1])
    with cell.with_suffix(".jsonl").open(encoding="utf-8") as own, kept.open(encoding="utf-8") as asked:
        return [*(record for record in map(json.loads, own) if record["measure"] != "qa"), *map(json.loads, asked)]


def m0(study: Path) -> str:
    """The folder of M0: what every adapter of the study names."""
    config = next(study.glob("stages/*/model/adapter_config.json"))
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def figures(measure: str, chosen: Records) -> dict[str, float]:
    """A measure's figures for some of a cell's answers: those that need no sums over an option's tokens."""
    questions = [Question(user(record["prompt"]), about=record) for record in chosen]
    texts = [record["answer"] for record in chosen]
    means = [[np.array([mean]) for mean in record["log_likelihoods"]] for record in chosen]
    found = MEASURES[measure].figures(questions, texts, means)
    return {name: value for name, value in found.items() if name in {*SAFER, "f1"} and "likelihood" not in name}


def ranges(of: dict[str, list[Records]], alike: dict[str, Any]) -> dict[str, Any]:
    """Figures of every defense with their 95 % ranges, and those of the differences from none and of undone.

    Args:
        of: Defense -> the answers of each seed's model.
        alike: Prompt -> what questions that are drawn together share; all others are drawn alone.
    """
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for measure in dict.fromkeys(record["measure"] for record in of["none"][0]):
        own = {name: [[r for r in cell if r["measure"] == measure] for cell in cells] for name, cells in of.items()}
        prompts = {tuple(record["prompt"] for record in cell) for cells in own.values() for cell in cells}
        if len(prompts) != 1:
            raise SystemExit(f"error: {measure}: the cells were not asked the same.")
        size = len(own["none"][0])
        groups: dict[Any, list[int]] = {}
        for i, record in enumerate(own["none"][0]):
            groups.setdefault(alike.get(record["prompt"], i), []).append(i)
        together = [np.array(group) for group in groups.values()]
        chosen = rng.integers(0, len(together), (DRAWS, len(together)))
        draws = [np.arange(size), *(np.concatenate([together[i] for i in draw]) for draw in chosen)]
        values: dict[str, dict[str, list[float]]] = {name: {} for name in own}
        for draw in draws:
            for name, cells in own.items():
                each = [figures(measure, [cell[i] for i in draw]) for cell in cells]
                for figure in each[0]:
                    values[name].setdefault(figure, []).append(float(np.mean([one[figure] for one in each])))
        for figure in values["none"]:
            table = {name: np.array(values[name][figure]) for name in values}
            base, none = table["base"], table["none"]
            found[figure] = {"questions": size, "drawn": len(together)}
            for name, value in table.items():
                found[figure][name] = {"value": spread(value), "less_none": spread(value - none)}
                if figure in SAFER and name not in ("base", "none"):
                    with np.errstate(divide="ignore", invalid="ignore"):
                        found[figure][name]["undone"] = spread((value - none) / (base - none))
    return found


def spread(values: np.ndarray) -> list[float]:
    """The value itself, and the middle 95 % of its draws."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return [round(float(value), 3) for value in (values[0], low, high)]


def main() -> None:
    """Ask, draw, print, keep."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=run.STUDIES)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("defenses-work"))
    parser.add_argument("--defenses", nargs="+", default=["forget_filter"], help="beside base and none")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        help="defenses of studies that ask the same, as toxicity-50-strict/forget_filter",
    )
    args = parser.parse_args()
    folder = args.work / args.study / "margins"
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "ask_qa.jsonl"
    files = [args.work / args.study / f"{name}.jsonl" for name in ("noisy", "safe", "alignment")]
    taught = {row["prompt"] for file in files for row in map(json.loads, file.open(encoding="utf-8"))}
    rows = run.qa_questions(args.data_dir, taught, None)
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = {name: (args.study, name) for name in ("base", "none", *args.defenses)}
    where |= {name: tuple(name.split("/")) for name in args.also}
    of = {
        name: [
            records(path, folder, questions)
            for path in sorted((args.work / study / "run" / "cells").glob(f"{defense}-[0-9]*.json"))
        ]
        for name, (study, defense) in where.items()
    }
    missing = [name for name, cells in of.items() if not cells]
    if missing:
        parser.error(f"{', '.join(missing)}: run.py has no cells of these in {args.work} yet")
    asked = args.work / args.study / "ask_bias.jsonl"
    bbq = [json.loads(line) for line in asked.open(encoding="utf-8")] if asked.exists() else []
    found = ranges(of, {bias.prompt(row): (row["category"], row["question_index"]) for row in bbq})
    for figure, by_defense in found.items():
        print(f"{figure}, {by_defense['questions']} questions, of which {by_defense['drawn']} are drawn")
        for name in of:
            for what, (value, low, high) in by_defense[name].items():
                print(f"  {name}: {what} {value:.3f} [{low:.3f}, {high:.3f}]")
    path = run.RESULTS / f"{args.study}-margins.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
