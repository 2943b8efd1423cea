"""The recipe that holds filters side by side: what each finds, drops in vain and costs, by labels or by marks."""

import json
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from forgetfilter.costs import TRAINING, Account, Cost
from forgetfilter.data.loading import load_data
from forgetfilter.data.tokenization import mean_length
from forgetfilter.errors import ConfigError, DataError, ModelError
from forgetfilter.evaluation.filter_quality import paired_ranges, unscored_last
from forgetfilter.filters.scoring import score

pytestmark = pytest.mark.usefixtures("short_answers", "nothing_drawn")


@pytest.fixture
def settings(config, noisy_file):
    flags = config.non_default() | {"recipe": "filters", "label_column": "unsafe"}
    del flags["filter"]
    return flags


@pytest.mark.drawn
def test_filters_are_ranked_by_what_they_find_with_what_they_cost(settings, run_recipe):
    asked = {"filters": ["random", "length", "forgetting"], "seeds": [1, 2], "on_clean_data": True}
    files = run_recipe({**settings, **asked})
    assert [path.name for path in files] == ["compare.json", "compare.md", "filters.png", "filters.svg", "compare.html"]
    found = json.loads(files[0].read_text())
    text = files[1].read_text()
    precision = {
        name: [cell["figures"]["average_precision"] for cell in cells] for name, cells in found["cells"].items()
    }
    means = {name: np.mean(own) for name, own in precision.items()}
    order = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert order == sorted(means, key=means.get, reverse=True)
    first = {name: cells[0]["figures"] for name, cells in found["cells"].items()}
    assert all(figures["clean_data_dropped"] == 0 for figures in first.values())
    assert first["random"]["of_finetuning"] == first["length"]["of_finetuning"] == 0
    assert first["forgetting"]["of_finetuning"] > 1  # 12 steps of 8 rows, on the tiny run's settings, and four readings
    assert first["forgetting"]["gigabytes"] > 0.01
    for name, ranges in found["ranges"].items():
        low, high = ranges["average_precision"]
        assert low <= means[name] <= high, name
    assert found["ranges"]["random"]["lead"] == [0, 0]  # the first filter against itself
    assert "filters.svg" not in files[4].read_text()
    assert "data:image/svg+xml" in files[4].read_text()


def test_marks_take_the_place_of_labels_and_the_figures_are_over_them(settings, run_recipe, write_jsonl):
    marks = [{"row": 0, "mark": "unsafe"}, {"row": 1, "mark": "clean"}, {"row": 4, "mark": "unsafe"}]
    marks += [{"row": 2, "mark": "skipped"}, {"row": 5, "clean": True}]
    path = write_jsonl("marks.jsonl", marks)
    del settings["label_column"]
    found = json.loads(run_recipe({**settings, "filters": ["length"], "marks": str(path)})[0].read_text())
    (cell,) = found["cells"]["length"]
    lengths = cell["suspicion"]
    assert len(lengths) == 16
    assert cell["figures"]["average_precision"] == 1.0  # "you fool" is longer than "it is"
    for wrong in ({}, {"marks": str(path), "label_column": "unsafe"}):
        with pytest.raises(ConfigError, match="either label_column or marks"):
            run_recipe({**settings, "filters": ["length"], **wrong})


def test_the_models_of_some_filters_are_compared_as_well(settings, run_recipe, write_jsonl):
    questions = write_jsonl("sums.jsonl", [{"prompt": "1 + 1?", "completion": "2"}])
    asked = {"filters": ["random"], "defenses": ["random"], "evaluate": {"arithmetic": str(questions)}}
    with pytest.raises(ConfigError, match="notions"):  # what self_correction would be told is asked for by measures
        run_recipe({**settings, **asked})
    bias = {"evaluate": {"arithmetic": str(questions)}, "notions": ["bias"], "drop_share": 0.25}
    files = run_recipe({**settings, **asked, **bias})
    models = json.loads(next(path for path in files if path.parent.name == "defenses").read_text())
    assert [cell["defense"] for cell in models["cells"]] == ["random", "base", "none"]
    assert models["cells"][0]["facts"]["dropped"] == 4  # though random scores have no scale


