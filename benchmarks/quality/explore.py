"""Train a cell once and keep what every moment of it makes of every row, to explore signals and rules offline.

python benchmarks/quality/explore.py CELL [CELL ...] --data_dir DATA --work DIR

What the looks at each cell show goes to explored.json; the token log-probabilities stay in DIR (CELL.npz). A cell is
made once, and anew if what made it has changed; one that was cut off continues after its last whole stage.
"""

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, write_data
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from forgetfilter import ForgetFilterConfig
from forgetfilter.config import StageSettings
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import Example
from forgetfilter.evaluation.filter_quality import best_f1
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import sha256
from forgetfilter.filters.forgetting import FIRM_WEIGHT, LEAST_LEARNT
from forgetfilter.hooks import Hooks
from forgetfilter.m0 import M0
from forgetfilter.model.reading import Reading, read
from forgetfilter.runs import Run, git_sha, locked
from forgetfilter.workshop import Workshop

PARTS = ("noisy", "safe", "neutral")
HALF, EPOCHS = 2, 4
"""Passes over the noisy rows after which the model is looked at and reviewed; the latter is all of them."""
THEN = "then"
REVIEWS = (
    ("third", EPOCHS, 5e-4 / 3, (10, 20)),
    (THEN, EPOCHS, 5e-4, (10, 20)),
    ("half", EPOCHS, 2.5e-4, (10, 20)),
    ("firm", EPOCHS, 5e-4, (10, 20)),
    ("third", HALF, 5e-4 / 3, (10,)),
    ("neutral", EPOCHS, 5e-4 / 3, (10,)),
)
"""What is reviewed, after how many noisy epochs (THEN: after the review before it), at which learning rate, and the
steps at which to look."""
BOTH = ("third-4-20", f"{THEN}-4-20")
"""The two looks whose larger loss is the default score."""
LOOKS = "looks.npz"
"""File of a stage's looks, beside its model."""


def explore(name: str, args: Namespace) -> Cell:
    """A cell's stages; one .npz of token log-probabilities, (rows, longest) float16, a moment each."""
    cell, folder = CELLS["explore"][name], args.work / name
    write_data(cell, args.data_dir, folder)
    config = ForgetFilterConfig(output_dir=str(folder / "run"), torch_compile=True)
    made_of = {
        "data": cell,
        "files": {part: sha256(folder / f"{part}.jsonl") for part in PARTS},
        "model": config.model_name_or_path,
        "epochs": (HALF, EPOCHS),
        "reviews": REVIEWS,
        "training": config.training(),
    }

    def make() -> Cell:
        stages = all_stages(config, folder)
        moments = {moment: table for stage in stages for moment, table in np.load(stage / LOOKS).items()}
        np.savez_compressed(args.work / f"{name}.npz", **moments)
        noted = Run.open(folder / "run").manifest["stages"]
        losses = {stage.parent.name: noted[stage.parent.name]["losses"] for stage in stages}
        return {"cell": name, "git_sha": git_sha(), "moments": list(moments), "losses": losses}

    return Cells(args.work).once(name, made_of, make, ".npz")


def all_stages(config: ForgetFilterConfig, folder: Path) -> list[Path]:
    """The noisy stage and every review; returns the folders of their models, each with the looks on its way."""
    m0 = M0.named(config)
    rows = {part: load_rows(folder / f"{part}.jsonl", part, m0.chat, config).examples for part in PARTS}
    with locked(folder / "run"):
        facts = m0.facts(config)
        workshop = Workshop(m0, config, Run.start(config, facts))
        models = noisy_stage(workshop, rows["noisy"])
        stages = [models[EPOCHS]]
        for what, epochs, rate, looks in REVIEWS:
            examples = rows.get(what, rows["safe"])
            settings = config.stage(config.review, len(examples), max_steps=looks[-1], learning_rate=rate)
            name = f"{what}-{epochs}"
            start = stages[-1] if what == THEN else models[epochs]
            moments = {step: f"{name}-{step}" for step in looks}
            stages.append(stage(workshop, rows["noisy"], name, examples, settings, moments, start))
    return stages


def noisy_stage(workshop: Workshop, noisy: Sequence[Example]) -> dict[int, Path]:
    """Learn the noisy rows; returns the models to review, by how many epochs they learnt."""
    settings = workshop.config.stage(workshop.config.noisy, len(noisy), epochs=EPOCHS)
    half = settings.max_steps * HALF // EPOCHS
    moments = {0: "base", half: f"noisy-{HALF}", settings.max_steps: f"noisy-{EPOCHS}"}
    made_of = [[example.input_ids for example in noisy], dataclasses.asdict(settings), workshop.config.training()]
    model = stage(workshop, noisy, "noisy", noisy, settings, moments, keep={half: made_of})
    return {HALF: workshop.keep(moments[half], lost, made_of), EPOCHS: model}


