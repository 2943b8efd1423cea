"""What a decided run prints: a short table, and what to do next."""

import shlex
from itertools import compress
from pathlib import Path

import numpy as np

from forgetfilter.data.formats import read_row
from forgetfilter.data.templates import learns
from forgetfilter.data.turns import exchanges
from forgetfilter.decision.opened import default_filter, read_scores
from forgetfilter.decision.outputs import counts_in_words
from forgetfilter.progress import show
from forgetfilter.result import Result
from forgetfilter.scored import ANSWER

FIGURES = ("precision", "recall", "f1", "flag_all_f1", "auroc", "average_precision", "clean_dropped")

SHOWN, WIDTH = 5, 100
"""How many of the most suspect rows are shown, and characters of their texts."""


def print_summary(result: Result, report: Path) -> None:
    """Print counts, the rule, figures where there are labels, the most suspect rows, and the next commands."""
    metrics, run = result.metrics, result.run
    print(f"\n{metrics['rows']} rows: {metrics['kept']} kept, {metrics['dropped']} dropped")
    for words, count in counts_in_words(metrics):
        print(f"  {words}: {count}")
    print(f"rule: {metrics['rule']} on {metrics['filter']}, threshold {show(metrics['threshold'])}: {metrics['says']}")
    if "planted" in metrics:
        print(f"planted: {metrics['planted']['says']}")
    if "f1" in metrics:
        print("  ".join(f"{name} {show(metrics[name])}" for name in FIGURES))
    print_most_suspect(result, metrics["filter"])
    print(f"files: {run.folder}  (kept, dropped, scores.parquet, metrics.json)")
    print(f"look:  {report}")
    _print_next(result)


def print_most_suspect(result: Result, name: str) -> None:
    """Print the rows with the highest scores by a filter: score, decision, question and answer."""
    table = read_scores(result.run)
    scores = table[name].to_numpy()  # null is NaN
    order = [row for row in np.argsort(-scores, kind="stable")[:SHOWN].tolist() if not np.isnan(scores[row])]
    if not order:
        return
    print(f"\nthe {len(order)} most suspect rows by {name}:")
    records = result.run.rows().rows()
    answers = table[ANSWER].to_numpy() if ANSWER in table.column_names else np.full(len(scores), np.nan)
    for row in order:
        turns = read_row(records[row], result.run.row_format)
        learnt = [learns(turn) for turn in turns if turn.trained]  # as answers are numbered
        pairs = [*compress(exchanges(turns), learnt)] or [("", turns[-1].content)]
        question, answer = pairs[-1 if np.isnan(answers[row]) else int(answers[row]) - 1]
        start, asked = f"  {scores[row]:8.3f} {table['decision'][row].as_py():7}", _line(question)
        print(f"{start} {asked}\n{'':19}-> {_line(answer)}" if asked else f"{start} {_line(answer)}")
    print()


def _line(text: str) -> str:
    """The start of a text in one line, without characters that a terminal would obey."""
    seen = "".join(char if char.isprintable() else " " for char in text)
    short = " ".join(seen.split())
    return short if len(short) <= WIDTH else f"{short[: WIDTH - 3]}..."


def _print_next(result: Result) -> None:
    """Print what may be done next, and how the final model stands to the decision."""
    metrics, run = result.metrics, result.run
    folder, final = shlex.quote(str(run.folder)), run.manifest["stages"].get("final")
    by = metrics["filter"]
    other = "" if by == default_filter(run, run.config()) else f" --filter {by}"
    decide = f"forgetfilter decide {folder}{other} --threshold NUMBER"
    if not metrics["kept"]:
        print("no row is kept, so there is nothing to finetune on. Look at the rows above: if they are harmless, the")
        print(f"safe rows are of another kind than yours. To set another threshold: {decide}")
        return
    print(f"next:  forgetfilter review {folder}     mark a few rows, and everything is ranked anew")
    for name, export in run.manifest.get("exports", {}).items():
        if export["stale"]:
            print(f"export: {run.folder / 'export' / name} is of an earlier decision, until you export again")
    if final is not None and not final.get("stale"):
        print(f"       {decide}\nmodel: {run.folder / 'model'}, finetuned on the kept rows")
        return
    print(f"       forgetfilter finetune {folder}   or   {decide}")
    if final is not None:
        print(f"model: {run.folder / 'model'} is of an earlier decision, until you finetune again")
