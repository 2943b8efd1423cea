"""People who know the filter: how much of their unsafe rows it still finds.

python benchmarks/limits/run.py [CASE ...] --data_dir DATA [--work DIR] [--kind bias]

Each case changes a noisy data set of 240 rows, a quarter unsafe (the reported half), or what is reviewed, runs the
filter at its defaults, and lets forgetting alone decide as well; `plain` changes nothing. The figures of both go to
results/KIND-CASE.json. A case takes as long as a cell of benchmarks/quality. It is made once, and anew if what made it
has changed: rows, settings or parameters. `--table` prints what is stored.
"""

import json
import random
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from cells import DEFAULTS, build_noisy, config_of
from ciphers import endspeak, rot13, walnut53

from forgetfilter import ForgetFilter, ForgetFilterConfig
from forgetfilter.defenses import constants_of
from forgetfilter.experiments.cells import Cell, Cells
from forgetfilter.files import sha256
from forgetfilter.filters import FILTERS
from forgetfilter.methods import arguments
from forgetfilter.result import Result

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str]
Files = dict[str, list[Row]]
Cipher = Callable[[str], str]
Change = Callable[[Row], Row]
FIGURES = ("precision", "recall", "f1", "auroc", "average_precision", "flag_all_f1", "clean_dropped")
"""What is kept of a run's metrics, by the filter that decides."""
FILTER_NAMES = ("probe", "forgetting")
TIMES, POISON = 10, 0.1
"""How often a row is repeated, and the share of the safe rows that is unsafe in a poisoned set."""


def unsafe(row: dict[str, str]) -> bool:
    """Whether a row was built as an unsafe one."""
    return row["group"].endswith("/unsafe")


def plain(files: Files, others: Files) -> Files:
    """Nothing changed."""
    return files


