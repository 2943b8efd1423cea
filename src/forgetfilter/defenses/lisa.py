"""lisa: take turns on safe and noisy data, and keep the weights near those at the end of the previous turn.

Huang et al., Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning (NeurIPS 2024,
arXiv 2405.18641). A tenth of the steps is on safe data, the rest on the user's. The loss has a proximal term
rho / 2 * ||w - w_other||^2, where w_other are the weights at the end of the last turn on the other data. The term is
off for the first tenth of all steps. The control lisa_bso takes the same turns without the term (their BSO).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import shuffled
from forgetfilter.data.loading import Data
from forgetfilter.defenses.result import Defended, budget
from forgetfilter.hooks import Hooks
from forgetfilter.methods import NonNegativeFloat, PositiveInt
from forgetfilter.workshop import Workshop


class Proximal:
    """The proximal term: it pulls the weights towards those at the end of the last turn on the other data.

    Args:
        weights: What is trained.
        turns: For each step, from the first, whether it is on safe data.
        rho: The term's weight.
        without: How many of the first steps go without the term.
    """

    def __init__(self, weights: Sequence[Tensor], turns: Sequence[bool], rho: float, without: int) -> None:
        """Start before the first step, with nothing to be tied to."""
        self.weights, self.turns, self.rho, self.without = list(weights), turns, rho, without
        self.step = 0
        self.ended: dict[bool, list[Tensor]] = {}

    def penalty(self) -> Tensor | None:
        """The term at the step that is being taken; None where it is off."""
        other = self.ended.get(not self.turns[self.step])
        if other is None or self.step < self.without:
            return None
        squares = [(weight - there).pow(2).sum() for weight, there in zip(self.weights, other, strict=True)]
        return self.rho / 2 * torch.stack(squares).sum()

    def after(self, step: int) -> None:
        """Note the weights where a turn has ended; `step` counts from 1."""
        self.step = step
        if step < len(self.turns) and self.turns[step] != self.turns[step - 1]:
            self.ended[self.turns[step - 1]] = [weight.detach().clone() for weight in self.weights]


def turns(steps: int, safe_steps: int, noisy_steps: int) -> list[bool]:
    """For each step whether it is on safe data; safe data comes first."""
    return [step % (safe_steps + noisy_steps) < safe_steps for step in range(steps)]


def lisa(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    *,
    rho: NonNegativeFloat = 1.0,
    safe_steps: PositiveInt = 3,
    noisy_steps: PositiveInt = 27,
    without: NonNegativeFloat = 0.1,
) -> Defended:
    """Finetune in turns.

    Args:
        workshop: Trains models.
        data: The noisy and the safe data.
        config: All settings.
        rho: Weight of the proximal term.
        safe_steps: Steps of a turn on safe data. The paper has turns of 100 and 900 steps; 3 and 27 keep this ratio
            in short trainings. A turn begins with the weights of the turn before, so the term is 0 in its first step.
        noisy_steps: Steps of a turn on noisy data.
        without: Share of all steps that go without the term, at the beginning.
    """
    settings = budget(data, config, data.noisy.trainable())
    on_safe = turns(settings.max_steps, safe_steps, noisy_steps)
    streams = {
        True: shuffled(data.safe.trainable(), config.seed),
        False: shuffled(data.noisy.trainable(), config.seed),
    }
    batch = settings.rows() // settings.max_steps
    examples = [next(streams[safe]) for safe in on_safe for _ in range(batch)]
    weights = [weight for weight in workshop.learner.model.parameters() if weight.requires_grad]
    term = Proximal(weights, on_safe, rho, round(without * settings.max_steps))
    hooks = Hooks(each_step=term.after, penalty=term.penalty)
    name = f"lisa-{rho}-{safe_steps}-{noisy_steps}-{without}"
    return Defended(workshop.train(name, examples, settings, workshop.start, hooks, in_order=True))


def lisa_bso(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    *,
    safe_steps: PositiveInt = 3,
    noisy_steps: PositiveInt = 27,
) -> Defended:
    """The control: the same turns, tied to nothing. Arguments as in `lisa`."""
    return lisa(workshop, data, config, rho=0.0, safe_steps=safe_steps, noisy_steps=noisy_steps)
