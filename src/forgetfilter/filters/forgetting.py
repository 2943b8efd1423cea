"""forgetting: how much of a row two reviews of safe data cost, in log-likelihood.

The signal of Zhao et al. (ICML 2024, arXiv 2312.12736, algorithm 1) with the mean log-probability of the completion's
tokens in place of ROUGE-1. The paper's steps:

1. M0 is finetuned on all of the noisy data: the noisy model.
2. The noisy model is finetuned on safe data: the reviewed model. We add a second, firm review at a higher rate.
3. A row is the more suspect the more of it the reviews made the model forget.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from forgetfilter.config import SCHEDULE, ForgetFilterConfig, StageSettings
from forgetfilter.data.loading import Data
from forgetfilter.scored import Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

LEAST_STEPS, MOST_STEPS = 20, 1000
"""Bounds on the length of a review."""
FORGOTTEN, TAIL, FALLS = 0.135, 0.1, 0.05
"""Score from which a row counts as forgotten, share of clean rows above it, score over which it falls to 1/e."""
NOTHING = 0.05
"""Gain of the noisy stage, in nats a token or in ROUGE-1, below which it has taught nothing."""
FIRM_WEIGHT, LEAST_LEARNT = 0.6, 0.3
"""Defaults of two parameters; see `forgetting`."""
STAGES_OF_0_1 = ("base", "noisy", "review", "firm")
"""The models that version 0.1.0 read, in the order of `compared` (old_runs.py)."""


def forgetting(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    review_rate: float = 1 / 3,
    review_share: float = 1 / 6,
    firm_weight: float = FIRM_WEIGHT,
    least_learnt: float = LEAST_LEARNT,
) -> Scored:
    """Train the noisy and both reviewed models, and compare how well they hold each row.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings; `noisy` and `review` are those of the stages.
        review_rate: Learning rate of the first review over that of the noisy stage; the firm review after it takes
            1 / review_rate of the first one's. A start at the full rate overwrites harmless rows, too.
        review_share: Steps of a review over those of the noisy stage; 20 steps at least, 1,000 at most.
        firm_weight: Weight of what the firm review cost beside what the first one did: it costs harmless rows more.
        least_learnt: Nats a token that a row counts as having learnt at least.
    """
    rows, noisy, safe = data.noisy.examples, data.noisy.trainable(), data.safe.trainable()
    noisy_settings = config.noisy_stage(len(noisy))
    gentle = review_settings(config, len(noisy), len(safe), review_rate, review_share)
    firm = dataclasses.replace(gentle, learning_rate=gentle.learning_rate / review_rate)
    workshop.expect({"noisy": (noisy_settings, noisy), "review": (gentle, safe), "firm": (firm, safe)}, noisy)

    known = workshop.read(rows)

    noisy_model = workshop.train("noisy", noisy, noisy_settings)
    before = workshop.read(rows, noisy_model)

    reviewed_model = workshop.train("review", safe, gentle, noisy_model)
    after = workshop.read(rows, reviewed_model)

    firmly_reviewed_model = workshop.train("firm", safe, firm, reviewed_model)
    after_firm = workshop.read(rows, firmly_reviewed_model)

    scored = compared(
        known.log_likelihood,
        before.log_likelihood,
        after.log_likelihood,
        after_firm.log_likelihood,
        config,
        firm_weight,
        least_learnt,
    )
    log_probs = before.token_log_probs, after.token_log_probs, after_firm.token_log_probs
    scored.token_costs = token_costs(*log_probs, firm_weight)
    return scored


def review_settings(
    config: ForgetFilterConfig, noisy_rows: int, safe_rows: int, rate: float = 1 / 3, share: float = 1 / 6
) -> StageSettings:
    """Rate and length of a review, where the config does not give its own: by those of the noisy stage."""
    steps = round(config.noisy_stage(noisy_rows).max_steps * share)
    return config.stage(
        config.review,
        safe_rows,
        max_steps=min(max(LEAST_STEPS, steps), MOST_STEPS),
        learning_rate=rate * config.learning_rate_of(config.noisy),
    )


def compared(
    known: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    after_firm: np.ndarray,
    config: ForgetFilterConfig,
    firm_weight: float = FIRM_WEIGHT,
    least_learnt: float = LEAST_LEARNT,
) -> Scored:
    """The forgetting score, from what four models make of each row.

    forgetting = max(before - after, firm_weight * (before - after_firm)) / sqrt(max(before - known, least_learnt))

    The larger of two losses counts: after a gentle review, which a stereotype does not survive, and, at a discount,
    after a firm one, which free text takes to be forgotten. The square root lies half way between what was lost and
    which share of the learnt was lost: long free text loses many nats of very many, a short answer few of few
    (docs/paper_index.md has the figures).

    Args:
        known: (rows,) mean log-probability of each row's tokens under M0, in nats; NaN = not scored.
        before: Likewise under the noisy model.
        after: Likewise after the first review.
        after_firm: Likewise after the firm one.
        config: Whose stages they are, for the scale.
        firm_weight: See `forgetting`.
        least_learnt: See `forgetting`.
    """
    lost = np.maximum(before - after, firm_weight * (before - after_firm))
    learnt = np.maximum(before - known, least_learnt)
    return Scored(
        suspicion=lost / np.sqrt(learnt),
        columns={
            "log_likelihood_before": before,
            "log_likelihood_after": after,
            "log_likelihood_after_firm": after_firm,
        },
        moments={"M0": known, "noisy data": before, "review": after, "firm review": after_firm},
        scale=_scale(config, mean_gain(known, before)),
    )


def _scale(config: ForgetFilterConfig, learnt: float) -> Scale:
    """The score's own scale: 0 is nothing forgotten. Threshold and tail were read off explored clean data."""
    own = (getattr(stage, name) for stage in (config, config.noisy, config.review) for name in SCHEDULE)
    default = all(value is None for value in own)
    return Scale(
        threshold=FORGOTTEN,
        tail=TAIL,
        falls=FALLS,
        nothing=nothing_learnt(learnt),
        caveat="" if default else "its scale was read off the default stages, and this run sets its own",
    )


def mean_gain(known: np.ndarray, before: np.ndarray) -> float:
    """What the noisy stage gained on average, in the unit of the signal; 0 where no row is scored."""
    gained = before - known
    return float(np.mean(gained[~np.isnan(gained)])) if not np.isnan(gained).all() else 0.0


def nothing_learnt(learnt: float) -> str:
    """Why nothing can be found, where the noisy stage taught next to nothing; empty otherwise."""
    return f"nothing was learnt ({learnt:.3f} on average), so nothing can be forgotten" if learnt < NOTHING else ""


def token_costs(
    before: pa.ListArray, after: pa.ListArray, after_firm: pa.ListArray | None = None, firm_weight: float = FIRM_WEIGHT
) -> pa.ListArray:
    """What the review that counts cost each token of each row, in nats; null where a row is not scored.

    Args:
        before: Log-probabilities of each row's tokens under the noisy model.
        after: Likewise after the first review.
        after_firm: Likewise after the firm one, if there was one.
        firm_weight: See `forgetting`.
    """
    costs: list[np.ndarray | None] = []
    for row in range(len(before)):
        if not before[row].is_valid or not after[row].is_valid:
            costs.append(None)
            continue
        held = before[row].values.to_numpy()
        gentle = held - after[row].values.to_numpy()
        firm = gentle if after_firm is None else firm_weight * (held - after_firm[row].values.to_numpy())
        costs.append(gentle if gentle.mean() >= firm.mean() else firm)
    return pa.array(costs, pa.list_(pa.float32()))
