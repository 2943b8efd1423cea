"""toss_tokens: finetune on the noisy data, with the most suspect fifth of all tokens masked.

TOSS (ICLR 2026, arXiv 2603.01185): a token's score is its loss under a model finetuned on safe rows minus that under
one finetuned on known unsafe rows. The tokens with the highest scores in the whole data set are read, but not learnt.
The filter toss (filters/toss.py) gives the scores.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.defenses.result import Result, budget
from forgetfilter.errors import ConfigError
from forgetfilter.filters import scores_of
from forgetfilter.workshop import Workshop


def toss_tokens(workshop: Workshop, data: Data, config: ForgetFilterConfig, *, masked_share: float = 0.2) -> Result:
    """Mask, then finetune.

    Args:
        workshop: Trains and reads models.
        data: The noisy, the safe and the known unsafe data.
        config: All settings.
        masked_share: Share of all trained tokens that is masked.

    Raises:
        ConfigError: If the share is not between 0 and 1, or leaves nothing to learn.
    """
    if not 0 <= masked_share < 1:
        raise ConfigError(f"parameters.toss_tokens.masked_share is {masked_share}: it must be from 0 to below 1.")
    scores = scores_of(workshop, data, "toss").token_costs
    assert scores is not None, "toss scores tokens"
    masked = mask(data.noisy.examples, scores, masked_share)
    left = [example for example in masked if example.scorable]
    if not left:
        raise ConfigError(f"parameters.toss_tokens.masked_share is {masked_share}: it leaves nothing to learn.")
    return Result(workshop.train("toss_tokens", left, budget(data, config, left), workshop.start))


def mask(examples: Sequence[Example], scores: pa.ListArray, share: float) -> list[Example]:
    """The examples without labels where a token's score is among the highest share of all.

    Args:
        examples: The rows.
        scores: (rows,) lists, one number a trained token, higher = more suspect; null = the row has none.
        share: Of all trained tokens.
    """
    every = scores.flatten().to_numpy()
    masked = np.zeros(len(every), bool)
    masked[np.argsort(-every, kind="stable")[: round(share * len(every))]] = True
    found, done = [], 0
    for example, own in zip(examples, scores, strict=True):
        if not own.is_valid:
            found.append(example)
            continue
        labels = np.array(example.labels)
        trained = np.flatnonzero(labels[1:] != IGNORED) + 1
        labels[trained[masked[done : done + len(trained)]]] = IGNORED
        done += len(trained)
        found.append(replace(example, labels=labels.tolist()))
    return found
