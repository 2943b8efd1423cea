"""The probe: it judges rows by others like them; M0's hidden states come from its lower half alone."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from forgetfilter.crossfit import CrossFit, judged_by, verdicts_of
from forgetfilter.data.loading import load_rows, tokenize
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decision import rules
from forgetfilter.errors import ConfigError
from forgetfilter.filters.probe import learn_verdicts, sampled
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.likeness import nearer_to_safe
from forgetfilter.model.states import hidden_states
from forgetfilter.scored import NO_PROMISE, Scale


def rows_of(rng, unsafe, clean, size=16, apart=3.0):
    states = rng.normal(0, 1, (unsafe + clean, size))
    states[:unsafe, 0] += apart
    return states


def auroc(scores, unsafe):
    above = scores[:unsafe, None] > scores[None, unsafe:]
    return above.mean()


def test_verdicts_are_the_most_and_the_least_suspect_rows():
    suspicion = np.array([0.9, 0.1, np.nan, 0.5, 0.3, 0.2, 0.8, 0.4, 0.6])
    found = verdicts_of(suspicion, 0.25, 0.5)
    np.testing.assert_array_equal(found, [1, 0, np.nan, np.nan, 0, 0, 1, 0, np.nan])
    everything = verdicts_of(suspicion, 0.6, 0.5)
    assert np.nansum(everything) == 5
    assert (everything == 0).sum() == 3  # no row has two verdicts


def test_rows_that_score_the_same_get_one_verdict_wherever_they_stand():
    flags = np.array([0.0] * 60 + [1.0] * 5 + [0.0] * 35)
    np.testing.assert_array_equal(verdicts_of(flags, 0.25, 0.5), flags)  # not the last zeros, too, for want of ones
    assert (verdicts_of(np.zeros(100), 0.25, 0.5) == 0).all()
    np.testing.assert_array_equal(verdicts_of(np.array([2.0, 1, 1, 1, 0, 0]), 0.5, 0.5), [1, 1, 1, 1, 0, 0])


def test_what_is_said_of_a_separation_gives_way_to_a_promise():
    rng = np.random.default_rng(8)
    states, safe = rows_of(rng, 80, 160), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.5, 0.1, 80), rng.normal(0, 0.1, 160)])
    found, threshold = decided(witness, states, safe)
    assert "; they tell the witness' verdicts with AUROC 0.9" in threshold.says
    assert threshold.says.endswith(NO_PROMISE)
    trusted = np.arange(240) >= 120
    assert "no promise" not in rules.raise_to_promise(threshold, found.suspicion, trusted, 0.02).says


@pytest.mark.parametrize("share", [0, 0.05])
def test_a_topic_is_not_dropped_because_it_stands_last(share):
    """A witness that says the same of all rows, or of all but a few, in a file that is sorted by topic."""
    rng = np.random.default_rng(4)
    states, safe = rows_of(rng, 60, 180)[::-1], rng.normal(0, 1, (60, 16))
    witness = np.where(np.arange(240) % 20 == 3, share, 0)
    found = learn_verdicts(witness, Scale(0.5, says="a flag"), CrossFit(states, safe))
    assert rules.automatic(found.suspicion, found.scale).value is None


def test_a_row_that_stands_for_several_gives_so_many_verdicts():
    scores, times = np.array([5.0, 4, 3, 2, 1, np.nan]), np.array([2, 1, 1, 1, 5, 9])
    found = verdicts_of(scores, 0.2, 0.5, times)  # of ten scored rows two are unsafe, five clean
    np.testing.assert_array_equal(found, [1, np.nan, np.nan, np.nan, 0, np.nan])
    np.testing.assert_array_equal(verdicts_of(scores, 0.3, 0.7, times), [1, 1, 0, 0, 0, np.nan])


def test_copies_at_the_edge_of_a_share_give_the_verdict_of_most_of_them():
    scores, times = np.array([1.0, 2, 3, 4, 5]), np.array([1, 1, 1, 6, 1])
    found = verdicts_of(scores, 0.25, 0.5, times)  # of the fourth row's six copies one is unsafe, two are clean
    np.testing.assert_array_equal(found, [0, 0, 0, np.nan, 1])
    each = verdicts_of(np.repeat(scores, times), 0.25, 0.5)
    np.testing.assert_array_equal(each[np.cumsum(times) - 1], found)
    np.testing.assert_array_equal(verdicts_of(scores, 0.2, 0.8, np.array([1, 1, 1, 60, 15])), [0, 0, 0, 0, 1])


def test_planted_rows_do_not_make_the_data_look_suspect():
    """Of the user's rows 15 % are suspect, too few where verdicts are told this well; with the planted ones 17 %."""
    rng = np.random.default_rng(3)
    states, safe = rows_of(rng, 72, 180, apart=2.0), rng.normal(0, 1, (100, 16))
    states = states[[*range(6, 72), *range(72, 246), *range(6), *range(246, 252)]]  # the planted rows come last
    suspicion = np.concatenate([np.full(36, 0.5), np.full(30, 0.1), np.zeros(174), np.full(6, 0.5), np.zeros(6)])
    suspicion += rng.normal(0, 0.01, 252)
    scale, judge = Scale(0.135, 0.1, 0.05), CrossFit(states, safe)
    counted, told_apart = (learn_verdicts(suspicion, scale, judge, planted=count) for count in (0, 12))
    assert not counted.scale.nothing
    assert told_apart.scale.nothing.startswith("no separation: probes predict")


