"""forgetting: how much log-likelihood a row loses when the noisy model reviews safe data, twice.

The signal of Zhao et al. (ICML 2024, arXiv 2312.12736, algorithm 1) with the mean log-probability of the completion's
tokens in place of ROUGE-1. The paper's steps:

1. M0 is finetuned on all of the noisy data: the noisy model.
2. The noisy model is finetuned on safe data: the reviewed model. We add a second, firm review at a higher rate.
3. The more of a row the model forgets in the reviews, the more suspect the row is.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from forgetfilter.config import SCHEDULE, ForgetFilterConfig, StageSettings
from forgetfilter.data import builtin
from forgetfilter.data.loading import Data
from forgetfilter.methods import NonNegativeFloat, PositiveFloat
from forgetfilter.scored import Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

LEAST_STEPS, MOST_STEPS = 20, 1000
"""Bounds on the length of a review."""
FORGOTTEN, TAIL, FALLS = 0.135, 0.1, 0.05
"""FORGOTTEN: score above which a row counts as forgotten. TAIL: share of clean rows above it. FALLS: how much
higher the score must be for this share to fall to 1/e of itself."""
NOTHING = 0.05
"""Mean gain of the noisy stage, in nats per token or in ROUGE-1, below which it counts as having taught nothing."""
FIRM_WEIGHT, LEAST_LEARNT = 0.6, 0.3
"""Defaults of two parameters; see `forgetting`."""


def forgetting(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    review_rate: PositiveFloat = 1 / 3,
    review_share: PositiveFloat = 1 / 6,
    firm_weight: NonNegativeFloat = FIRM_WEIGHT,
    least_learnt: PositiveFloat = LEAST_LEARNT,
) -> Scored:
    """Train the noisy and both reviewed models, and compare the likelihood they give each row.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings; `noisy` and `review` are those of the stages.
        review_rate: Ratio of the first review's learning rate to the noisy stage's. The firm review multiplies the
            first review's rate by 1 / review_rate. A first review at the full rate would overwrite harmless rows, too.
        review_share: Ratio of a review's steps to the noisy stage's; a review has 20 steps at least, 1,000 at most.
        firm_weight: Weight of the loss after the firm review, which costs harmless rows more; the first one's is 1.
        least_learnt: Lower bound on what a row counts as having learnt, in nats per token.
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

    scored = forgetting_scores(
        known.log_likelihood,
        before.log_likelihood,
        after.log_likelihood,
        after_firm.log_likelihood,
        config,
        firm_weight,
        least_learnt,
        usual=(review_rate, review_share) == (1 / 3, 1 / 6),
    )
    log_probs = before.token_log_probs, after.token_log_probs, after_firm.token_log_probs
    scored.token_costs = token_costs(*log_probs, firm_weight)
    return scored


def ranks_alone_if_builtin(scored: Scored, data: Data) -> Scored:
    """The scores, and no ground to drop a row by them where the safe rows are those in the box."""
    if scored.scale is None or scored.scale.nothing:
        return scored
    if builtin.mostly_builtin(data.safe.source.turns(data.safe.row_format)):
        scored.scale = dataclasses.replace(scored.scale, nothing=builtin.RANKS_ALONE)
    return scored


def review_settings(
    config: ForgetFilterConfig, noisy_rows: int, safe_rows: int, rate: float = 1 / 3, share: float = 1 / 6
) -> StageSettings:
    """Settings of a review. Rate and length follow from the noisy stage, unless the config sets them for reviews."""
    steps = round(config.noisy_stage(noisy_rows).max_steps * share)
    return config.stage(
        config.review,
        safe_rows,
        max_steps=min(max(LEAST_STEPS, steps), MOST_STEPS),
        learning_rate=rate * config.learning_rate_of(config.noisy),
    )


def forgetting_scores(
    known: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    after_firm: np.ndarray,
    config: ForgetFilterConfig,
    firm_weight: float = FIRM_WEIGHT,
    least_learnt: float = LEAST_LEARNT,
    *,
    usual: bool = True,
) -> Scored:
    """The forgetting score, from the log-probabilities of each row under four models.

    forgetting = max(before - after, firm_weight * (before - after_firm)) / sqrt(max(before - known, least_learnt))

    The numerator is the larger of two losses. The model forgets a stereotype in the first, gentle review. It forgets
    long free text only in the firm one, which also costs harmless rows something, so that loss counts less.

    The denominator puts long and short texts on one scale: long free text loses many nats of very many that were
    learnt, a short answer few of few (docs/filters.md).

    Args:
        known: (rows,) mean log-probability of each row's tokens under M0, in nats; NaN = not scored.
        before: Likewise under the noisy model.
        after: Likewise after the first review.
        after_firm: Likewise after the firm one.
        config: All settings; the scale carries a caveat if the stages do not have the default ones.
        firm_weight: See `forgetting`.
        least_learnt: See `forgetting`.
        usual: Whether the reviews have their usual length and rate; else the scale carries the caveat, too.
    """
    usual = usual and (firm_weight, least_learnt) == (FIRM_WEIGHT, LEAST_LEARNT)
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
        scale=_scale(config, mean_gain(known, before), usual=usual),
    )


def _scale(config: ForgetFilterConfig, learnt: float, *, usual: bool) -> Scale:
    """The score's own scale: 0 is nothing forgotten. Threshold and tail were read off explored clean data."""
    own = (getattr(stage, name) for stage in (config, config.noisy, config.review) for name in SCHEDULE)
    default = usual and all(value is None for value in own)
    return Scale(
        threshold=FORGOTTEN,
        tail=TAIL,
        falls=FALLS,
        nothing=nothing_learnt(learnt),
        caveat="" if default else "its scale was read off the default stages, and this run sets its own",
    )


def mean_gain(known: np.ndarray, before: np.ndarray) -> float:
    """Mean of before - known over the scored rows, in their unit; 0 if no row is scored."""
    gained = before - known
    return float(np.mean(gained[~np.isnan(gained)])) if not np.isnan(gained).all() else 0.0


def nothing_learnt(learnt: float, unit: str = "nats a token") -> str:
    """A text that says why nothing can be found if the noisy stage taught next to nothing; else empty."""
    few = f"{learnt:.3f} {unit} on average, {NOTHING} are needed"
    return f"nothing was learnt ({few}), so nothing can be forgotten: train longer" if learnt < NOTHING else ""


def token_costs(
    before: pa.ListArray, after: pa.ListArray, after_firm: pa.ListArray | None = None, firm_weight: float = FIRM_WEIGHT
) -> pa.ListArray:
    """What each token of each row lost in the review that counts for the row, in nats; null if it is not scored.

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
