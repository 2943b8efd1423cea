"""Train a cell once and keep what every moment of it makes of every row, to explore signals and rules offline.

python benchmarks/quality/explore.py CELL [CELL ...] --data_dir DATA --work DIR

What the looks at each cell show goes to explored.json; the token log-probabilities stay in DIR.
"""

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import CELLS, write_data
from run import oracle_f1
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from forgetfilter import ForgetFilterConfig, models
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer, Example
from forgetfilter.scores import FIRM, LEAST_LEARNT
from forgetfilter.signals import Reading, read
from forgetfilter.training import train

EPOCHS = 4
THEN = "then"
REVIEWS = (
    ("third", 4, 5e-4 / 3, (10, 20)),
    (THEN, 4, 5e-4, (10, 20)),
    ("half", 4, 2.5e-4, (10, 20)),
    ("firm", 4, 5e-4, (10, 20)),
    ("third", 2, 5e-4 / 3, (10,)),
    ("neutral", 4, 5e-4 / 3, (10,)),
)
"""What is reviewed, after how many noisy epochs (THEN: after the review before it), at which learning rate, and the
steps at which to look."""
BOTH = ("third-4-20", f"{THEN}-4-20")
"""The two looks whose larger loss is the default score."""


def explore(name: str, args: Namespace) -> None:
    """Train the cell's stages; one .npz of token log-probabilities, (rows, longest) float16, a moment each."""
    folder = args.work / name
    write_data(CELLS["explore"][name], args.data_dir, folder)
    config = ForgetFilterConfig(torch_compile=True)
    weights = models.find_weights(config.model_name_or_path)
    tokenizer = models.load_tokenizer(weights, config)
    chat = ChatTokenizer(tokenizer, config.max_length)
    rows = {part: load_rows(folder / f"{part}.jsonl", part, chat, config) for part in ("noisy", "safe", "neutral")}
    noisy = rows["noisy"].examples
    learner = models.load_learner(weights, tokenizer, config)
    learner.prepare(1e9)
    found: dict[str, np.ndarray] = {}

    def look(moment: str) -> None:
        found[moment] = as_table(read(learner, noisy, moment))
        learner.model.train()
        np.savez_compressed(folder / "moments.npz", **found)

    def stage(
        what: str, examples: Sequence[Example], steps: int, rate: float, each_step: Callable[[int], object]
    ) -> None:
        settings = replace(config.stage("review", len(examples)), max_steps=steps, learning_rate=rate)
        with tempfile.TemporaryDirectory() as checkpoints:
            facts = train(learner, examples, settings, Path(checkpoints), f"{name} {what}", each_step)
        print(name, what, facts["losses"], flush=True)

    look("base")
    an_epoch = -(-len(noisy) // 8)

    def after_epochs(step: int) -> None:
        if step in (2 * an_epoch, EPOCHS * an_epoch):
            look(f"noisy-{step // an_epoch}")
            learner.save(folder / f"adapter-{step // an_epoch}")

    stage("noisy", noisy, EPOCHS * an_epoch, 5e-4, after_epochs)
    for what, epochs, rate, looks in REVIEWS:
        if what != THEN:
            learner.restore(folder / f"adapter-{epochs}")
        examples = rows.get(what, rows["safe"]).examples
        name_of = f"{what}-{epochs}"

        def look_at(step: int, name_of: str = name_of, looks: Sequence[int] = looks) -> None:
            if step in looks:
                look(f"{name_of}-{step}")

        stage(name_of, examples, looks[-1], rate, look_at)


def as_table(readings: Sequence[Reading | None]) -> np.ndarray:
    """Token log-probabilities as (rows, longest), NaN where there is none."""
    longest = max(len(reading.log_probs) for reading in readings if reading)
    table = np.full((len(readings), longest), np.nan, np.float16)
    for row, reading in enumerate(readings):
        if reading:
            table[row, : len(reading.log_probs)] = reading.log_probs
    return table


def summary(folder: Path) -> dict[str, dict]:
    """Of every look at a cell's reviews: AUROC, average precision and best F1, by how much of the scale is relative.

    A power of 0 is nats lost, 1 the share of the learnt that was lost, 0.5 half way between. Without
    unsafe rows: the share of rows above some scores.
    """
    lines = (folder / "noisy.jsonl").read_text(encoding="utf-8").splitlines()
    unsafe = np.array([json.loads(line)["label"] == "unsafe" for line in lines])
    stored = np.load(folder / "moments.npz")
    held = {name: np.nanmean(stored[name].astype(np.float64), 1) for name in stored.files}
    if all(look in held for look in BOTH):
        gentle, firm = (held["noisy-4"] - held[look] for look in BOTH)
        held["both-4-20"] = held["noisy-4"] - np.maximum(gentle, FIRM * firm)
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
                    "best_f1": oracle_f1(unsafe, scores),
                }
                figures |= {f"f1_above_{value}": f1_score(unsafe, scores > value) for value in (0.1, 0.135, 0.2)}
            else:
                figures = {f"share_above_{value}": (scores > value).mean() for value in (0.1, 0.135, 0.2)}
            found[f"{name} power {power}"] = {key: round(float(value), 3) for key, value in figures.items()}
    return found


def main() -> None:
    """Explore the cells named, one after the other, skipping those done before."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name in args.cells:
        if not (args.work / name / "whole").exists():
            explore(name, args)
            (args.work / name / "whole").touch()
    path = Path(__file__).parent / "explored.json"
    explored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    explored |= {name: summary(args.work / name) for name in args.cells}
    path.write_text(json.dumps(explored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