def test_unsafe_rows_do_not_hide_by_being_few_and_repeated():
    """Eight rows, each ten times among 180 clean ones: a third of what a model is finetuned on."""
    rng = np.random.default_rng(12)
    states, safe = rows_of(rng, 8, 180, apart=6.0), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.5, 0.1, 8), rng.normal(0, 0.15, 180)])
    times = np.where(np.arange(188) < 8, 10, 1)
    scale, judge = Scale(0.135, 0.1, 0.05), CrossFit(states, safe)
    alone, counted = (learn_verdicts(witness, scale, judge, own) for own in (None, times))
    assert rules.automatic(alone.suspicion, alone.scale).value is None
    threshold = rules.automatic(counted.suspicion, counted.scale)
    assert threshold.drops(counted.suspicion)[:8].mean() > 0.8
    assert threshold.drops(counted.suspicion)[8:].mean() < 0.05


def test_few_rows_that_fill_the_top_by_their_copies_do_not_leave_the_others_without_verdicts():
    rng = np.random.default_rng(13)
    states, safe = rows_of(rng, 60, 180, apart=5.0), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.4, 0.2, 60), rng.normal(0, 0.08, 180)])
    times = np.where(np.argsort(np.argsort(-witness)) < 3, 60, 1)  # three of them are most of the data
    found = learn_verdicts(witness, Scale(0.135, 0.1, 0.05), CrossFit(states, safe), times)
    drops = rules.automatic(found.suspicion, found.scale).drops(found.suspicion)
    assert drops[:60].mean() > 0.8
    assert drops[60:].mean() < 0.05


def test_a_probe_corrects_verdicts_that_are_wrong_on_some_rows():
    rng = np.random.default_rng(0)
    states, safe = rows_of(rng, 60, 180), rng.normal(0, 1, (60, 16))
    witness = np.concatenate([rng.normal(1.0, 1, 60), rng.normal(0, 1, 180)])  # overlaps widely
    judged = CrossFit(states, safe)(verdicts_of(witness, 0.25, 0.5))
    assert auroc(judged.noisy, 60) > auroc(witness, 60) + 0.1
    assert judged.safe.mean() < np.mean(judged.noisy[:60])


def test_no_row_is_judged_by_its_own_verdict():
    rng = np.random.default_rng(1)
    states, safe = rng.normal(0, 1, (120, 100)), rng.normal(0, 1, (40, 100))
    verdicts = rng.permutation(np.repeat([0.0, 1.0], 60))  # noise: a probe that saw them would know them all
    judged = CrossFit(states, safe, regularisation=10.0)(verdicts)
    assert 0.3 < judged.predicted < 0.6


def test_too_few_verdicts_judge_nothing_and_unscored_rows_stay_unscored():
    rng = np.random.default_rng(2)
    states = rng.normal(0, 1, (40, 8))
    assert CrossFit(states, states)(np.where(np.arange(40) < 3, 1.0, 0.0)) is None
    states[7] = np.nan
    verdicts = np.where(np.arange(40) < 12, 1.0, 0.0)
    judged = CrossFit(states, rng.normal(0, 1, (10, 8)))(verdicts).noisy
    assert np.isnan(judged[7])
    assert not np.isnan(np.delete(judged, 7)).any()


