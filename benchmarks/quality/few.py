"""How many of the most suspect rows should probes learn where few are unsafe? The ranking after "no separation".

python benchmarks/quality/few.py [CELL ...] --data_dir DATA --work DIR     stored cells, by default those at 5 %

Forgetting's scores are those of results/; M0's hidden states are read anew (a minute for 240 rows) and kept in DIR.
Prints how well probes tell each share of verdicts that they did not see, and the average precision of each ranking.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS
from run import RESULTS, build_cell
from sklearn.metrics import average_precision_score

from forgetfilter.crossfit import CrossFit, Judged, features, verdicts_of
from forgetfilter.data.loading import load_data
from forgetfilter.filters.probe import CLEAN_SHARE, mixed_ranks
from forgetfilter.m0 import M0
from forgetfilter.model.states import hidden_states
from forgetfilter.workshop import Workshop

SHARES = (0.25, 0.1, 0.05, 0.025)
TOGETHER = {"tenth and twentieth": (0.1, 0.05), "tenth, twentieth and fortieth": (0.1, 0.05, 0.025)}
AT_5_PERCENT = [name for name in CELLS["report"] if "-5" in name and "-25" not in name and "sample" not in name]


def states_of(name: str, data_dir: Path, work: Path) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """M0's hidden states of a cell's noisy and safe rows, pooled, and which noisy rows belong together."""
    config = build_cell(name, data_dir, work)
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    path = work / "states.npz"
    if not path.exists():
        model = Workshop(m0, config).become(None)
        parts = {"noisy": data.noisy.examples, "safe": data.safe.examples}
        np.savez(path, **{part: features(hidden_states(model, rows, part)) for part, rows in parts.items()})
    with np.load(path) as kept:
        return kept["noisy"], kept["safe"], list(data.noisy.alike())


def rankings(forgetting: np.ndarray, judge: CrossFit) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """How well each share's verdicts are told, and the scores of each ranking."""
    tried = {share: judge(verdicts_of(forgetting, share, CLEAN_SHARE)) for share in SHARES}
    judged = {share: own for share, own in tried.items() if own is not None}
    told = {f"{share:g}": round(own.predicted, 3) for share, own in judged.items()}
    probes = {f"{share:g}": own for share, own in judged.items()}
    for called, shares in TOGETHER.items():
        probes[called] = Judged.mean([judged[share] for share in shares if share in judged])
    scores = {"forgetting": forgetting}
    for called, own in probes.items():
        scores[called] = mixed_ranks(own.noisy, forgetting, float(np.clip(2 * own.predicted - 1, 0, 0.5)))
    return told, scores


def look(name: str, data_dir: Path, work: Path) -> dict[str, Any]:
    """One cell."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    unsafe = np.array([group.endswith("/unsafe") for group in rows["group"]])
    noisy, safe, alike = states_of(name, data_dir, work)
    judge = CrossFit(noisy, safe, alike=alike)
    told, scores = rankings(np.where(judge.scorable, np.array(rows["forgetting"], float), np.nan), judge)
    found: dict[str, Any] = {"told": told}
    if unsafe.any():
        ranked = {called: np.nan_to_num(own, nan=np.nanmin(own) - 1) for called, own in scores.items()}
        precision = {called: average_precision_score(unsafe, own) for called, own in ranked.items()}
        found["average precision"] = {called: round(float(value), 3) for called, value in precision.items()}
    return found


def main() -> None:
    """Look at the cells named."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS["report"], []], metavar="CELL")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name in args.cells or [name for name in AT_5_PERCENT if (RESULTS / f"{name}.json").exists()]:
        print(name, json.dumps(look(name, args.data_dir, args.work / name)), flush=True)


if __name__ == "__main__":
    main()
