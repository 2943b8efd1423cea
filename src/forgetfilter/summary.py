"""What a decided run prints: a short table, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

from forgetfilter.decision.decide import Result
from forgetfilter.decision.opened import default_filter

FIGURES = ("precision", "recall", "f1", "flag_all_f1", "auroc", "average_precision", "clean_dropped")


NOTES = {
    "unscored": "unscored",
    "partly_scored": "partly scored",
    "malformed": "malformed",
    "also_safe": "also among the safe rows",
    "repeated": "saying the same as a row before them, whose scores they share",
    "unreadable": "that the model can hardly read, such as ciphers; --unreadable drop leaves them out",
    "spelt_specials": "with special tokens or a change of turn spelt out, which stay text",
}
"""Counts worth a line, in words."""


def show(value: Any) -> str:
    """A figure for a table: numbers short, a missing one as a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_summary(result: Result, report: Path) -> None:
    """Print counts, the rule, figures where there are labels, where the report is, and the next commands."""
    metrics, folder = result.metrics, result.run.folder
    print(f"\n{metrics['rows']} rows: {metrics['kept']} kept, {metrics['dropped']} dropped")
    for name, words in NOTES.items():
        if metrics.get(name):  # an older run lacks some
            print(f"  {words}: {metrics[name]}")
    print(f"rule: {metrics['rule']} on {metrics['filter']}, threshold {show(metrics['threshold'])}: {metrics['says']}")
    if "planted" in metrics:
        print(f"planted: {metrics['planted']['says']}")
    if "f1" in metrics:
        print("  ".join(f"{name} {show(metrics[name])}" for name in FIGURES))
    print(f"files: {folder}  (kept, dropped, scores.parquet, metrics.json)")
    print(f"look:  {report}")
    by = metrics["filter"]
    other = "" if by == default_filter(result.run, result.run.config()) else f" --filter {by}"
    run = shlex.quote(str(folder))
    print(f"next:  forgetfilter review {run}     mark a few rows, and everything is ranked anew")
    print(f"       forgetfilter finetune {run}   or   forgetfilter decide {run}{other} --threshold NUMBER")
