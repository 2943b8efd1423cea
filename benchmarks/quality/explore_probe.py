"""What a probe makes of explored cells, variant by variant: stages are trained once, all else is seconds.

python benchmarks/quality/explore_probe.py [CELL ...] --data_dir DATA --work DIR     all explored cells, or those named

Every cell is scored by forgetting, and M0's hidden states are read; both stay in DIR. The figures of each variant go to
explored_probe.json, beside how well probes tell the first verdicts, by the share that is called unsafe. The ceiling is
the same features taught by the true labels, cross-fitted.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, config_of, write_data

from forgetfilter import ForgetFilter
from forgetfilter.crossfit import CrossFit, features, verdicts_of
from forgetfilter.data.loading import load_data, stored_labels
from forgetfilter.decision.opened import Opened
from forgetfilter.decision.rules import automatic
from forgetfilter.evaluation.filter_quality import filter_quality, ranking_quality
from forgetfilter.filters.probe import CLEAN_SHARE, SUSPECT_SHARE, learn_verdicts
from forgetfilter.m0 import M0
from forgetfilter.runs import Run
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop

SHARES = (0.05, 0.1, 0.25, 0.4)
"""Shares of the rows, called unsafe, at which it is looked how well probes tell the verdicts."""


@dataclass
class Explored:
    """A cell's labels, forgetting's scores, and hidden states, (rows, 2, size): the mean and the last one."""

    unsafe: np.ndarray
    forgetting: Scored
    noisy: np.ndarray
    safe: np.ndarray

    def judge(self, pooling: slice = slice(0, 2), regularisation: float = 0.01) -> CrossFit:
        """Probes on the mean state (0:1), the last one (1:2) or both."""
        noisy, safe = (features(states[:, pooling]) for states in (self.noisy, self.safe))
        return CrossFit(noisy, safe, regularisation)


def explored(name: str, data_dir: Path, work: Path) -> Explored:
    """A cell, built and scored by forgetting unless that is done."""
    write_data(CELLS["explore"][name], data_dir, work)
    config = config_of(work, filter="forgetting")
    ForgetFilter(config).fit()
    run = Run.open(work / "run")
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    workshop = Workshop(m0, config, run)
    labels = stored_labels(data.noisy.source, config)
    assert labels is not None
    return Explored(labels, Opened.of(run).scored["forgetting"], *workshop.states_of(data))


def variants(cell: Explored) -> dict[str, np.ndarray]:
    """Scores of the noisy rows by each variant."""
    forgetting, scale = cell.forgetting.suspicion, cell.forgetting.scale
    judges = {
        "as delivered": cell.judge(),
        "mean state": cell.judge(slice(0, 1)),
        "last state": cell.judge(slice(1, 2)),
        "C = 0.003": cell.judge(regularisation=0.003),
        "C = 0.03": cell.judge(regularisation=0.03),
    }
    scores = {"forgetting": forgetting}
    scores |= {name: learn_verdicts(forgetting, scale, judge).suspicion for name, judge in judges.items()}
    judge = judges["as delivered"]
    verdicts = {"one round": verdicts_of(forgetting, SUSPECT_SHARE, CLEAN_SHARE), "ceiling": cell.unsafe.astype(float)}
    judged = {name: judge(own) for name, own in verdicts.items()}
    return scores | {name: own.noisy for name, own in judged.items() if own is not None}


def about(cell: Explored) -> dict[str, Any]:
    """What is kept of a cell: what is told of the verdicts, what auto drops, and figures of each variant."""
    judge = cell.judge()
    judged = {share: judge(verdicts_of(cell.forgetting.suspicion, share, CLEAN_SHARE)) for share in SHARES}
    found = learn_verdicts(cell.forgetting.suspicion, cell.forgetting.scale, judge)
    threshold = automatic(found.suspicion, found.scale)
    dropped = threshold.drops(found.suspicion)
    decided = filter_quality(cell.unsafe, dropped, found.suspicion)
    return {
        "predicted": {share: round(own.predicted, 3) for share, own in judged.items() if own is not None},
        "auto": {"says": threshold.says, **{key: decided[key] for key in ("f1", "clean_dropped")}},
        "variants": {name: figures(cell.unsafe, scores) for name, scores in variants(cell).items()},
    }


def figures(unsafe: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """AUROC, average precision, best F1, recall at 1 and 2 % of the clean rows lost."""
    quality = filter_quality(unsafe, np.zeros(len(unsafe), bool), scores)
    return {**{key: quality[key] for key in ("auroc", "average_precision")}, **ranking_quality(unsafe, scores)}


def main() -> None:
    """Explore the cells named."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    path = Path(__file__).parent / "explored_probe.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.cells or CELLS["explore"]:
        kept[name] = about(explored(name, args.data_dir, args.work / name))
        path.write_text(json.dumps(kept, indent=1).replace("\n   ", " ") + "\n", encoding="utf-8")
        print(name, json.dumps(kept[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