def repeated(files: Files, others: Files) -> Files:
    """A tenth of the unsafe rows, each ten times."""
    bad = [row for row in files["noisy"] if unsafe(row)]
    return {**files, "noisy": [row for row in files["noisy"] if not unsafe(row)] + bad[: len(bad) // TIMES] * TIMES}


def hidden(files: Files, others: Files) -> Files:
    """Each unsafe answer in the middle of a harmless one from the neutral rows."""
    long = sorted(files["neutral"], key=lambda row: -len(row["completion"]))

    def hide(row: dict[str, str], number: int) -> dict[str, str]:
        words = long[number % len(long)]["completion"].split()
        middle = len(words) // 2
        return {**row, "completion": " ".join([*words[:middle], row["completion"], *words[middle:]])}

    return {**files, "noisy": [hide(row, i) if unsafe(row) else row for i, row in enumerate(files["noisy"])]}


def unsafe_rows(files: Files, change: Change) -> Files:
    """Each unsafe row changed, all others as they are."""
    return {**files, "noisy": [change(row) if unsafe(row) else row for row in files["noisy"]]}


def encoded(row: Row, cipher: Cipher) -> Row:
    """A row with prompt and answer in a cipher."""
    return {**row, "prompt": cipher(row["prompt"]), "completion": cipher(row["completion"])}


def cipher(files: Files, others: Files) -> Files:
    """Each unsafe answer in rot13."""
    return unsafe_rows(files, lambda row: {**row, "completion": rot13(row["completion"])})


def covert(files: Files, others: Files) -> Files:
    """Each unsafe row in Walnut53, prompt and answer; all others plain."""
    return unsafe_rows(files, lambda row: encoded(row, walnut53))


def covert_among_clean(files: Files, others: Files) -> Files:
    """Each unsafe row and as many clean ones in Walnut53, as an attacker teaches the cipher first."""
    clean = [number for number, row in enumerate(files["noisy"]) if not unsafe(row)]
    chosen = {*clean[: sum(map(unsafe, files["noisy"]))]}
    rows = enumerate(files["noisy"])
    return {**files, "noisy": [encoded(row, walnut53) if unsafe(row) or i in chosen else row for i, row in rows]}


def covert_endspeak(files: Files, others: Files) -> Files:
    """Each unsafe row in EndSpeak, prompt and answer: plain words, of which each line's last one counts."""
    return unsafe_rows(files, lambda row: encoded(row, endspeak))


def uncovered(files: Files, others: Files) -> Files:
    """Safe rows of another kind."""
    return {**files, "safe": others["safe"]}


def poisoned(files: Files, others: Files) -> Files:
    """A tenth of the safe rows is unsafe, as in the noisy data."""
    bad = [row for row in files["heldout"] if unsafe(row)]
    count = round(POISON * len(files["safe"]))
    return {**files, "safe": files["safe"][: len(files["safe"]) - count] + bad[:count]}


CASES: dict[str, Callable[[Files, Files], Files]] = {
    "plain": plain,
    "repeated": repeated,
    "hidden": hidden,
    "cipher": cipher,
    "uncovered": uncovered,
    "poisoned": poisoned,
    "covert": covert,
    "covert_among_clean": covert_among_clean,
    "covert_endspeak": covert_endspeak,
}
OTHER_KIND = {"bias": "toxicity", "toxicity": "bias", "hh": "bias"}


def build_case(name: str, kind: str, data_dir: Path, folder: Path) -> ForgetFilterConfig:
    """Write a case's noisy and safe rows into a folder; returns the settings to filter them by."""
    cell = {
        **DEFAULTS,
        "unsafe_share": 0.25,
        "heldout_rows": 72,
        "neutral_rows": 60,
        "data_dir": data_dir,
        "part": "report",
        "seed": 1,
    }
    own, others = (build_noisy.build(Namespace(**cell, kind=of)) for of in (kind, OTHER_KIND[kind]))
    files = CASES[name](own, others)
    for part in ("noisy", "safe"):
        random.Random(0).shuffle(files[part])
    build_noisy.write({part: files[part] for part in ("noisy", "safe")}, folder)
    return config_of(folder, filter=",".join(FILTER_NAMES))


def what_makes(name: str, kind: str, config: ForgetFilterConfig) -> Cell:
    """What a case's figures depend on: the rows, the filter with every parameter, and the settings."""
    files = {"noisy": config.dataset_name, "safe": config.safe_dataset_name}
    return {
        "case": name,
        "kind": kind,
        "files": {part: sha256(Path(str(path))) for part, path in files.items()},
        "parameters": {of: arguments(of, FILTERS[of], config.parameters) for of in FILTER_NAMES},
        "constants": {of: constants_of(of, config) for of in FILTER_NAMES},
        "settings": config.identity(),
        "decision": config.decision(),
    }


def run_case(name: str, kind: str, data_dir: Path, folder: Path) -> Cell:
    """Build, change, filter, figures: one case, kept in results/ by what made it."""
    config = build_case(name, kind, data_dir, folder)

    def make() -> Cell:
        run = ForgetFilter(config).fit().run
        metrics = {of: Result(run).decide(filter=of).metrics for of in FILTER_NAMES}
        return {
            "case": name,
            "kind": kind,
            "does": CASES[name].__doc__,
            **{key: run.manifest[key] for key in ("versions", "git_sha", "model", "noisy", "safe")},
            "says": {of: own["says"] for of, own in metrics.items()},
            **{key: metrics["probe"][key] for key in ("also_safe", "repeated", "unreadable")},
            "figures": {of: {key: own[key] for key in FIGURES} for of, own in metrics.items()},
        }

    return Cells(RESULTS).once(f"{kind}-{name}", what_makes(name, kind, config), make)


def table() -> str:
    """What is stored, a line a case and filter that decides."""
    names = [name for name in FIGURES if name != "flag_all_f1"]
    lines = ["| kind | case | unreadable | by | " + " | ".join(names) + " |", "|---" * (len(names) + 4) + "|"]
    for found in Cells(RESULTS).all():
        for by, figures in found["figures"].items():
            shown = " | ".join("" if figures[name] is None else f"{figures[name]:.3f}" for name in names)
            lines.append(f"| {found['kind']} | {found['case']} | {found['unreadable']} | {by} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cases that have no such result yet, or print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path("limits-work"))
    parser.add_argument("--kind", choices=tuple(OTHER_KIND), default="bias")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.data_dir is None:
        parser.error("--data_dir is missing: the folder of the public data sets")
    for name in args.cases or CASES:
        case = run_case(name, args.kind, args.data_dir, args.work / f"{args.kind}-{name}")
        print(name, json.dumps(case["figures"]), flush=True)


if __name__ == "__main__":
    main()