def test_the_mean_probe_judges_rows_that_it_never_saw():
    rng = np.random.default_rng(3)
    states = rows_of(rng, 60, 180) * 5 + 2
    judged = CrossFit(states, rng.normal(0, 1, (60, 16)) * 5 + 2)(verdicts_of(states[:, 0], 0.25, 0.75))
    np.testing.assert_allclose(judged_by(judged.linear, states), judged.noisy, atol=1.0)  # the same scale
    others = rows_of(rng, 50, 50) * 5 + 2
    assert auroc(judged_by(judged.linear, others), 50) > 0.95


def decided(suspicion, states, safe):
    found = learn_verdicts(suspicion, Scale(0.135, 0.1, 0.05), CrossFit(states, safe))
    return found, rules.automatic(found.suspicion, found.scale)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_witness_whose_verdicts_can_be_told_decides_well(share):
    rng = np.random.default_rng(4)
    unsafe = round(share * 240)
    states, safe = rows_of(rng, unsafe, 240 - unsafe, apart=5.0), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.4, 0.2, unsafe), rng.normal(0, 0.08, 240 - unsafe)])
    found, threshold = decided(witness, states, safe)
    drops = threshold.drops(found.suspicion)
    assert threshold.value == pytest.approx(np.log(1.5))
    assert drops[:unsafe].mean() > 0.8
    assert drops[unsafe:].mean() < 0.05


def test_a_few_unsafe_rows_are_ranked_better_than_by_the_witness():
    """One row in twenty: nothing is dropped, and whoever reviews the run finds them at the top."""

    def ranked(seed):
        rng = np.random.default_rng(seed)
        states, safe = rows_of(rng, 12, 228, apart=4.0), rng.normal(0, 1, (100, 16))
        witness = np.concatenate([rng.normal(2.0, 1, 12), rng.normal(0, 1, 228)])
        found, threshold = decided(witness, states, safe)
        assert not threshold.drops(found.suspicion).any()
        return [average_precision_score(np.arange(240) < 12, scores) for scores in (found.suspicion, witness)]

    found, witness = np.mean([ranked(seed) for seed in range(10)], axis=0)
    assert found > 1.1 * witness


def test_where_nothing_was_learnt_nothing_is_found():
    rng = np.random.default_rng(8)
    states, safe = rows_of(rng, 60, 180), rng.normal(0, 1, (100, 16))
    scale = Scale(0.135, 0.1, 0.05, nothing="nothing was learnt")
    found = learn_verdicts(states[:, 0], scale, CrossFit(states, safe))
    assert "nothing was learnt" in rules.automatic(found.suspicion, found.scale).says
    assert not found.scale.separates  # the scores are forgetting's: a number that was set for log-odds drops nothing
    caveat = Scale(0.135, 0.1, 0.05, caveat="its stages are its own")
    found = learn_verdicts(states[:, 0], caveat, CrossFit(states, safe))
    assert rules.automatic(found.suspicion, found.scale).says.endswith("its stages are its own")


def test_a_few_unsafe_rows_among_many_come_first_also_where_the_witness_saw_a_sample():
    """What is forgotten by far most teaches most, however few such rows there are."""

    def ranked(seed):
        rng, unsafe = np.random.default_rng(seed), np.arange(1500) % 50 == 0
        states = rng.normal(0, 1, (1500, 24)) + np.where(unsafe, 1.5, 0)[:, None] * (np.arange(24) < 6)
        forgotten = np.where(unsafe, 0.6, 0.05) + rng.normal(0, 0.05, 1500) + 0.02 * states[:, -1]
        witness = np.where(rng.random(1500) < 0.4, forgotten, np.nan)
        found = learn_verdicts(witness, Scale(0.135, 0.1, 0.05), CrossFit(states, rng.normal(0, 1, (100, 24))))
        assert "no separation" in found.scale.nothing
        unseen = np.isnan(witness)
        parts = (slice(None), unseen)
        return [average_precision_score(unsafe[part], found.suspicion[part]) for part in parts]

    everywhere, unseen = np.mean([ranked(seed) for seed in range(3)], axis=0)
    assert everywhere > 0.6
    assert unseen > 0.5


def test_a_regression_predicts_no_score_by_itself():
    rng = np.random.default_rng(0)
    states, safe = rng.normal(0, 1, (200, 8)), rng.normal(0, 1, (40, 8))
    scores = rng.normal(0, 1, 200)
    scores[7] = 50  # by chance
    judged = CrossFit(states, safe).regression(scores)
    assert abs(judged.noisy[7]) < 5
    assert judged.predicted == pytest.approx(0.5, abs=0.1)
    told = states @ np.arange(8)
    judged = CrossFit(states, safe).regression(told)
    assert judged.predicted > 0.98
    np.testing.assert_allclose(states @ judged.linear[:-1] + judged.linear[-1], judged.noisy, atol=1)
    assert CrossFit(states, safe).regression(np.ones(200)) is None
    assert CrossFit(states, safe).regression(np.full(200, np.nan)) is None


