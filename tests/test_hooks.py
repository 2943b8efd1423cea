"""What a method does inside a training: before it, after each step, in its loss, and in a second pass."""

import contextlib
import dataclasses
import sys

import pytest
import torch
from safetensors.torch import load_file

from forgetfilter.data.loading import load_data
from forgetfilter.hooks import Hooks


@pytest.fixture
def rows(workshop, config):
    return load_data(config, workshop.m0.chat).noisy.trainable()


@pytest.fixture(params=[1, 2])
def settings(config, request):
    """Six steps, of one batch or of two."""
    return dataclasses.replace(
        config.noisy_stage(16), per_device_train_batch_size=4, gradient_accumulation_steps=request.param
    )


FACTOR = 1.0


def by_factor(losses):
    return FACTOR * losses.mean()


def test_with_another_constant_beside_the_hooks_it_is_another_stage(workshop, rows, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings, hooks = dataclasses.replace(config.noisy_stage(16), max_steps=2), Hooks(loss=by_factor)
    first = workshop.train("scaled", rows, settings, hooks=hooks)
    assert workshop.train("scaled", rows, settings, hooks=hooks) == first
    base = workshop.base("scaled", rows, settings, hooks).folder
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    assert workshop.train("scaled", rows, settings, hooks=hooks) != first
    assert workshop.base("scaled", rows, settings, hooks).folder != base


def test_hooks_of_no_file_have_no_constants():
    assert Hooks(each_step=[].append).constants() == {}


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_a_second_pass_where_nothing_was_moved_trains_as_one_pass(workshop, rows, settings):
    found = []

    def still(model):
        found.append({name: weight.grad.clone() for name, weight in trained(model).items()})
        return contextlib.nullcontext()

    plain = workshop.train("plain", rows, settings)
    twice = workshop.train("twice", rows, settings, hooks=Hooks(perturbed=still))
    assert twice != plain
    one, two = adapter(plain), adapter(twice)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert len(found) == 6 * settings.gradient_accumulation_steps  # once in each pass over a batch
    for gradients in found:
        assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    steps = workshop.run.manifest["stages"]
    assert steps[plain.parent.name]["tokens"] == steps[twice.parent.name]["tokens"]


def test_each_batchs_first_pass_leaves_its_own_gradients_alone(workshop, rows, settings):
    """Rows in order, a rate of next to nothing: the same rows leave the same gradients in every batch of a step."""
    found = []

    def note(model):
        found.append({name: weight.grad.clone() for name, weight in trained(model).items()})
        return contextlib.nullcontext()

    same = dataclasses.replace(settings, learning_rate=1e-12)
    workshop.train("still", rows[:4] * 12, same, hooks=Hooks(perturbed=note), in_order=True)
    first, *others = found
    for gradients in others:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, first[name], atol=1e-7, rtol=1e-4)


def test_a_second_pass_elsewhere_trains_otherwise(workshop, rows, settings):
    """As sharpness-aware minimisation does: up the gradient, and back."""

    @contextlib.contextmanager
    def uphill(model):
        weights = list(trained(model).values())
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        moves = [0.5 * weight.grad / norm for weight in weights]
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.add_(move)
        yield
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                weight.sub_(move)

    plain, sharp = (
        adapter(workshop.train(name, rows, settings, hooks=hooks))
        for name, hooks in (("plain", None), ("sharp", Hooks(perturbed=uphill)))
    )
    assert all(torch.isfinite(value).all() for value in sharp.values())
    assert any(not torch.allclose(value, sharp[name], atol=1e-3) for name, value in plain.items())


def test_the_second_passs_gradients_alone_are_used(workshop, rows, settings):
    """Where A is 0 and B is not, B has no gradient and A has one; M0's own adapter has it the other way about."""

    @contextlib.contextmanager
    def elsewhere(model):
        weights = trained(model)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        assert any(weight.grad.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.fill_(0.0 if "lora_A" in name else 0.1)
        yield
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])

    one_step = dataclasses.replace(settings, max_steps=1, warmup_steps=0)
    model = adapter(workshop.train("elsewhere", rows, one_step, hooks=Hooks(perturbed=elsewhere)))
    fresh = workshop.learner.fresh_adapter
    assert model.keys() == fresh.keys()
    for name, value in model.items():
        assert torch.equal(value, fresh[name].cpu()) == ("lora_B" in name), name


def test_hooks_are_called_before_the_first_step_and_after_each(workshop, rows, config):
    called = []

    def penalty():
        called.append("penalty")

    hooks = Hooks(before=lambda: called.append("before"), each_step=called.append, penalty=penalty)
    plain = workshop.train("plain", rows, config.noisy_stage(16))
    hooked = workshop.train("hooked", rows, config.noisy_stage(16), hooks=hooks)
    assert called == ["before", *(call for step in range(1, 7) for call in ("penalty", step))]
    for name, value in adapter(plain).items():  # a penalty of None costs nothing
        assert torch.equal(value, adapter(hooked)[name]), name


def test_a_stage_with_hooks_starts_anew_after_an_interruption(workshop, rows, config):
    settings = dataclasses.replace(config.noisy_stage(16), max_steps=13)

    def train(seen):
        def after(step):
            seen.append(step)
            if step == 12 and stops:
                raise KeyboardInterrupt

        return workshop.train("looked", rows, settings, hooks=Hooks(each_step=after))

    stops, first, second = True, [], []
    with pytest.raises(KeyboardInterrupt):
        train(first)
    assert not list(workshop.run.folder.glob("stages/looked-*/checkpoints/checkpoint-*"))  # nobody could go on from it
    stops = False
    train(second)
    assert (first, second) == ([*range(1, 13)], [*range(1, 14)])
    assert not list(workshop.run.folder.glob("stages/looked-*/checkpoints"))
    train(second)
    assert len(second) == 13