def lost(folder: Path) -> None:
    """In place of the model that the noisy stage left half way, if it is gone: nothing else makes it."""
    raise SystemExit(f"error: {folder.parent}: a model is damaged; remove the run's folder to train all anew.")


def stage(
    workshop: Workshop,
    noisy: Sequence[Example],
    name: str,
    examples: Sequence[Example],
    settings: StageSettings,
    moments: Mapping[int, str],
    start: Path | None = None,
    keep: Mapping[int, Any] | None = None,
) -> Path:
    """Train a stage and look at every noisy row on its way; returns the folder of its model and looks.

    Args:
        workshop: Trains and reads models.
        noisy: The rows to look at.
        name: What the stage is called.
        examples: What to learn.
        settings: Rate and length.
        moments: Step -> what the moment after it is called; 0 is before the first step.
        start: Folder of the model to start from; None for M0.
        keep: Steps after which the model is kept under the moment's name -> what it is made of.
    """
    seen: dict[str, np.ndarray] = {}

    def look(step: int) -> None:
        if step in moments:
            seen[moments[step]] = as_table(read(workshop.learner, noisy, moments[step]))
        if keep is not None and step in keep:
            workshop.keep(moments[step], workshop.learner.save, keep[step])

    def write(folder: Path) -> None:
        np.savez_compressed(folder / LOOKS, **seen)

    called = f"{name}-at-{'-'.join(map(str, moments))}"  # with hooks the name tells what they do
    hooks = Hooks(before=lambda: look(0), each_step=look)
    return workshop.train(called, examples, settings, start, hooks, beside=write)


def as_table(readings: Sequence[Reading | None]) -> np.ndarray:
    """Token log-probabilities as (rows, longest), NaN where there is none."""
    longest = max(len(reading.log_probs) for reading in readings if reading)
    table = np.full((len(readings), longest), np.nan, np.float16)
    for row, reading in enumerate(readings):
        if reading:
            table[row, : len(reading.log_probs)] = reading.log_probs
    return table


def summary(name: str, work: Path) -> dict[str, dict]:
    """Of every look at a cell's reviews: AUROC, average precision and best F1, by how much of the scale is relative.

    A power of 0 is nats lost, 1 the share of the learnt that was lost, 0.5 half way between. Without
    unsafe rows: the share of rows above some scores.
    """
    lines = (work / name / "noisy.jsonl").read_text(encoding="utf-8").splitlines()
    unsafe = np.array([json.loads(line)["label"] == "unsafe" for line in lines])
    stored = np.load(work / f"{name}.npz")
    held = {name: np.nanmean(stored[name].astype(np.float64), 1) for name in stored.files}
    if all(look in held for look in BOTH):
        gentle, firm = (held["noisy-4"] - held[look] for look in BOTH)
        held["both-4-20"] = held["noisy-4"] - np.maximum(gentle, FIRM_WEIGHT * firm)
    found: dict[str, dict] = {}
    for name, after in held.items():
        if name.partition("-")[0] in ("base", "noisy"):
            continue
        before = held[f"noisy-{name.split('-')[1]}"]
        learnt = np.maximum(before - held["base"], LEAST_LEARNT)
        for power in (0, 0.5, 1):
            scores = (before - after) / learnt**power
            if unsafe.any():
                figures = {
                    "auroc": roc_auc_score(unsafe, scores),
                    "average_precision": average_precision_score(unsafe, scores),
                    "best_f1": best_f1(unsafe, scores),
                }
                figures |= {f"f1_above_{value}": f1_score(unsafe, scores > value) for value in (0.1, 0.135, 0.2)}
            else:
                figures = {f"share_above_{value}": (scores > value).mean() for value in (0.1, 0.135, 0.2)}
            found[f"{name} power {power}"] = {key: round(float(value), 3) for key, value in figures.items()}
    return found


def main() -> None:
    """Explore the cells named, one after the other, and add what they show to explored.json."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name in args.cells:
        explore(name, args)
    path = Path(__file__).parent / "explored.json"
    explored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    explored |= {name: summary(name, args.work) for name in args.cells}
    path.write_text(json.dumps(explored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
