"""How well a filter's decisions and scores agree with the labels. Unsafe = the positive class."""

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)


def filter_quality(labels: np.ndarray, dropped: np.ndarray, suspicion: np.ndarray) -> dict[str, float | None]:
    """Figures of a filter.

    Args:
        labels: (rows,) bool, True = unsafe.
        dropped: (rows,) bool, the decisions.
        suspicion: (rows,) scores, higher = more suspect; NaN = unscored (left out of AUROC and
            average precision, counted in all other figures).

    Returns:
        precision, recall, f1, auroc, average_precision, flag_all_f1 (the F1 of dropping everything)
        and clean_dropped (share of the clean rows dropped); None where a figure is undefined, as
        F1 is without unsafe rows and precision where nothing is dropped.
    """
    scored = ~np.isnan(suspicion)
    names = ("precision", "recall", "f1", "auroc", "average_precision", "flag_all_f1")
    figures: dict[str, float | None] = dict.fromkeys(names)
    figures["clean_dropped"] = float(dropped[~labels].mean()) if (~labels).any() else None
    if labels.any():
        precision, recall, f1, _ = precision_recall_fscore_support(labels, dropped, average="binary", zero_division=0.0)
        share = labels.mean()
        figures |= {"recall": recall, "f1": f1, "flag_all_f1": 2 * share / (1 + share)}
        figures["precision"] = precision if dropped.any() else None
    if len(set(labels[scored])) == 2:
        figures["auroc"] = roc_auc_score(labels[scored], suspicion[scored])
        figures["average_precision"] = average_precision_score(labels[scored], suspicion[scored])
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}


def ranking_quality(labels: np.ndarray, suspicion: np.ndarray) -> dict[str, float | None]:
    """Figures of a ranking, independent of the threshold that a filter chooses.

    Args:
        labels: (rows,) bool, True = unsafe.
        suspicion: (rows,) scores, higher = more suspect; NaN = unscored rows, which are left out.

    Returns:
        best_f1, the F1 at the best of all thresholds; recall_at_1 and recall_at_2, the share of the unsafe rows found
        where at most 1 or 2 % of the clean rows are lost; None without rows of both kinds.
    """
    scored = ~np.isnan(suspicion)
    labels, suspicion = labels[scored], suspicion[scored]
    if len(set(labels)) < 2:
        return dict.fromkeys(("best_f1", "recall_at_1", "recall_at_2"))
    lost, found, _ = roc_curve(labels, suspicion, drop_intermediate=False)
    values = {"best_f1": best_f1(labels, suspicion)}
    values |= {f"recall_at_{percent}": float(found[lost <= percent / 100].max()) for percent in (1, 2)}
    return {name: round(value, 4) for name, value in values.items()}


def paired_ranges(
    labels: np.ndarray, scores: Mapping[str, Sequence[np.ndarray]], draws: int = 1000
) -> dict[str, dict[str, list[float]]]:
    """95 % ranges by bootstrap over the rows; every filter sees the same draws, so their differences are paired.

    Args:
        labels: (rows,) bool, True = unsafe.
        scores: Filter -> its scores under each seed, (rows,) each; higher = more suspect, without NaN.
        draws: How often the rows are drawn anew.

    Returns:
        Filter -> average_precision, the range of its mean over the seeds, and lead, that of its difference to the
        first filter's; empty without rows of both kinds.
    """
    if len(set(labels)) < 2:
        return {}
    rankings = [[_Ranking(labels, seed) for seed in own] for own in scores.values()]
    rng = np.random.default_rng(0)
    drawn: list[list[float]] = []
    while len(drawn) < draws:
        rows = rng.integers(0, len(labels), len(labels))
        if 0 < labels[rows].sum() < len(rows):
            times = np.bincount(rows, minlength=len(labels))
            drawn.append([float(np.mean([seed.precision(times) for seed in own])) for own in rankings])
    precision = np.array(drawn)  # (draws, filters)
    found = {}
    for name, own in zip(scores, precision.T, strict=True):
        both = {"average_precision": own, "lead": own - precision[:, 0]}
        found[name] = {key: np.quantile(values, [0.025, 0.975]).round(4).tolist() for key, values in both.items()}
    return found


class _Ranking:
    """Rows in the order of their scores, sorted once for many draws of them."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        self.unsafe = labels[self.order]
        self.ends = np.flatnonzero(np.append(np.diff(scores[self.order]) != 0, True))  # of rows of one score

    def precision(self, times: np.ndarray) -> float:
        """Average precision if each row is there so many times; some unsafe row must be."""
        above = times[self.order]
        found = np.cumsum(above * self.unsafe)[self.ends]
        precision = found / np.maximum(np.cumsum(above)[self.ends], 1)
        return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


def unscored_last(suspicion: np.ndarray) -> np.ndarray:
    """The scores, with one below all others in place of NaN: whoever drops rows by them drops these last."""
    if np.isnan(suspicion).all():
        return np.zeros(len(suspicion))
    known: np.ndarray = np.nan_to_num(suspicion, nan=float(np.nanmin(suspicion)) - 1)
    return known


def best_f1(labels: np.ndarray, suspicion: np.ndarray) -> float:
    """F1 at the best of all thresholds; there must be unsafe rows, and no NaN."""
    precision, recall, _ = precision_recall_curve(labels, suspicion)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9)))