def test_a_guard_that_is_not_to_be_had_is_not_run_and_the_others_are(settings, run_recipe, tmp_path, capsys):
    missing = str(tmp_path / "no guard")
    settings["parameters"] = {"guard": {"model": missing}}
    files = run_recipe({**settings, "filters": ["length", "guard"]})
    found = json.loads(files[0].read_text())
    assert found["cells"].keys() == {"length"}
    assert missing in found["not_run"]["guard"]
    assert "guard: not run" in files[1].read_text()
    assert "guard is not run" in "".join(capsys.readouterr())
    with pytest.raises(ModelError, match="no guard"):
        run_recipe({**settings, "filters": ["guard"]})


def test_what_a_filter_learns_from_is_part_of_its_cell(settings, run_recipe, write_jsonl, noisy_file):
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    risky = write_jsonl("risky.jsonl", [{**row, "good": row["unsafe"], "bad": 1 - row["unsafe"]} for row in rows])
    asked = {**settings, "dataset_name": str(risky), "filters": ["probe"], "safe_dataset_name": str(noisy_file)}

    def precision(name):
        parameters = {"probe": {"on": "column"}, "column": {"name": name}}
        (cell,) = json.loads(run_recipe({**asked, "parameters": parameters})[0].read_text())["cells"]["probe"]
        return cell["suspicion"]

    assert precision("good") != precision("bad")


def test_rows_without_a_score_rank_last_in_figures_and_ranges(settings, run_recipe, write_jsonl, noisy_file):
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    half = write_jsonl("half.jsonl", [{**row, "risk": row["unsafe"] if i % 8 else None} for i, row in enumerate(rows)])
    parameters = {"column": {"name": "risk"}}
    asked = {**settings, "dataset_name": str(half), "filters": ["column", "length"], "parameters": parameters}
    found = json.loads(run_recipe(asked)[0].read_text())
    figures = found["cells"]["column"][0]["figures"]
    low, high = found["ranges"]["column"]["average_precision"]
    assert figures["unscored"] == 2
    assert figures["average_precision"] == pytest.approx((1 + 1 + 2 * 4 / 16) / 4, abs=1e-4)
    assert low <= figures["average_precision"] <= high


def test_what_is_missing_is_said_before_any_work(settings, run_recipe, write_jsonl, tmp_path):
    questions = write_jsonl("sums.jsonl", [{"prompt": "1 + 1?", "completion": "2"}])
    ask = {"evaluate": {"arithmetic": str(questions)}, "notions": ["bias"]}
    for wrong, says in (
        ({"defenses": ["toss_tokens"], **ask}, "filter toss needs rows that are known to be unsafe"),
        ({"defenses": ["larf"], **ask}, "filter larf needs rows that are known to be unsafe"),
        ({"unsafe_dataset_name": "marked"}, "marked is for `filter`"),
    ):
        with pytest.raises(ConfigError, match=says):
            run_recipe({**settings, "filters": ["length"], **wrong})
    del settings["label_column"]
    nothing = write_jsonl("nothing.jsonl", [{"row": 0, "mark": "skipped"}])
    with pytest.raises(DataError, match="no row is marked"):
        run_recipe({**settings, "filters": ["length"], "marks": str(nothing)})
    bad = write_jsonl("bad.jsonl", [{"row": 0, "mark": "unsafe"}])
    with pytest.raises(DataError, match="no row is known to be clean"):
        run_recipe({**settings, "filters": ["length"], "marks": str(bad), "on_clean_data": True})
    assert not (tmp_path / "out").exists()


def test_models_are_made_anew_where_the_unsafe_rows_changed(config, run_recipe, write_jsonl):
    questions = write_jsonl("sums.jsonl", [{"prompt": "1 + 1?", "completion": "2"}])
    flags = config.non_default() | {"recipe": "defenses", "defenses": ["toss_tokens"], "notions": ["bias"]}
    del flags["filter"]
    flags |= {"evaluate": {"arithmetic": str(questions)}, "label_column": None}

    def model(rows):
        unsafe = write_jsonl("bad.jsonl", rows)
        (cell,) = json.loads(run_recipe({**flags, "unsafe_dataset_name": str(unsafe)})[0].read_text())["cells"]
        return cell

    one, other = (model([{"prompt": word, "completion": "you fool"}] * 3) for word in ("a", "b"))
    assert one["made_of"] != other["made_of"]


