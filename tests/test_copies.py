"""Rows that say the same are one to a filter: none hides by being repeated."""

import dataclasses
import json
import sys

import numpy as np
import pyarrow as pa
import pytest

from forgetfilter.data.copies import first_copies, plain
from forgetfilter.data.sources import load_source
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.review.session import Review
from forgetfilter.scored import Scored

SAME = ["you fool", "You Fool", " you \n fool ", "\uff59\uff4f\uff55 fool", "you f\u200bool"]


def test_what_says_the_same_is_told_by_the_text():
    assert {plain(text) for text in SAME} == {"you fool"}
    rows = [{"prompt": "a", "completion": text} for text in [*SAME, "you fools", "you fool!"]]
    np.testing.assert_array_equal(first_copies(load_source(rows), "prompt_completion"), [0, 0, 0, 0, 0, 5, 6])
    other = [{"prompt": "A", "completion": "b"}, {"prompt": "b", "completion": "a"}, {"prompt": "a", "completion": "B"}]
    np.testing.assert_array_equal(first_copies(load_source(other), "prompt_completion"), [0, 1, 0])


def test_text_hidden_in_characters_that_show_nothing_is_said():
    hidden = "".join(chr(0xE0000 + ord(letter)) for letter in "be rude")
    assert plain(f"Sure{hidden}") != plain("Sure") == plain("Su\u200bre")


def test_who_speaks_makes_a_difference():
    def row(*roles):
        return {"messages": [{"role": role, "content": "hi"} for role in roles]}

    rows = [row("user", "assistant"), row("system", "user", "assistant"), row("user", "assistant")]
    np.testing.assert_array_equal(first_copies(load_source(rows), "messages"), [0, 1, 0])


def test_scores_are_shared_and_token_costs_only_where_the_tokens_are_the_same():
    scored = Scored(
        np.array([0.1, 0.9]),
        {"number": np.array([1.0, 2.0]), "text": np.array(["a", None], object)},
        {"M0": np.array([-1.0, -2.0])},
        pa.array([[0.5], [0.7, 0.8]], pa.list_(pa.float32())),
    )
    found = scored.shared(np.array([1, 0, 1]), np.array([True, True, False]))
    assert found.suspicion.tolist() == [0.9, 0.1, 0.9]
    assert found.columns["text"].tolist() == [None, "a", None]
    assert found.moments["M0"].tolist() == [-2, -1, -2]
    assert found.token_costs.to_pylist() == [[pytest.approx(0.7), pytest.approx(0.8)], [0.5], None]


@pytest.fixture
def repeated(config, write_jsonl, noisy_file):
    """Sixteen rows, then the first four times more in other ways of writing."""
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    copies = [
        {**rows[0], "completion": text(rows[0]["completion"])} for text in (str, str.upper, str.title, "{}  ".format)
    ]
    return dataclasses.replace(config, dataset_name=str(write_jsonl("repeated.jsonl", rows + copies)))


def test_a_filter_sees_a_repeated_row_once(config, repeated):
    alone = ForgetFilter(config).fit().scores["forgetting"]
    result = ForgetFilter(dataclasses.replace(repeated, output_dir=f"{config.output_dir}-2")).fit()
    scores = result.scores["forgetting"]
    assert scores[:16] == list(alone)
    assert scores[16:] == [scores[0]] * 4
    assert result.metrics["repeated"] == 4
    assert result.metrics["kept"] + result.metrics["dropped"] == 20
    (noisy,) = (entry for part, entry in result.run.manifest["stages"].items() if part.startswith("noisy-"))
    assert noisy["steps"] == 6


def test_a_probe_judges_copies_alike_and_a_review_knows_the_states_of_all(repeated):
    result = ForgetFilter(dataclasses.replace(repeated, filter="probe")).fit()
    probe = np.array(result.scores["probe"])
    assert (probe[16:] == probe[0]).all()
    review = Review(result.run)
    review.mark({0: "unsafe", 4: "unsafe", 1: "clean"})
    ranked = review.scored().suspicion
    assert len(ranked) == 20
    assert (ranked[16:] == ranked[16]).all()
    assert len({int(review.ranking.copies[row]) for row in (0, 16, 17, 18, 19)}) == 1


def test_a_probe_counts_a_row_as_often_as_it_stands_in_the_data(repeated, monkeypatch):
    seen, module = [], sys.modules["forgetfilter.filters.probe"]
    real = module.learn_verdicts
    monkeypatch.setattr(module, "learn_verdicts", lambda *given: seen.append(given[3]) or real(*given))
    ForgetFilter(dataclasses.replace(repeated, filter="probe")).fit()
    assert seen[0].tolist() == [5, *[1] * 15]
