"""probe: a linear model on M0's hidden states that learns from another filter's verdicts, and judges every row anew.

Forgetting is a noisy witness of each row, but rows of a kind lie together in M0's hidden states. So a logistic
regression learns the most suspect rows against the least suspect ones and the safe data. No row is judged by a probe
that learnt from the row's own verdict (cross-fitting). Learning from noisy verdicts in this way is that of Zhu et al.
(arXiv 2110.06283) and of confident learning (Northcutt et al., JAIR 2021, arXiv 1911.00068).

1. First verdicts: the most suspect quarter of the rows is called unsafe, the less suspect half clean.
2. A probe that did not see a row's verdict must be able to tell it. If it cannot, the verdicts are noise, and the run
   says so: "no separation". The rows are still ranked: by their scores, by those that a regression foresees, and by a
   probe of the most suspect twentieth. The ranking assumes that few rows are unsafe, which need not be so.
3. If it can, the verdicts are given anew, by the probe, and learnt once more.
4. If neither the rows that are kept nor those that are dropped are of the kind of the safe rows, the reviews have made
   the model forget whole tasks, and that is what the probe has learnt: "no separation", too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import numpy as np

from forgetfilter.config import ENOUGH_ROWS, ForgetFilterConfig
from forgetfilter.crossfit import CrossFit, features, verdicts_of
from forgetfilter.data.loading import Data
from forgetfilter.likeness import nearer_to_safe
from forgetfilter.methods import Least, PositiveFloat, PositiveInt
from forgetfilter.scored import NO_PROMISE, NO_SEPARATION, Scale, Scored, ranks

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

VERSION = 4
"""Raised when the same settings give other scores than before: stored ones are then made anew."""

CLEAN_SHARE = 0.5
"""Share of the rows, from the least suspect on, whose first verdict is clean."""
SUSPECT_SHARE = 0.25
"""Share of the rows, from the most suspect on, whose first verdict is unsafe."""
FEW_SHARE = 0.05
"""The same after "no separation", for the ranking alone: most often there are few unsafe rows then, or none."""
SURE, LIKELY = 0.95, 0.85
"""AUROC with which probes that did not see the first verdicts must tell them: SURE is enough alone; LIKELY if, on the
witness' own scale, LEAST_SHARE of the rows are suspect, too. With fewer, most that is forgotten is clean."""
LEAST_SHARE, MOST_SHARE = 0.16, 0.6
"""In step 3 as many rows get the verdict unsafe as are suspect on the witness' own scale: MOST_SHARE at most, and
SUSPECT_SHARE if they are fewer than LEAST_SHARE, since the scale then doesn't fit what the probe has found."""
ODDS = 1.5
"""How many times as likely unsafe as clean a row must be to be dropped, by probes that hold both equally common."""
COVERED, NEARER = 0.2, 0.65
"""Few of the rows that are kept are like the safe ones if CrossFit.covered is below COVERED. Then the dropped ones must
be: with an AUROC of NEARER at least (likeness.nearer_to_safe). Else whole tasks would go (docs/limits.md)."""
TOO_FEW = "the probe had too few rows to learn from"


def probe(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    on: str = "forgetting",
    regularisation: PositiveFloat = 0.01,
    folds: Annotated[int, Least(2)] = 5,
    repeats: PositiveInt = 2,
) -> Scored:
    """Score by another filter, learn its verdicts, and judge every row by probes that did not see its own.

    With more than `sample_rows` rows, the other filter sees a random sample of them; the probe judges them all.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data.
        config: All settings.
        on: The filter whose verdicts are learnt.
        regularisation: C of the logistic regression; smaller = smoother.
        folds: Parts that the rows are dealt to; the rows of a part are judged by a probe that the others taught.
        repeats: How often they are dealt anew; the judgements are averaged.
    """
    from forgetfilter.filters.scoring import scores_of

    rows = len(data.noisy.examples)
    sample = sampled(rows - data.noisy.planted, config)
    if sample is None:
        witness = scores_of(workshop, data, on)
    else:
        sample = np.append(sample, np.arange(rows - data.noisy.planted, rows))  # and all planted rows
        seen = replace(data, noisy=data.noisy.select(sample.tolist()))
        witness = scores_of(workshop, seen, on).spread(sample, rows)
    noisy, safe = (features(states) for states in workshop.states_of(data))
    judge = CrossFit(noisy, safe, regularisation, folds, repeats, config.seed, data.noisy.alike())

    def nearer(dropped: np.ndarray) -> float:
        return nearer_to_safe(data.noisy, dropped[: rows - data.noisy.planted], data.safe)

    scored = learn_verdicts(witness.suspicion, witness.scale, judge, data.noisy.times, data.noisy.planted, nearer)
    if sample is not None and scored.scale is not None and scored.scale.says:
        part = f"; {on} saw {len(sample) - data.noisy.planted} of {rows - data.noisy.planted} different rows or answers"
        scored.scale = replace(scored.scale, says=scored.scale.says.removesuffix(NO_PROMISE) + part + NO_PROMISE)
    columns = {on: witness.suspicion, **witness.columns, **scored.columns}
    return replace(scored, columns=columns, moments=witness.moments, token_costs=witness.token_costs)


