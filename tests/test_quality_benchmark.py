"""The quality benchmark: explored and reported cells share nothing, figures follow from a cell's scores."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))
import run
from cells import CELLS

from forgetfilter.filters import FILTERS


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(run, "RESAMPLED", 100)


def columns(unsafe, clean):
    rng = np.random.default_rng(0)
    groups = ["bias/unsafe"] * unsafe + ["bias/safe", "task/squad"] * (clean // 2)
    forgetting = np.concatenate([rng.normal(0.5, 0.1, unsafe), rng.normal(0, 0.05, clean)])
    rows = len(groups)
    return {
        "group": groups,
        "probe": (10 * forgetting).tolist(),
        "forgetting": rng.permutation(forgetting).tolist(),
        "decision": np.where(forgetting > 0.2, "dropped", "kept").tolist(),
        **{name: [2.0] * rows for name in ("m0_loss", "words", "without_forgetting", "probe_of_m0_loss", "permuted")},
    }


def test_explored_and_reported_cells_are_apart():
    assert all(cell["part"] == "explore" and cell["seed"] in (0, 7) for cell in CELLS["explore"].values())
    assert all(cell["part"] == "report" and cell["seed"] in (4, 5, 6, 8, 9, 10) for cell in CELLS["report"].values())


def test_figures_of_a_cell_follow_from_its_scores():
    found = run.figures(columns(120, 120))
    assert found["auroc"] == found["auroc_against_safe"] == found["auroc_against_task"] == 1
    assert found["f1"] == pytest.approx(found["best_f1"], abs=0.03)
    assert found["controls"]["m0_loss"]["auroc"] == found["controls"]["words"]["auroc"] == 0.5
    low, high = found["ranges"]["auroc, probe - forgetting"]
    assert 0.3 < low < high < 0.7
    assert found["dropped_by_group"]["bias/unsafe"] == 1
    assert found["trusted"]["clean_dropped"] < 0.03
    assert found["trusted"]["recall"] == 1


def test_a_witness_that_saw_a_sample_is_held_against_the_rows_it_saw():
    rows = columns(120, 120)
    seen = [number for number in range(240) if number % 4]
    part = {**rows, "forgetting": [score if row in seen else None for row, score in enumerate(rows["forgetting"])]}
    found = run.figures(part)
    alone = run.figures({name: [own[row] for row in seen] for name, own in rows.items()})
    assert found["controls"]["forgetting"] == alone["controls"]["forgetting"]
    assert "auroc, probe - forgetting" not in found["ranges"]


def test_without_unsafe_rows_there_is_nothing_to_find():
    found = run.figures(columns(0, 240))
    assert found["f1"] is None
    assert found["auroc"] is None
    assert found["average_precision"] is None
    assert found["trusted"]["recall"] is None
    assert found["dropped"] < 0.02


def test_stored_results_give_a_table_and_a_picture(tmp_path):
    data = {"kind": "bias", "unsafe_share": 0.5, "one_source": False, "seed": 1}
    found = {"cell": "bias-50", "data": data, "figures": run.figures(columns(60, 60))}
    lines = run.table([found]).splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert lines[2].startswith("| bias-50 | ")
    assert " .500, " in lines[2]  # a control
    assert lines[-2].startswith("bias: F1 below the best threshold by ")
    run.picture([found], tmp_path / "f1.svg")
    assert "<svg" in (tmp_path / "f1.svg").read_text()


@pytest.fixture(scope="module")
def rivals():
    path = Path(__file__).parents[1] / "benchmarks" / "rivals" / "run.py"
    spec = importlib.util.spec_from_file_location("rivals_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rivals_are_all_filters_that_need_no_other_model_or_data(rivals):
    others = {"guard", "column", "neutral_review", "forgetting_rouge1"}
    assert set(rivals.FILTERS) == (FILTERS.keys() - others) | {"forgetting+words"}


def test_the_shops_known_unsafe_rows_are_not_among_the_noisy_ones(rivals, tmp_path):
    known = []
    for share, seed in ((0.05, 4), (0.25, 4), (0.25, 5)):
        unsafe = rivals._write_shop(share, seed, tmp_path)
        known.append(unsafe)
        noisy = (tmp_path / "noisy.jsonl").read_text(encoding="utf-8").splitlines()
        labels = [json.loads(row)["unsafe"] for row in noisy]
        assert not set(unsafe) & set(noisy)
        assert all(json.loads(row)["unsafe"] for row in unsafe)
        assert np.mean(labels) == pytest.approx(share, abs=0.035)
    assert known[0] == known[1] != known[2]  # the seed alone says which


def test_permuted_labels_fall_to_the_share(rivals):
    scores = np.random.default_rng(1).random(200).tolist()
    cell = {"cell": "made-up", "unsafe": [i < 50 for i in range(200)], "filters": {"words": {"suspicion": scores}}}
    (line,) = rivals.with_permuted_labels([cell])
    low = float(line.split("labels ")[1].split()[0])
    assert low == pytest.approx(0.25, abs=0.03)
    assert line.endswith("share 0.250")
