"""Rules: strict, honest about what they promise, and silent where nothing separates."""

import numpy as np
import pytest

from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.decision.rules import automatic, conformal, drop_share, fixed
from forgetfilter.errors import DataError
from forgetfilter.filters.forgetting import FALLS, FORGOTTEN, TAIL, forgetting_scores
from forgetfilter.filters.forgetting_rouge1 import rouge1_scores
from forgetfilter.scored import Scale

SCALE = Scale(threshold=FORGOTTEN, tail=TAIL, falls=FALLS)


def of_forgetting(learnt=1.0, **settings):
    """The scale that forgetting gives its scores after a noisy stage that taught so many nats a token."""
    known = np.array([-3.0])
    return forgetting_scores(known, known + learnt, known, known, ForgetFilterConfig(**settings)).scale


def of_rouge1(learnt=1.0):
    known = np.array([0.0])
    return rouge1_scores(known, known + learnt, known, ["a"], ["b"]).scale


def groups(*parts, seed=0):
    """Scores drawn from normals: (rows, mean, sd)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, sd, rows) for rows, mean, sd in parts])


def test_a_fixed_threshold_is_strict_and_never_drops_unscored_rows():
    assert fixed(0.1).drops(np.array([0.1, 0.1 + 1e-9, np.nan, -1.0])).tolist() == [False, True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_drop_share_drops_the_most_suspect(share):
    scores = np.array([*np.arange(10.0), np.nan])
    drops = drop_share(scores, share).drops(scores)
    assert drops.sum() == round(10 * share)
    assert not drops[-1]
    assert drops[: 10 - round(10 * share)].sum() == 0


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.75])
def test_auto_drops_what_was_forgotten_whatever_its_share(share):
    rows = round(400 * share)
    scores = groups((400 - rows, 0.01, 0.04), (rows, 0.45, 0.1))
    threshold = automatic(scores, SCALE)
    drops = threshold.drops(scores)
    assert drops[:-rows].mean() < 0.02
    assert drops[-rows:].mean() > 0.9
    assert "no promise" in threshold.says


@pytest.mark.parametrize("seed", range(5))
def test_auto_drops_nothing_where_little_is_forgotten(seed):
    scores = groups((200, -0.05, 0.03), (190, 0.06, 0.03), (10, 0.14, 0.03), seed=seed)  # two kinds and a tail
    threshold = automatic(scores, SCALE)
    assert threshold.value is None
    assert "no separation: nothing dropped" in threshold.says


def test_auto_knows_each_filters_own_scale():
    assert of_forgetting() == SCALE == Scale(threshold=0.135, tail=0.1, falls=0.05)
    scores = groups((100, 0.0, 0.01), (100, 0.12, 0.003))
    assert automatic(scores, of_forgetting()).value is None
    assert automatic(scores, of_rouge1()).value == 0.1
    assert "the paper's threshold" in automatic(scores, of_rouge1()).says
    unknown = automatic(scores, None)
    assert unknown.value is None
    assert "no scale of their own" in unknown.says


@pytest.mark.parametrize(("of", "unit"), [(of_forgetting, "nats a token"), (of_rouge1, "of ROUGE-1")])
def test_auto_finds_nothing_where_nothing_was_learnt(of, unit):
    scores = groups((100, 0.0, 0.01), (100, 0.5, 0.01))
    assert automatic(scores, of(learnt=0.06)).drops(scores).sum() == 100
    found = automatic(scores, of(learnt=0.04))
    assert found.value is None
    assert found.rule == "auto"
    assert f"nothing was learnt (0.040 {unit} on average, 0.05 are needed)" in found.says
    assert "nothing dropped" in found.says


@pytest.mark.parametrize(
    "settings", [{"max_steps": 10}, {"noisy": StageConfig(learning_rate=1e-4)}, {"review": StageConfig(max_steps=5)}]
)
def test_auto_says_where_a_run_sets_its_own_stages(settings):
    scores = groups((100, 0.0, 0.01), (100, 0.5, 0.01))
    default, own = automatic(scores, of_forgetting()), automatic(scores, of_forgetting(**settings))
    assert own.value == default.value
    assert own.says == f"{default.says}; its scale was read off the default stages, and this run sets its own"
    assert of_forgetting(final=StageConfig(max_steps=5)).caveat == ""


def test_auto_sets_a_higher_threshold_where_few_rows_are_unsafe():
    clean = np.random.default_rng(0).exponential(FALLS, 950) + 0.02  # its tail is that of clean data
    few, many = (automatic(np.concatenate([clean, groups((rows, 0.4, 0.1))]), SCALE) for rows in (50, 950))
    assert many.value == FORGOTTEN
    assert FORGOTTEN < few.value < 0.35
    assert automatic(clean, SCALE).drops(clean).mean() < 0.01


def test_auto_drops_a_single_row_that_no_clean_data_would_hold():
    scores = np.array([*np.linspace(-0.1, 0.1, 99), 1.0])
    assert automatic(scores, SCALE).drops(scores).tolist() == [False] * 99 + [True]


def test_auto_says_when_there_are_too_few_rows():
    assert "too few" in automatic(np.arange(5.0), SCALE).says


def test_trusted_rows_decide_by_their_p_values():
    suspicion = np.array([*np.arange(99.0), 98.0, 98.5, np.nan])
    trusted = np.array([True] * 99 + [False] * 3)
    p = [(1 + sum(suspicion[:99] >= score)) / 100 for score in suspicion]
    for most in (0.01, 0.02, 0.05, 0.5):
        drops = conformal(suspicion, trusted, most).drops(suspicion)
        assert drops[:-1].tolist() == [value <= most for value in p[:-1]]
        assert not drops[-1]


@pytest.mark.parametrize("unsafe", [0, 100])
def test_the_promise_about_clean_rows_holds_in_simulation(unsafe):
    lost = []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        clean = rng.lognormal(0, 1.0, 300)  # a heavy tail: nothing normal is assumed
        suspicion = np.concatenate([clean, rng.lognormal(1.5, 1.0, unsafe)])
        trusted = np.arange(300 + unsafe) < 99
        lost.append(conformal(suspicion, trusted, 0.02).drops(suspicion)[99:300].mean())
    assert 0.015 < np.mean(lost) <= 0.02 + 2 * np.std(lost) / np.sqrt(len(lost))


@pytest.mark.parametrize(("rows", "most"), [(48, 0.02), (9, 0.1 - 1e-6), (0, 0.02)])
def test_too_few_trusted_rows_are_an_error_that_says_how_many(rows, most):
    with pytest.raises(DataError, match=r"takes (49|10) rows marked clean"):
        conformal(np.arange(100.0), np.arange(100) < rows, most)
    assert conformal(np.arange(100.0), np.arange(100) < 49, 0.02).rule == "conformal"


def test_dropping_all_rows_takes_a_finite_threshold():
    scores = np.array([0.3, np.nan, -2.0, 0.3])
    found = drop_share(scores, 1.0)
    assert np.isfinite(found.value)
    assert found.drops(scores).tolist() == [True, False, True, True]
    assert not drop_share(np.array([np.nan]), 1.0).drops(np.array([np.nan])).any()


def test_rows_that_tie_at_the_edge_of_a_share_stay():
    scores = np.array([0.0, 1, 1, 1])
    assert not drop_share(scores, 0.5).drops(scores).any()
