"""seal: a weight for each noisy row is learnt together with the model, so that the safe data is predicted well.

Shen et al., SEAL (ICLR 2025, arXiv 2410.07471). Each noisy row i has a logit s_i and the weight p_i = N softmax(s)_i,
1 on average. In turns the model learns `safe_weight` times the safe rows' mean loss plus the rest times the mean of
p_i * loss_i, and the logits descend on the mean of p_i * loss_i. The fifth of the rows with the smallest logits is
dropped.

safe_weight is 1 in the first epoch and falls by 0.03 an epoch, so the model hardly learns anything but the safe data,
and the logits learn the order of the rows' losses under it: with plain gradient descent SEAL's ranking is that of
safe_only (filters/safe_only.py). The published Adam blurs it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetfilter import processes
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import shuffled
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.errors import ConfigError
from forgetfilter.hooks import Hooks
from forgetfilter.methods import PositiveFloat, PositiveInt, traits
from forgetfilter.scored import NO_PROMISE, Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

KEPT = 0.8
"""Share of the rows that the published rule keeps."""
BETAS, FIRST_LOGIT = (0.9, 0.95), 0.1
"""The published Adam's, and where the logits start."""
LOGITS = "logits.npy"


class Selector:
    """The rows' logits and their optimiser.

    Args:
        rows: How many rows.
        rate: Learning rate.
        adam: Take Adam, as published; else plain gradient descent.
    """

    def __init__(self, rows: int, rate: float, *, adam: bool) -> None:
        """Start with equal weights."""
        self.logits = np.full(rows, FIRST_LOGIT)
        self.rate, self.adam, self.steps = rate, adam, 0
        self.mean, self.square = np.zeros(rows), np.zeros(rows)

    def weights(self) -> np.ndarray:
        """(rows,) N softmax(logits): 1 on average."""
        powers = np.exp(self.logits - self.logits.max())
        found: np.ndarray = len(powers) * powers / powers.sum()
        return found

    def gradient(self, batch: Sequence[int], losses: np.ndarray) -> np.ndarray:
        """(rows,) d/ds_j of the batch's mean of p_i * loss_i: p_j / B * ([j in batch] loss_j - sum p_i loss_i / N)."""
        weights = self.weights()
        own = np.zeros(len(weights))
        np.add.at(own, list(batch), losses)
        shared = (weights[list(batch)] * losses).sum() / len(weights)
        found: np.ndarray = weights / len(batch) * (own - shared)
        return found

    def step(self, batch: Sequence[int], losses: np.ndarray) -> None:
        """Descend on the mean of p_i * loss_i of a batch."""
        gradient = self.gradient(batch, losses)
        if not self.adam:
            self.logits -= self.rate * gradient
            return
        self.steps += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        mean, square = self.mean / (1 - BETAS[0] ** self.steps), self.square / (1 - BETAS[1] ** self.steps)
        self.logits -= self.rate * mean / (np.sqrt(square) + 1e-8)


@dataclasses.dataclass
class Plan:
    """What the training sees: batches of safe and of noisy rows in turn, two to an optimiser step.

    Attributes:
        examples: All rows in order.
        noisy: For each optimiser step, the numbers of its noisy rows. Those that fill an epoch's last batch, which are
            seen a second time, stand at its end.
        fresh: For each optimiser step, how many of its noisy rows are new in this epoch; they alone move the logits.
        safe_weights: For each optimiser step, the weight of the safe rows' loss.
    """

    examples: list[Example]
    noisy: list[list[int]]
    fresh: list[int]
    safe_weights: list[float]

    @classmethod
    def of(
        cls, noisy: Sequence[Example], safe: Sequence[Example], batch: int, epochs: int, fall: float, seed: int
    ) -> "Plan":
        """Every noisy row once in an epoch, and a few twice to fill the last batch; the safe rows over and over."""
        noisy_rows, safe_rows = shuffled(range(len(noisy)), seed), shuffled(range(len(safe)), seed + 1)
        plan = cls([], [], [], [])
        for epoch in range(epochs):
            order = list(islice(noisy_rows, len(noisy)))
            for first in range(0, len(order), batch):
                fresh = order[first : first + batch]
                rows = [*fresh, *islice(cycle(order), batch - len(fresh))]
                plan.examples += [safe[row] for row in islice(safe_rows, batch)]
                plan.examples += [noisy[row] for row in rows]
                plan.noisy.append(rows)
                plan.fresh.append(len(fresh))
                plan.safe_weights.append(1 - fall * epoch)
        return plan


