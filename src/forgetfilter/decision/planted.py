"""What a decision would have made of the planted rows (data/planted.py): the share found, in all and by notion."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from forgetfilter.decision.rules import Threshold

FEW = 4
"""Unsafe planted rows of a notion from which on something is said of it."""
TOLD = 0.7
"""A notion is hardly told if its rows are ranked above the clean planted ones with an AUROC below this."""


def planted_figures(
    about: Sequence[dict[str, Any]], scores: Mapping[str, np.ndarray], name: str, threshold: Threshold
) -> dict[str, Any]:
    """Counts and AUROC of the planted rows, in all and by notion, with a sentence that says them.

    Whether a notion is covered is told by the witness, not by the probe: a probe learns what the user's unsafe rows
    look like, and the planted ones look otherwise.

    Args:
        about: For each planted row its notion, and whether it is unsafe.
        scores: Filter -> (planted rows,) its scores, higher = more suspect, NaN = not scored. The last is the witness.
        name: The filter that decides.
        threshold: That of the decision.

    Returns:
        unsafe and clean (rows), found (unsafe rows above the threshold), clean_dropped, witness, auroc, notions (each
        with unsafe, found and auroc), hardly_told (names of notions), and says.
    """
    unsafe = np.array([row["unsafe"] for row in about], bool)
    notion = np.array([row["notion"] for row in about])
    witness = list(scores)[-1]
    dropped = threshold.drops(scores[name])
    notions = {}
    for called in dict.fromkeys(notion[unsafe].tolist()):
        own = unsafe & (notion == called)
        notions[called] = _counts(own, ~unsafe, dropped, scores[witness])
    found = {**_counts(unsafe, ~unsafe, dropped, scores[witness]), "witness": witness}
    found |= {"clean": int((~unsafe).sum()), "clean_dropped": int(dropped[~unsafe].sum()), "notions": notions}
    found["hardly_told"] = [called for called, own in notions.items() if _hardly(own)]
    return {**found, "says": _sentence(found)}


def _counts(own: np.ndarray, clean: np.ndarray, dropped: np.ndarray, suspicion: np.ndarray) -> dict[str, Any]:
    """How many unsafe rows there are and were found, and their AUROC against the clean ones, where scored."""
    scored, auroc = ~np.isnan(suspicion), None
    if (own & scored).any() and (clean & scored).any():
        chosen = (own | clean) & scored
        auroc = round(float(roc_auc_score(own[chosen], suspicion[chosen])), 4)
    return {"unsafe": int(own.sum()), "found": int(dropped[own].sum()), "auroc": auroc}


def _hardly(own: dict[str, Any]) -> bool:
    """Whether a notion's rows are hardly told from clean ones."""
    return own["unsafe"] >= FEW and own["auroc"] is not None and own["auroc"] < TOLD


def _sentence(found: dict[str, Any]) -> str:
    """The figures in words."""
    said = (
        f"{found['found']} of {found['unsafe']} planted unsafe rows and {found['clean_dropped']} of {found['clean']} "
        "planted clean rows would be dropped"
    )
    if found["auroc"] is None:
        return said
    said += f"; {found['witness']} tells them apart with AUROC {found['auroc']:.2f}"
    hardly = [f"{name} ({found['notions'][name]['auroc']:.2f})" for name in found["hardly_told"]]
    return f"{said}, hardly so {', '.join(hardly)}. Do your safe rows speak of these?" if hardly else said
