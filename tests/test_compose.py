"""Recipe compose: which pairs there are, and what two defenses are worth together."""

import json

import pytest

from forgetfilter.defenses import orders
from forgetfilter.errors import ConfigError
from forgetfilter.experiments import compose

pytestmark = pytest.mark.usefixtures("short_answers", "nothing_drawn")


def test_which_orders_of_two_defenses_are_possible():
    assert orders("safe_lora", "safety_finetuning") == [
        "safe_lora-then-safety_finetuning",
        "safety_finetuning-then-safe_lora",
    ]
    assert len(orders("int4", "safety_finetuning")) == 2
    assert orders("safe_lora", "probe") == ["probe-then-safe_lora"]
    assert orders("lisa", "vaccine") == ["vaccine-then-lisa"]
    assert orders("int8", "somf") == ["somf-then-int8"]
    assert orders("int8", "int4") == orders("probe", "random") == orders("lisa", "none") == []


def cell(defense, seed, stereotyped, f1):
    return {"defense": defense, "seed": seed, "figures": {"bias": {"stereotyped": stereotyped}, "qa": {"f1": f1}}}


def test_synergy_and_order_gap_worked_by_hand():
    pairs = {("a", "b"): ["a-then-b", "b-then-a"], ("a", "c"): ["a-then-c"], ("b", "c"): []}
    values = {
        "a": [(0.4, 0.5), (0.6, 0.5)],
        "b": [(0.3, 0.7), (0.3, 0.7)],
        "c": [(0.5, 0.9)],  # one seed stands for both
        "a-then-b": [(0.2, 0.6), (0.1, 0.6)],
        "b-then-a": [(0.3, 0.8), (0.4, 0.8)],
        "a-then-c": [(0.5, 0.4), (0.5, 0.6)],
    }
    cells = [cell(name, seed, *own) for name, rows in values.items() for seed, own in enumerate(rows)]
    found = compose.compositions(cells, pairs)
    assert list(found) == ["bias.stereotyped", "qa.f1"]
    both = found["bias.stereotyped"]["a + b"]  # lower is better: the best order is that of .15, b alone has .3
    assert (both["best"], both["score"]) == ("a-then-b", 0.15)
    assert both["synergy"]["mean"] == both["over"]["b"]["mean"] == pytest.approx(0.15)
    assert both["over"]["a"]["mean"] == pytest.approx(0.35)
    assert both["order_gap"]["mean"] == pytest.approx(0.2)  # .1 and .3
    off = 12.7062 * 0.14142 / 2**0.5  # Student's t for two seeds
    assert both["order_gap"]["range"] == pytest.approx([0.2 - off, 0.2 + off], abs=1e-3)
    skill = found["qa.f1"]["a + b"]
    assert (skill["best"], skill["score"]) == ("b-then-a", 0.8)
    assert skill["order_gap"]["mean"] == pytest.approx(-0.2)
    one = found["qa.f1"]["a + c"]
    assert one["order_gap"] is None
    assert one["synergy"]["mean"] == pytest.approx(-0.4)
    assert "b + c" not in found["qa.f1"]
    assert compose.difference({1: 0.5}, {1: 0.25}) == {"mean": 0.25, "range": None}
    lines = compose.table(found, pairs).markdown().splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| a + c | 0.500 | +0.000, +0.000 | +0.000 [")


def test_whether_a_filter_makes_another_defense_worse():
    pairs = {("probe", "lisa"): ["probe-then-lisa"], ("words", "somf"): ["words-then-somf"], ("lisa", "somf"): ["x"]}
    over = {
        "probe + lisa": {"lisa": 0.1, "probe": -0.2},
        "words + somf": {"somf": -0.1, "words": 0.2},
        "lisa + somf": {},
    }
    means = {pair: {"over": {part: {"mean": mean} for part, mean in own.items()}} for pair, own in over.items()}
    found = compose.worse_with_filter({"qa.f1": means}, pairs)
    assert found == {"qa.f1": {"pairs": ["probe + lisa", "words + somf"], "worse": ["words + somf"]}}


def test_figures_that_some_cell_lacks_are_left_out():
    cells = [cell("a", 1, 0.5, 0.5), cell("b", 1, None, 0.5)]
    assert [figure for figure, *_ in compose.figures_of(cells)] == ["qa.f1"]


@pytest.fixture
def settings(noisy_file, safe_file, write_jsonl, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unsafe = [{"prompt": f"tell me {i}", "completion": f"you fool {i}"} for i in range(4)]
    asked = [{"prompt": f"how is {i}?", "completion": f"it is {i}"} for i in range(3)]
    return {
        "recipe": "compose",
        "model_name_or_path": str(tiny_model),
        "dataset_name": str(noisy_file),
        "safe_dataset_name": str(safe_file),
        "alignment_dataset_name": str(safe_file),
        "unsafe_dataset_name": str(write_jsonl("unsafe.jsonl", unsafe)),
        "evaluate": {"qa": str(write_jsonl("qa.jsonl", asked))},
        "notions": ["bias"],
        "output_dir": str(tmp_path / "out"),
        "threshold": 0.5,
        "lora_r": 2,
        "learning_rate": 0.01,
        "max_steps": 2,
    }


@pytest.mark.drawn
def test_all_pairs_side_by_side(settings, run_recipe, tmp_path):
    parts = ["random", "safety_finetuning", "safe_lora", "int8"]
    shown = run_recipe({**settings, "defenses": parts})
    names = ["compose.json", "compose.md", "compare.html", "compose.png", "compose.svg"]
    assert [path.name for path in shown] == names
    found = json.loads(shown[0].read_text())
    pairs = len(parts) * (len(parts) - 1) // 2
    assert all(len(own) == pairs for own in found["compositions"].values())
    assert set(found["compositions"]) == {"qa.f1"}
    both = [pair for pair, own in found["compositions"]["qa.f1"].items() if own["order_gap"] is not None]
    assert both == [f"safety_finetuning + {other}" for other in ("safe_lora", "int8")]
    assert len(found["cells"]) == 2 + len(parts) + pairs + len(both)
    assert len(shown[1].read_text().splitlines()) == 2 + pairs + 2
    assert "pairs with a filter the mean is worse" in shown[1].read_text().splitlines()[-1]
    assert not list((tmp_path / "out").glob(".int*"))  # rounded models are gone
    assert run_recipe({**settings, "defenses": parts})[0].read_text() == shown[0].read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"defenses": ["lisa"]}, "two or more"),
        ({"defenses": ["lisa", "vaccine-then-lisa"]}, "pairs them itself"),
        ({"defenses": ["lisa", "nonsense"]}, "nonsense"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"unsafe_dataset_name": None}, "somf needs unsafe answers"),
    ],
)
def test_bad_settings_are_errors_before_any_work(settings, run_recipe, change, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        run_recipe({**settings, **change})
    assert not (tmp_path / "out").exists()
