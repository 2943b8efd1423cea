"""The result of a defense, and the training budgets that several defenses share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.decision.choice import Decision
from forgetfilter.hooks import Hooks
from forgetfilter.m0 import M0
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop


@dataclass
class Kept:
    """How a defense chose the rows it kept: a filter's scores, and the decision that follows from them."""

    scored: Scored
    decision: Decision


@dataclass
class Defended:
    """What a defense gives back.

    Attributes:
        model: Folder of the final model's adapter (of all weights with use_peft off); None for M0.
        m0: The M0 that the adapter is of, where the defense has made one of its own.
        sentence: Text to put before every prompt of a safety measure.
        reasoning: Text with which the model has learnt to begin its answers about bias.
        kept: How the rows were chosen, if a filter chose them.
        facts: What else results should record.
    """

    model: Path | None
    sentence: str = ""
    reasoning: str = ""
    kept: Kept | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    m0: M0 | None = None


def budget(data: Data, config: ForgetFilterConfig, examples: Sequence[Example]) -> StageSettings:
    """Settings of a defense's final training: the usual number of epochs, but no more steps than `none` takes.

    So a defense with few rows sees each one as often as `none` does, and one with many rows gets no more training.
    """
    most = len(data.noisy.trainable())
    rows = min(len(examples), most)
    return config.final_stage(rows, share=rows / most)


def safe_budget(data: Data, config: ForgetFilterConfig) -> StageSettings:
    """Settings of a training on the safe data, after the one on the noisy data: the same number of epochs."""
    rows = len(data.safe.trainable())
    return config.final_stage(rows, share=rows / len(data.noisy.trainable()))


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draw `count` examples: all of them count // len(examples) times, and the rest at random, each at most once."""
    whole, rest = divmod(count, len(examples))
    return [*(list(examples) * whole), *random.Random(seed).sample(list(examples), rest)]


def train_new_m0(
    workshop: Workshop,
    name: str,
    examples: Sequence[Example],
    settings: StageSettings,
    hooks: Hooks | None = None,
    **changes: Any,
) -> Workshop:
    """A workshop whose M0 is this one's after a training, in float32, since its weights are merged.

    Args:
        workshop: Its M0 is trained, once for all runs.
        name: What the new M0 is called; with hooks it also tells what they do.
        examples: What to learn.
        settings: Rates and lengths.
        hooks: What a method does inside the training.
        changes: Settings that differ in this training alone.
    """
    return workshop.on(workshop.on(None, dtype="float32", **changes).base(name, examples, settings, hooks))