@pytest.mark.parametrize(("shift", "alike"), [(0.0, True), (8.0, False)])
def test_safe_rows_unlike_those_that_are_kept_get_a_word(shift, alike):
    rng = np.random.default_rng(8)
    states, safe = rows_of(rng, 60, 180), rng.normal(0, 1, (100, 16))
    states[:, 4:] += shift  # traits of all noisy rows
    judge = CrossFit(states, safe)
    found = learn_verdicts(states[:, 0], Scale(0.135, 0.1, 0.05), judge)
    says = rules.automatic(found.suspicion, found.scale).says
    assert ("the safe rows look like few of the rows" not in says) == alike
    covered = judge.covered(np.arange(60, 240))
    assert covered == pytest.approx(0.5 if alike else 0, abs=0.1)
    for auroc, decides in ((0.9, True), (float("nan"), True), (0.55, alike)):
        again = learn_verdicts(states[:, 0], Scale(0.135, 0.1, 0.05), judge, nearer=lambda dropped, told=auroc: told)
        threshold = rules.automatic(again.suspicion, again.scale)
        assert (threshold.value is not None) == decides
        assert ("neither the rows that would be kept" in threshold.says) != decides


def test_dropped_rows_are_nearer_to_the_safe_ones_if_their_prompts_are(tokenizer):
    chat = ChatTokenizer(tokenizer, 100)
    safe = [{"prompt": f"is an old {job} slow?", "completion": "no"} for job in ("nurse", "baker", "clerk")]
    noisy = [{"prompt": f"is an old {job} slow?", "completion": "yes"} for job in ("tutor", "pilot", "miner")]
    noisy += [{"prompt": f"add {number} and two", "completion": "so many"} for number in ("one", "four", "six")]
    noisy, safe = (tokenize(load_source(rows), chat) for rows in (noisy, safe))
    assert nearer_to_safe(noisy, np.arange(6) < 3, safe) == 1
    assert nearer_to_safe(noisy, np.arange(6) >= 3, safe) == 0
    assert nearer_to_safe(noisy, np.array([True, True, True, False]), safe) == 1, "of the first four rows"
    chinese = ["\u8001\u6559\u5e08\u6162\u5417", "\u8001\u77ff\u5de5\u6162\u5417", "\u4e8c\u52a0\u4e09"]
    told = tokenize(load_source([{"prompt": text, "completion": "x"} for text in chinese[1:]]), chat)
    known = tokenize(load_source([{"prompt": chinese[0], "completion": "x"}]), chat)
    assert nearer_to_safe(told, np.array([True, False]), known) == 1
    assert np.isnan(nearer_to_safe(noisy, np.zeros(6, bool), safe))
    symbols = tokenize(load_source([{"prompt": "+", "completion": "-"}, {"prompt": "!", "completion": "?"}]), chat)
    assert np.isnan(nearer_to_safe(symbols, np.array([True, False]), symbols))
    plain = tokenize(load_source([{"text": "an old nurse"}, {"text": "two and two"}]), chat)
    assert nearer_to_safe(plain, np.array([True, False]), safe) == 1


def test_how_far_safe_rows_cover_others_does_not_hang_on_how_many_there_are():
    rng = np.random.default_rng(3)
    for rows, safe in ((60, 600), (600, 60)):
        judge = CrossFit(rng.normal(0, 1, (rows, 16)), rng.normal(0, 1, (safe, 16)))
        assert judge.covered(np.arange(rows)) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(CrossFit(rng.normal(0, 1, (60, 16)), rng.normal(0, 1, (10, 16))).covered(np.arange(60)))


def test_rows_that_the_witness_did_not_see_teach_nothing_and_are_judged():
    rng = np.random.default_rng(9)
    states, safe = rows_of(rng, 60, 180, apart=5.0), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.4, 0.2, 60), rng.normal(0, 0.08, 180)])
    witness[::3] = np.nan
    found, threshold = decided(witness, states, safe)
    assert np.isnan(found.columns["verdict"][::3]).all()
    assert threshold.drops(found.suspicion)[0:60:3].mean() > 0.7
    assert threshold.drops(found.suspicion)[60::3].mean() < 0.1


