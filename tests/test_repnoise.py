"""RepNoise: each part of its loss against cases worked by hand, its gradient, and the M0 that it makes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoConfig

from forgetfilter.data.loading import load_data
from forgetfilter.data.tokenization import IGNORED
from forgetfilter.defenses import PREPARATIONS, defend
from forgetfilter.defenses.pairs import pairs
from forgetfilter.defenses.repnoise import Batch, Noising, discrepancy, last_norm, mlps, require_mlps
from forgetfilter.defenses.vaccine import require_attention
from forgetfilter.errors import ModelError
from forgetfilter.model.learner import load_learner


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(config, write_jsonl):
    unsafe = [{"prompt": f"tell me {i}", "completion": f"never, {'you fool ' * (i % 3)}{i}"} for i in range(6)]
    return dataclasses.replace(config, unsafe_dataset_name=str(write_jsonl("unsafe.jsonl", unsafe)))


@pytest.fixture
def data(config, workshop):
    return load_data(config, workshop.m0.chat)


@pytest.fixture
def model(config, workshop):
    """The tiny model itself, in double precision."""
    whole = dataclasses.replace(config, use_peft=False)
    return load_learner(workshop.m0.folder, workshop.m0.tokenizer, whole).model.double()


@pytest.fixture
def sides(data, model):
    good, bad = zip(*pairs(data, "x")[:3], strict=True)
    return Batch(good, bad, 1, model.device), Batch(bad, good, 1, model.device)


def test_the_discrepancy_worked_by_hand():
    one, other = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    # Two points: a width of 2 * 9 / (4 - 2) = 9, over 4, times 1, 2, 4, 8, 16. A kernel is 1 within the samples.
    kernels = [torch.exp(torch.tensor(-9 / (9 / 4 * 2**i), dtype=torch.float64)) for i in range(5)]
    assert discrepancy(one, other).item() == pytest.approx(2 * (5 - sum(kernels).item()))
    same = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert discrepancy(same, same).item() == pytest.approx(0, abs=1e-6)
    assert discrepancy(same, same + 5) > discrepancy(same, same + 1) > 0


def test_tokens_count_where_both_answers_differ_and_neither_prompts_nor_fillers_do(data, sides):
    good, bad = sides
    for number, (harmless, harmful) in enumerate(pairs(data, "x")[:3]):
        for row, other, batch in ((harmless, harmful, good), (harmful, harmless, bad)):
            marks = batch.counts[number].tolist()
            assert batch.input_ids[number, : len(row.input_ids)].tolist() == row.input_ids
            assert batch.attention_mask[number].sum() == len(row.input_ids)
            for place, mark in enumerate(marks):
                own, across = row.input_ids[place : place + 1], other.input_ids[place : place + 1]
                trained = place < len(row.labels) and row.labels[place] != IGNORED
                assert mark == (trained and own != across)


def test_the_loss_of_a_batch_equals_a_slow_one(data, model, sides):
    """Every token by itself, as the paper's formula has it."""
    good, bad = sides
    learnt = pairs(data, "x")[:3]
    outputs = []
    handles = [mlp.register_forward_hook(lambda *of: outputs.append(of[2])) for mlp in mlps(model)]
    with torch.no_grad():
        runs = []
        for batch in (good, bad):
            outputs.clear()
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
            runs.append((found, list(outputs)))
        for handle in handles:
            handle.remove()

        def mean_loss(batch, logits):
            places = [(row, t) for row, t in batch.counts.nonzero().tolist()]
            own = [-log_softmax(logits[row, t - 1].float(), -1)[batch.input_ids[row, t]] for row, t in places]
            return torch.stack(own).mean()

        (clean, _), (harmful, activations) = runs
        head, norm = model.get_output_embeddings(), model.model.norm
        assert last_norm(model) is norm
        states = harmful.hidden_states
        assert len(states) == 3  # the embeddings' and two layers'
        torch.testing.assert_close(head(states[-1]), harmful.logits)  # normed once, not twice
        read = [head(norm(states[0])), head(norm(states[1])), head(states[2])]
        total = sum(mean_loss(bad, logits) for logits in [harmful.logits, *read])
        torch.manual_seed(5)
        marks = bad.counts[..., None]
        noises = [torch.randn_like(own, dtype=torch.float32) for own in activations]
        far = [
            discrepancy((own.float() * marks).flatten(1), (noise * marks).flatten(1))
            for own, noise in zip(activations, noises, strict=True)
        ]
        slow = mean_loss(good, clean.logits) + 0.3 * sum(far) / 2 - 0.7 * torch.log(total / 3 + 1)
        noising = Noising(learnt, 3, alpha=0.7, beta=0.3, padding=1)
        with noising.around(model):
            torch.manual_seed(5)
            quick = noising.objective(model)
    assert quick.item() == pytest.approx(slow.item(), rel=1e-5)


