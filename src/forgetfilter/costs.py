"""What a piece of work costs: seconds, passes of tokens through a model, and memory."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil

TRAINING = 3.0
"""A token's training in units of its scoring: forward, and twice as much backward."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the memory."""


@dataclass
class Cost:
    """What a piece of work costs.

    Attributes:
        seconds: Time on the clock.
        passes: Tokens that went through a model, times its weights in millions; a trained token counts TRAINING times.
        memory: Most bytes that the process held meanwhile: on the GPU if there is one.
    """

    seconds: float = 0.0
    passes: float = 0.0
    memory: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(self.seconds + other.seconds, self.passes + other.passes, max(self.memory, other.memory))

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {key: round(value, 3) for key, value in asdict(self).items()}

    @classmethod
    def noted(cls, entry: Mapping[str, Any]) -> "Cost":
        """What a manifest's entry says of itself; nothing where an older version wrote it."""
        return cls(**entry.get("cost", {}))


def _apart(part: str, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Cost]:
    """A part's cost split up: one entry for each part it was made with, and the rest under its own name."""
    found: dict[str, Cost] = {}
    for name in stages[part].get("made_with", []):
        if name in stages:
            found |= _apart(name, stages)
    whole, others = Cost.noted(stages[part]), sum(found.values(), Cost())
    rest = Cost(max(0.0, whole.seconds - others.seconds), max(0.0, whole.passes - others.passes), whole.memory)
    return {**found, part: rest}


class _Work:
    """A piece of work under way: the parts of the run that it made or found again, and what else was added."""

    def __init__(self) -> None:
        self.parts: dict[str, Cost] = {}
        self.rest = Cost()

    def total(self) -> Cost:
        return sum(self.parts.values(), self.rest)


class Account:
    """Adds up what work costs. It knows of work within work, and counts each part of a run once in a piece of work."""

    def __init__(self) -> None:
        """Nothing has been done yet."""
        self._open = [_Work()]

    def add(self, cost: Cost) -> None:
        """Count something as part of the work under way; its seconds are added to those on the clock."""
        self._open[-1].rest += cost

    def reuse(self, part: str, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """Count what had made a part of the run that was found again.

        Args:
            part: Its name in the manifest.
            stages: The manifest's entries, which tell what each part cost, and which others it was made with.
        """
        for name, cost in _apart(part, stages).items():
            self._open[-1].parts.setdefault(name, cost)

    def parts(self) -> list[str]:
        """The parts of the run that the work under way has made or found again."""
        return sorted(self._open[-1].parts)

    @contextmanager
    def measuring(self, part: str | None = None) -> Iterator[Cost]:
        """A piece of work. When the context ends, the cost given is filled in: by the clock, and by what was added.

        Args:
            part: The part of the run that it makes; the work around it does not count it again when it finds it.
        """
        found, over, outer = Cost(), threading.Event(), self._open[-1]
        outer.rest.memory = max(outer.rest.memory, _gpu_memory(reset=True) or 0)
        watcher = threading.Thread(target=_watch, args=(found, over), daemon=True)
        self._open.append(_Work())
        started = time.monotonic()
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
            work = self._open.pop()
            added, on_gpu = work.total(), _gpu_memory()
            found.seconds = time.monotonic() - started + added.seconds
            found.passes = added.passes
            found.memory = max(found.memory if on_gpu is None else on_gpu, added.memory)
            # The clock runs on for the work around it, so its own seconds are not added.
            if part is not None:
                outer.parts.setdefault(part, Cost(added.seconds, added.passes, found.memory))
            else:
                outer.rest += work.rest
                for name, cost in work.parts.items():
                    outer.parts.setdefault(name, cost)


def _watch(cost: Cost, over: threading.Event) -> None:
    """Note the most memory that the process holds, until it is over."""
    process = psutil.Process()
    while not over.wait(LOOK_EVERY if cost.memory else 0):
        cost.memory = max(cost.memory, process.memory_info().rss)


def _gpu_memory(*, reset: bool = False) -> int | None:
    """Most bytes that torch has held on the GPU since the last reset; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.max_memory_allocated())