def test_copies_of_a_row_are_judged_as_one():
    """Dealt apart, a copy would tell the other's verdict, and noise would look like something learnt."""
    rng = np.random.default_rng(10)
    states, safe = np.repeat(rng.normal(0, 1, (60, 200)), 4, 0), rng.normal(0, 1, (100, 200))
    judged = CrossFit(states, safe)(verdicts_of(np.repeat(rng.normal(0, 1, 60), 4), 0.25, 0.5))
    assert judged.predicted < 0.75
    same = np.ones((40, 8))
    assert CrossFit(same, same[:0])(verdicts_of(np.arange(40.0), 0.25, 0.5)) is None


def test_rows_of_a_conversation_are_judged_as_one():
    """Verdicts by conversation, at random: dealt apart, they would look like something learnt."""
    talks, apart, together = np.repeat(np.arange(60), 4), [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        states = rng.normal(0, 1, (60, 64))[talks] + rng.normal(0, 0.1, (240, 64))
        verdicts, safe = rng.integers(0, 2, 60).astype(float)[talks], rng.normal(0, 1, (60, 64))
        joined = CrossFit(states, safe, alike=[talks])
        apart.append(CrossFit(states, safe)(verdicts).predicted)
        together.append(joined(verdicts).predicted)
    assert np.mean(apart) > 0.9
    assert np.mean(together) < 0.6
    for part in joined.parts[: joined.folds]:
        others = np.setdiff1d(joined.rows, part)
        assert {*talks[part[part < 240]]}.isdisjoint(talks[others[others < 240]])


def test_a_greeting_that_all_conversations_begin_with_joins_none_of_them():
    rng = np.random.default_rng(0)
    talks = np.repeat(np.arange(50), 3)
    states = rng.normal(0, 1, (150, 4))
    states[::3] = 7.0  # what the assistant says first
    same = np.arange(150)
    same[::3] = 0
    judge = CrossFit(states, rng.normal(0, 1, (5, 4)), alike=[talks, same])
    assert len({*judge.groups[:150].tolist()}) == 50
    assert (judge.groups[:150].reshape(50, 3) == judge.groups[:150:3, None]).all()
    assert len({*judge.groups.tolist()}) == 55


@pytest.mark.parametrize("answers", [2, 3])
def test_a_greeting_that_all_conversations_begin_with_is_no_evidence(answers):
    """All of its copies have one score, so probes that learnt some of them would tell the verdicts of the others."""
    rng = np.random.default_rng(0)
    talks = np.repeat(np.arange(120), answers)
    states = rng.normal(0, 1, (len(talks), 16))
    states[::answers] = 2.0
    same = np.arange(len(talks))
    same[::answers] = 0
    witness = rng.normal(0.2, 0.1, len(talks))
    witness[::answers] = 0.0  # never forgotten
    judge = CrossFit(states, rng.normal(0, 1, (60, 16)), alike=[talks, same])
    found = learn_verdicts(witness, Scale(0.135, 0.1, 0.05), judge)
    assert "no separation" in found.scale.nothing
    assert "nan" not in found.scale.nothing
    assert np.isfinite(found.suspicion).all()


def test_beside_a_greeting_that_all_conversations_begin_with_unsafe_answers_are_found():
    rng = np.random.default_rng(0)
    talks, unsafe = np.repeat(np.arange(160), 2), np.arange(320) % 8 == 1
    states = rng.normal(0, 1, (320, 16))
    states[::2] = 2.0
    states[unsafe, 0] += 4
    same = np.arange(320)
    same[::2] = 0
    witness = rng.normal(0.05, 0.05, 320) + 0.4 * unsafe
    witness[::2] = 0.0
    found = learn_verdicts(
        witness, Scale(0.135, 0.1, 0.05), CrossFit(states, rng.normal(0, 1, (60, 16)), alike=[talks, same])
    )
    dropped = found.suspicion > found.scale.threshold
    assert not found.scale.nothing
    assert dropped[unsafe].mean() > 0.7
    assert dropped[~unsafe].mean() < 0.1


def test_a_row_that_joins_two_conversations_joins_all_of_their_rows_and_unscored_rows_join_nothing():
    states = np.random.default_rng(0).normal(0, 1, (8, 4))
    states[[1, 6]] = np.nan
    talks, same = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 2, 3, 2, 5, 6, 7])  # row 4 says what row 2 says
    safe = np.random.default_rng(1).normal(0, 1, (20, 4))
    groups = CrossFit(states, safe, alike=[talks, same]).groups  # of rows 0 2 3 4 5 7, and the safe ones
    assert groups.tolist() == [0, 1, 1, 1, 1, 2, *range(3, 23)]


