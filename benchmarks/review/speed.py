"""How long it takes to rank all rows anew after a mark.

python benchmarks/review/speed.py [--size 576] [ROWS ...]

Made-up hidden states of a model's size, one unsafe row in twenty. 40 marks each, one after the other; figures are the
median and the slowest, from the mark to the next row to ask about, and the time to get ready, once.
"""

import json
import statistics
import time
from argparse import ArgumentParser
from itertools import islice
from pathlib import Path

import numpy as np

from forgetfilter.config import ENOUGH_ROWS, ForgetFilterConfig
from forgetfilter.decision.choice import choose
from forgetfilter.review.asking import questions
from forgetfilter.review.ranking import Ranking
from forgetfilter.scored import Scored

SAFE_ROWS, MARKS = 300, 40


def measure(rows: int, size: int) -> dict[str, float]:
    """Seconds at a number of rows; the filter saw a sample of them, as it does by default."""
    rng = np.random.default_rng(0)
    unsafe = rng.random(rows) < 0.05
    noisy = rng.standard_normal((rows, 2, size), dtype=np.float32).astype(np.float16)
    noisy[unsafe, :, :8] += np.float16(1)
    safe = rng.standard_normal((SAFE_ROWS, 2, size), dtype=np.float32).astype(np.float16)
    verdict = np.full(rows, np.nan)
    verdict[: min(rows, ENOUGH_ROWS)] = 0
    witness, order, config = rng.random(rows) + unsafe, rng.permutation(rows), ForgetFilterConfig()
    began = time.perf_counter()
    ranking = Ranking(Scored(witness, columns={"verdict": verdict}), np.zeros(rows, bool), noisy, safe, seed=0)
    ready = time.perf_counter() - began
    marks: dict[int, bool] = {}
    seconds = []
    for _ in range(MARKS):
        began = time.perf_counter()
        scored = ranking(marks)
        threshold = choose(scored, config, {})
        (question,) = islice(
            questions(scored.suspicion, threshold.value, witness, order, list(marks.items()), ranking.copies), 1
        )
        seconds.append(time.perf_counter() - began)
        marks[question.row] = bool(unsafe[question.row])
    found = sum(marks.values())
    return {"ready": ready, "median": statistics.median(seconds), "slowest": max(seconds), "unsafe_found": found}


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, default=[10_000, 100_000])
    parser.add_argument("--size", type=int, default=576, help="hidden size: 576 is SmolLM2-135M's")
    args = parser.parse_args()
    found = {str(rows): measure(rows, args.size) for rows in args.rows}
    for rows, figures in found.items():
        print(rows, {name: round(value, 3) for name, value in figures.items()})
    path = Path(__file__).parent / "results" / f"speed-{args.size}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"size": args.size, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
