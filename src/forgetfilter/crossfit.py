"""Cross-fitted linear models on hidden states: no row is judged by a model that learnt from the row's own verdict.

The room knows no model and no filter. Whoever has verdicts (a filter's, a person's) learns them here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import kendalltau
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors

from forgetfilter.data.lazy import mapped

AT_ONCE = 8192
"""Rows whose features are in memory at a time."""
MOST_VERDICTS = 5000
"""Verdicts that `untold` learns, and scores that `regression` does; of more they take a sample."""
STRENGTHS = (30, 100, 300, 1000, 3000, 10000, 30000)
"""Penalties of a ridge regression on standardised features; generalised cross-validation takes one of them."""
MOST_SAFE = 5000
"""Safe rows that teach a probe; of more it takes a sample, so that neither they nor a fit fill the memory."""
DIMENSIONS, ENOUGH_FOR_THEM = 1200, 4096
"""Principal components that a quick judge learns in, if a model is wider, and rows that they are found by."""

NEIGHBOURS, PLANE, MOST_ASKED, LEAST_COVERED = 10, 50, 500, 20
"""Of CrossFit.covered: neighbours looked at, principal components, rows looked at, and safe and noisy rows it needs."""


@dataclass
class Judged:
    """What cross-fitted probes make of the rows.

    Attributes:
        noisy: (rows,) log-odds of the noisy rows, higher = more suspect; NaN = not scored. By a regression on scores
            these are scores.
        safe: (rows,) the same of the safe rows, judged likewise.
        linear: (size + 1,) weights and bias of the mean of the probes, for other rows.
        predicted: AUROC with which the verdicts of the noisy rows are told by probes that did not see them; NaN if none
            is clean. By a regression, the share of pairs of rows that are put in the order of their scores.
    """

    noisy: np.ndarray
    safe: np.ndarray
    linear: np.ndarray
    predicted: float


class CrossFit:
    """Judges every row by probes that learnt from other rows alone; the safe rows count as clean.

    Args:
        noisy: (rows, size) features of the noisy rows; NaN = not scored.
        safe: (rows, size) features of the safe rows.
        regularisation: C of the logistic regression; smaller = smoother.
        folds: Parts that the rows are dealt to; the rows of a part are judged by a model that the others taught.
        repeats: How often they are dealt anew; the judgements are averaged.
        seed: Of the deals.
        alike: Labels of the noisy rows, (rows,) numbers each: rows with the same number in one of them lie in the same
            part, as do rows with equal features. Where that would join more rows than a part has (all conversations
            that begin with the same greeting, say), the first of the labels counts alone. Rows that are equal and then
            lie in several parts give no verdict: each would be judged by probes that learnt its own.
        quick: For a person who waits, and verdicts of which few change between two calls: learn in DIMENSIONS principal
            components of the features, however wide the model is, and begin each fit where the last one ended.
        scratch_folder: A folder on whose disk the components are to lie; None for the system's own for such files.
    """

    def __init__(
        self,
        noisy: np.ndarray,
        safe: np.ndarray,
        regularisation: float = 0.01,
        folds: int = 5,
        repeats: int = 2,
        seed: int = 42,
        alike: Sequence[np.ndarray] = (),
        quick: bool = False,
        scratch_folder: Path | None = None,
    ) -> None:
        """Look through the features, and deal the rows."""
        self.noisy, self.safe, self.count = noisy, safe, len(noisy)
        everything = np.arange(len(noisy) + len(safe))
        known, said = np.zeros(len(everything), bool), np.zeros(len(everything), "V16")
        for rows in _parts(everything):
            found = self._features(rows)
            known[rows] = ~np.isnan(found).any(axis=1)
            said[rows] = [blake2b(row.tobytes(), digest_size=16).digest() for row in found]
        self.rows, self.scorable = np.flatnonzero(known), known[: len(noisy)]
        self.groups = _numbered(said[self.rows])
        self.split = self.rows[:0]
        if alike:
            here = np.flatnonzero(self.scorable)  # the noisy rows, which come first
            first, *others = (own[here] for own in alike)
            joined = _numbered(_joined([self.groups, first, *others]))
            alone = self.groups + 2 * len(self.rows)
            alone[: len(here)] = _numbered(first) + len(self.rows)
            large = np.bincount(joined)[joined] > len(self.rows) / folds
            same = [self.groups, *others]
            self.groups = _numbered(np.where(large, alone, joined))
            self.split = self.rows[_spans_several(same, self.groups)]
        self.centre = self._mean(lambda found: found)
        self.width = np.sqrt(self._mean(lambda found: (found - self.centre) ** 2)) + 1e-6
        self.folds, self.quick = folds, quick
        self.components: np.ndarray | None = None
        if quick and noisy.shape[1] > DIMENSIONS < len(self.rows):
            self._reduce(seed, scratch_folder)
        enough = self.groups.max(initial=-1) + 1 >= folds
        self.repeats = repeats
        self.parts = [part for repeat in range(repeats) for part in self._dealt(seed + repeat)] if enough else []
        self.models = [_regression(regularisation, quick) for _ in range(folds * repeats)]
        self.untold_models = [_regression(regularisation, quick) for _ in range(folds * repeats)]

    def __call__(
        self,
        verdicts: np.ndarray,
        marks: Mapping[int, bool] | None = None,
        weight: float = 1.0,
        apart: Collection[int] = (),
        times: np.ndarray | None = None,
    ) -> Judged | None:
        """Judge every row.

        Args:
            verdicts: (rows,) on the noisy rows: 1 = unsafe, 0 = clean, NaN = none.
            marks: Row -> whether a person called it unsafe. Marked rows teach every probe, in place of their verdict.
            weight: How many verdicts a mark is worth.
            apart: Marked rows that are judged like all others, by probes that did not learn their own mark.
            times: (rows,) how many rows each of the noisy rows stands for, and so counts as; None: one each.

        Returns:
            None if there are too few verdicts of either kind to be dealt.
        """
        labels, weights = self._labels(verdicts, marks or {}, weight)
        if times is not None:
            weights[: self.count] *= times
        fitted = self._fitted(labels, weights, marks or {}, apart, self.models)
        if fitted is None:
            return None
        judged, linear = self._together(fitted)
        told = np.flatnonzero(~np.isnan(labels[: self.count]))
        mixed = (labels[told] == 0).any() and (labels[told] == 1).any()
        counted = None if times is None else times[told]
        predicted = float(roc_auc_score(labels[told], judged[told], sample_weight=counted)) if mixed else np.nan
        return Judged(judged[: self.count], judged[self.count :], linear, predicted)

    def regression(self, scores: np.ndarray, times: np.ndarray | None = None) -> Judged | None:
        """Predict every row's score by ridge regressions that did not see it. Safe rows have none and teach nothing.

        So the highest scores teach most, and nobody need say how many of them count as unsafe.

        Args:
            scores: (rows,) of the noisy rows; NaN = none.
            times: (rows,) how many rows each of the noisy rows stands for, and so counts as; None: one each.

        Returns:
            None if there are too few scores to be dealt, all are equal, or all lie in one part.
        """
        known = np.setdiff1d(np.flatnonzero(np.isfinite(scores) & self.scorable), self.split)
        told = np.sort(np.random.default_rng(0).permutation(known)[:MOST_VERDICTS])
        if not self.parts or len(told) < self.folds or np.ptp(scores[told]) == 0:
            return None
        fitted = []
        for held_out in self.parts:
            taught = np.setdiff1d(told, held_out)
            if len(taught) < 2:
                return None
            weights = None if times is None else times[taught]
            model = RidgeCV(STRENGTHS).fit(self._inputs(taught), scores[taught], weights)
            fitted.append((held_out, model))
        judged, linear = self._together(fitted)
        ordered = kendalltau(scores[told], judged[told]).statistic
        return Judged(judged[: self.count], judged[self.count :], linear, (1 + float(ordered)) / 2)

    def _together(self, fitted: Sequence[tuple[np.ndarray, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(rows and safe rows,) what models make of rows that they did not see; the mean model, as `Judged.linear`."""
        judged = np.full(self.count + len(self.safe), np.nan)
        judged[self.rows] = 0
        for held_out, model in fitted:
            judged[held_out] += self._judged(held_out, model) / self.repeats
        mean = np.mean([np.ravel(model.coef_) for _, model in fitted], 0, dtype=np.float64) / self.width
        bias = float(np.mean([model.intercept_ for _, model in fitted])) - float(mean @ self.centre)
        if self.components is not None:
            mean = mean @ self.components
            bias -= float(mean @ self.origin)
        return judged, np.append(mean, bias)

    def covered(self, rows: np.ndarray) -> float:
        """How far the safe rows look like some of the noisy rows: 0.5 if they are of one kind, 0 if they share nothing.

        It is the share of safe rows among the NEIGHBOURS nearest ones of as many safe as noisy rows, in PLANE principal
        components.

        Args:
            rows: Numbers of noisy rows; MOST_ASKED of them, drawn at random, are looked at.

        Returns:
            NaN with too few rows.
        """
        rng, places = np.random.default_rng(0), self.rows
        each = [rng.permutation(part) for part in (places[places < self.count], places[places >= self.count])]
        size = min(*map(len, each), MOST_ASKED)
        asked = rng.permutation(np.intersect1d(rows, places))[:MOST_ASKED]
        if size < LEAST_COVERED or not len(asked):
            return float("nan")
        pool = np.concatenate([part[:size] for part in each])
        plane = PCA(min(PLANE, size, self.noisy.shape[1]), random_state=0).fit(self._standardised(pool))
        points, others = (plane.transform(self._standardised(part)) for part in (asked, pool))
        near = pool[NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(others).kneighbors(points, return_distance=False)]
        safe = np.where(near == asked[:, None], np.nan, near >= self.count)  # no row is its own neighbour
        return float(np.nanmean(safe))

    def untold(
        self, verdicts: np.ndarray, marks: Mapping[int, bool], weight: float, rows: Collection[int]
    ) -> dict[int, float]:
        """Log-odds of some rows, each by models that have learnt neither its verdict nor its mark.

        Args:
            verdicts: (rows,) on the noisy rows: 1 = unsafe, 0 = clean, NaN = none.
            marks: Row -> whether a person called it unsafe.
            weight: How many verdicts a mark is worth.
            rows: The rows to judge.

        Returns:
            Row -> log-odds; empty if there are too few verdicts to be dealt.
        """
        labels, weights = self._labels(verdicts, marks, weight)
        told = np.setdiff1d(np.flatnonzero(~np.isnan(labels[: self.count])), list(marks))
        if len(told) > MOST_VERDICTS:  # a sample of them, as heavy as all, is as good here, and takes no longer
            left_out = np.random.default_rng(0).permutation(told)[MOST_VERDICTS:]
            weights[told] *= len(told) / MOST_VERDICTS
            labels[left_out] = np.nan
        found: dict[int, float] = {}
        for held_out, model in self._fitted(labels, weights, marks, list(marks), self.untold_models) or []:
            own = held_out[np.isin(held_out, list(rows))]
            for row, odds in zip(own.tolist(), self._judged(own, model).tolist(), strict=True):
                found[row] = found.get(row, 0.0) + odds / self.repeats
        return found

    def _labels(self, verdicts: np.ndarray, marks: Mapping[int, bool], weight: float) -> tuple[np.ndarray, np.ndarray]:
        """(rows and safe rows,) labels, NaN = none, and weights."""
        labels = np.concatenate([verdicts, np.zeros(len(self.safe))])
        labels[self.count + np.random.default_rng(0).permutation(len(self.safe))[MOST_SAFE:]] = np.nan
        for row, unsafe in marks.items():
            labels[row] = unsafe
        labels[np.setdiff1d(np.arange(len(labels)), self.rows)] = np.nan
        labels[np.setdiff1d(self.split, list(marks))] = np.nan
        return labels, np.where(np.isin(np.arange(len(labels)), list(marks)), weight, 1.0)

    def _fitted(
        self,
        labels: np.ndarray,
        weights: np.ndarray,
        marks: Mapping[int, bool],
        apart: Collection[int],
        models: Sequence[LogisticRegression],
    ) -> list[tuple[np.ndarray, LogisticRegression]] | None:
        """For each part of each deal its rows, and a model that the others taught; None with too few labels."""
        teaches_all = np.isin(np.arange(len(labels)), list(set(marks).difference(apart)))
        fewest = min((labels == 1).sum(), (labels == 0).sum())
        if not self.parts or fewest < (1 if marks else self.folds):
            return None
        for held_out, model in zip(self.parts, models, strict=True):
            teaches = ~np.isnan(labels)
            teaches[held_out[~teaches_all[held_out]]] = False
            taught = np.flatnonzero(teaches)
            if len(set(labels[taught])) < 2:
                return None
            model.fit(self._inputs(taught), labels[taught], balanced(labels[taught], weights[taught]))
        return list(zip(self.parts, models, strict=True))

    def _judged(self, rows: np.ndarray, model: LogisticRegression | RidgeCV) -> np.ndarray:
        """(rows,) what a linear model says of them."""
        weights = np.ravel(model.coef_).astype(np.float32)
        found = [self._standardised(part) @ weights + np.float32(model.intercept_) for part in _parts(rows)]
        return np.concatenate([np.zeros(0, np.float32), *found])

    def _inputs(self, rows: np.ndarray) -> np.ndarray:
        """The standardised features of some rows, exact unless speed counts more."""
        return np.asarray(self._standardised(rows), np.float32 if self.quick else np.float64)

    def _standardised(self, rows: np.ndarray) -> np.ndarray:
        """(rows, size) float32, with mean 0 and deviation 1 over all rows."""
        found = self._features(rows)
        found -= self.centre.astype(np.float32)
        found /= self.width.astype(np.float32)
        return found

    def _features(self, rows: np.ndarray) -> np.ndarray:
        """(rows, size) float32; the safe rows come after the noisy ones."""
        here = rows < self.count
        found = np.empty((len(rows), self.noisy.shape[1]), np.float32)
        found[here] = self.noisy[rows[here]]
        found[~here] = self.safe[rows[~here] - self.count]
        return found

    def _reduce(self, seed: int, scratch_folder: Path | None) -> None:
        """Put principal components, found by some of the rows, in the place of the standardised features."""
        some = np.random.default_rng([seed, 3]).permutation(self.rows)[:ENOUGH_FOR_THEM]
        found = PCA(DIMENSIONS, random_state=seed).fit(self._standardised(some)).components_
        reduced = mapped((self.count + len(self.safe), DIMENSIONS), np.float16, scratch_folder)
        for part in _parts(self.rows):
            reduced[part] = self._standardised(part) @ found.T
        self.components, self.origin = found / self.width, self.centre
        self.noisy, self.safe = reduced[: self.count], reduced[self.count :]
        self.centre, self.width = np.zeros(DIMENSIONS), np.ones(DIMENSIONS)

    def _mean(self, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """(size,) float64, the mean over all rows that are known of what a change makes of their features."""
        sums = (change(self._features(part)).sum(0, dtype=np.float64) for part in _parts(self.rows))
        return sum(sums, np.zeros(self.noisy.shape[1])) / max(1, len(self.rows))

    def _dealt(self, seed: int) -> Iterator[np.ndarray]:
        """The rows of each part; rows with equal features lie in the same part."""
        deal = KFold(self.folds, shuffle=True, random_state=seed)
        for _, held_out in deal.split(np.arange(self.groups.max() + 1)):
            yield self.rows[np.isin(self.groups, held_out)]


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, some at a time: all of their features need not be in memory together."""
    return (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE))


def _numbered(values: np.ndarray) -> np.ndarray:
    """(values,) numbers from 0, equal for equal values, in the order in which these come up first."""
    _, first, found = np.unique(values, return_index=True, return_inverse=True)
    number = np.empty(len(first), int)
    number[np.argsort(first)] = np.arange(len(first))
    return number[found]


def _spans_several(labels: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether a row shares one of its labels with rows of another group.

    Args:
        labels: (rows,) numbers each, from 0 on; one that says nothing of the last rows may be shorter.
        groups: (rows,) numbers.
    """
    found = np.zeros(len(groups), bool)
    for own in labels:
        pairs = np.unique(np.stack([own, groups[: len(own)]]), axis=1)
        found[: len(own)] |= (np.bincount(pairs[0]) > 1)[own]
    return found


def _joined(labels: Sequence[np.ndarray]) -> np.ndarray:
    """(rows,) numbers, equal for rows that equal labels join, directly or by way of other rows.

    Args:
        labels: (rows,) numbers each, from 0 on; one that says nothing of the last rows may be shorter.
    """
    rows = max(map(len, labels))
    first, edges = rows, []
    for own in labels:
        edges.append([np.arange(len(own)), own + first])
        first += int(own.max(initial=-1)) + 1
    ends = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), shape=(first, first))
    found: np.ndarray = connected_components(graph, directed=False)[1][:rows]
    return found