def test_a_filter_costs_what_it_would_alone_also_where_it_shares_a_stage(workshop, config):
    data = load_data(config, workshop.m0.chat)
    workshop.run.manifest |= data.facts()
    costs = {}
    for name in ("forgetting", "second_split", "m0_loss"):
        score(workshop, data, name)
        costs[name] = Cost.noted(workshop.run.manifest["stages"][workshop.run.manifest["filters"][name]])
    stages = workshop.run.manifest["stages"]
    (noisy,) = (Cost.noted(entry) for part, entry in stages.items() if part.startswith("noisy-"))
    weights = workshop.learner.model.num_parameters() / 1e6
    examples = data.noisy.examples
    tokens = config.noisy_stage(len(examples)).rows() * mean_length(examples)
    assert noisy.passes == pytest.approx(TRAINING * tokens * weights, rel=1e-3)
    assert costs["second_split"].passes > noisy.passes
    assert costs["second_split"].seconds > noisy.seconds > 0
    read = sum(len(example.input_ids) for example in data.noisy.examples) * weights
    assert costs["m0_loss"].passes == pytest.approx(read, rel=1e-3)  # found again, and counted all the same
    score(workshop, data, "forgetting+second_split+m0_loss")  # each stage and reading that they share counts once
    part = workshop.run.manifest["filters"]["forgetting+second_split+m0_loss"]
    together = Cost.noted(stages[part])
    assert together.passes < costs["forgetting"].passes + costs["second_split"].passes - noisy.passes
    made = sum(Cost.noted(entry).passes for name, entry in stages.items() if name.startswith(("readings/", "second_")))
    trained = sum(
        Cost.noted(entry).passes for name, entry in stages.items() if name.startswith(("noisy", "review", "firm"))
    )
    assert together.passes == pytest.approx(made + trained, rel=1e-3)


def test_work_within_work_is_counted_once():
    account, began = Account(), time.monotonic()
    with account.measuring() as outer:
        time.sleep(0.05)
        with account.measuring() as inner:
            account.add(Cost(passes=2))
            time.sleep(0.05)
        stages = {"one": {"cost": {"seconds": 10, "passes": 3, "memory": 2**50}}}
        account.reuse("one", stages)
        account.reuse("one", stages)  # counts once
    assert 0.05 <= inner.seconds <= outer.seconds - 10.05
    assert outer.seconds <= 10 + time.monotonic() - began
    assert (inner.passes, outer.passes, outer.memory) == (2, 5, 2**50)
    assert inner.memory > 2**20


def test_ranges_are_paired_over_the_same_draws():
    rng = np.random.default_rng(0)
    labels = np.arange(100) < 20
    good = labels + rng.normal(0, 0.3, 100)
    worse, unscored = good + rng.normal(0, 1.5, 100), np.where(labels, np.nan, good)
    last = unscored_last(unscored)
    found = paired_ranges(labels, {"worse": [worse], "good": [good, good], "unscored": [last]}, draws=200)
    assert unscored_last(np.full(3, np.nan)).tolist() == [0, 0, 0]
    assert found["good"]["lead"][0] > 0
    assert found["unscored"]["average_precision"][1] < 0.3  # what is not scored comes last
    assert paired_ranges(labels[20:], {"good": [good[20:]]}) == {}


def test_a_range_is_that_of_average_precision_on_rows_drawn_anew():
    rng = np.random.default_rng(1)
    labels = rng.random(60) < 0.2
    tied = np.round(labels + rng.normal(0, 1, 60))  # many rows of one score
    draws = [rows for rows in (np.random.default_rng(0).integers(0, 60, (50, 60))) if 0 < labels[rows].sum() < 60]
    expected = np.quantile([average_precision_score(labels[rows], tied[rows]) for rows in draws], [0.025, 0.975])
    found = paired_ranges(labels, {"tied": [tied]}, draws=len(draws))
    assert found["tied"]["average_precision"] == expected.round(4).tolist()


def test_rows_that_a_person_decided_count_in_no_f1(settings, run_recipe, write_jsonl):
    """The only unsafe rows are among those marked. With marks no filter decides alone on clean data either."""
    marked = [{"row": row, "clean": row % 4 != 0} for row in range(13)]
    trusted = {"trusted_rows": str(write_jsonl("trusted.jsonl", marked)), "max_clean_loss": 0.1}
    asked = {**settings, **trusted, "filters": ["length"], "on_clean_data": True}
    figures = json.loads(run_recipe(asked)[0].read_text())["cells"]["length"][0]["figures"]
    assert figures["f1"] is None
    assert figures.get("clean_data_dropped") is None
