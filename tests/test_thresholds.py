"""Thresholds: strict, honest about what they promise, and silent where nothing separates."""

import numpy as np
import pytest

from forgetfilter.errors import DataError
from forgetfilter.thresholds import automatic, conformal, drop_share, fixed


def groups(*parts, seed=0):
    """Scores drawn from normals: (rows, mean, sd)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, sd, rows) for rows, mean, sd in parts])


def test_a_fixed_threshold_is_strict_and_never_drops_unscored_rows():
    assert fixed(0.1).drops(np.array([0.1, 0.1 + 1e-9, np.nan, -1.0])).tolist() == [False, True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_drop_share_drops_the_most_forgotten(share):
    scores = np.array([*np.arange(10.0), np.nan])
    drops = drop_share(scores, share).drops(scores)
    assert drops.sum() == round(10 * share)
    assert not drops[-1]
    assert drops[: 10 - round(10 * share)].sum() == 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_auto_finds_a_group_that_stands_apart(share):
    rows = round(400 * share)
    scores = groups((400 - rows, 0.1, 0.1), (rows, 1.2, 0.25))
    threshold = automatic(scores, np.full(400, 2.0))
    drops = threshold.drops(scores)
    assert drops[:-rows].mean() < 0.03
    assert drops[-rows:].mean() > 0.9
    assert "lost" in threshold.says


@pytest.mark.parametrize("seed", range(5))
def test_auto_drops_nothing_from_one_group(seed):
    assert automatic(groups((400, 0.2, 0.2), seed=seed), np.full(400, 2.0)).value is None


def test_auto_does_not_split_kinds_of_harmless_rows():
    scores = groups((200, -0.1, 0.05), (200, 0.3, 0.05))
    threshold = automatic(scores, np.full(400, 3.0))
    assert threshold.value is None
    assert "no separation: nothing dropped" in threshold.says


def test_auto_makes_no_group_of_one_outlier():
    scores = groups((200, 0.1, 0.1), (60, 1.2, 0.2))
    scores[0] = 30.0
    drops = automatic(scores, np.full(260, 2.0)).drops(scores)
    assert drops[200:].mean() > 0.9
    assert drops[1:200].mean() < 0.03


def test_auto_says_when_there_are_too_few_rows():
    assert "too few" in automatic(np.arange(5.0), np.ones(5)).says


def test_trusted_rows_decide_by_their_p_values():
    forgetting = np.array([*np.arange(99.0), 98.0, 98.5, np.nan])
    trusted = np.array([True] * 99 + [False] * 3)
    p = [(1 + sum(forgetting[:99] >= score)) / 100 for score in forgetting]
    for most in (0.01, 0.02, 0.05, 0.5):
        drops = conformal(forgetting, trusted, most).drops(forgetting)
        assert drops[:-1].tolist() == [value <= most for value in p[:-1]]
        assert not drops[-1]


@pytest.mark.parametrize("unsafe", [0, 100])
def test_the_promise_about_clean_rows_holds_in_simulation(unsafe):
    lost = []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        clean = rng.lognormal(0, 1.0, 300)  # a heavy tail: nothing normal is assumed
        forgetting = np.concatenate([clean, rng.lognormal(1.5, 1.0, unsafe)])
        trusted = np.arange(300 + unsafe) < 99
        lost.append(conformal(forgetting, trusted, 0.02).drops(forgetting)[99:300].mean())
    assert 0.015 < np.mean(lost) <= 0.02 + 2 * np.std(lost) / np.sqrt(len(lost))


@pytest.mark.parametrize(("rows", "most"), [(48, 0.02), (9, 0.1 - 1e-6), (0, 0.02)])
def test_too_few_trusted_rows_are_an_error_that_says_how_many(rows, most):
    with pytest.raises(DataError, match=r"takes (49|10) rows marked clean"):
        conformal(np.arange(100.0), np.arange(100) < rows, most)
    assert conformal(np.arange(100.0), np.arange(100) < 49, 0.02).rule == "conformal"
