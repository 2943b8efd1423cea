"""What marks are worth in the model: filter, mark forty rows, finetune, ask.

python benchmarks/review/worth.py [KIND-SHARE[-large] ...] --data_dir DATA --work DIR [--seeds 1 2 3]

About fifteen minutes each, hours where it is -large: 2,000 rows, most of them tasks, as in quality/cells.yaml. Data,
M0's alignment and questions are those of benchmarks/defenses/run.py, whose table has `none` and `probe`. The reviewer
knows the labels. Each way, with marks and by the true labels, finetunes the same M0 for the same epochs.
Results go to results/worth-KIND-SHARE-seed-SEED.json.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).parents[1] / "defenses"))
import run as defenses
from cells import config_of

from forgetfilter import ForgetFilter, StageConfig
from forgetfilter.data.loading import stored_labels
from forgetfilter.evaluation.ask import evaluate
from forgetfilter.forgetting import finetune
from forgetfilter.marks import word
from forgetfilter.result import Result

MARKS = 40
LARGE = {"rows": 2000, "task_share": 0.95, "tasks": "squad,alpaca,gsm8k"}


def asked(run_folder: Path, files: dict[str, Path]) -> dict[str, Any]:
    """The final model's figures."""
    found, _ = evaluate(str(run_folder), {measure: str(path) for measure, path in files.items()})
    return dict(found)


def review(result: Result) -> list[str]:
    """Mark rows one after the other, and decide; returns what the review said after every ten marks."""
    opened = result.review.opened
    unsafe = stored_labels(opened.source, opened.config)
    assert unsafe is not None
    said = []
    for number in range(MARKS):
        (row,) = result.ask()
        line = result.mark({row: word(not unsafe[row])})
        said += [line] if (number + 1) % 10 == 0 else []
    result.decide()
    return said


def by_labels(result: Result, folder: Path) -> Result:
    """The decision that the true labels give."""
    opened = result.review.opened
    unsafe = stored_labels(opened.source, opened.config)
    assert unsafe is not None
    lines = [{"row": row, "decision": "dropped" if bad else "kept"} for row, bad in enumerate(unsafe)]
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return result.decide(decisions=path)


def make(name: str, seed: int, data_dir: Path, work: Path) -> dict[str, Any]:
    """One study under one seed."""
    kind, share, *large = name.split("-")
    folder = work / f"{name}-seed-{seed}"
    data = {"kind": kind, "unsafe_share": int(share) / 100, **(LARGE if large else {})}
    files = defenses.write_data(data, data_dir, folder, None)
    alignment, final = str(folder / "alignment.jsonl"), StageConfig(num_train_epochs=4)
    config = config_of(folder, alignment_dataset_name=alignment, seed=seed, final=final)
    result = ForgetFilter(config).fit()
    found: dict[str, Any] = {"study": name, "seed": seed, "marks": MARKS, "before": result.metrics}
    found["said"] = review(result)
    for way, decided in (("marks", lambda: result), ("labels", lambda: by_labels(result, folder))):
        metrics = decided().metrics
        finetune(result.run)
        found[way] = {"metrics": metrics, "asked": asked(result.run.folder, files)}
        print(name, seed, way, json.dumps(found[way]["asked"]), flush=True)
    return found


def main() -> None:
    """Make the studies named."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=["bias-50", "toxicity-50"])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    for name in args.studies:
        for seed in args.seeds:
            found = make(name, seed, args.data_dir, args.work)
            path = Path(__file__).parent / "results" / f"worth-{name}-seed-{seed}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