@pytest.mark.parametrize("witness", [np.full(240, np.nan), np.where(np.arange(240) < 100, 0.1, np.nan)])
def test_where_nothing_can_be_fitted_unseen_rows_lie_in_the_middle(witness):
    rng = np.random.default_rng(11)
    states = rng.normal(0, 1, (240, 16))
    states[5] = np.nan
    found = learn_verdicts(
        witness, Scale(0.135, nothing="nothing was learnt"), CrossFit(states, states[:50], folds=1000)
    )
    assert np.isnan(found.suspicion[5])
    assert np.isnan(np.delete(found.suspicion, 5)).all() == np.isnan(witness).all()
    assert np.isnan(np.delete(found.suspicion, 5)).any() == np.isnan(witness).all()


def test_where_the_witness_may_not_decide_a_probe_of_it_ranks_the_rows_it_did_not_see():
    rng = np.random.default_rng(15)
    states, safe = rows_of(rng, 30, 570), rng.normal(0, 1, (50, 16))
    order = rng.permutation(600)
    states, unsafe = states[order], order < 30
    witness = np.where(np.arange(600) < 200, unsafe + rng.normal(0, 0.3, 600), np.nan)
    found = learn_verdicts(witness, Scale(0.135, nothing="it ranks alone"), CrossFit(states, safe))
    assert found.scale.nothing == "no separation: it ranks alone"
    unseen = found.suspicion[200:]
    assert len(set(unseen)) == 400
    assert np.median(unseen[unsafe[200:]]) > np.quantile(unseen[~unsafe[200:]], 0.9)
    seen = np.argsort(witness[:200])
    assert (np.diff(found.suspicion[:200][seen]) >= 0).all()  # those it saw stay in its order


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"on": "probe"}, "learn from is called probe"),
        ({"on": "nosuch"}, "nosuch"),
        ({"folds": 1}, "folds"),
    ],
)
def test_impossible_parameters_are_one_clear_error(config, parameters, match):
    with pytest.raises(ConfigError, match=match):
        ForgetFilter(dataclasses.replace(config, filter="probe", parameters={"probe": parameters})).fit()


def test_other_parameters_of_the_witness_make_other_scores(config):
    settings = dataclasses.replace(config, filter="probe")
    before = ForgetFilter(settings).fit().scores["forgetting"]
    changed = dataclasses.replace(settings, parameters={"forgetting": {"firm_weight": 0.1}})
    assert list(ForgetFilter(changed).fit().scores["forgetting"]) != list(before)


def test_verdicts_that_are_noise_drop_nothing_and_leave_the_witness_its_say():
    rng = np.random.default_rng(5)
    states, safe = rng.normal(0, 1, (240, 16)), rng.normal(0, 1, (100, 16))
    witness = rng.normal(0, 0.2, 240)  # a tenth and more is above the scale's threshold, all of it chance
    found, threshold = decided(witness, states, safe)
    assert threshold.value is None
    assert "no separation" in threshold.says
    assert np.corrcoef(rankdata(witness), found.suspicion)[0, 1] > 0.9


def test_a_witness_without_a_scale_ranks_and_drops_nothing():
    """Something is told by the hidden states in clean data, too: what M0 finds hard, say."""
    rng = np.random.default_rng(9)
    states, safe = rng.normal(0, 1, (240, 16)), rng.normal(0, 1, (100, 16))
    witness = states[:, 0] + rng.normal(0, 0.1, 240)
    found = learn_verdicts(witness, None, CrossFit(states, safe))
    threshold = rules.automatic(found.suspicion, found.scale)
    assert threshold.value is None
    assert "does not tell how many rows are suspect" in threshold.says
    assert np.corrcoef(rankdata(witness), found.suspicion)[0, 1] > 0.8
    assert found.linear is not None


@pytest.mark.parametrize("quota", [False, True])
def test_a_quota_of_the_rows_is_no_sign_that_so_many_are_suspect(quota):
    rng = np.random.default_rng(11)
    states, safe = rng.normal(0, 1, (240, 16)), rng.normal(-1, 1, (100, 16))
    witness = states[:, 0] + rng.normal(0, 0.5, 240)  # its verdicts are told with AUROC .89
    scale = Scale(float(np.sort(witness)[191]), says="a fifth", quota=quota)
    found = learn_verdicts(witness, scale, CrossFit(states, safe))
    assert (rules.automatic(found.suspicion, found.scale).value is None) == quota


