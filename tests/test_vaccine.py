"""Vaccine: how far and where it moves hidden states, what it leaves behind, and its controls."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from forgetfilter import workshop as workshops
from forgetfilter.config import StageConfig
from forgetfilter.data.loading import load_data
from forgetfilter.defenses import PREPARATIONS, defend
from forgetfilter.defenses.vaccine import Perturbation, attention_blocks
from forgetfilter.model import training
from forgetfilter.model.batches import label_logits


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(config):
    return dataclasses.replace(config, final=StageConfig(max_steps=3))


@pytest.fixture
def data(config, workshop):
    return load_data(config, workshop.m0.chat)


def weights(workshop):
    return load_file(workshop.m0.folder / "model.safetensors")


def loss_of(learner, data):
    batch = learner.collate(*zip(*[(row.input_ids, row.labels) for row in data.noisy.examples[:4]], strict=True))
    logits, targets = label_logits(learner.model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), targets)


@pytest.mark.parametrize("random", [False, True])
def test_all_moves_together_have_a_norm_of_rho_and_go_to_every_block(learner, workshop, config, random):
    data = load_data(config, workshop.m0.chat)
    moves = Perturbation(0.25, random=random)
    blocks = attention_blocks(learner.model)
    assert len(blocks) == 2
    outputs = []
    with moves.around(learner.model):
        loss_of(learner, data).backward()
        caught = dict(moves.gradients)
        handles = [block.register_forward_hook(lambda *args: outputs.append(args[2][0].detach())) for block in blocks]
        with moves.perturbed(learner.model):
            norm = torch.stack([move.norm() for move in moves.moves.values()]).norm()
            assert norm.item() == pytest.approx(0.25, rel=1e-5)
            if not random:
                whole = torch.stack([gradient.norm() for gradient in caught.values()]).norm()
                for block, gradient in caught.items():  # one norm over all blocks, so a block has its share of it
                    torch.testing.assert_close(moves.moves[block], 0.25 * gradient / whole, atol=1e-6, rtol=1e-4)
            first_move = moves.moves[0]
            moved = loss_of(learner, data)
        moved_outputs = list(outputs)
        outputs.clear()
        assert (moves.moves, moves.gradients) == ({}, {})
        plain = loss_of(learner, data)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(moved_outputs[0] - outputs[0], first_move, atol=1e-5, rtol=1e-3)
    if not random:
        assert moved > plain  # along the gradient of the loss
    learner.model.zero_grad()


def test_a_block_below_which_nothing_is_trained_is_moved_too(learner, workshop, config):
    data, moves = load_data(config, workshop.m0.chat), Perturbation(0.25)
    trained = [name for name, own in learner.model.named_parameters() if own.requires_grad]
    for name, weight in learner.model.named_parameters():
        weight.requires_grad_(name in trained and ".layers.1." in name)
    try:
        with moves.around(learner.model):
            loss_of(learner, data).backward()
            assert sorted(moves.gradients) == [0, 1]
            with torch.no_grad():
                loss_of(learner, data)
    finally:
        for name, weight in learner.model.named_parameters():
            weight.requires_grad_(name in trained)
        learner.model.zero_grad()


def test_the_caught_gradient_is_that_of_the_loss_by_finite_differences(learner, workshop, config):
    data = load_data(config, workshop.m0.chat)
    moves = Perturbation(1.0)
    with moves.around(learner.model):
        loss_of(learner, data).backward()
        gradients = dict(moves.gradients)
        generator = torch.Generator().manual_seed(3)
        way = torch.randn(gradients[1].shape, generator=generator)
        values = []
        for step in (1e-2, -1e-2):
            moves.moves = {1: step * way}
            values.append(loss_of(learner, data).item())
        moves.moves = {}
    slope = (values[0] - values[1]) / 2e-2
    assert slope == pytest.approx((gradients[1] * way).sum().item(), rel=2e-2)
    learner.model.zero_grad()


def test_hooks_are_gone_afterwards_also_after_an_error(learner):
    def hooks():
        return [len(block._forward_hooks) for block in attention_blocks(learner.model)]

    moves = Perturbation(1.0)
    with moves.around(learner.model):
        assert hooks() == [1, 1]
    assert hooks() == [0, 0]
    with pytest.raises(RuntimeError, match="in a step"), moves.around(learner.model):
        raise RuntimeError("in a step")
    assert hooks() == [0, 0]


def test_a_perturbation_of_0_is_the_plain_training_bit_for_bit_and_another_is_not(workshop, data, config):
    def prepared(name, **given):
        found = PREPARATIONS[name](workshop, data, config, **given)
        return weights(found)

    plain = prepared("vaccine_plain")
    still, moved, noise = (
        prepared("vaccine", rho=0.0),
        prepared("vaccine", rho=1.0),
        prepared("vaccine_random", rho=1.0),
    )
    assert all(torch.equal(still[name], value) for name, value in plain.items())
    for one, other in ((plain, moved), (plain, noise), (moved, noise)):
        assert any(not torch.equal(one[name], value) for name, value in other.items())


def test_a_step_makes_two_passes_over_each_batch(workshop, data, config, monkeypatch):
    passes = []
    real = training.label_logits

    def note(model, batch):
        passes.append(batch["input_ids"].shape)
        return real(model, batch)

    monkeypatch.setattr(training, "label_logits", note)
    PREPARATIONS["vaccine_plain"](workshop, data, config)
    once = list(passes)
    passes.clear()
    PREPARATIONS["vaccine"](workshop, data, config)
    assert passes == [shape for shape in once for _ in range(2)]


def test_it_costs_twice_as_much_also_where_it_is_found_again(workshop, data, config):
    def cost(name):
        with workshop.account.measuring() as found:
            PREPARATIONS[name](workshop, data, config)
        return found.passes

    plain = cost("vaccine_plain")
    assert plain > 0
    assert [cost("vaccine") for _ in range(2)] == [pytest.approx(2 * plain, rel=1e-4)] * 2


def test_the_finetuning_starts_from_the_new_m0_which_is_trained_once(workshop, data, config, monkeypatch):
    trained = []
    real = workshops.train
    monkeypatch.setattr(workshops, "train", lambda *args, **more: (trained.append(args[4]), real(*args, **more))[1])
    result = defend("vaccine", workshop, data, config)
    plain = defend("none", workshop, data, config)
    assert trained == ["vaccine-1.0", "none stage", "none stage"]
    assert result.model != plain.model
    assert result.m0.sha256 != workshop.m0.sha256
    assert plain.m0 is None
    again = defend("vaccine", workshop, data, config)
    assert (again.model, again.m0.folder, len(trained)) == (result.model, result.m0.folder, 3)
    alone = defend("vaccine-then-base", workshop, data, config)
    assert (alone.model, alone.m0.folder) == (None, result.m0.folder)
