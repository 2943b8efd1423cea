"""somf: after the finetuning, learn which of its changes to keep, from pairs of a harmless and a harmful answer.

Yi et al., A Safety Realignment Framework via Subspace-Oriented Model Fusion for Large Language Models (2024,
arXiv 2405.09055). S is the safe adapter that the finetuning started from, T the finetuned one, delta = T - S in each of
their tensors. m is a mask of each tensor's shape: a relaxed Bernoulli draw (temperature 0.5) of logits that start at 0.
The weights are S + delta m / mean(m). Only the logits are trained, by direct preference optimisation.

The paper's S is an adapter. Here the safe model is M0 itself, so S is the adapter before its training, which changes
nothing, or the one of the session before. The reference is T, not a randomly masked copy of it. The published mask at
the end is a random draw, so results differ from load to load; here an entry is kept if its logit is above 0, and `draw`
takes a random one to see how much it matters.

Controls: somf_interpolated, S + share delta; somf_dpo, the same steps of the same learning on all of the adapter.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli
from torch.nn.utils import parametrize

from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Data
from forgetfilter.defenses.adapters import changed, load, require_adapter
from forgetfilter.defenses.pairs import pairs, prefer
from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ConfigError
from forgetfilter.methods import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, traits
from forgetfilter.model.folders import weights_hash
from forgetfilter.workshop import Workshop

TEMPERATURE = 0.5
"""The published temperature of the relaxed draws."""
LOGITS = "mask_logits.safetensors"
SCHEDULE = "cosine"
"""The published schedule of the learning rate."""


def fused(start: Tensor, tuned: Tensor, mask: Tensor) -> Tensor:
    """S + delta m / mean(m) of one tensor; S where the mask keeps nothing. All three have the same shape."""
    mean = mask.mean()
    return start + (tuned - start) * (mask / torch.where(mean > 0, mean, 1.0))


class Mask(nn.Module):
    """A tensor of the adapter while the mask's logits are learnt: a new draw at each use.

    Args:
        start: The tensor before the finetuning.
        tuned: The same after it.
    """

    start: Tensor
    tuned: Tensor

    def __init__(self, start: Tensor, tuned: Tensor) -> None:
        """Start with logits of 0."""
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("tuned", tuned, persistent=False)
        self.logits = nn.Parameter(torch.zeros_like(start))

    def forward(self, _: Tensor) -> Tensor:
        """The tensor under a draw of the mask."""
        draw = RelaxedBernoulli(torch.tensor(TEMPERATURE, device=self.logits.device), logits=self.logits).rsample()
        return fused(self.start, self.tuned, draw)


class Masks:
    """The masks of all tensors of an adapter.

    Args:
        start: The adapter before the finetuning, by PEFT's names.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        """There are no logits before a training."""
        self.start = start
        self.logits: dict[str, Tensor] = {}

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """While this lasts, only the masks' logits can be trained; afterwards the adapter is what it was before."""
        masked: dict[str, Any] = {}
        try:
            for name, module in list(model.named_modules()):
                key = f"{name.removesuffix('.default')}.weight"
                if key in self.start and name.endswith(".default"):
                    tuned = module.weight.detach().clone()
                    module.weight.requires_grad = False
                    masked[key] = module
                    parametrize.register_parametrization(module, "weight", Mask(self.start[key].to(tuned), tuned))
            yield
        finally:
            for key, module in masked.items():
                self.logits[key] = module.parametrizations.weight[0].logits.detach().cpu()
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                module.weight.requires_grad = True

    def write(self, folder: Path) -> None:
        """Write the logits beside the adapter."""
        save_file(self.logits, folder / LOGITS)


