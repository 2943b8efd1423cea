"""How sure a study's figures are: 95 % ranges over questions, after all questions of SQuAD that are left were asked.

python benchmarks/defenses/margins.py STUDY --data_dir DATA [--work DIR] [--defenses NAME ...] [--also STUDY/NAME ...]

After run.py, whose models in --work are asked again (two minutes a model on two cores; each model once).
Questions are drawn with replacement, the same for every model, 1,000 times (BBQ's by template: those of one are
answered alike); figures are means over the seeds, which are not drawn.
Prints each defense's figures and its differences from none, and writes results/STUDY-margins.json.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import run  # first: it makes benchmarks/questions.py importable
from questions import qa_questions

from forgetfilter.evaluation import bias
from forgetfilter.evaluation.ask import MEASURES, evaluate
from forgetfilter.evaluation.questions import Question, user
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import sha256, write_jsonl
from forgetfilter.model.folders import weights_hash

DRAWS = 1000
Records = list[dict[str, Any]]


def records(cell: Path, questions: Path) -> Records:
    """A cell's answers; in place of its answers of SQuAD those to all questions, asked once and kept beside these."""
    study = cell.parents[1]
    model = Cells(cell.parent).load(cell.stem)["model"]
    where = study / model if model else Path(m0(study))
    key = where.parent.name if model else where.name  # a stage's name tells what it was made of
    cells = Cells(questions.parent)
    answers = cells.path(key).with_suffix(".jsonl")

    def make() -> Cell:
        found, asked = evaluate(str(where), {"qa": str(questions)})
        write_jsonl(answers, asked)
        return {"model": key, "figures": found}

    made_of = {"questions": sha256(questions), "model": weights_hash(where)}
    cells.once(key, made_of, make, ".jsonl")
    return [*(record for record in read(cell.with_suffix(".jsonl")) if record["measure"] != "qa"), *read(answers)]


def read(path: Path) -> Records:
    """Records, one a line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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
    wanted = {*MEASURES[measure].safer, "f1"}
    return {name: value for name, value in found.items() if name in wanted and "likelihood" not in name}


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
        (asked,) = prompts
        groups: dict[Any, list[int]] = {}
        for i, prompt in enumerate(asked):
            groups.setdefault(alike.get(prompt, i), []).append(i)
        together = [np.array(group) for group in groups.values()]
        chosen = rng.integers(0, len(together), (DRAWS, len(together)))
        draws = [np.arange(len(asked)), *(np.concatenate([together[i] for i in draw]) for draw in chosen)]
        for figure, values in drawn(measure, own, draws).items():
            about = {"questions": len(asked), "drawn": len(together)}
            found[figure] = about | compared(values, undone=figure in MEASURES[measure].safer)
    return found


def drawn(measure: str, own: dict[str, list[Records]], draws: list[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Figure -> defense -> (draws,) its mean over the seeds, the first with every question."""
    values: dict[str, dict[str, list[float]]] = {}
    for draw in draws:
        for name, cells in own.items():
            each = [figures(measure, [cell[i] for i in draw]) for cell in cells]
            for figure in each[0]:
                mean = float(np.mean([one[figure] for one in each]))
                values.setdefault(figure, {}).setdefault(name, []).append(mean)
    return {figure: {name: np.array(means) for name, means in table.items()} for figure, table in values.items()}


def compared(table: dict[str, np.ndarray], *, undone: bool) -> dict[str, Any]:
    """Each defense's values, their differences from none, and for figures of safety how much of the harm is undone."""
    base, none = table["base"], table["none"]
    found: dict[str, Any] = {}
    for name, value in table.items():
        found[name] = {"value": spread(value), "less_none": spread(value - none)}
        if undone and name not in ("base", "none"):
            with np.errstate(divide="ignore", invalid="ignore"):
                found[name]["undone"] = spread((value - none) / (base - none))
    return found


def spread(values: np.ndarray) -> list[float]:
    """The value itself, and the middle 95 % of its draws."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return [round(float(value), 3) for value in (values[0], low, high)]


def show(found: dict[str, Any]) -> None:
    """Print every figure with its ranges."""
    for figure, values in found.items():
        by_defense = dict(values)
        print(f"{figure}, {by_defense.pop('questions')} questions, of which {by_defense.pop('drawn')} are drawn")
        for name, own in by_defense.items():
            for what, (value, low, high) in own.items():
                print(f"  {name}: {what} {value:.3f} [{low:.3f}, {high:.3f}]")


def main() -> None:
    """Ask, draw, print, keep."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=run.STUDIES)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("defenses-work"))
    parser.add_argument("--defenses", nargs="+", default=["forget_filter"], help="beside base and none")
    also = "defenses of studies that ask the same, as toxicity-50-strict/forget_filter"
    parser.add_argument("--also", nargs="+", default=[], help=also)
    args = parser.parse_args()
    study = args.work / args.study
    questions = study / "margins" / "ask_qa.jsonl"
    questions.parent.mkdir(parents=True, exist_ok=True)
    taught = {row["prompt"] for name in ("noisy", "safe", "alignment") for row in read(study / f"{name}.jsonl")}
    rows = qa_questions(args.data_dir, taught, None)
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = {name: (args.study, name) for name in ("base", "none", *args.defenses)}
    where |= {name: tuple(name.split("/")) for name in args.also}
    cells = {
        name: sorted((args.work / of / "run" / "cells").glob(f"{defense}-[0-9]*.json"))
        for name, (of, defense) in where.items()
    }
    missing = [name for name, paths in cells.items() if not paths]
    if missing:
        parser.error(f"{', '.join(missing)}: run.py has no cells of these in {args.work} yet")
    answers = {name: [records(path, questions) for path in paths] for name, paths in cells.items()}
    asked = study / "ask_bias.jsonl"
    bbq = read(asked) if asked.exists() else []
    found = ranges(answers, {bias.prompt(row): (row["category"], row["question_index"]) for row in bbq})
    show(found)
    path = run.RESULTS / f"{args.study}-margins.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
