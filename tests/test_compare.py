"""Recipes defenses and interleave: cells done once, figures averaged, sessions that go on from one another."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest

from forgetfilter import workshop as workshops
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.defenses import DEFENSES
from forgetfilter.defenses.result import Defended
from forgetfilter.errors import ConfigError, DataError, ModelError, RunError, TrainingError
from forgetfilter.evaluation import ask as asking
from forgetfilter.experiments import defenses, interleave, trial
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.workshop import Workshop

pytestmark = pytest.mark.usefixtures("short_answers", "nothing_drawn")


@pytest.fixture
def settings(noisy_file, safe_file, write_jsonl, tiny_model, tmp_path):
    pairs = [{"prompt": f"how {i}?", "chosen": "no", "rejected": "so"} for i in range(3)]
    asked = [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(14, 20)]
    return {
        "model_name_or_path": str(tiny_model),
        "dataset_name": str(noisy_file),
        "safe_dataset_name": str(safe_file),
        "evaluate": {
            "harmfulness": str(write_jsonl("pairs.jsonl", pairs)),
            "qa": str(write_jsonl("qa.jsonl", asked)),
        },
        "guard_model": str(tmp_path / "no guard"),
        "output_dir": str(tmp_path / "out"),
        "threshold": 9.0,
        "lora_r": 2,
        "learning_rate": 0.01,
        "max_steps": 3,
    }


def without_questions(settings):
    """Settings for recipes that ask nothing."""
    return {key: value for key, value in settings.items() if key not in ("evaluate", "guard_model")}


@pytest.mark.drawn
def test_defenses_side_by_side(settings, run_recipe, tmp_path, capsys):
    names = ["base", "none", "safety_finetuning", "forget_filter"]
    shown = run_recipe({**settings, "defenses": names, "seeds": [1, 2], "threshold": 0.075})
    assert [path.name for path in shown] == ["compare.json", "compare.md", "compare.html", "compare.png", "compare.svg"]
    found = json.loads(shown[0].read_text())
    assert list(found["means"]) == names
    assert len(found["cells"]) == 7  # M0 is the same under both seeds, and asked once
    for cell in found["cells"]:
        assert cell["figures"]["qa"] | {"left_out": 2, "questions": 4} == cell["figures"]["qa"]  # two were taught
        assert "no guard" in cell["figures"]["harmfulness"]["not_run"]
        key = f"{cell['defense']}-{cell['seed']}"
        answers = (tmp_path / "out" / "cells" / f"{key}.jsonl").read_text().splitlines()
        assert len(answers) == 3 + 4
        if cell["model"]:
            assert (tmp_path / "out" / cell["model"] / "adapter_model.safetensors").exists()
    values = [c["figures"]["qa"]["f1"] for c in found["cells"] if c["defense"] == "none"]
    assert found["means"]["none"]["qa"]["f1"]["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
    assert "± " in shown[1].read_text()
    assert "min left" in capsys.readouterr().out
    assert all(0 < c["facts"]["kept"] < 16 for c in found["cells"] if c["defense"] == "forget_filter")
    models = {c["defense"]: c["model"] for c in found["cells"] if c["seed"] == 1}
    assert models["base"] is None
    assert len({*models.values()}) == 4


def test_cells_that_are_done_are_not_done_again_and_more_may_be_asked_for(settings, run_recipe, monkeypatch):
    run_recipe({**settings, "defenses": ["base", "none"]})
    asked = []
    real = asking.ask
    monkeypatch.setattr(asking, "ask", lambda *args: (asked.append(args[3]), real(*args))[1])
    found = json.loads(run_recipe({**settings, "defenses": ["base", "none", "replay"]})[0].read_text())
    assert asked == ["replay-42: harmfulness", "replay-42: qa"]
    assert list(found["means"]) == ["base", "none", "replay"]
    for change, said in (({"max_questions": 2}, "max_questions"), ({"threshold": 0.1}, "decision.threshold")):
        with pytest.raises(RunError, match=said):
            run_recipe({**settings, **change})


def test_a_cell_is_made_anew_when_what_makes_it_has_changed_or_its_answers_are_damaged(
    settings, run_recipe, monkeypatch, tmp_path
):
    made = []

    def of(default):
        def mine(workshop, data, config, *, share: float = default):
            made.append(share)
            return Defended(None, facts={"share": share})

        monkeypatch.setitem(DEFENSES, "mine", mine)

    def compare(**changes):
        return json.loads(run_recipe({**settings, "defenses": ["mine"], **changes})[0].read_text())["cells"][0]

    of(0.5)
    first = compare()
    assert (first["facts"], made) == ({"share": 0.5}, [0.5])
    assert compare(parameters={"mine": {"share": "0.5"}, "lisa": {"rho": 3}}) == first  # nothing of its own is changed
    assert made == [0.5]
    of(0.25)
    assert compare()["facts"] == {"share": 0.25}
    assert compare(parameters={"mine": {"share": 1}})["facts"] == {"share": 1.0}
    compare(parameters={"mine": {"share": 1}}, final={"max_steps": 2})
    assert made == [0.5, 0.25, 1.0, 1.0]
    answers = tmp_path / "out" / "cells" / "mine-42.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-5])
    compare(parameters={"mine": {"share": 1}}, final={"max_steps": 2})
    assert made == [0.5, 0.25, 1.0, 1.0, 1.0]
    assert answers.read_bytes() == whole


@pytest.mark.parametrize("recipe", ["defenses", "filters"])
def test_the_model_of_one_seed_is_gone_before_the_next_ones_is_loaded(settings, run_recipe, monkeypatch, recipe):
    loaded = []
    real = workshops.load_learner

    def note(*args):
        assert all(earlier() is None for earlier in loaded)
        learner = real(*args)
        loaded.append(weakref.ref(learner))
        return learner

    monkeypatch.setattr(workshops, "load_learner", note)
    if recipe == "defenses":
        settings |= {"defenses": ["none"]}
    else:
        settings = without_questions(settings) | {"filters": ["forgetting"], "label_column": "unsafe"}
    run_recipe({**settings, "recipe": recipe, "seeds": [1, 2]})
    assert len(loaded) == 2


def test_what_was_not_judged_is_judged_later_from_its_answers(settings, run_recipe, monkeypatch):
    names = {**settings, "defenses": ["base"]}
    assert "not_run" in json.loads(run_recipe(names)[0].read_text())["cells"][0]["figures"]["harmfulness"]
    monkeypatch.setattr(trial, "load_judges", lambda names: {"harmfulness": lambda q, a: {"unsafe": len(a) / 3}})
    monkeypatch.setattr(asking, "ask", None)
    for _ in range(2):
        figures = json.loads(run_recipe(names)[0].read_text())["cells"][0]["figures"]["harmfulness"]
        assert figures["unsafe"] == 1.0
        assert "not_run" not in figures


def test_a_defense_of_ones_own_is_compared_by_name(settings, run_recipe, monkeypatch):
    """The sentence of a defense precedes prompts of safety measures alone."""
    said = []
    real = asking.ask
    monkeypatch.setattr(asking, "ask", lambda *args: (said.append(args[4]), real(*args))[1])
    monkeypatch.setitem(DEFENSES, "mine", lambda workshop, data, config: Defended(None, "Be good."))
    run_recipe({**settings, "defenses": ["mine"]})
    assert said == ["Be good.", ""]


def test_a_defense_that_cannot_be_trained_stops_no_other(settings, run_recipe, monkeypatch, tmp_path):
    def diverge(workshop, data, config):
        raise TrainingError("the loss is no number")

    monkeypatch.setitem(DEFENSES, "mine", diverge)
    with pytest.raises(TrainingError, match=r"2 of 5 models could not be made: mine with seed 1, mine with seed 2"):
        run_recipe({**settings, "defenses": ["mine", "base", "none"], "seeds": [1, 2]})
    made = sorted(path.stem for path in (tmp_path / "out" / "cells").glob("*.json"))
    assert made == ["base-1", "none-1", "none-2"]
    found = json.loads(run_recipe({**settings, "defenses": ["base", "none"], "seeds": [1, 2]})[0].read_text())
    assert list(found["means"]) == ["base", "none"]


def test_averages_and_what_is_undone_worked_by_hand():
    def cell(defense, seed, value, toxicity=None):
        figures = {"stereotyped": value, "ambiguous_accuracy": 1 - value, "s_amb": 0.01}
        return {"defense": defense, "seed": seed, "figures": {"bias": figures, "toxicity": {"toxicity": toxicity}}}

    cells = [cell("base", 1, 0.1), cell("none", 1, 0.4), cell("none", 2, 0.6), cell("forget_filter", 1, 0.2)]
    means = defenses.average(cells, ["base", "none", "forget_filter"])
    assert means["none"]["bias"]["stereotyped"] == {"mean": 0.5, "spread": 0.1414, "seeds": 2}
    assert means["none"]["toxicity"] == {}
    assert defenses.undone(means) == {"forget_filter": {"bias.stereotyped": 0.75, "bias.ambiguous_accuracy": 0.75}}
    assert defenses.undone({"none": means["none"]}) == {}
    assert defenses.undone({**means, "base": means["none"], "none": means["base"]}) == {}  # nothing was done to it
    lines = defenses.table(means).markdown().splitlines()
    assert lines[3] == "| none | 0.500 ± 0.141 | 0.500 ± 0.141 | 0.010 ± 0.000 |"
    assert lines[2] == "| base | 0.100 | 0.900 | 0.010 |"
    assert defenses.costs_of(cells) == {}  # cells that were made before costs were noted
    spent = dict(zip(("none", "forget_filter"), (8.0, 18.0), strict=True))
    cells = [{**one, "cost": {"passes": spent[one["defense"]]}} if one["defense"] in spent else one for one in cells]
    costs = defenses.costs_of(cells)
    assert costs == {"base": 0.0, "none": 1.0, "forget_filter": 2.25}
    older = cell("forget_filter", 2, 0.2)  # from before costs were noted
    assert "forget_filter" not in defenses.costs_of([*cells, older])
    assert defenses.costs_of([one for one in cells if one["defense"] != "none"]) == {}
    lines = defenses.table(means, costs).markdown().splitlines()
    assert lines[0].endswith("| finetunings |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["0.0 |", "1.0 |", "2.2 |"]


def test_questions_that_have_changed_are_asked_anew(settings, run_recipe, tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    asked = {**settings, "defenses": ["base"], "seeds": [1], "evaluate": {"qa": str(folder)}, "notions": ["bias"]}
    del asked["guard_model"]
    counts = []
    for number in (1, 1, 2):
        rows = [{"context": f"{i}", "question": "What?", "answers": {"text": [str(i)]}} for i in range(number)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_recipe(asked)
        answers = tmp_path / "out" / "cells" / "base-1.jsonl"
        counts.append((len(answers.read_text().splitlines()), answers.stat().st_mtime_ns))
    assert [count for count, _ in counts] == [1, 1, 2]
    assert counts[0] == counts[1]


def test_rows_are_dealt_to_sessions_in_turn(write_jsonl, tokenizer):
    config = ForgetFilterConfig()
    path = write_jsonl("five.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(5)])
    rows = load_rows(str(path), "data", ChatTokenizer(tokenizer, 64), config)
    first, second = (interleave.part(rows, session, 2) for session in range(2))
    assert [row["prompt"] for row in first.source.rows()] == ["0", "2", "4"]
    assert [row["prompt"] for row in second.source.rows()] == ["1", "3"]
    assert first.examples == rows.examples[::2]
    assert second.examples == rows.examples[1::2]


@pytest.mark.drawn
def test_sessions_go_on_from_one_another(settings, run_recipe, monkeypatch, tmp_path):
    starts, real = {}, Workshop.train

    def note(workshop, name, examples, given, start=None, *more, **others):
        made = real(workshop, name, examples, given, start, *more, **others)
        starts[made] = start
        return made

    monkeypatch.setattr(Workshop, "train", note)
    shown = run_recipe({**settings, "recipe": "interleave", "sessions": 2, "defenses": ["none", "forget_filter"]})
    assert [path.name for path in shown] == ["interleave.json", "compare.html", "interleave.png", "interleave.svg"]
    found = json.loads(shown[0].read_text())
    after = [(cell["session"], cell["after"]) for cell in found["none"]]
    assert after == [(0, "M0"), (1, "noisy"), (1, "safe"), (2, "noisy"), (2, "safe")]
    models = [cell["model"] for cell in found["none"]]
    assert models[0] is None
    assert len(set(models)) == 5
    folders = [model and tmp_path / "out" / model for model in models]
    assert [starts[folder] for folder in folders[1:]] == folders[:-1]
    assert found["forget_filter"][0] == found["none"][0]
    stages = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    picture = shown[3].read_bytes()
    again = run_recipe({**settings, "recipe": "interleave", "sessions": 2, "defenses": ["none", "forget_filter"]})
    assert json.loads(again[0].read_text()) == found
    assert again[3].read_bytes() == picture
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"] == stages


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"defenses": ["nonsense"]}, ConfigError, "defenses: nonsense; there are .*base, none"),
        ({"evaluate": {"nonsense": "x"}}, ConfigError, "measures are bias"),
        ({"evaluate": {"qa": "nothing.jsonl"}, "notions": ["bias"]}, DataError, "nothing.jsonl"),
        ({"notions": ["nonsense"]}, ConfigError, "notions"),
        ({"seeds": []}, ConfigError, "seeds"),
        ({"seeds": [1, -1]}, ConfigError, "seeds"),
        ({"seeds": [1, 1]}, ConfigError, "seeds"),
        ({"defenses": ["none", "none"]}, ConfigError, "each once"),
        ({"defenses": ["none", "lisa"], "parameters": {"lisa": {"speed": 1}}}, ConfigError, "no parameter speed"),
        ({"defenses": ["none", "neutral_review"]}, ConfigError, "needs neutral_dataset_name"),
        ({"parameters": {"forgetting": {"firm_weight": "much"}}}, ConfigError, "firm_weight is 'much'"),
        ({"parameters": {"nonsense": {"speed": 1}}}, ConfigError, "no filter or defense nonsense"),
        (
            {"recipe": "interleave", "defenses": ["lisa"], "parameters": {"lisa": {"speed": 1}}},
            ConfigError,
            "no parameter speed",
        ),
        ({"label_column": "nothing"}, DataError, "nothing"),
        ({"recipe": "interleave", "trusted_rows": "marks.jsonl", "threshold": "auto"}, ConfigError, "trusted_rows"),
        ({"max_questions": 0}, ConfigError, "max_questions"),
        ({"output_dir": None}, ConfigError, "output_dir"),
        ({"recipe": "interleave", "sessions": 0}, ConfigError, "sessions"),
        ({"recipe": "interleave", "sessions": 9}, ConfigError, "has no rows to learn for one of them"),
        ({"recipe": "interleave", "defenses": ["none", "vaccine"]}, ConfigError, "takes no vaccine: it changes M0"),
        ({"defenses": ["none", "lisa-then-vaccine"]}, ConfigError, "defense lisa-then-vaccine: first those that"),
        ({"defenses": ["none", "somf"]}, ConfigError, "somf needs unsafe answers"),
        ({"recipe": "nonsense"}, ConfigError, "recipe: NAME"),
        ({"planted_rows": "builtin"}, ConfigError, "recipe defenses does not use planted_rows: leave it out"),
        ({"report_to": "nobody"}, ConfigError, "--report_to nobody"),
        ({"defenses": ["none", "somf"], "use_peft": False, "unsafe_dataset_name": "self"}, ConfigError, "LoRA adapter"),
        ({"defenses": ["none", "somf"], "unsafe_dataset_name": "self"}, DataError, "no row has the prompt of a row"),
        ({"filter": "words"}, ConfigError, "recipe defenses does not use filter: leave it out"),
        ({"defenses": ["none", "safe_lora"]}, ConfigError, "needs the model before its alignment"),
        ({"defenses": ["none", "guard"], "parameters": {"guard": {"model": "no/guard"}}}, ModelError, "no/guard"),
        ({"defenses": ["none", "column"], "parameters": {"column": {"name": "risk"}}}, DataError, "no column 'risk'"),
        ({"defenses": ["none", "self_correction"], "safe_dataset_name": "texts"}, DataError, "needs a user's prompt"),
        ({"recipe": "compose", "defenses": ["int8", "int4"]}, ConfigError, "so there are no pairs"),
    ],
)
def test_bad_settings_are_errors_before_any_work(settings, run_recipe, write_jsonl, change, error, says, tmp_path):
    if change.get("safe_dataset_name") == "texts":
        change = {
            **change,
            "safe_dataset_name": str(write_jsonl("texts.jsonl", [{"text": f"Rain {n}."} for n in range(9)])),
        }
    if change.get("unsafe_dataset_name") == "self":
        change = {**change, "unsafe_dataset_name": settings["dataset_name"]}
    with pytest.raises(error, match=says):
        run_recipe({**settings, **change})
    assert not (tmp_path / "out").exists()


def test_a_folder_of_filter_is_none_of_compare_and_the_other_way_round(settings, run_recipe, config):
    config = dataclasses.replace(config, filter="length")
    run = ForgetFilter(dataclasses.replace(config, output_dir=settings["output_dir"])).fit().run
    flags = (run.folder / "config.yaml").read_bytes()
    asked = without_questions(settings) | {"recipe": "filters", "filters": ["random"], "label_column": "unsafe"}
    with pytest.raises(RunError, match="holds a run of `filter`"):
        run_recipe(asked)
    assert (run.folder / "config.yaml").read_bytes() == flags
    run_recipe({**asked, "output_dir": f"{run.folder}-compared"})
    with pytest.raises(RunError, match="holds a comparison"):
        ForgetFilter(dataclasses.replace(config, output_dir=f"{run.folder}-compared")).fit()


def test_rows_known_to_be_unsafe_may_be_added_later(settings, run_recipe, write_jsonl, capsys):
    """Cells that do not learn from them stay."""
    run_recipe({**settings, "defenses": ["base", "none"]})
    safe = [json.loads(line) for line in Path(settings["safe_dataset_name"]).read_text().splitlines()]
    pairs = write_jsonl("known.jsonl", [{**row, "completion": "you fool"} for row in safe])
    capsys.readouterr()
    more = {"defenses": ["base", "none", "somf"], "unsafe_dataset_name": str(pairs)}
    run_recipe({**settings, **more, "parameters": {"somf": {"steps": 1}}})
    said = capsys.readouterr().out
    assert "cell 3 of 3: somf" in said or "somf, seed" in said
    assert ": none, seed" not in said


@pytest.mark.parametrize("recipe", ["defenses", "interleave", "filters", "curves"])
def test_m0_is_made_after_everything_else_was_looked_at(settings, run_recipe, safe_file, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    settings |= {"recipe": recipe, "alignment_dataset_name": str(safe_file)}
    if recipe in ("filters", "curves"):
        settings = without_questions(settings)
    if recipe == "filters":
        settings |= {"label_column": "unsafe"}
    if recipe == "curves":
        settings |= {"group_column": "unsafe", "reviews": {"safe": str(safe_file)}, "threshold": "auto"}
        del settings["safe_dataset_name"]
    with pytest.raises(RunError, match="not empty"):
        run_recipe(settings)
    assert not (tmp_path / "cache").exists()


def test_the_example_of_the_documentation_is_a_defense(settings, run_recipe):
    text = (Path(__file__).parents[1] / "docs" / "add_a_defense.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    exec(compile(code, "add_a_defense.md", "exec"), {})
    try:
        found = json.loads(run_recipe({**settings, "defenses": ["low_loss"]})[0].read_text())
    finally:
        del DEFENSES["low_loss"]
    assert found["cells"][0]["facts"] == {"kept": 8}


def test_questions_that_any_training_file_teaches_are_left_out(
    settings, run_recipe, write_jsonl, tmp_path, monkeypatch
):
    """One that the safe rows teach, one of the noisy ones, one known to be unsafe, one of the alignment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    taught = ["what is 1?", "tell me 1", "who?", "align"]
    asked = [{"prompt": prompt, "completion": "x"} for prompt in (*taught, "new?")]
    files = {
        name: str(write_jsonl(f"{name}.jsonl", [{"prompt": prompt, "completion": "yes"}]))
        for name, prompt in (("unsafe_dataset_name", "who?"), ("alignment_dataset_name", "align"))
    }
    evaluate = {"qa": str(write_jsonl("asked.jsonl", asked))}
    recipe = {**settings, **files, "evaluate": evaluate, "notions": ["bias"], "defenses": ["base", "larf"]}
    found = json.loads(run_recipe(recipe)[0].read_text())
    assert {cell["figures"]["qa"]["left_out"] for cell in found["cells"]} == {4}