class _Losses:
    """The loss of each batch, in the order of a plan; a noisy batch also teaches the selector."""

    def __init__(self, plan: Plan, selector: Selector, batch: int) -> None:
        self.plan, self.selector, self.batch, self.done = plan, selector, batch, 0

    def __call__(self, token_losses: Any) -> Any:
        """A batch's loss.

        Args:
            token_losses: (tokens,) tensor, the losses of the batch's trained tokens, row after row.
        """
        step, noisy = divmod(self.done, 2)
        rows = self.plan.examples[self.done * self.batch : (self.done + 1) * self.batch]
        self.done += 1
        losses = [own.mean() for own in token_losses.split([row.trained_tokens for row in rows])]
        share = self.plan.safe_weights[step]
        if not noisy:
            return share * sum(losses) / len(losses)
        chosen = self.plan.noisy[step]
        weights = self.selector.weights()[chosen].tolist()
        told = np.array([float(loss.detach()) for loss in losses])
        told[self.plan.fresh[step] :] = 0
        self.selector.step(chosen, told)
        weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        return (1 - share) * sum(weighted) / len(weighted)


def require_seal(workshop: "Workshop", data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise ConfigError if a launcher has started several processes, or a setting does not fit."""
    processes.require_one("filter seal")
    fall, epochs = parameters["fall"], parameters["epochs"]
    if not 0 <= fall * (epochs - 1) <= 1:
        raise ConfigError(f"parameters.seal.fall is {fall}: the safe rows' weight must stay from 0 to 1.")
    accumulated = workshop.config.noisy_stage(len(data.noisy.trainable())).gradient_accumulation_steps
    if accumulated > 1:
        raise ConfigError(
            f"seal weighs a step's rows at once: it needs gradient_accumulation_steps 1, not {accumulated}."
        )


@traits(check=require_seal)
def seal(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    epochs: PositiveInt = 3,
    selector_rate: PositiveFloat = 5e-3,
    adam: bool = True,
    fall: float = 0.03,
) -> Scored:
    """The rows' logits after the training, their sign changed.

    Args:
        workshop: Trains and keeps the model.
        data: The noisy and the safe data.
        config: All settings; `noisy` are those of the stage, at a constant rate.
        epochs: Passes over the noisy data.
        selector_rate: Learning rate of the logits.
        adam: Their optimiser: Adam as published, or plain gradient descent.
        fall: How much the weight of the safe rows' loss falls after each epoch.

    Raises:
        ConfigError: If there are several processes, or a parameter is out of range.
    """
    require_seal(workshop, data, {"fall": fall, "epochs": epochs})
    rows = [row for row, example in enumerate(data.noisy.examples) if example.scorable]
    noisy, safe = [data.noisy.examples[row] for row in rows], data.safe.trainable()
    settings = config.noisy_stage(len(noisy))
    batch = min(settings.per_device_train_batch_size, len(noisy))
    plan = Plan.of(noisy, safe, batch, epochs, fall, config.seed)
    settings = dataclasses.replace(
        settings,
        max_steps=len(plan.noisy),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
    )
    selector = Selector(len(noisy), selector_rate, adam=adam)

    def keep_logits(folder: Path) -> None:
        np.save(folder / LOGITS, selector.logits)

    hooks = Hooks(loss=_Losses(plan, selector, batch))
    name = f"seal-{epochs}-{selector_rate}-{'adam' if adam else 'descent'}-{fall}"
    model = workshop.train(name, plan.examples, settings, hooks=hooks, in_order=True, beside=keep_logits)
    suspicion = np.full(len(data.noisy.examples), np.nan)
    suspicion[rows] = -np.load(model / LOGITS)
    kept = int(KEPT * len(rows))
    says = f"as published: {1 - KEPT:.0%} of the rows at most, those with the smallest weights, whatever the data"
    threshold = float(np.sort(suspicion[rows])[kept - 1])
    return Scored(suspicion, scale=Scale(threshold, says=says + NO_PROMISE, quota=True, kept=KEPT))
