"""A model's log-probabilities of each row's trained tokens (teacher forcing), in batches of rows of like length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from forgetfilter.data.tokenization import Example
from forgetfilter.errors import TrainingError
from forgetfilter.model.batches import label_logits
from forgetfilter.model.learner import Learner
from forgetfilter.model.memory import RELEASE_EVERY, in_halves, release_freed_memory
from forgetfilter.model.sharding import shared
from forgetfilter.progress import progress

Made = TypeVar("Made")
BATCH_TOKENS, LOGITS = 4096, 256
"""Bounds on memory: the most tokens in a scoring batch, and the most tokens whose logits become float32 at once."""


@dataclass
class Reading:
    """A model's predictions of a row's trained tokens, each given the true tokens before it (teacher forcing).

    Attributes:
        log_probs: (trained tokens,) float32, the log-probability of each, in nats.
        favourites: (trained tokens,) the token that the model finds likeliest in place of each.
    """

    log_probs: np.ndarray
    favourites: list[int]

    @property
    def log_likelihood(self) -> float:
        """Mean log-probability of the row's trained tokens, in nats; at most 0."""
        return float(np.mean(self.log_probs, dtype=np.float64))


@torch.no_grad()
def read(learner: Learner, examples: Sequence[Example], what: str, bar: Any = None) -> list[Reading | None]:
    """One forward pass over every row; logits are computed for trained tokens only.

    Args:
        learner: The model.
        examples: The rows.
        what: Name for the progress bar.
        bar: A bar of the caller's that counts the rows instead.

    Returns:
        One for each example; None for rows that cannot be scored.
    """
    found: list[Reading | None] = [None] * len(examples)
    for batch, readings in in_batches(learner, examples, partial(_read, learner), what, bar):
        for i, reading in zip(batch, readings, strict=True):
            if np.isnan(reading.log_probs).any():
                raise TrainingError(f"{what}: the model gives no numbers any more. Take a lower learning rate.")
            found[i] = reading
    return found


def in_batches(
    learner: Learner,
    examples: Sequence[Example],
    work: Callable[[Sequence[Example]], list[Made]],
    what: str,
    bar: Any = None,
) -> Iterator[tuple[Sequence[int], list[Made]]]:
    """Do something with all rows that can be scored, a batch at a time, or half of one where the memory lacks.

    Args:
        learner: The model.
        examples: The rows.
        work: What is done with some rows: one result a row.
        what: Name for the progress bar.
        bar: A bar of the caller's that counts the rows instead.

    Yields:
        For each batch the numbers of its rows, and what was made of them.
    """
    learner.model.eval()
    scorable = [i for i, example in enumerate(examples) if example.scorable]
    all_batches = batches(scorable, examples, learner.config.per_device_eval_batch_size)
    with progress(what, len(scorable), "rows", bar=bar) as bar:
        done = shared(all_batches, lambda batch: in_halves(work, [examples[i] for i in batch]))
        for number, (batch, made) in enumerate(done):
            if number % RELEASE_EVERY == 0:
                release_freed_memory()
            yield batch, made
            bar.update(len(batch))


def _read(learner: Learner, rows: Sequence[Example]) -> list[Reading]:
    """One forward pass over some rows."""
    inputs = learner.collate([row.input_ids for row in rows], [row.labels for row in rows])
    with learner.mixed:
        logits, targets = label_logits(learner.model, inputs)
        parts = list(zip(logits.split(LOGITS), targets.split(LOGITS), strict=True))
        log_probs = torch.cat([-cross_entropy(part.float(), target, reduction="none") for part, target in parts])
    counts = [row.trained_tokens for row in rows]
    scores, favourites = log_probs.cpu().split(counts), logits.argmax(-1).cpu().split(counts)
    return [Reading(s.numpy(), f.tolist()) for s, f in zip(scores, favourites, strict=True)]


def batches(rows: Sequence[int], examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Rows of like length together, at most `size` of them and about BATCH_TOKENS tokens; longest first.

    So a batch too large for the memory fails at the start, and later batches reuse the memory of earlier ones.
    """
    batch: list[int] = []
    for row in sorted(rows, key=lambda i: -len(examples[i].input_ids)):
        if batch and (len(batch) == size or (len(batch) + 1) * len(examples[batch[0]].input_ids) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
