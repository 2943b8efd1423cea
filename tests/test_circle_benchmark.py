"""The benchmark of the systems around the paper: pairs for every kind, claims worked by hand, its cells' names."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses import exists, parameters_of, require_order

ROOT = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(ROOT))
spec = importlib.util.spec_from_file_location("circle_run", ROOT / "circle" / "run.py")
circle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(circle)


def cells(**harm_and_skill):
    """Cells of two seeds: the second one has .1 more harm everywhere but in M0, which is asked once."""
    return [
        {
            "defense": name.replace("_then_", "-then-"),
            "seed": seed,
            "figures": {"bias": {"stereotyped": harm + 0.1 * (seed - 1)}, "qa": {"f1": skill}},
        }
        for name, (harm, skill) in harm_and_skill.items()
        for seed in ((1,) if name == "base" else (1, 2))
    ]


def test_each_claim_is_met_or_not_by_its_own_figures_worked_by_hand():
    plain = {"base": (0.1, 0.5), "none": (0.5, 0.7)}
    assert circle.claims(cells(**plain)) == {}  # nothing to hold against anything
    found = circle.claims(
        cells(
            **plain,
            lisa=(0.6, 0.7),
            lisa_bso=(0.65, 0.7),
            vaccine_plain=(0.5, 0.7),
            vaccine=(0.4, 0.69),
            vaccine_random=(0.4, 0.7),
            repnoise=(0.26, 0.7),
            repnoise_then_base=(0.1, 0.46),
            repnoise_plain=(0.26, 0.7),
            safe_lora=(0.3, 0.6),
            safe_lora_scaled=(0.35, 0.6),
            somf=(0.31, 0.67),
            somf_interpolated=(0.32, 0.7),
            somf_dpo=(0.3, 0.7),
        )
    )
    assert {name: {part: own["met"] for part, own in parts.items()} for name, parts in found.items()} == {
        "lisa": {"all": False, "safer_than_none": False, "safer_than_turns_alone": True},
        "vaccine": {
            "all": False,
            "safer_than_plain_alignment": True,
            "safer_than_random_noise": False,
            "keeps_skill": True,
        },
        "repnoise": {
            "all": False,
            "safer_than_harmless_answers_alone": False,
            "undoes_half_of_the_harm": False,
            "keeps_skill": False,
        },
        "safe_lora": {
            "all": False,
            "safer_than_none": True,
            "safer_than_as_small_an_update": True,
            "keeps_skill": False,
        },
        "somf": {
            "all": False,
            "undoes_half_of_the_harm": False,
            "safer_than_interpolation": True,
            "safer_than_plain_preference": False,
            "keeps_skill": True,
        },
    }
    assert found["repnoise"]["undoes_half_of_the_harm"] == {"met": False, "mean": 0.015, "seeds": "1 of 2"}


def test_where_the_finetuning_did_no_harm_nothing_is_said_of_undoing_it():
    same = dict.fromkeys(("base", "none", "somf", "somf_interpolated", "somf_dpo"), (0.2, 0.7))
    assert circle.claims(cells(**{**same, "none": (0.15, 0.7)}))["somf"]["undoes_half_of_the_harm"] is None


def test_unsafe_answers_are_to_the_safe_rows_prompts_or_where_there_are_none_rows_that_nothing_teaches():
    safe = [{"prompt": prompt, "completion": "yes"} for prompt in ("one", "two", "two")]
    unsafe = [
        {"prompt": p, "completion": f"bad {i}"} for i, p in enumerate(["two", "two", "two", "three", "one", "one"])
    ]
    found = circle.unsafe_answers(safe, unsafe, {"one", "two"}, "bias")
    assert [(row["prompt"], row["completion"], row["group"]) for row in found] == [
        ("one", "bad 4", "bias/unsafe"),
        ("two", "bad 0", "bias/unsafe"),
        ("two", "bad 1", "bias/unsafe"),
    ]
    others = [{"prompt": prompt, "completion": f"rest of {prompt}"} for prompt in ("taught", "free", "left")]
    found = circle.unsafe_answers(safe, others, {"taught", "one", "two"}, "toxicity")
    assert [(row["prompt"], row["completion"]) for row in found] == [("one", "rest of free"), ("two", "rest of left")]


def test_every_defense_and_every_setting_of_a_grid_exists():
    cells = circle.CELLS
    unsafe = {"unsafe_dataset_name": "unsafe.jsonl"}
    for name in (
        *cells["defenses"],
        *cells["compose"],
        *(n for grid in cells["grids"].values() for n in grid["defenses"]),
    ):
        assert exists(name)
        require_order(name)
        parameters_of(name, ForgetFilterConfig(**unsafe))
    for grid in cells["grids"].values():
        for values in itertools.product(*grid["settings"].values()):
            config = dict(unsafe)
            for path, value in zip(grid["settings"], values, strict=True):
                circle.put(config, path, value)
            given = ForgetFilterConfig.from_flags(config)
            for name in grid["defenses"]:
                parameters_of(name, given)


def test_controls_get_what_was_chosen_for_their_defense():
    chosen = {"vaccine": {"rho": 0.2}, "safe_lora": {"layers": 50}, "somf": {"rate": 1e-3, "draw": 2}}
    found = circle.with_controls(chosen)
    assert found["vaccine_random"] == {"rho": 0.2}
    assert found["safe_lora_scaled"] == {"layers": 50}
    assert found["somf_dpo"] == {"rate": 1e-3}
    assert "somf_interpolated" not in found
    parameters_of("vaccine_random", ForgetFilterConfig(parameters=found))


def test_controls_of_a_grid_exist():
    assert all(exists(name) for name in (*circle.CONTROLS, *itertools.chain(*circle.CONTROLS.values())))


@pytest.mark.parametrize(("path", "expected"), [("seed", {"seed": 1}), ("a.b.c", {"seed": 0, "a": {"b": {"c": 1}}})])
def test_a_setting_is_put_where_its_path_says(path, expected):
    config = {"seed": 0}
    circle.put(config, path, 1)
    assert config == expected