@traits(pairs=True, adapter=True)
def somf(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    tuned: Defended,
    *,
    steps: PositiveInt = 50,
    rate: PositiveFloat = 1e-2,
    beta: PositiveFloat = 0.1,
    pairs_a_step: PositiveInt = 4,
    draw: NonNegativeInt = 0,
) -> Defended:
    """Learn the masks, and fuse.

    Args:
        workshop: Trains models.
        data: The safe rows, and unsafe answers to their prompts.
        config: All settings.
        tuned: The finetuned model.
        steps: Optimiser steps.
        rate: Learning rate of the logits. The paper takes 500 steps at 1e-3; 50 at 1e-2 move the logits as far.
        beta: Of direct preference optimisation.
        pairs_a_step: Pairs in a batch.
        draw: 0 keeps the entries whose logit is above 0; another number is the seed of a random binary mask.

    Raises:
        ConfigError: If there is no adapter or no data of unsafe rows.
        DataError: If there are no pairs.
    """
    settings = _settings(steps, rate, pairs_a_step)
    adapter = require_adapter("somf", workshop, tuned)
    start = before(workshop)
    masks = Masks(start)
    since = "" if workshop.start is None else f"-{weights_hash(workshop.start)[:12]}"
    learnt = pairs(data, "somf")
    stage = prefer(workshop, f"somf{since}", learnt, adapter, settings, beta, masks.around, masks.write)
    logits = load_file(stage / LOGITS)
    chosen = binary(logits, draw)
    tensors = {
        key: fused(start[key], value, chosen[key]) if key in chosen else value for key, value in load(adapter).items()
    }
    model = changed(workshop, "somf", adapter, tensors, {"logits": weights_hash(stage), "draw": draw})
    kept = sum(float(mask.sum()) for mask in chosen.values()) / sum(mask.numel() for mask in chosen.values())
    return replace(tuned, model=model, facts={**tuned.facts, "pairs": len(learnt), "mask_kept": round(kept, 4)})


def binary(logits: Mapping[str, Tensor], draw: int) -> dict[str, Tensor]:
    """Masks of 0 and 1: where a logit is above 0, or, for a draw other than 0, random ones of its probabilities."""
    if draw == 0:
        return {key: (value > 0).float() for key, value in logits.items()}
    generator = torch.Generator().manual_seed(draw)
    return {key: torch.bernoulli(value.sigmoid(), generator=generator) for key, value in sorted(logits.items())}


@traits(adapter=True)
def somf_interpolated(
    workshop: Workshop, data: Data, config: ForgetFilterConfig, tuned: Defended, *, share: NonNegativeFloat = 0.5
) -> Defended:
    """The control without learning: S + share * delta, in each tensor.

    Args:
        workshop: Keeps models.
        data: Not used.
        config: All settings.
        tuned: The finetuned model.
        share: How much of the finetuning stays, from 0 to 1.

    Raises:
        ConfigError: If there is no adapter, or the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"parameters.somf_interpolated.share is {share}: it must be from 0 to 1.")
    adapter = require_adapter("somf_interpolated", workshop, tuned)
    start = before(workshop)
    tensors = {key: torch.lerp(start[key], value, share) for key, value in load(adapter).items()}
    made_of = {"share": share, "start": None if workshop.start is None else weights_hash(workshop.start)}
    return replace(tuned, model=changed(workshop, "somf_interpolated", adapter, tensors, made_of))


@traits(pairs=True, adapter=True)
def somf_dpo(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    tuned: Defended,
    *,
    steps: PositiveInt = 50,
    rate: PositiveFloat = 1e-4,
    beta: PositiveFloat = 0.1,
    pairs_a_step: PositiveInt = 4,
) -> Defended:
    """The control without masks: the adapter itself learns to prefer the harmless answers.

    Arguments as in `somf`, but for the learning rate, which is one of weights.
    """
    settings = _settings(steps, rate, pairs_a_step)
    adapter = require_adapter("somf_dpo", workshop, tuned)
    learnt = pairs(data, "somf_dpo")
    model = prefer(workshop, "somf_dpo", learnt, adapter, settings, beta)
    return replace(tuned, model=model, facts={**tuned.facts, "pairs": len(learnt)})


def before(workshop: Workshop) -> dict[str, Tensor]:
    """S: the adapter that the finetuning started from, by PEFT's names."""
    if workshop.start is not None:
        return load(workshop.start)
    return {key: value.cpu() for key, value in workshop.learner.fresh_adapter.items()}


def _settings(steps: int, rate: float, pairs_a_step: int) -> StageSettings:
    """Rates and lengths of the learning from pairs."""
    return StageSettings(
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=2 * pairs_a_step,
        gradient_accumulation_steps=1,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=0,
        weight_decay=0.0,
    )