def _regression(regularisation: float, quick: bool) -> LogisticRegression:
    return LogisticRegression(C=regularisation, max_iter=1000, warm_start=quick)


def balanced(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(rows,) the weights, changed so that both labels weigh the same, and all rows together as many as they are."""
    unsafe = labels == 1
    total = weights.sum()
    found: np.ndarray = np.where(unsafe, weights / weights[unsafe].sum(), weights / weights[~unsafe].sum()) * total / 2
    return found


def judged_by(linear: np.ndarray, states: np.ndarray) -> np.ndarray:
    """(rows,) log-odds of rows that no stage saw, by `Scored.linear`; NaN for rows whose hidden states are NaN."""
    log_odds: np.ndarray = features(states).astype(np.float64) @ linear[:-1] + linear[-1]
    return log_odds


def features(states: np.ndarray) -> np.ndarray:
    """What the probe reads of each row: the mean hidden state and the last one side by side, (rows, 2 * size)."""
    return states.reshape(len(states), -1)


def verdicts_of(suspicion: np.ndarray, share: float, clean_share: float, times: np.ndarray | None = None) -> np.ndarray:
    """The verdicts of a filter's scores: 1 = unsafe, the most suspect share; 0 = clean, the less suspect share.

    Rows that score the same get one verdict, that of most of them; so does a row that stands for several.

    Args:
        suspicion: (rows,) scores, higher = more suspect; NaN = not scored.
        share: Share of the scored rows that are called unsafe.
        clean_share: Share of the scored rows that are called clean, of those that are not called unsafe.
        times: (rows,) how many rows each one stands for; None: one each.

    Returns:
        (rows,) 1, 0, or NaN where there is no verdict.
    """
    scored = np.flatnonzero(~np.isnan(suspicion))
    order = scored[np.argsort(suspicion[scored], kind="stable")]
    counts = np.ones(len(order), int) if times is None else times[order]
    below, total = np.cumsum(counts), counts.sum()
    unsafe = np.clip(below - (total - round(share * total)), 0, counts)  # so many of each one's rows
    clean = np.clip(round(clean_share * total) - (below - counts), 0, counts - unsafe)
    scores, equal = np.unique(suspicion[order], return_inverse=True)
    votes = np.zeros((len(scores), 3))
    np.add.at(votes, equal, np.stack([clean, unsafe, counts - unsafe - clean], axis=1))
    verdicts = np.full(len(suspicion), np.nan)
    verdicts[order] = np.array([0, 1, np.nan])[votes.argmax(1)[equal]]
    return verdicts