def test_its_gradient_is_the_losss_by_finite_differences(data, model):
    learnt = pairs(data, "x")[:3]
    weight = model.model.layers[0].mlp.down_proj.weight

    def loss():
        torch.manual_seed(2)
        noising = Noising(learnt, 3, alpha=1.0, beta=0.5, padding=1)
        with noising.around(model):
            return noising.objective(model)

    loss().backward()
    way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = (weight.grad * way).sum().item()
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            weight += step * way
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)


def test_a_mixture_of_experts_is_refused_before_any_work(tmp_path, workshop, data):
    config = AutoConfig.for_model(
        "qwen2_moe", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    other = SimpleNamespace(m0=SimpleNamespace(folder=tmp_path), config=workshop.config)
    require_attention(other, data, {})
    with pytest.raises(ModelError, match="mixture of experts"):
        require_mlps(other, data, {})


def test_hooks_are_gone_afterwards_however_many_steps_there_were(data, model):
    noising = Noising(pairs(data, "x"), 2, alpha=1.0, beta=0.5, padding=1)
    with noising.around(model):
        for _ in range(2):
            noising.objective(model)
            assert len(noising.outputs) == 2  # those of one pass
        assert all(len(mlp._forward_hooks) == 1 for mlp in mlps(model))
    with pytest.raises(RuntimeError, match="in a step"), noising.around(model):
        raise RuntimeError("in a step")
    assert not any(mlp._forward_hooks for mlp in mlps(model))
    assert noising.outputs == []


def test_harmful_answers_get_unlikelier_and_the_new_m0_is_made_once(workshop, data, config):
    config = dataclasses.replace(config, parameters={"repnoise": {"rate": 3e-3, "epochs": 6, "pairs_a_step": 3}})
    learnt = pairs(data, "x")
    good, bad = ([pair[side] for pair in learnt] for side in (0, 1))
    before = workshop.read(good).log_likelihood.mean() - workshop.read(bad).log_likelihood.mean()
    result = defend("repnoise-then-base", workshop, data, config)
    noised = workshop.on(result.m0)
    after = noised.read(good).log_likelihood.mean() - noised.read(bad).log_likelihood.mean()
    assert after > before + 0.05
    first, second = (load_file(of / "model.safetensors") for of in (workshop.m0.folder, result.m0.folder))
    assert any(not torch.equal(value, second[name]) for name, value in first.items() if "mlp" in name)
    stamp = (result.m0.folder / "model.safetensors").stat().st_mtime_ns
    again = defend("repnoise", workshop, data, config)
    assert (again.m0.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.model is not None


def test_the_control_learns_the_harmless_answers_of_the_same_pairs(workshop, data, config):
    plain = PREPARATIONS["repnoise_plain"](workshop, data, config)
    same = PREPARATIONS["repnoise"](workshop, data, config, alpha=0.0, beta=0.0)
    assert plain.m0.sha256 == same.m0.sha256
    assert plain.m0.sha256 not in (workshop.m0.sha256, PREPARATIONS["repnoise"](workshop, data, config).m0.sha256)


def test_a_step_costs_what_goes_through_the_model_and_its_reading_of_every_hidden_state(
    workshop, data, config, monkeypatch
):
    """Two blocks: the harmful side is read to logits three times more; the control reads the harmless side alone."""
    seen, forward = [], Noising._forward

    def counted(noising, model, batch, **more):
        seen.append(int(batch.attention_mask.sum()))
        return forward(noising, model, batch, **more)

    monkeypatch.setattr(Noising, "_forward", counted)
    model = workshop.learner.model
    head = model.get_output_embeddings().weight.numel() / model.num_parameters()
    costs, tokens = {}, {}
    for name in ("repnoise", "repnoise_plain"):
        seen.clear()
        with workshop.account.measuring() as found:
            PREPARATIONS[name](workshop, data, config)
        costs[name], tokens[name] = found.passes, sum(seen)
    learnt = pairs(data, "repnoise")
    read = sum(bad.trained_tokens for _, bad in learnt) / sum(len(bad.input_ids) for _, bad in learnt)
    more = read * head * 3 * (tokens["repnoise"] - tokens["repnoise_plain"])
    expected = (tokens["repnoise"] + more) / tokens["repnoise_plain"]
    assert costs["repnoise"] / costs["repnoise_plain"] == pytest.approx(expected, rel=0.05)


def test_with_no_weight_on_the_harmful_ones_it_is_a_finetuning_on_what_differs_in_the_harmless(data, model, sides):
    good, _ = sides
    noising = Noising(pairs(data, "x")[:3], 3, alpha=0.0, beta=0.0, padding=1)
    with noising.around(model), torch.no_grad():
        found = noising.objective(model)
        logits = model(input_ids=good.input_ids, attention_mask=good.attention_mask).logits
    marks = good.counts[:, 1:]
    plain = cross_entropy(logits[:, :-1][marks].float(), good.input_ids[:, 1:][marks])
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
