"""second_split: how soon a model forgets what it had learnt of a row, once it is finetuned on other data.

Maini et al., Characterizing Datapoints via Second-Split Forgetting (NeurIPS 2022, arXiv 2210.15031). A model learns one
part of the data and is then trained on another. A row's forgetting time is the first epoch of this second training from
which on the row stays misclassified. Mislabelled rows go first.

Here the first part is the noisy data and the second the safe data, and every token of a completion is a row of theirs:
it counts as classified rightly while its probability is above 1/2.
"""

import dataclasses
import random
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.filters.forgetting import review_settings
from forgetfilter.methods import PositiveFloat, PositiveInt
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

VERSION = 2
"""Raised when the same settings give other scores than before: stored ones are then made anew."""


def second_split(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    looks: PositiveInt = 4,
    share: PositiveFloat = 1 / 3,
) -> Scored:
    """For how many looks the tokens that the noisy stage taught stay wrong, to the end; the mean of them, 0 = never.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings; `noisy` and `review` are those of the stages.
        looks: Parts of the second training, after each of which the rows are read. Each part begins with a new
            optimiser, at a constant rate.
        share: Ratio of the steps of the second training to the noisy stage's.
    """
    rows, noisy, safe = data.noisy.examples, data.noisy.trainable(), data.safe.trainable()
    noisy_settings = config.noisy_stage(len(noisy))
    whole = review_settings(config, len(noisy), len(safe), 1.0, share)
    part = dataclasses.replace(whole, max_steps=max(1, whole.max_steps // looks), lr_scheduler_type="constant")
    stages = {f"second_split_{look}": (part, safe) for look in range(1, looks + 1)}
    workshop.expect({"noisy": (noisy_settings, noisy), **stages}, noisy)

    model = workshop.train("noisy", noisy, noisy_settings)
    known, learnt = workshop.read(rows).token_log_probs, workshop.read(rows, model).token_log_probs
    stream = cycle(random.Random(config.seed).sample(list(safe), len(safe)))  # a part goes on where the last one ended
    later = []
    for name in stages:
        model = workshop.train(name, list(islice(stream, part.rows())), part, model, in_order=True)
        later.append(workshop.read(rows, model).token_log_probs)
    return Scored(np.array([_soonness(*read) for read in zip(known, learnt, *later, strict=True)]))


def _soonness(known: pa.ListScalar, learnt: pa.ListScalar, *later: pa.ListScalar) -> float:
    """How soon a row is forgotten: as many as looks = by the first, 0 = never or nothing learnt, NaN = not scored."""
    if not known.is_valid:
        return float("nan")
    taught = _right(learnt) & ~_right(known)
    if not taught.any():
        return 0.0
    held = np.array([_right(look)[taught] for look in later])  # (looks, taught tokens)
    wrong_to_the_end = np.cumprod(~held[::-1], axis=0).sum(axis=0)  # looks from which on the token stays wrong
    return float(wrong_to_the_end.mean())


def _right(log_probs: pa.ListScalar) -> np.ndarray:
    """(tokens,) whether each has more than half of the probability."""
    right: np.ndarray = log_probs.values.to_numpy() > np.log(0.5)
    return right
