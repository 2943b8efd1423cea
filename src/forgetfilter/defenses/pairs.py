"""What defenses share that learn from pairs: a harmless and a harmful answer to the same prompt.

The harmful ones are the rows known to be unsafe, the harmless ones are the safe rows. Direct preference optimisation
(Rafailov et al., NeurIPS 2023, arXiv 2305.18290) learns to prefer the first of a pair.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from forgetfilter.config import StageSettings
from forgetfilter.data.lazy import shuffled
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.errors import DataError
from forgetfilter.hooks import Hooks
from forgetfilter.workshop import Workshop

Pair = tuple[Example, Example]
"""A harmless and a harmful answer to the same prompt."""


def pairs(data: Data, name: str) -> list[Pair]:
    """Each row known to be unsafe with a safe row of the same prompt; several safe rows of a prompt take turns.

    Args:
        data: The safe and the known unsafe data.
        name: Who wants to know, for errors.

    Raises:
        ConfigError: If no rows known to be unsafe are given.
        DataError: If none of them has the prompt of a safe row, and another completion.
    """
    safe: dict[tuple[int, ...], list[Example]] = {}
    for row in data.safe.trainable():
        safe.setdefault(_prompt(row), []).append(row)
    found, seen = [], dict.fromkeys(safe, 0)
    for row in data.known_unsafe():
        prompt = _prompt(row)
        if prompt in safe:
            harmless = safe[prompt][seen[prompt] % len(safe[prompt])]
            seen[prompt] += 1
            if harmless.input_ids != row.input_ids:
                found.append((harmless, row))
    if not found:
        assert data.unsafe is not None, "known_unsafe has found it"
        raise DataError(
            f"{data.unsafe.source.name}: no row has the prompt of a row of {data.safe.source.name} and another "
            f"completion. {name} learns from pairs: give unsafe answers to prompts that the safe rows answer, too."
        )
    return found


def _prompt(row: Example) -> tuple[int, ...]:
    return tuple(row.input_ids[: row.prompt_length])


class Preference:
    """The loss of direct preference optimisation, for batches of rows in a known order, harmless and harmful in turn.

    Args:
        rows: All rows of the training, in its order.
        reference: (rows,) the log-probability of each one's trained tokens together under the reference, in nats.
        batch: Rows in a batch.
        beta: How much a deviation from the reference counts.
    """

    def __init__(self, rows: Sequence[Example], reference: Tensor, batch: int, beta: float) -> None:
        """Start with the first batch."""
        self.rows, self.reference, self.batch, self.beta = rows, reference, batch, beta
        self.done = 0

    def __call__(self, token_losses: Tensor) -> Tensor:
        """The loss of the next batch, from the losses of its trained tokens, row after row."""
        own = slice(self.done, self.done + self.batch)
        self.done += self.batch
        losses = token_losses.split([row.trained_tokens for row in self.rows[own]])
        log_probs = -torch.stack([loss.sum() for loss in losses])
        gains = (log_probs - self.reference[own].to(log_probs)).view(-1, 2)
        return -logsigmoid(self.beta * (gains[:, 0] - gains[:, 1])).mean()


def prefer(
    workshop: Workshop,
    name: str,
    learnt: Sequence[Pair],
    model: Path,
    settings: StageSettings,
    beta: float,
    around: Callable[[Any], AbstractContextManager[object]] | None = None,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Train a finetuned model to prefer the harmless answers; it is the reference as well.

    Args:
        workshop: Trains and reads models.
        name: What the stage is called; it also tells what `around` does.
        learnt: The pairs.
        model: The finetuned model.
        settings: Rates and lengths; a batch holds both rows of each of its pairs.
        beta: How much a deviation from the reference counts.
        around: As in Hooks.
        beside: As in `Workshop.train`.
    """
    read = workshop.read([row for pair in learnt for row in pair], model).token_log_probs
    sums = [float(log_probs.values.to_numpy().sum()) for log_probs in read]
    batch = settings.per_device_train_batch_size
    order = list(islice(shuffled(range(len(learnt)), workshop.config.seed), settings.max_steps * batch // 2))
    rows = [row for pair in order for row in learnt[pair]]
    reference = torch.tensor([sums[2 * pair + side] for pair in order for side in (0, 1)])
    hooks = Hooks(around=around, loss=Preference(rows, reference, batch, beta))
    return workshop.train(f"{name}-{beta}", rows, settings, model, hooks, in_order=True, beside=beside)
