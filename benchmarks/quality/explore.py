"""Train a cell once and keep what every moment of it makes of every row, to explore signals and rules offline.

python benchmarks/quality/explore.py CELL [CELL ...] --data_dir DATA --work DIR
"""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import CELLS, write_data

from forgetfilter import ForgetFilterConfig, models
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer, Example
from forgetfilter.signals import read
from forgetfilter.training import train

EPOCHS = 4
LOOKS = (5, 10, 20, 40)


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
        readings = read(learner, noisy, moment)
        longest = max(len(reading.log_probs) for reading in readings if reading)
        table = np.full((len(noisy), longest), np.nan, np.float16)
        for row, reading in enumerate(readings):
            if reading:
                table[row, : len(reading.log_probs)] = reading.log_probs
        found[moment] = table
        learner.model.train()
        np.savez_compressed(folder / "moments.npz", **found)

    def stage(what: str, examples: Sequence[Example], steps: int, looks: Sequence[int], rate: float, how: str) -> None:
        settings = replace(
            config.stage("review", len(examples)), max_steps=steps, learning_rate=rate, lr_scheduler_type=how
        )
        with tempfile.TemporaryDirectory() as checkpoints:
            facts = train(
                learner,
                examples,
                settings,
                Path(checkpoints),
                f"{name} {what}",
                lambda step: look(f"{what}-{step}") if step in looks else None,
            )
        print(name, what, facts["losses"], flush=True)

    look("base")
    an_epoch = -(-len(noisy) // 8)
    stage("noisy", noisy, EPOCHS * an_epoch, [an_epoch * n for n in range(1, EPOCHS + 1)], 5e-4, "linear")
    learner.save(folder / "adapter")
    for what in args.reviews.split(","):
        learner.stage = None if what == "fresh" else folder / "none"
        learner.restore(folder / "adapter")
        examples = {"neutral": rows["neutral"], "again": rows["noisy"]}.get(what, rows["safe"]).examples
        rate, how = {"third": (1.7e-4, "linear"), "constant": (5e-4, "constant")}.get(what, (5e-4, "linear"))
        stage(what, examples, LOOKS[-1], LOOKS, rate, how)


def main() -> None:
    """Explore the cells named, one after the other, skipping those done before."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--reviews", default="safe,third,neutral,again")
    args = parser.parse_args()
    for name in args.cells:
        if not (args.work / name / "whole").exists():
            explore(name, args)
            (args.work / name / "whole").touch()


if __name__ == "__main__":
    main()
