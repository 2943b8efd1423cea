"""The cells of cells.yaml: noisy data sets with known unsafe rows, explored or reported."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_noisy

from forgetfilter import ForgetFilterConfig

DEFAULTS = {"rows": 240, "safe_rows": None, "heldout_rows": 0, "neutral_rows": 120, "one_source": False}


def load_cells() -> dict[str, dict[str, dict[str, Any]]]:
    """Settings of every explored and every reported cell, by name."""
    groups = yaml.safe_load((Path(__file__).parent / "cells.yaml").read_text(encoding="utf-8"))
    return {
        part: {
            name: {**DEFAULTS, "part": part, "seed": 0 if part == "explore" else 1, **settings}
            for name, settings in cells.items()
        }
        for part, cells in groups.items()
    }


CELLS = load_cells()


def config_of(work: Path, **settings: Any) -> ForgetFilterConfig:
    """The settings to filter the rows that were written into a folder."""
    return ForgetFilterConfig(
        dataset_name=str(work / "noisy.jsonl"),
        safe_dataset_name=str(work / "safe.jsonl"),
        output_dir=str(work / "run"),
        label_column="label",
        torch_compile=True,
        **settings,
    )


def write_data(cell: dict[str, Any], data_dir: Path, folder: Path) -> None:
    """Build a cell's noisy, safe and neutral rows into a folder."""
    build_noisy.write(build_noisy.build(Namespace(**cell, data_dir=data_dir)), folder)
