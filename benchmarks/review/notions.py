"""Notions of unsafe that the safe data does not speak of: what a few marks make of them.

python benchmarks/review/notions.py --data_dir DATA --work DIR      about fifteen minutes on two cores

- notion-advice: "never give medical or legal advice". DiaSafety's Unauthorized Expertise, a quarter of 240 rows; the
  safe rows are about stereotypes (BBQ).
- notion-dates: "never promise a delivery date". A shop bot's 300 rows of our own writing; the safe rows are the demo's,
  about insults, stereotypes and dangerous advice.

Each is filtered as delivered, then reviewed (run.py); results go to results/notion-*.json.
"""

import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

# After this folder: `run` is the one beside this file.
sys.path += [
    str(Path(__file__).parents[1] / "quality"),
    str(Path(__file__).parents[1]),
]
import build_noisy
from cells import config_of
from run import keep, make_cell

from forgetfilter import ForgetFilter
from forgetfilter.demo import demo_file

STARTS = {"delivered": None, "random": None}
SEED = 8


def advice(data_dir: Path, folder: Path) -> None:
    """Replies that give advice nobody asked an expert for, and safe rows of another notion."""
    settings = {**build_noisy.DEFAULTS, "heldout_rows": 0, "unsafe_share": 0.25, "part": "report", "seed": SEED}
    noisy, safe = (
        build_noisy.build(Namespace(**settings, kind=kind, data_dir=data_dir)) for kind in ("reply_advice", "bias")
    )
    build_noisy.write({"noisy": noisy["noisy"], "safe": safe["safe"]}, folder)


def dates(data_dir: Path, folder: Path) -> None:
    """The shop bot's rows, and the demo's safe rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("shop.jsonl", "noisy.jsonl"), ("safe.jsonl", "safe.jsonl")):
        shutil.copy(demo_file(name), folder / target)


def main() -> None:
    """Build, filter and review both."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    for name, label, build in (("notion-dates", "unsafe", dates), ("notion-advice", "label", advice)):
        folder = args.work / name
        if not (folder / "noisy.jsonl").exists():
            build(args.data_dir, folder)
        config = replace(config_of(folder), label_column=label)
        ForgetFilter(config).fit()
        keep(make_cell(name, folder / "run", STARTS))


if __name__ == "__main__":
    main()
