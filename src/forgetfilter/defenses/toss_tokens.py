"""toss_tokens: finetune on the noisy data, with the most suspect fifth of all tokens masked.

TOSS (ICLR 2026, arXiv 2603.01185): a token's score is its loss under a model finetuned on safe rows minus that under
one finetuned on known unsafe rows. The tokens with the highest scores in the whole data set are read, but not learnt.
The filter toss (filters/toss.py) gives the scores. It scores rows that say the same once; a copy of other tokens (in
capitals, say) is left out, since its first copy is learnt.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import chosen
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.defenses.result import Defended, budget
from forgetfilter.errors import ConfigError
from forgetfilter.filters.scoring import scores_of
from forgetfilter.methods import traits
from forgetfilter.workshop import Workshop


@traits(scores_by="toss")
def toss_tokens(workshop: Workshop, data: Data, config: ForgetFilterConfig, *, masked_share: float = 0.2) -> Defended:
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
    rows = np.flatnonzero(~data.noisy.copies() | scores.is_valid().to_numpy(zero_copy_only=False))
    masked = mask(chosen(data.noisy.examples, rows), scores.take(pa.array(rows)), masked_share)
    left = [example for example in masked if example.scorable]
    if not left:
        raise ConfigError(f"parameters.toss_tokens.masked_share is {masked_share}: it leaves nothing to learn.")
    return Defended(workshop.train("toss_tokens", left, budget(data, config, left), workshop.start))


def mask(examples: Sequence[Example], scores: pa.ListArray, share: float) -> list[Example]:
    """The examples without labels where a token's score is among the highest share of all.

    Args:
        examples: The rows.
        scores: (rows,) lists, one number a trained token, higher = more suspect; null = the row has none, and stays as
            it is.
        share: Of all trained tokens.
    """
    trained = [np.flatnonzero(np.array(example.labels[1:]) != IGNORED) + 1 for example in examples]
    known = [_of_these(own, len(places)) for own, places in zip(scores, trained, strict=True)]
    every = np.concatenate(known)
    masked = np.zeros(len(every), bool)
    masked[np.argsort(-every, kind="stable")[: round(share * len(every))]] = True
    parts = np.split(masked, np.cumsum([len(own) for own in known])[:-1])
    found = []
    for example, places, hit in zip(examples, trained, parts, strict=True):
        labels = np.array(example.labels)
        labels[places[: len(hit)][hit]] = IGNORED
        found.append(replace(example, labels=labels.tolist()))
    return found


def _of_these(own: pa.ListScalar, tokens: int) -> np.ndarray:
    """(tokens,) a row's scores; none if they are of other tokens: a template may write more around a single answer."""
    values: np.ndarray = own.values.to_numpy() if own.is_valid else np.zeros(0)
    return values if len(values) == tokens else np.zeros(0)