def sampled(rows: int, config: ForgetFilterConfig) -> np.ndarray | None:
    """Places of the rows that the witness sees, in order; None for all."""
    wanted = ENOUGH_ROWS if config.sample_rows == "auto" else config.sample_rows
    if rows <= wanted:
        return None
    return np.sort(np.random.default_rng(config.seed).choice(rows, wanted, replace=False))


def learn_verdicts(
    suspicion: np.ndarray,
    scale: Scale | None,
    judge: CrossFit,
    times: np.ndarray | None = None,
    planted: int = 0,
    nearer: Callable[[np.ndarray], float] | None = None,
) -> Scored:
    """Steps 1 to 4: what probes make of a witness' scores.

    Args:
        suspicion: (rows,) the witness' scores, higher = more suspect; NaN = not seen, or not scored.
        scale: The witness' scale, if it knows one.
        judge: Fits and judges.
        times: (rows,) how many rows that say the same each one stands for: so many verdicts it gives. None: one.
        planted: How many of the last rows are planted: they do not count where the share of suspect rows decides.
        nearer: What `nearer_to_safe` says of (rows,) bool, the rows that would be dropped. None: step 4 is left out.
    """
    suspicion = np.where(judge.scorable, suspicion, np.nan)
    if scale is not None and scale.nothing:
        return _nothing(suspicion, judge, scale.nothing, times)
    told = suspicion.copy()
    told[judge.split[judge.split < len(told)]] = np.nan  # equal rows in several parts would tell each other's verdicts
    judged = judge(verdicts_of(told, SUSPECT_SHARE, CLEAN_SHARE, times), times=times)
    if judged is None and times is not None:  # few rows, often repeated, leave too few verdicts of a kind to be dealt
        return learn_verdicts(suspicion, scale, judge, planted=planted, nearer=nearer)
    if judged is None:
        return _nothing(suspicion, judge, f"{NO_SEPARATION}: {TOO_FEW}", times)
    own = slice(len(suspicion) - planted)
    counted = None if times is None else times[own]
    share = 0.0 if scale is None or scale.quota else suspect_share(told[own], scale, counted)
    needed = LIKELY if share >= LEAST_SHARE else SURE
    if not judged.predicted >= needed:
        why = (
            f"{NO_SEPARATION}: probes predict which rows are suspect with AUROC {judged.predicted:.2f}, {needed} is "
            "needed, so the suspicion may be chance; rows are only ranked"
        )
        return Scored(_ranked(suspicion, judge, times), scale=Scale(0, nothing=why))
    found = _separated(told, min(share, MOST_SHARE) if share >= LEAST_SHARE else SUSPECT_SHARE, judge, times)
    if found is None:
        return _nothing(suspicion, judge, f"{NO_SEPARATION}: {TOO_FEW}", times)
    if scale is None or scale.quota:
        why = "the filter that the probe learnt from does not tell how many rows are suspect; rows are only ranked"
        return replace(found, scale=Scale(0, nothing=why))
    says = (
        f"at least {ODDS} times as likely unsafe as clean, by probes that did not see the row's own verdict; they "
        f"tell the witness' verdicts with AUROC {judged.predicted:.2f}"
    )
    threshold = float(np.log(ODDS))
    caveats = [scale.caveat] if scale.caveat else []
    covered = judge.covered(np.flatnonzero(found.suspicion <= threshold))
    if covered < COVERED and nearer is not None and nearer(found.suspicion > threshold) < NEARER:
        why = (
            f"{NO_SEPARATION}: neither the rows that would be kept nor those that would be dropped look like the safe "
            "rows, so whole harmless tasks may be forgotten; rows are only ranked. Add safe rows of the kinds of yours "
            "(`forgetfilter safe_data --notions tasks` writes ordinary ones)"
        )
        return Scored(_ranked(suspicion, judge, times), scale=Scale(0, nothing=why))
    if covered < COVERED:
        caveats.append(
            f"the safe rows look like few of the rows that are kept ({covered:.2f}; rows of one kind have 0.50), so "
            "harmless rows of other kinds may be dropped: look at them, or add safe rows of their kinds (`forgetfilter "
            "safe_data --notions tasks` writes ordinary ones)"
        )
    return replace(found, scale=Scale(threshold, says=says + NO_PROMISE, caveat="; ".join(caveats)))


