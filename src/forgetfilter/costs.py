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


class Account:
    """Adds up what work costs, and knows of work within work."""

    def __init__(self) -> None:
        """Nothing has been done yet."""
        self._open = [Cost()]

    def add(self, cost: Cost) -> None:
        """Count something as part of the work under way; its seconds are added to those on the clock."""
        self._open[-1] += cost

    @contextmanager
    def measuring(self) -> Iterator[Cost]:
        """A piece of work. When the context ends, the cost given is filled in: by the clock, and by what was added."""
        found, over = Cost(), threading.Event()
        watcher = threading.Thread(target=_watch, args=(found, over), daemon=True)
        self._open.append(Cost())
        started, on_gpu = time.monotonic(), _gpu_memory(reset=True)
        watcher.start()
        try:
            yield found
        finally:
            over.set()
            watcher.join()
            added = self._open.pop()
            memory = found.memory if on_gpu is None else _gpu_memory() or 0
            found.seconds = time.monotonic() - started + added.seconds
            found.passes, found.memory = added.passes, max(memory, added.memory)
            self.add(added)  # the clock runs on for the work around it, so its own seconds are not added


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