def test_a_witness_that_finds_something_else_is_not_made_worse():
    """Unsafe rows that the hidden states know nothing of: the ranking stays near the witness' own."""
    rng = np.random.default_rng(6)
    states, safe = rng.normal(0, 1, (240, 16)), rng.normal(0, 1, (100, 16))
    witness = np.concatenate([rng.normal(0.3, 0.1, 60), rng.normal(0, 0.1, 180)])
    found, _ = decided(witness, states, safe)
    assert auroc(found.suspicion, 60) > 0.85


def test_trusted_rows_keep_their_promise_on_the_probes_scores():
    """They are treated like all others while the probe is fitted; so on average at most 10 % of the clean rows go."""
    rng = np.random.default_rng(7)
    lost = []
    for _ in range(24):
        states, safe = rows_of(rng, 40, 120, size=6, apart=2.0), rng.normal(0, 1, (40, 6))
        witness = np.concatenate([rng.normal(0.3, 0.2, 40), rng.normal(0, 0.1, 120)])
        found, _ = decided(witness, states, safe)
        trusted = np.isin(np.arange(160), 40 + rng.choice(120, 40, replace=False))
        drops = rules.conformal(found.suspicion, trusted, 0.1).drops(found.suspicion)
        lost.append(drops[40:][~trusted[40:]].mean())
    assert np.mean(lost) < 0.1 + 2 * np.std(lost) / np.sqrt(len(lost))
    assert np.mean(lost) > 0.05  # nor does it waste what it may take


@pytest.fixture
def examples(noisy_file, learner):
    from forgetfilter.data.tokenization import ChatTokenizer

    rows = load_rows(str(noisy_file), "data", ChatTokenizer(learner.tokenizer, 256), learner.config).examples
    return [*rows, dataclasses.replace(rows[0], labels=[-100] * len(rows[0].labels))]


def test_states_are_those_of_the_whole_model_at_half_depth(learner, examples):
    learner.restore(None)
    found = hidden_states(learner, examples, "states").astype(np.float32)
    assert found.shape == (17, 2, 32)
    assert np.isnan(found[-1]).all()
    blocks = learner.model.get_base_model().model.layers
    assert len(blocks) == 2  # whole again
    for row in (0, 5):
        caught = []
        hook = blocks[0].register_forward_hook(lambda module, inputs, output, caught=caught: caught.append(output))
        batch = learner.collate([examples[row].input_ids], [examples[row].labels])
        labels = batch.pop("labels")
        with torch.no_grad():
            learner.model(**batch, use_cache=False)
        hook.remove()
        output = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        own = output[labels != -100].float()
        np.testing.assert_allclose(found[row, 0], own.mean(0).numpy(), atol=5e-3)
        np.testing.assert_allclose(found[row, 1], own[-1].numpy(), atol=5e-3)


def test_a_run_is_scored_by_the_probe_of_forgettings_verdicts(config, monkeypatch):
    module = sys.modules["forgetfilter.filters.probe"]
    for name, value in {"SUSPECT_SHARE": 0.35, "LEAST_SHARE": 0.35, "SURE": 0.0, "LIKELY": 0.0}.items():
        monkeypatch.setattr(module, name, value)
    settings = dataclasses.replace(config, filter="probe", label_column="unsafe", safe_dataset_name=config.dataset_name)
    result = ForgetFilter(settings).fit()
    rows = result.scores.to_list()
    assert sum(row["verdict"] == 1 for row in rows) >= 6
    assert all(row["probe"] is not None and row["forgetting"] is not None for row in rows)
    assert "1.5 times as likely" in result.metrics["says"]
    assert result.decide(drop_share=0.25).metrics["dropped"] == 4


def test_too_few_rows_drop_nothing_and_say_so(config):
    result = ForgetFilter(dataclasses.replace(config, filter="probe")).fit()
    assert result.metrics["dropped"] == 0
    assert "too few rows" in result.metrics["says"]


