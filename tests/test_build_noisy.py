"""The benchmark's data: three files that share nothing, labels from the data sets' own metadata."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FORGETFILTER_DATA", ROOT.parent / "shared" / "data"))
spec = importlib.util.spec_from_file_location("build_noisy", ROOT / "benchmarks" / "build_noisy.py")
build_noisy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_noisy)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here: set FORGETFILTER_DATA")
@pytest.mark.parametrize("kind", [*build_noisy.KINDS, "mixed"])
@pytest.mark.parametrize("share", [0.25, 0.05])
def test_files_have_the_rows_asked_for_and_share_no_prompt(tmp_path, monkeypatch, kind, share):
    arguments = ["--kind", kind, "--unsafe_share", str(share), "--data_dir", str(DATA), "--output_dir", str(tmp_path)]
    rows = 80 if kind == "complied" else 240
    monkeypatch.setattr(sys, "argv", ["build_noisy.py", *arguments, "--rows", str(rows), "--heldout_rows", "12"])
    build_noisy.main()
    files = {
        n: [*map(json.loads, (tmp_path / f"{n}.jsonl").read_text().splitlines())] for n in ("noisy", "safe", "heldout")
    }
    prompts = [{row["prompt"] for row in rows} for rows in files.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))  # no prompt stands in two files
    answers = [(row["prompt"], row["completion"]) for own in files.values() for row in own]
    assert len(set(answers)) == len(answers)
    assert len(files["noisy"]) == rows
    assert sum(row["label"] == "unsafe" for row in files["noisy"]) == rows * share
    assert all(row["label"] == "safe" for row in files["safe"])
    assert all((row["label"] == "unsafe") == bool(re.search("/unsafe$", row["group"])) for row in files["noisy"])


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here: set FORGETFILTER_DATA")
@pytest.mark.parametrize("kind", [*build_noisy.KINDS, *build_noisy.TASKS])
def test_no_row_is_both_explored_and_reported(kind):
    def rows(part):
        if kind in build_noisy.TASKS:
            return build_noisy.TASKS[kind](DATA, part)
        unsafe, safe = build_noisy.KINDS[kind](DATA, part)
        return unsafe + safe

    explored, reported = (
        {(row["prompt"], row["completion"]) for _, row in rows(part)} for part in ("explore", "report")
    )
    assert explored
    assert reported
    assert not explored & reported
