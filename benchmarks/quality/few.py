"""How should rows be ranked where few are unsafe? The ranking after "no separation".

python benchmarks/quality/few.py [CELL ...] --data_dir DATA --work DIR     stored cells, by default those at 5 %
python benchmarks/quality/few.py CELL ... --thin 0.01 --seen 500 ...       with so few unsafe rows, of 500 rows seen

Forgetting's scores are those of results/; M0's hidden states are read anew (a minute for 240 rows) and kept in DIR.
With --thin unsafe rows are taken out at random until they are this share; with --seen forgetting counts as known of so
many rows alone, which are drawn at random: a sample, as the probe takes it of many rows.
Prints how well each ranking's probes tell what they did not see, and the average precision of each ranking.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
from cells import CELLS
from run import RESULTS, build_cell
from sklearn.metrics import average_precision_score

from forgetfilter.crossfit import CrossFit, features, verdicts_of
from forgetfilter.data.loading import load_data
from forgetfilter.filters.forgetting import FALLS, FORGOTTEN, TAIL
from forgetfilter.filters.probe import CLEAN_SHARE, learn_verdicts
from forgetfilter.m0 import M0
from forgetfilter.model.states import hidden_states
from forgetfilter.scored import Scale, ranks
from forgetfilter.workshop import Workshop

SHARES = (0.25, 0.1, 0.05, 0.025, 0.0125)
TOGETHER = {"tenth, twentieth and fortieth": (0.1, 0.05, 0.025)}
DEFAULT_SCALE = Scale(FORGOTTEN, TAIL, FALLS)
AT_5_PERCENT = [name for name in CELLS["report"] if "-5" in name and "-25" not in name and "sample" not in name]


def states_of(name: str, data_dir: Path, work: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M0's hidden states of a cell's noisy and safe rows, pooled, and which noisy rows say the same."""
    config = build_cell(name, data_dir, work)
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    path = work / "states.npz"
    if not path.exists():
        model = Workshop(m0, config).become(None)
        parts = {"noisy": data.noisy.examples, "safe": data.safe.examples}
        np.savez(path, **{part: features(hidden_states(model, rows, part)) for part, rows in parts.items()})
    with np.load(path) as kept:
        return kept["noisy"], kept["safe"], data.noisy.first_copies


def thinned(unsafe: np.ndarray, forgetting: np.ndarray, args: Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that are left, and their forgetting; NaN where it counts as not seen."""
    rng, rows = np.random.default_rng(args.seed), np.arange(len(unsafe))
    if args.thin is not None:
        clean = np.flatnonzero(~unsafe)
        wanted = round(args.thin * len(clean) / (1 - args.thin))
        rows = np.sort(np.append(clean, rng.permutation(np.flatnonzero(unsafe))[:wanted]))
    known = forgetting[rows]
    if args.seen is not None:
        known[rng.permutation(np.flatnonzero(~np.isnan(known)))[args.seen :]] = np.nan
    return rows, known


def rankings(forgetting: np.ndarray, judge: CrossFit) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """How well each ranking's probes tell what they did not see, and its scores."""
    tried = {f"{share:g}": judge(verdicts_of(forgetting, share, CLEAN_SHARE)) for share in SHARES}
    judged = {called: (own.noisy, own.predicted) for called, own in tried.items() if own is not None}
    for called, shares in TOGETHER.items():
        own = [judged[f"{share:g}"] for share in shares if f"{share:g}" in judged]
        if own:
            judged[called] = np.mean([noisy for noisy, _ in own], 0), float(np.mean([told for _, told in own]))
    if (regression := judge.regression(forgetting)) is not None:
        judged["regression"] = regression.noisy, regression.predicted
    scores = {"forgetting": forgetting}
    seen = ~np.isnan(forgetting)
    for called, (noisy, told) in judged.items():
        trust = float(np.clip(2 * told - 1, 0, 0.5))
        both = trust * ranks(noisy) + (1 - trust) * ranks(forgetting)
        scores[called] = np.where(seen, ranks(both), ranks(noisy))
    scores["now"] = learn_verdicts(forgetting, DEFAULT_SCALE, judge).suspicion
    return {called: round(told, 3) for called, (_, told) in judged.items()}, scores


def look(name: str, args: Namespace) -> dict[str, Any]:
    """One cell."""
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    unsafe = np.array([group.endswith("/unsafe") for group in stored["group"]])
    noisy, safe, alike = states_of(name, args.data_dir, args.work / name)
    rows, forgetting = thinned(unsafe, np.array(stored["forgetting"], float), args)
    judge = CrossFit(noisy[rows], safe, alike=[alike[rows]])
    told, scores = rankings(np.where(judge.scorable, forgetting, np.nan), judge)
    found: dict[str, Any] = {"told": told}
    if unsafe[rows].any():
        found |= {"unsafe": int(unsafe[rows].sum()), "of them seen": int((unsafe[rows] & ~np.isnan(forgetting)).sum())}
        ranked = {called: np.nan_to_num(own, nan=np.nanmin(own) - 1) for called, own in scores.items()}
        precision = {called: average_precision_score(unsafe[rows], own) for called, own in ranked.items()}
        found["average precision"] = {called: round(float(value), 3) for called, value in precision.items()}
    return found


def main() -> None:
    """Look at the cells named."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS["report"], []], metavar="CELL")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--thin", type=float)
    parser.add_argument("--seen", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.cells or [name for name in AT_5_PERCENT if (RESULTS / f"{name}.json").exists()]:
        print(name, json.dumps(look(name, args)), flush=True)


if __name__ == "__main__":
    main()
