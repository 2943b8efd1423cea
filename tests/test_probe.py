"""The probe: it judges rows by others like them; M0's hidden states come from its lower half alone."""

import dataclasses

import numpy as np
import pytest
import torch

from forgetfilter.data.loading import load_rows
from forgetfilter.errors import ConfigError
from forgetfilter.filters.forgetting import FORGOTTEN
from forgetfilter.filters.probe import cross_fitted, verdicts_of
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.model.states import hidden_states


def rows_of(rng, unsafe, clean, size=16, apart=3.0):
    states = rng.normal(0, 1, (unsafe + clean, size))
    states[:unsafe, 0] += apart
    return states


def auroc(scores, unsafe):
    above = scores[:unsafe, None] > scores[None, unsafe:]
    return above.mean()


def test_verdicts_are_the_most_and_the_least_suspect_rows():
    suspicion = np.array([0.9, 0.1, np.nan, 0.5, 0.3, 0.2, 0.8, 0.4, 0.6])
    found = verdicts_of(suspicion, 0.25)
    np.testing.assert_array_equal(found, [1, 0, np.nan, np.nan, 0, 0, 1, 0, np.nan])
    everything = verdicts_of(suspicion, 0.6)
    assert np.nansum(everything) == 5
    assert (everything == 0).sum() == 3  # no row has two verdicts


def test_a_probe_corrects_verdicts_that_are_wrong_on_some_rows():
    rng = np.random.default_rng(0)
    states, safe = rows_of(rng, 60, 180), rng.normal(0, 1, (60, 16))
    witness = np.concatenate([rng.normal(1.0, 1, 60), rng.normal(0, 1, 180)])  # overlaps widely
    judged = cross_fitted(states, safe, verdicts_of(witness, 0.25))
    assert auroc(judged.noisy, 60) > auroc(witness, 60) + 0.1
    assert judged.safe.mean() < np.mean(judged.noisy[:60])


def test_no_row_is_judged_by_its_own_verdict():
    rng = np.random.default_rng(1)
    states, safe = rng.normal(0, 1, (120, 100)), rng.normal(0, 1, (40, 100))
    verdicts = rng.permutation(np.repeat([0.0, 1.0], 60))  # noise: a probe that saw them would know them all
    judged = cross_fitted(states, safe, verdicts, regularisation=10.0).noisy
    above = judged[verdicts == 1][:, None] > judged[verdicts == 0][None, :]
    assert 0.3 < above.mean() < 0.6


def test_too_few_verdicts_judge_nothing_and_unscored_rows_stay_unscored():
    rng = np.random.default_rng(2)
    states = rng.normal(0, 1, (40, 8))
    few = np.where(np.arange(40) < 3, 1.0, 0.0)
    assert np.isnan(cross_fitted(states, states, few).noisy).all()
    states[7] = np.nan
    verdicts = np.where(np.arange(40) < 12, 1.0, 0.0)
    judged = cross_fitted(states, rng.normal(0, 1, (10, 8)), verdicts).noisy
    assert np.isnan(judged[7])
    assert not np.isnan(np.delete(judged, 7)).any()


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


def test_a_run_is_scored_by_the_probe_of_forgettings_verdicts(config):
    result = ForgetFilter(dataclasses.replace(config, filter="probe,forgetting", label_column="unsafe")).fit()
    rows = result.scores.to_list()
    share = min(sum(row["forgetting"] > FORGOTTEN for row in rows) / 16, 0.6)
    order = sorted(rows, key=lambda row: -row["forgetting"])
    assert [row["verdict"] for row in order[: round(16 * share)]] == [1] * round(16 * share)
    assert all(row["probe"] is not None for row in rows)
    assert result.metrics["dropped"] == 0
    assert "no scale" in result.metrics["says"]
    assert result.decide(drop_share=0.25).metrics["dropped"] == 4
    with pytest.raises(ConfigError, match="random has no scale"):
        ForgetFilter(dataclasses.replace(config, filter="probe", parameters={"probe": {"on": "random"}})).fit()


def test_a_models_blocks_are_whole_again_after_a_failure(learner, examples, monkeypatch):
    from forgetfilter.model import states

    monkeypatch.setattr(states, "_pooled", None)
    with pytest.raises(TypeError):
        hidden_states(learner, examples, "states")
    assert len(learner.model.get_base_model().model.layers) == 2
