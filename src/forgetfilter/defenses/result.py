"""What a defense gives back, and the budget and the draws that several of them share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.decision.outputs import Decision
from forgetfilter.scored import Scored


@dataclass
class Kept:
    """By what a defense kept rows: a filter's scores, and the decision over them."""

    scored: Scored
    decision: Decision


@dataclass
class Result:
    """What a defense gives back.

    Attributes:
        model: The adapter of the model it ends with; None for M0.
        sentence: What precedes every prompt of a measure of safety.
        reasoning: What the model was taught to begin answers about bias with.
        kept: By what rows were kept, if a filter did that.
        facts: What else there is to say.
    """

    model: Path | None
    sentence: str = ""
    reasoning: str = ""
    kept: Kept | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def budget(data: Data, config: ForgetFilterConfig, examples: Sequence[Example]) -> StageSettings:
    """The final training of a defense: as many epochs as any, and no more steps than the noisy data gives.

    So few rows are not seen more often than `none` sees them, and many get no more training than it.
    """
    most = len(data.noisy.trainable())
    rows = min(len(examples), most)
    return config.final_stage(rows, share=rows / most)


def safe_budget(data: Data, config: ForgetFilterConfig) -> StageSettings:
    """A training on the safe data after that on the noisy data: as many epochs."""
    rows = len(data.safe.trainable())
    return config.final_stage(rows, share=rows / len(data.noisy.trainable()))


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of the examples at random; all of them as often as they go in, then some once more."""
    whole, rest = divmod(count, len(examples))
    return [*(list(examples) * whole), *random.Random(seed).sample(list(examples), rest)]