def _nothing(suspicion: np.ndarray, judge: CrossFit, why: str, times: np.ndarray | None = None) -> Scored:
    """The witness' own scores, since nothing is told by them; rows that it did not see are ranked by a probe of it.

    Where no probe can be fitted they lie in the middle. They are no log-odds, so a number that was set for those means
    nothing: `why` begins with NO_SEPARATION.
    """
    why = why if why.startswith(NO_SEPARATION) else f"{NO_SEPARATION}: {why}"
    unseen = np.isnan(suspicion) & judge.scorable
    foreseen = judge.regression(suspicion, times) if unseen.any() else None
    if foreseen is not None:
        both = np.where(unseen, ranks(foreseen.noisy), ranks(suspicion))
        return Scored(both, scale=Scale(0, nothing=why))
    middle = np.nan if np.isnan(suspicion).all() else np.nanmedian(suspicion)
    return Scored(np.where(unseen, middle, suspicion), scale=Scale(0, nothing=why))


def _ranked(suspicion: np.ndarray, judge: CrossFit, times: np.ndarray | None) -> np.ndarray:
    """(rows,) ranks from 0 to 1 where few rows are unsafe, if any: by what is suspect, and what looks like it.

    Unsafe rows are then few, but their scores stand out. So a regression foresees each row's score, and the row is
    ranked by the score that it has together with the one foreseen, which counts twice, and three times where the
    witness saw nothing. To this comes what a probe makes of the most suspect twentieth. It counts half at most, and the
    less, the worse it tells verdicts that it did not see: at 1 % most of the twentieth is clean. Both are taken in
    standard deviations, and not as ranks: what stands out far counts for more.
    """
    foreseen = judge.regression(suspicion, times)
    if foreseen is None:
        return ranks(suspicion)
    both = np.where(np.isnan(suspicion), 3 * foreseen.noisy, suspicion + 2 * foreseen.noisy)
    few = judge(verdicts_of(suspicion, FEW_SHARE, CLEAN_SHARE, times), times=times)
    if few is None:
        return ranks(both)
    trust = np.clip(np.nan_to_num(few.predicted) - 0.5, 0, 1)  # 0 if it tells the verdicts no better than chance
    return ranks(both / np.nanstd(both) + trust * few.noisy / np.nanstd(few.noisy))


def suspect_share(suspicion: np.ndarray, scale: Scale, times: np.ndarray | None = None) -> float:
    """Share of the scored rows that are suspect on the witness' own scale."""
    scored = ~np.isnan(suspicion)
    return float(np.average(suspicion[scored] > scale.threshold, weights=None if times is None else times[scored]))


def _separated(suspicion: np.ndarray, share: float, judge: CrossFit, times: np.ndarray | None) -> Scored | None:
    """Step 3: learn the witness' verdicts, this share unsafe, then those of the probe itself; None with too few."""
    first = judge(verdicts_of(suspicion, share, CLEAN_SHARE, times), times=times)
    if first is None:
        return None
    seen = np.where(np.isnan(suspicion), np.nan, first.noisy)  # rows that the witness did not see teach nothing
    verdicts = verdicts_of(seen, share, 1 - share, times)
    second = judge(verdicts, times=times)
    if second is None:
        return None
    return Scored(second.noisy, columns={"verdict": verdicts}, linear=second.linear)
