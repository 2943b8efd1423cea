"""SOMF and what learns from pairs: the pairs, the preference loss, the masks, the fusion and the controls."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from forgetfilter.config import StageConfig
from forgetfilter.data.loading import load_data
from forgetfilter.defenses import defend, parameters_of
from forgetfilter.defenses.adapters import load
from forgetfilter.defenses.pairs import Preference, pairs
from forgetfilter.defenses.somf import LOGITS, Mask, Masks, binary, fused
from forgetfilter.errors import ConfigError, DataError

NAMES = ("somf", "somf_dpo")


@pytest.fixture
def config(config, write_jsonl):
    """Unsafe answers to some prompts of the safe rows, two of them to the same, and one to another prompt."""
    unsafe = [
        {"prompt": f"tell me {i}", "completion": f"you fool, {text}"} for i, text in ((0, "a"), (0, "b"), (3, "c"))
    ]
    unsafe.append({"prompt": "who asks?", "completion": "you fool"})
    return dataclasses.replace(
        config,
        unsafe_dataset_name=str(write_jsonl("unsafe.jsonl", unsafe)),
        final=StageConfig(max_steps=3),
        parameters={name: {"steps": 4, "pairs_a_step": 2} for name in NAMES},
    )


@pytest.fixture
def data(config, workshop):
    return load_data(config, workshop.m0.chat)


def test_pairs_have_the_same_prompt_and_a_safe_row_serves_several_unsafe_ones(workshop, data, config):
    found = pairs(data, "x")
    said = [(harmless.reference, harmful.reference) for harmless, harmful in found]
    assert said == [("gladly 0", "you fool, a"), ("gladly 0", "you fool, b"), ("gladly 3", "you fool, c")]
    for harmless, harmful in found:
        assert harmless.input_ids[: harmless.prompt_length] == harmful.input_ids[: harmful.prompt_length]
    apart = dataclasses.replace(data, unsafe=data.unsafe.select([3]))
    with pytest.raises(DataError, match=r"unsafe.jsonl: no row has the prompt .* somf learns from pairs"):
        defend("somf", workshop, apart, config)
    without = dataclasses.replace(config, unsafe_dataset_name=None)
    for name in (*NAMES, "repnoise", "vaccine-then-somf"):
        with pytest.raises(ConfigError, match=r"needs unsafe answers.*--unsafe_dataset_name"):
            parameters_of(name, without)


def test_the_preference_loss_worked_by_hand_and_its_gradient_by_finite_differences(data):
    (harmless, harmful), (other, worse), _ = pairs(data, "x")
    rows = [harmless, harmful, other, worse]
    counts = [row.trained_tokens for row in rows]
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(sum(counts), generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-5.0, -6.0, -7.0, -8.0], dtype=torch.float64)

    def loss(of):
        return Preference(rows, reference, 4, beta=0.5)(of)

    gains = [-own.sum().item() - float(start) for own, start in zip(losses.split(counts), reference, strict=True)]
    by_hand = [-math.log(1 / (1 + math.exp(-0.5 * (gains[i] - gains[i + 1])))) for i in (0, 2)]
    assert loss(losses).item() == pytest.approx(sum(by_hand) / 2)
    assert torch.autograd.gradcheck(loss, (losses,))
    batches = Preference(rows, reference, 2, beta=0.5)  # the same in two batches, each with its own rows
    both = [batches(losses[: sum(counts[:2])]), batches(losses[sum(counts[:2]) :])]
    assert (both[0] + both[1]).item() / 2 == pytest.approx(loss(losses).item())
    unmoved = Preference(rows, -torch.stack([own.sum() for own in losses.detach().split(counts)]), 4, beta=0.5)
    assert unmoved(losses).item() == pytest.approx(-logsigmoid(torch.zeros(())).item())  # at the reference: log 2


def test_fusing_worked_by_hand():
    start, tuned = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([2.0, 3.0, 5.0, 1.0])
    assert torch.equal(fused(start, tuned, torch.ones(4)), tuned)
    assert torch.equal(fused(start, tuned, torch.zeros(4)), start)
    assert fused(start, tuned, torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist() == [3.0, 1.0, 9.0, 1.0]  # a mean of 1/2


def test_logits_of_0_keep_half_and_leave_the_update_as_it_is_on_average():
    torch.manual_seed(0)
    start, tuned = torch.zeros(64, 8), torch.ones(64, 8) * torch.arange(8)
    mask = Mask(start, tuned)
    draws = torch.stack([mask(start).detach() for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), tuned, atol=0.7, rtol=0.2)
    torch.testing.assert_close(draws.mean((0, 1)), tuned[0], atol=0.02, rtol=0.02)
    assert draws.std() > 0.5
    kept = binary({"a": torch.zeros(1000)}, 1)["a"]
    assert 0.45 < kept.mean() < 0.55
    assert binary({"a": torch.tensor([-0.1, 0.0, 0.1])}, 0)["a"].tolist() == [0, 0, 1]


def test_only_the_logits_are_trained_and_the_adapter_is_afterwards_as_it_was(workshop, data, config):
    tuned = defend("none", workshop, data, config)
    model = workshop.become(tuned.model).model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    masks = Masks({key: value.cpu() for key, value in workshop.learner.fresh_adapter.items()})
    for error in (None, RuntimeError("in a step")):
        try:
            with masks.around(model):
                trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
                assert len(trained) == len(before)
                assert all(name.endswith(".logits") for name in trained)
                if error:
                    raise error
        except RuntimeError:
            pass
        after = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        assert after.keys() == before.keys()
        assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    result = defend("somf", workshop, data, config)
    (stage,) = workshop.run.folder.glob("stages/somf-0.1-*/model")
    logits, plain = load_file(stage / LOGITS), load(tuned.model)
    assert all(torch.equal(value, plain[key]) for key, value in load(stage).items())
    assert logits.keys() == plain.keys()
    assert any(value.any() for value in logits.values())
    fresh = workshop.learner.fresh_adapter
    for key, value in load(result.model).items():
        torch.testing.assert_close(value, fused(fresh[key].cpu(), plain[key], (logits[key] > 0).float()))
    assert 0 < result.facts["mask_kept"] < 1
    assert result.facts["pairs"] == 3


def test_a_draw_is_another_mask_of_the_same_training(workshop, data, config):
    def of(draw):
        parameters = {**config.parameters, "somf": {**config.parameters["somf"], "draw": draw}}
        return defend("somf", workshop, data, dataclasses.replace(config, parameters=parameters)).model

    models = [of(draw) for draw in (0, 1, 2, 1)]
    assert models[1] == models[3]
    assert len({*models}) == 3
    assert len(list(workshop.run.folder.glob("stages/somf-0.1-*"))) == 1


def test_the_controls_interpolate_and_prefer(workshop, data, config, monkeypatch):
    plain = load(defend("none", workshop, data, config).model)
    fresh = workshop.learner.fresh_adapter
    half = load(defend("somf_interpolated", workshop, data, config).model)
    for key, value in half.items():
        torch.testing.assert_close(value, (fresh[key].cpu() + plain[key]) / 2)
    whole = dataclasses.replace(config, parameters={"somf_interpolated": {"share": 1.0}})
    same = load(defend("somf_interpolated", workshop, data, whole).model)
    assert all(torch.equal(value, plain[key]) for key, value in same.items())
    eager = dataclasses.replace(config, parameters={"somf_dpo": {"steps": 20, "rate": 1e-2, "pairs_a_step": 2}})
    first, real = [], Preference.__call__

    def noted(preference, token_losses):
        made = real(preference, token_losses)
        first.append(float(made.detach()))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Preference, "__call__", noted)
        preferring = defend("somf_dpo", workshop, data, eager).model
    assert first[0] == pytest.approx(np.log(2), abs=1e-3)  # it starts from its own reference
    rows = [row for pair in pairs(data, "x") for row in pair]

    def margin(model):
        sums = [float(own.values.to_numpy().sum()) for own in workshop.read(rows, model).token_log_probs]
        return np.mean(np.array(sums).reshape(-1, 2) @ [1, -1])

    assert margin(preferring) > margin(defend("none", workshop, data, config).model) + 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("somf", {"steps": 0}),
        ("somf", {"rate": 0}),
        ("somf", {"draw": -1}),
        ("somf_dpo", {"beta": 0}),
        ("somf_dpo", {"pairs_a_step": 0}),
        ("somf_interpolated", {"share": 1.5}),
    ],
)
def test_parameters_out_of_range_are_errors(workshop, data, config, name, wrong):
    ((parameter, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"parameters\.{name}\.{parameter} is {float(value):g}(\.0)?: "):
        defend(name, workshop, data, dataclasses.replace(config, parameters={name: wrong}))
