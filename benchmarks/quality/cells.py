"""The cells of cells.yaml: noisy data sets with known unsafe rows, explored or reported."""

import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_noisy

from forgetfilter import ForgetFilterConfig

DEFAULTS = {**build_noisy.DEFAULTS, "heldout_rows": 0}
FIRST_SEED = {"explore": 0, "report": 4}
"""The seed that a cell's name leaves out."""


def load_cells() -> dict[str, dict[str, dict[str, Any]]]:
    """Settings of every explored and every reported cell, by name."""
    groups = yaml.safe_load((Path(__file__).parent / "cells.yaml").read_text(encoding="utf-8"))
    cells: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in groups}
    for part, lines in groups.items():
        for line in lines:
            kinds, shares, seeds = (line.pop(key) for key in ("kinds", "shares", "seeds"))
            called = line.pop("called", None)
            for kind, share, seed in product(kinds, shares, seeds):
                name = [kind, str(share), called, f"seed-{seed}" if seed != FIRST_SEED[part] else None]
                own = {"kind": kind, "unsafe_share": share / 100, "part": part, "seed": seed}
                cells[part]["-".join(filter(None, name))] = {**DEFAULTS, **own, **line}
    return cells


CELLS = load_cells()


def config_of(work: Path, **settings: Any) -> ForgetFilterConfig:
    """The settings to filter the rows that were written into a folder."""
    files = {"dataset_name": work / "noisy.jsonl", "safe_dataset_name": work / "safe.jsonl", "output_dir": work / "run"}
    named = {name: str(path) for name, path in files.items()}
    return ForgetFilterConfig.from_flags({**named, "label_column": "label", **settings})


def write_data(cell: dict[str, Any], data_dir: Path, folder: Path) -> None:
    """Build a cell's noisy and safe rows into a folder."""
    build_noisy.write(build_noisy.build(Namespace(**cell, data_dir=data_dir)), folder)
