"""What a person at the terminal is told: lines, and one progress bar for all long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from forgetfilter import processes

PATIENCE = 5.0
"""Seconds after which work that is mostly short shows a bar."""


def say(text: str) -> None:
    """Print a line; of several processes the first one does."""
    if processes.is_main_process():
        print(text, flush=True)


@contextmanager
def progress(
    what: str, total: int | None, unit: str, done: int = 0, after: float = 0, bar: Any = None
) -> Iterator[Any]:
    """A bar on standard error; in a log it adds a line every half a minute at most.

    Args:
        what: What is done.
        total: How many units there are; None where nobody knows yet.
        unit: What they are.
        done: How many are done already.
        after: Seconds without a bar: work that ends before shows none.
        bar: A bar of the caller's that counts the units in place of a new one.
    """
    if bar is not None:
        yield bar
        return
    live = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        mininterval=0.5 if live else 30,
        miniters=1,
        dynamic_ncols=live,
        delay=after,
        disable=not processes.is_main_process(),
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed} gone, {remaining} left]{postfix}",
    ) as bar:
        yield bar


def silent() -> Any:
    """A bar that shows nothing."""
    return tqdm(disable=True)


def show(value: Any) -> str:
    """A figure for a table: numbers short, a missing one as a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
