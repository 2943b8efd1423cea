"""What a probe makes of explored cells, variant by variant: stages are trained once, all else is seconds.

python benchmarks/quality/explore_probe.py CELL [CELL ...] --data_dir DATA --work DIR

Every cell is scored by forgetting, and M0's hidden states are read; both stay in DIR. The figures of each variant go
to explored_probe.json. The ceiling is the same features taught by the true labels, cross-fitted.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS, config_of, write_data
from scipy.stats import rankdata

from forgetfilter import ForgetFilter
from forgetfilter.data.loading import load_data, stored_labels
from forgetfilter.decision.opened import Opened
from forgetfilter.evaluation.filter_quality import filter_quality, ranking_quality
from forgetfilter.filters.forgetting import FORGOTTEN
from forgetfilter.filters.probe import LAST, MEAN, cross_fitted, verdicts_of
from forgetfilter.runs import Run
from forgetfilter.workshop import M0, Workshop


def scored_cell(name: str, data_dir: Path, work: Path) -> dict[str, np.ndarray]:
    """Labels, forgetting scores and pooled hidden states of a cell's noisy and safe rows; trained once."""
    write_data(CELLS["explore"][name], data_dir, work)
    config = config_of(work)
    ForgetFilter(config).fit()
    run = Run.open(work / "run")
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    workshop = Workshop(m0, config, run)
    labels = stored_labels(data.noisy.source, config)
    assert labels is not None
    return {
        "unsafe": labels,
        "forgetting": Opened.of(run).scored["forgetting"].suspicion,
        "noisy": workshop.states(data.noisy.examples),
        "safe": workshop.states(data.safe.examples),
    }


def features(found: dict[str, np.ndarray], pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """The noisy and the safe rows' features: the mean state, the last one, or both side by side."""
    chosen = {"mean": [MEAN], "last": [LAST], "both": [MEAN, LAST]}[pooling]
    return tuple(found[part][:, chosen].reshape(len(found[part]), -1) for part in ("noisy", "safe"))


def variants(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of the noisy rows by each variant."""
    forgetting, unsafe = found["forgetting"], found["unsafe"]
    share = float(np.clip((forgetting > FORGOTTEN).mean(), 0.03, 0.6))
    scores = {"forgetting": forgetting}
    for pooling in ("mean", "last", "both"):
        noisy, safe = features(found, pooling)
        for strength in (0.001, 0.01, 0.1):
            judged = cross_fitted(noisy, safe, verdicts_of(forgetting, share), strength)
            scores[f"{pooling} C={strength}"] = judged.noisy
        for part in (0.5, 0.75, 1.0):
            judged = cross_fitted(noisy, safe, verdicts_of(forgetting, max(0.03, part * share)))
            scores[f"{pooling} {part:.0%} of the forgotten"] = judged.noisy
        first = scores[f"{pooling} C=0.01"]
        scores[f"{pooling} again"] = cross_fitted(noisy, safe, verdicts_of(first, share)).noisy
        scores[f"{pooling} + forgetting"] = rankdata(first) + rankdata(forgetting)
        if unsafe.any():
            scores[f"{pooling} ceiling"] = cross_fitted(noisy, safe, unsafe.astype(float)).noisy
        permuted = np.random.default_rng(0).permutation(verdicts_of(forgetting, share))
        scores[f"{pooling} permuted verdicts"] = cross_fitted(noisy, safe, permuted).noisy
    return scores


def figures(unsafe: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """AUROC, average precision, best F1, recall at 1 and 2 % of the clean rows lost."""
    quality = filter_quality(unsafe, np.zeros(len(unsafe), bool), scores)
    return {**{key: quality[key] for key in ("auroc", "average_precision")}, **ranking_quality(unsafe, scores)}


def main() -> None:
    """Explore the cells named."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    path = Path(__file__).parent / "explored_probe.json"
    explored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.cells:
        found = scored_cell(name, args.data_dir, args.work / name)
        np.savez_compressed(args.work / f"{name}.npz", **found)
        explored[name] = {variant: figures(found["unsafe"], s) for variant, s in variants(found).items()}
        path.write_text(json.dumps(explored, indent=1).replace("\n   ", " ") + "\n", encoding="utf-8")
        for variant, own in explored[name].items():
            print(f"{name:16} {variant:28}", *(f"{key} {value}" for key, value in own.items()), flush=True)


if __name__ == "__main__":
    main()