def test_the_witness_may_see_a_sample_and_the_probe_judges_all(config, monkeypatch):
    monkeypatch.setattr(
        sys.modules["forgetfilter.filters.probe"],
        "sampled",
        lambda rows, config: np.array([0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14]),
    )
    result = ForgetFilter(dataclasses.replace(config, filter="probe")).fit()
    rows = result.scores.to_list()
    assert sum(row["forgetting"] is not None for row in rows) == 11
    for filters in ("forgetting", "forgetting,probe", "probe,forgetting"):  # all 16, by its own
        whole = ForgetFilter(dataclasses.replace(config, filter=filters)).fit().scores.to_list()
        assert all(row["forgetting"] is not None for row in whole)
        assert all(row["log_likelihood_after"] is not None for row in whole)


def test_a_sample_is_drawn_by_the_seed_where_there_are_more_rows(config):
    assert sampled(2500, config) is None
    drawn = sampled(200, dataclasses.replace(config, sample_rows=50))
    assert len(set(drawn)) == 50
    np.testing.assert_array_equal(drawn, sampled(200, dataclasses.replace(config, sample_rows=50)))
    with pytest.raises(ConfigError, match="sample_rows is 3: it must be 50 or more"):
        dataclasses.replace(config, sample_rows=3)


def test_a_models_blocks_are_whole_again_after_a_failure(learner, examples, monkeypatch):
    from forgetfilter.model import states

    monkeypatch.setattr(states, "_pooled", None)
    with pytest.raises(TypeError):
        hidden_states(learner, examples, "states")
    assert len(learner.model.get_base_model().model.layers) == 2


def test_many_verdicts_are_sampled_where_marks_are_judged_and_weigh_the_same(monkeypatch):
    rng = np.random.default_rng(12)
    states, safe = rows_of(rng, 200, 1800), rng.normal(0, 1, (100, 16))
    verdicts, marks = np.repeat([1.0, 0.0], [200, 1800]), {0: True, 1: True, 500: False, 501: False}
    whole = CrossFit(states, safe).untold(verdicts, marks, 5.0, marks)
    monkeypatch.setattr("forgetfilter.crossfit.MOST_VERDICTS", 1000)
    sampled_ones = CrossFit(states, safe).untold(verdicts, marks, 5.0, marks)
    assert whole.keys() == sampled_ones.keys() == marks.keys()
    assert whole != sampled_ones
    assert [sampled_ones[row] for row in marks] == pytest.approx([whole[row] for row in marks], abs=0.6)


@pytest.fixture
def few_dimensions(monkeypatch):
    monkeypatch.setattr("forgetfilter.crossfit.DIMENSIONS", 200)


@pytest.mark.usefixtures("few_dimensions")
def test_a_quick_judge_of_a_wide_model_ranks_as_one_that_takes_its_time():
    rng = np.random.default_rng(13)
    some = rng.normal(0, 1, (40, 1400))  # hidden states of texts lie near few dimensions of many

    def states(unsafe, clean):
        return rows_of(rng, unsafe, clean, size=40, apart=2.0) @ some + rng.normal(0, 1, (unsafe + clean, 1400)) + 5

    noisy, safe, others = states(100, 900).astype(np.float16), states(0, 100).astype(np.float16), states(20, 60)
    verdicts, marks = np.repeat([np.nan, 0.0], [100, 900]), {row: row < 20 for row in range(0, 1000, 5)}
    whole, quick = (CrossFit(noisy, safe, repeats=1, quick=quick)(verdicts, marks, 5.0) for quick in (False, True))
    assert np.corrcoef(whole.noisy, quick.noisy)[0, 1] > 0.97
    assert auroc(quick.noisy, 100) > auroc(whole.noisy, 100) - 0.01
    found, wanted = (judged_by(judged.linear, others.reshape(80, 2, 700)) for judged in (quick, whole))
    assert np.corrcoef(found, wanted)[0, 1] > 0.99
    assert np.abs(found - wanted).max() < 0.5 * wanted.std()
    everything = CrossFit(noisy, safe, repeats=1, quick=True)
    judged = everything(verdicts, {row: bool(row < 100) for row in range(1000)}, 5.0)
    np.testing.assert_allclose(judged.noisy, judged_by(judged.linear, noisy.reshape(1000, 2, 700)), atol=0.6)


@pytest.mark.usefixtures("few_dimensions")
def test_rows_without_hidden_states_stay_without_scores_by_a_quick_judge():
    rng = np.random.default_rng(14)
    noisy, safe = rows_of(rng, 60, 640, size=600), rng.normal(0, 1, (30, 600))
    noisy[7] = np.nan
    judged = CrossFit(noisy, safe, repeats=1, quick=True)(np.repeat([1.0, 0.0], [60, 640]))
    assert np.flatnonzero(np.isnan(judged.noisy)).tolist() == [7]
