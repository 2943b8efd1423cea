"""Cells: a result is made once, and anew when what made it has changed or a file of it is damaged."""

import json

import pytest

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.experiments.cells import Cells
from forgetfilter.methods import arguments


@pytest.fixture
def cells(tmp_path):
    return Cells(tmp_path / "cells")


@pytest.fixture
def made(cells):
    """What makes a cell and a file beside it, and how often it did."""

    def make():
        make.count += 1
        (cells.folder / "a.jsonl").parent.mkdir(exist_ok=True)
        (cells.folder / "a.jsonl").write_text(f"answers {make.count}")
        return {"number": make.count}

    make.count = 0
    return make


def test_a_cell_is_made_once_and_read_as_it_was_made(cells, made):
    made_of = {"seed": 1, "parameters": {"share": 0.5}, "kinds": ("a", "b"), "none": None}
    first = cells.once("a", made_of, made, ".jsonl")
    assert first["number"] == 1
    assert first["made_of"] == json.loads(json.dumps(made_of))
    assert list(first["files"]) == ["a.jsonl"]
    assert cells.done("a", made_of)
    assert Cells(cells.folder).once("a", made_of, made, ".jsonl") == first
    assert made.count == 1
    assert cells.load("a") == first
    assert cells.all() == [first]
    assert json.loads(cells.path("a").read_text()) == first


def test_other_questions_make_a_cell_anew_and_a_cell_that_noted_none_stays(cells, made):
    cells.once("a", {"seed": 1}, made, ".jsonl")
    assert cells.done("a", {"seed": 1, "questions": "these"})
    cells.once("b", {"seed": 1, "questions": "these"}, made)
    assert not cells.done("b", {"seed": 1, "questions": "those"})


def test_a_cell_is_made_anew_when_a_parameters_default_changes(cells, made):
    def before(workshop, data, config, *, share: float = 0.5, steps: int = 3):
        pass

    def after(workshop, data, config, *, share: float = 0.25, steps: int = 3):
        pass

    def more(workshop, data, config, *, share: float = 0.25, steps: int = 3, loud: bool = False):
        pass

    given = {"m": {"steps": 4}}
    for count, method in enumerate((before, after, more), 1):
        made_of = {"parameters": arguments("m", method, given)}
        assert not cells.done("a", made_of)
        for _ in range(2):
            assert cells.once("a", made_of, made, ".jsonl")["number"] == count
    spelt_out = {"parameters": arguments("m", more, {"m": {"steps": "4", "share": 0.25}})}
    assert cells.once("a", spelt_out, made, ".jsonl")["number"] == 3  # a default spelt out is the same


@pytest.mark.parametrize("damage", ["cut", "gone", "cell cut", "cell gone", "cell of another kind"])
def test_a_cell_is_made_anew_when_a_file_of_it_is_damaged(cells, made, damage):
    cells.once("a", {"seed": 1}, made, ".jsonl")
    path = cells.path("a") if damage.startswith("cell") else cells.folder / "a.jsonl"
    if damage.endswith("cut"):
        path.write_bytes(path.read_bytes()[:-3])
    elif damage.endswith("gone"):
        path.unlink()
    else:
        path.write_text("3")
    assert not cells.done("a", {"seed": 1})
    assert cells.once("a", {"seed": 1}, made, ".jsonl")["number"] == 2
    assert cells.once("a", {"seed": 1}, made, ".jsonl")["number"] == 2


def test_a_cell_that_could_not_be_made_is_not_there(cells, made):
    def fails():
        made()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cells.once("a", {}, fails, ".jsonl")
    assert not cells.done("a", {})
    assert cells.once("a", {}, made, ".jsonl")["number"] == 2


def test_a_cell_that_was_added_to_stays_what_it_was_made_of(cells, made):
    cell = cells.once("a", {"seed": 1}, made, ".jsonl")
    cells.store("a", {"seed": 1}, {**cell, "judged": True}, ".jsonl")
    found = cells.once("a", {"seed": 1}, made, ".jsonl")
    assert found == {**cell, "judged": True}


def test_cells_of_several_keys_stand_side_by_side(cells, made):
    for key, seed in (("b", 2), ("a", 1)):
        cells.once(key, {"seed": seed}, made)
    assert [cell["made_of"]["seed"] for cell in cells.all()] == [1, 2]
    assert made.count == 2
    assert "files" not in cells.load("a")


def test_settings_and_constants_that_did_not_exist_then_change_nothing_but_others_do(cells, made):
    settings = json.loads(json.dumps(ForgetFilterConfig().identity()))
    older = {key: value for key, value in settings.items() if key != "lora_dropout"}
    cells.once("a", {"settings": older, "constants": {"forgetting": {"TAIL": 0.1, "GONE": 1}}}, made, ".jsonl")
    now = {"settings": settings, "constants": {"forgetting": {"TAIL": 0.1, "NEW": 2}}}
    assert cells.done("a", now)
    assert not cells.done("a", {**now, "settings": {**settings, "lora_dropout": 0.1}})
    assert not cells.done("a", {**now, "settings": {**settings, "seed": 1}})
    assert not cells.done("a", {**now, "constants": {"forgetting": {"TAIL": 0.2}}})
    assert not cells.done("a", {**now, "kind": "bias"})
    for code in ("words.VERSION", "filters.gradient_norm.CHANGED"):
        assert not cells.done("a", {**now, "constants": {**now["constants"], code: 2}})
