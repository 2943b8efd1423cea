"""What a decision would have made of the planted rows (data/planted.py): the share found, in all and by notion."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

FEW = 4
"""Unsafe planted rows of a notion from which on something is said of it."""
TOLD = 0.7
"""A notion is hardly told if its rows are ranked above the clean planted ones with an AUROC below this."""


def planted_figures(
    about: Sequence[dict[str, Any]],
    scores: Mapping[str, np.ndarray],
    name: str,
    dropped: np.ndarray,
    yours: np.ndarray,
    *,
    decides: bool,
) -> dict[str, Any]:
    """Counts and AUROC of the planted rows, in all and by notion, with a sentence that says them.

    Whether a notion is covered is told by the witness, not by the probe: a probe learns what the user's unsafe rows
    look like, and the planted ones look otherwise.

    Args:
        about: For each planted row its notion, and whether it is unsafe.
        scores: Filter -> (planted rows,) its scores, higher = more suspect, NaN = not scored. The last is the witness.
        name: The filter that decides.
        dropped: (planted rows,) bool: which of them the decision would drop.
        yours: (rows,) the witness' scores of the user's rows, most of which are clean. They stand for the clean planted
            rows where there are none.
        decides: Whether the decision has a threshold.

    Returns:
        unsafe and clean (rows), found (unsafe rows that would be dropped), clean_dropped, witness, auroc, notions (each
        with unsafe, found and auroc), hardly_told (names of notions), and says.
    """
    unsafe = np.array([row["unsafe"] for row in about], bool)
    notion = np.array([row["notion"] for row in about])
    witness = list(scores)[-1]
    clean = scores[witness][~unsafe] if (~unsafe).any() else yours

    def counts(own: np.ndarray) -> dict[str, Any]:
        auroc = _auroc(scores[witness][own], clean)
        return {"unsafe": int(own.sum()), "found": int(dropped[own].sum()), "auroc": auroc}

    notions = {called: counts(unsafe & (notion == called)) for called in dict.fromkeys(notion[unsafe].tolist())}
    found = {**counts(unsafe), "witness": witness, "notions": notions}
    found |= {"clean": int((~unsafe).sum()), "clean_dropped": int(dropped[~unsafe].sum())}
    found["hardly_told"] = [called for called, own in notions.items() if _hardly(own)]
    if np.isnan(scores[name]).all():
        return {**found, "says": f"{len(about)} rows are planted, and {name} scores none of them"}
    return {**found, "says": _sentence(found, decides=decides)}


def _auroc(unsafe: np.ndarray, clean: np.ndarray) -> float | None:
    """How well scores tell unsafe rows from clean ones, where they are scored; None if there are none of either."""
    unsafe, clean = unsafe[~np.isnan(unsafe)], clean[~np.isnan(clean)]
    if not len(unsafe) or not len(clean):
        return None
    labels = np.arange(len(unsafe) + len(clean)) < len(unsafe)
    return round(float(roc_auc_score(labels, np.append(unsafe, clean))), 4)


def _hardly(own: dict[str, Any]) -> bool:
    """Whether rows are hardly told from clean ones."""
    return own["unsafe"] >= FEW and own["auroc"] is not None and own["auroc"] < TOLD


def _sentence(found: dict[str, Any], *, decides: bool) -> str:
    """The figures in words; without a threshold, of which no row is found or lost, the ranking's alone."""
    unsafe, clean = found["unsafe"], found["clean"]
    said = f"{unsafe} unsafe and {clean} clean rows are planted"
    if decides:
        lost = f" and {found['clean_dropped']} of {clean} planted clean rows" if clean else ""
        said = f"{found['found']} of {unsafe} planted unsafe rows{lost} would be dropped"
    notions = found["notions"]
    if decides and len(notions) > 1:
        each = [f"{name} {own['found']} of {own['unsafe']}" for name, own in notions.items()]
        said += f" ({', '.join(each)})"
    if found["auroc"] is None:
        return said
    others = "the clean ones" if clean else "your rows"
    said += f"; {found['witness']} tells the unsafe ones from {others} with AUROC {found['auroc']:.2f}"
    hardly = [f"{name} ({notions[name]['auroc']:.2f})" for name in found["hardly_told"]]
    if hardly:
        return f"{said}, hardly so {', '.join(hardly)}. Do your safe rows speak of these?"
    return f"{said}, which is little. Do your safe rows speak of them?" if _hardly(found) else said
