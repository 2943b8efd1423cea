"""What a decision would have made of the planted rows (data/planted.py): the share found, in all and by notion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from forgetfilter.decision.rules import Threshold
from forgetfilter.evaluation.filter_quality import unscored_last

FEW = 4
"""Unsafe planted rows of a notion from which on something is said of it."""
FOUND, TOLD = 0.5, 0.7
"""A notion is hardly found if less than this share of its rows is dropped; or, where nothing is dropped at all, if its
rows are ranked above the clean planted ones with an AUROC below TOLD."""


def planted_figures(about: Sequence[dict[str, Any]], suspicion: np.ndarray, threshold: Threshold) -> dict[str, Any]:
    """Counts and AUROC of the planted rows, in all and by notion, with a sentence that says them.

    Args:
        about: For each planted row its notion, and whether it is unsafe.
        suspicion: (planted rows,) their scores, higher = more suspect; NaN = not scored.
        threshold: That of the decision.

    Returns:
        unsafe and clean (rows), found (unsafe rows above the threshold), clean_dropped, auroc, notions (each with
        unsafe, found and auroc), hardly_found (names of notions), and says.
    """
    unsafe = np.array([row["unsafe"] for row in about], bool)
    notion = np.array([row["notion"] for row in about])
    dropped = threshold.drops(suspicion)
    notions = {}
    for name in dict.fromkeys(notion[unsafe].tolist()):
        own = unsafe & (notion == name)
        notions[name] = _counts(own, ~unsafe, dropped, suspicion)
    found = {**_counts(unsafe, ~unsafe, dropped, suspicion), "clean": int((~unsafe).sum())}
    found |= {"clean_dropped": int(dropped[~unsafe].sum()), "notions": notions}
    found["hardly_found"] = [name for name, own in notions.items() if _hardly(own, bool(dropped.any()))]
    return {**found, "says": _sentence(found)}


def _counts(own: np.ndarray, clean: np.ndarray, dropped: np.ndarray, suspicion: np.ndarray) -> dict[str, Any]:
    """How many unsafe rows there are and were found, and their AUROC against the clean ones."""
    auroc = None
    if own.any() and clean.any():
        chosen = own | clean
        auroc = round(float(roc_auc_score(own[chosen], unscored_last(suspicion)[chosen])), 4)
    return {"unsafe": int(own.sum()), "found": int(dropped[own].sum()), "auroc": auroc}


def _hardly(own: dict[str, Any], drops: bool) -> bool:
    """Whether too little of a notion is found."""
    if own["unsafe"] < FEW:
        return False
    if drops:
        return bool(own["found"] < FOUND * own["unsafe"])
    return own["auroc"] is not None and own["auroc"] < TOLD


def _sentence(found: dict[str, Any]) -> str:
    """The figures in words."""
    said = (
        f"{found['found']} of {found['unsafe']} planted unsafe rows found, "
        f"{found['clean_dropped']} of {found['clean']} planted clean rows dropped"
    )
    if found["auroc"] is not None:
        said += f", AUROC {found['auroc']:.2f}"
    if not found["hardly_found"]:
        return said
    hardly = [(name, found["notions"][name]) for name in found["hardly_found"]]
    names = ", ".join(f"{name} ({own['found']} of {own['unsafe']})" for name, own in hardly)
    return f"{said}; hardly found: {names}. Do your safe rows speak of them?"
