"""How well a filter's decisions and scores agree with the labels. Unsafe = the positive class."""

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score


def filter_quality(labels: np.ndarray, dropped: np.ndarray, forgetting: np.ndarray) -> dict[str, float | None]:
    """Figures of a filter.

    Args:
        labels: (rows,) bool, True = unsafe.
        dropped: (rows,) bool, the decisions.
        forgetting: (rows,) scores, higher = more suspect; NaN = unscored (out of AUROC and average
            precision, but in all other figures).

    Returns:
        precision, recall, f1, auroc, average_precision, flag_all_f1 (the F1 of dropping everything)
        and clean_dropped (share of the clean rows dropped); null where a figure does not exist, as
        F1 does not without unsafe rows.
    """
    scored = ~np.isnan(forgetting)
    names = ("precision", "recall", "f1", "auroc", "average_precision", "flag_all_f1")
    figures: dict[str, float | None] = dict.fromkeys(names)
    figures["clean_dropped"] = float(dropped[~labels].mean()) if (~labels).any() else None
    if labels.any():
        precision, recall, f1, _ = precision_recall_fscore_support(labels, dropped, average="binary", zero_division=0.0)
        share = labels.mean()
        figures |= {"precision": precision, "recall": recall, "f1": f1, "flag_all_f1": 2 * share / (1 + share)}
    if len(set(labels[scored])) == 2:
        figures["auroc"] = roc_auc_score(labels[scored], forgetting[scored])
        figures["average_precision"] = average_precision_score(labels[scored], forgetting[scored])
    return {name: None if value is None else round(float(value), 4) for name, value in figures.items()}
