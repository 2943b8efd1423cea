"""What each command costs by the number of rows: seconds of its one processor core, and the most memory it took.

python benchmarks/speed/rows.py [--rows 10000 100000 1000000]          most of an hour on one core

The model is tiny and random, so this measures everything but the model: reading, tokenising, writing, the probe's fits.
Each command has a process of its own. `filter` trains on a sample, `review` opens the run, marks some rows and takes
the decision, `score` judges as many new rows, `decide` and `export` do what they do. Results go to
benchmarks/speed/results/rows.json.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from score import peak_mb, tiny_model, write_rows

from forgetfilter import ForgetFilter, ForgetFilterConfig
from forgetfilter.data.formats import read_row
from forgetfilter.runs import Run

RESULTS = Path(__file__).parent / "results" / "rows.json"
COMMANDS = ("filter", "decide", "review", "score", "export")
MARKS = 12
"""Rows marked in the review."""
UNSAFE = "late"
"""A row whose answer has this word is marked unsafe."""


def prepare(folder, rows):
    """A tiny model, noisy rows, safe rows and new rows."""
    tiny_model(folder / "tiny")
    for name, count in (("noisy", rows), ("safe", 300), ("more", rows)):
        write_rows(folder / f"{name}.jsonl", count)


def run_filter(folder):
    """Score and decide."""
    config = ForgetFilterConfig(
        model_name_or_path=str(folder / "tiny"),
        dataset_name=str(folder / "noisy.jsonl"),
        safe_dataset_name=str(folder / "safe.jsonl"),
        output_dir=str(folder / "run"),
    )
    ForgetFilter(config).fit()


def run_decide(folder):
    """Decide by the share to drop, and write the page, as the command does."""
    from forgetfilter.report.run_page import write_report
    from forgetfilter.result import Result

    write_report(Result(Run.open(folder / "run")).decide(drop_share=0.05).run)


def run_review(folder):
    """Mark the rows asked about and decide; seconds to the first row, and of each mark."""
    from forgetfilter.review.session import open_review

    started = time.process_time()
    review = open_review(folder / "run")
    review.ask()
    opened, seconds = time.process_time() - started, []
    records, row_format = review.opened.source.records, review.run.row_format
    for _ in range(MARKS):
        row = review.ask()[0].row
        unsafe = UNSAFE in read_row(records[row], row_format)[-1].content
        started = time.process_time()
        review.mark({row: "unsafe" if unsafe else "clean"})
        review.ask()
        review.status()
        seconds.append(time.process_time() - started)
    review.done()
    return {"opened_seconds": round(opened, 2), "mark_seconds": round(float(np.median(seconds)), 2)}


def run_score(folder):
    """Judge new rows by what the marks taught."""
    from forgetfilter.new_rows import score

    score(Run.open(folder / "run"), folder / "more.jsonl")


def run_export(folder):
    """Write the kept rows for a trainer."""
    from forgetfilter.cli import main

    main(["export", str(folder / "run"), "--format", "trl"])


def measure(command, folder):
    """Run a command in this process."""
    before, started, busy = peak_mb(), time.monotonic(), time.process_time()
    more = globals()[f"run_{command}"](folder) or {}
    spent = {"seconds": round(time.process_time() - busy, 1), "clock_seconds": round(time.monotonic() - started, 1)}
    return {**spent, **more, "before_mb": before, "peak_mb": peak_mb()}


def in_process(command, folder):
    """Run a command in a process of its own, on one thread."""
    call = [sys.executable, __file__, "--here", command, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def growth(measured):
    """For each command the exponent of its seconds over the rows, from the smallest number to the largest."""
    least, most = measured[0], measured[-1]
    both = [name for name in COMMANDS if name in least and name in most]
    more = {name: np.log(most[name]["seconds"] / least[name]["seconds"]) for name in both}
    return {name: round(float(factor / np.log(most["rows"] / least["rows"])), 3) for name, factor in more.items()}


def main():
    """Measure each number of rows, and add it to the results."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--here", nargs=2, help="a command and a folder: measure in this process, and print JSON")
    parser.add_argument("--dir", help="folder for the data and the run; by default the system's own")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.here[0], Path(args.here[1]))))
        return
    found = {}
    if RESULTS.exists():
        found = {entry["rows"]: entry for entry in json.loads(RESULTS.read_text())["measured"]}
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.dir) as name:
            prepare(Path(name), rows)
            found[rows] = {"rows": rows}
            for command in COMMANDS:
                found[rows][command] = in_process(command, Path(name))
                print(rows, command, found[rows][command], flush=True)
        measured = [found[count] for count in sorted(found)]
        about = {"device": f"{platform.machine()} CPU, one thread", "growth": {}, "measured": measured}
        if len(measured) > 1:
            about["growth"] = growth(measured)
            print("growth", about["growth"], flush=True)
        RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
