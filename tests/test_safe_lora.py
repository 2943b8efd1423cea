"""Safe LoRA: the projection against cases worked by hand, which layers it takes, its control, and its errors."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from tiny_models import tiny_config
from tiny_models import tiny_model as build

from forgetfilter.alignment import aligned
from forgetfilter.config import StageConfig
from forgetfilter.data.loading import load_data
from forgetfilter.defenses import defend, require_inputs
from forgetfilter.defenses.adapters import Weights, load, updates
from forgetfilter.defenses.safe_lora import project, projection
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.m0 import M0
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

A, B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


@pytest.fixture
def config(config, tiny_model, tmp_path):
    """M0's layers before the alignment differ from it in one direction of the outputs, each layer in another."""
    weights = load_file(tiny_model / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers" in name:
            weight += torch.randn(len(weight), 1, generator=generator) @ torch.randn(
                1, weight.shape[1], generator=generator
            )
    folder = tmp_path / "unaligned"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return dataclasses.replace(
        config,
        final=StageConfig(max_steps=3),
        parameters={"safe_lora": {"base": str(folder)}, "safe_lora_scaled": {"base": str(folder)}},
    )


@pytest.fixture
def data(config, workshop):
    return load_data(config, workshop.m0.chat)


def repaired(name, workshop, data, config, **changes):
    parameters = {**config.parameters, name: {**config.parameters.get(name, {}), **changes}}
    return defend(name, workshop, data, dataclasses.replace(config, parameters=parameters))


def test_p_is_v_times_its_transpose_over_vs_norm_and_the_true_projector_changes_nothing_inside():
    change = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    torch.testing.assert_close(projection(change), torch.tensor([[9.0, 12.0], [12.0, 16.0]]) / 5)  # V's norm is 5
    true = projection(change, 1)
    torch.testing.assert_close(true, torch.tensor([[0.36, 0.48], [0.48, 0.64]]))
    torch.testing.assert_close(true @ true, true)
    torch.testing.assert_close(true @ change, change)
    assert not projection(torch.zeros(2, 3)).any()


def test_cosines_and_the_choice_of_layers_worked_by_hand(tmp_path):
    """V = diag(1, 0) in each layer: of B the first row stays, and the cosine is its share of the norm."""
    ups = {"one": [[1.0], [0.0]], "two": [[0.6], [0.8]], "three": [[0.0], [1.0]]}
    tensors = {}
    for layer, up in ups.items():
        tensors |= {A.format(layer): torch.tensor([[2.0, 0.0]]), B.format(layer): torch.tensor(up)}
    for name, value in (("aligned", torch.diag(torch.tensor([1.0, 0.0]))), ("base", torch.zeros(2, 2))):
        (tmp_path / name).mkdir()
        weights = {f"{layer}.weight": value.clone() for layer in ups}
        save_file(weights, tmp_path / name / "model.safetensors")
    aligned, base = Weights(tmp_path / "aligned"), Weights(tmp_path / "base")
    found = project(tensors, aligned, base)
    assert found.cosines == {"one": 1.0, "two": 0.6, "three": 0.0}
    assert found.layers == ["three"]
    assert not found.tensors[B.format("three")].any()
    assert torch.equal(found.tensors[B.format("two")], tensors[B.format("two")])
    assert found.shrink == pytest.approx((2 / 3) ** 0.5)
    wider = project(tensors, aligned, base, threshold=0.6)
    assert wider.layers == ["three", "two"]
    torch.testing.assert_close(wider.tensors[B.format("two")], torch.tensor([[0.6], [0.0]]))
    for count in range(5):  # by number, in the order of the cosines
        assert project(tensors, aligned, base, layers=count).layers == ["three", "two", "one"][:count]
    with pytest.raises(ModelError, match="no direction"):
        project(tensors, base, base)


def test_no_layer_is_none_bit_for_bit_and_more_layers_leave_less_of_the_update(workshop, data, config):
    plain = load(defend("none", workshop, data, config).model)
    none = repaired("safe_lora", workshop, data, config, layers=0, directions=1)
    untouched = load(none.model)
    assert untouched.keys() == plain.keys()
    assert all(torch.equal(untouched[name], value) for name, value in plain.items())
    assert none.facts["shrink"] == 1
    counts = [0, 3, 7, 14]
    shrinks = []
    for count in counts:
        result = repaired("safe_lora", workshop, data, config, layers=count, directions=1)
        assert (result.facts["projected_layers"], result.facts["of_layers"]) == (count, 14)
        shrinks.append(result.facts["shrink"])
    assert spearmanr(counts, shrinks).statistic == -1


def test_the_control_has_the_norm_and_another_direction(workshop, data, config):
    def norm(tensors):
        return sum(float(update.norm()) ** 2 for update in updates(tensors)) ** 0.5

    plain = load(defend("none", workshop, data, config).model)
    first = repaired("safe_lora", workshop, data, config)
    projected, scaled = load(first.model), load(repaired("safe_lora_scaled", workshop, data, config).model)
    assert norm(projected) == pytest.approx(norm(scaled), rel=1e-4)
    assert norm(projected) == pytest.approx(norm(plain) * first.facts["shrink"], rel=1e-3)
    for name, value in plain.items():
        if "lora_A" in name:
            assert torch.equal(scaled[name], value)
        else:
            torch.testing.assert_close(scaled[name], value * norm(projected) / norm(plain), rtol=1e-3, atol=1e-8)
    assert any(not torch.allclose(projected[name], scaled[name], rtol=0.1) for name in plain)


def test_layers_that_hold_their_weights_the_other_way_round_are_projected_onto_directions_of_their_outputs(
    config, tokenizer, tmp_path
):
    model = build(tiny_config("gpt2"))
    for name in ("base", "aligned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for block in model.transformer.h:
                for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                    layer.weight[:, 0] += 1  # the alignment moves the first output alone
    parameters = {"safe_lora": {"base": str(tmp_path / "base"), "layers": 8}}
    config = dataclasses.replace(config, model_name_or_path=str(tmp_path / "aligned"), parameters=parameters)
    workshop = Workshop(M0.named(config), config, Run.start(config, {}))
    data = load_data(config, workshop.m0.chat)
    plain, repaired = (load(defend(name, workshop, data, config).model) for name in ("none", "safe_lora"))
    after = {update.layer: update for update in updates(repaired)}
    for before in updates(plain):
        assert before.up.any()
        assert after[before.layer].up[0].any()
        assert not after[before.layer].up[1:].any()


def test_the_repaired_adapter_is_made_once_and_works_as_any_other(workshop, data, config):
    first = repaired("safe_lora", workshop, data, config)
    stamp = (first.model / "adapter_model.safetensors").stat().st_mtime_ns
    again = repaired("safe_lora", workshop, data, config)
    assert (again.model, again.facts) == (first.model, first.facts)
    assert (first.model / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    rows = data.noisy.examples
    own = workshop.read(rows, first.model).log_likelihood
    plain = workshop.read(rows, defend("none", workshop, data, config).model).log_likelihood
    assert not np.allclose(own, plain, atol=1e-4)
    assert repaired("safe_lora", workshop, data, config, threshold=-1.0).model != first.model


def test_the_direction_is_that_of_the_alignment_data_where_no_base_is_given(config, safe_file, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(config, parameters=None, alignment_dataset_name=str(safe_file))
    m0 = aligned(M0.named(config), config)
    workshop = Workshop(m0, config, Run.start(config, {}))
    result = defend("safe_lora", workshop, load_data(config, m0.chat), config)
    after, before = Weights(m0.folder), Weights(Path(config.model_name_or_path))
    changes = {update.layer: after.of(update.layer) - before.of(update.layer) for update in updates(load(result.model))}
    assert all(torch.linalg.matrix_rank(change, rtol=1e-4) == config.lora_r for change in changes.values())
    assert result.facts["projected_layers"] == len(changes)
    for update in updates(load(result.model)):  # what is left of the update lies in the alignment's two directions
        directions = torch.linalg.svd(changes[update.layer]).U[:, : config.lora_r]
        torch.testing.assert_close(directions @ directions.T @ update.up, update.up, atol=1e-6, rtol=1e-3)


def test_a_defense_before_the_finetuning_is_an_alignment_too(workshop, data, config):
    config = dataclasses.replace(config, parameters=None)
    workshop = Workshop(workshop.m0, config, workshop.run)
    require_inputs("vaccine-then-safe_lora", workshop, data)
    with pytest.raises(ConfigError, match="needs the model before its alignment"):
        require_inputs("none-then-safe_lora", workshop, data)
    for named, error in ((config.model_name_or_path, None), ("no/model", "no/model")):  # M0 is aligned from it
        workshop.config = dataclasses.replace(config, parameters={"safe_lora": {"base": named}})
        with pytest.raises(ModelError, match=error) if error else nullcontext():
            require_inputs("vaccine-then-safe_lora", workshop, data)


def test_files_may_leave_out_the_first_part_of_a_name(tmp_path):
    """As those of GPT-2 on the Hub do."""
    save_file({"h.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).of("transformer.h.0").sum() == 4
    with pytest.raises(ModelError, match="no weight transformer"):
        Weights(tmp_path).of("transformer.h.1")
    longer = tmp_path / "longer"
    longer.mkdir()
    save_file({"transformer.h.0.weight": torch.ones(2, 2)}, longer / "model.safetensors")
    Weights(tmp_path).require_same_shapes(Weights(longer))
    Weights(longer).require_same_shapes(Weights(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: weight[:1], r"has another shape, \[1, "),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is stored as F8_E4M3: give a model in F32"),
    ],
)
def test_a_base_that_is_no_version_of_m0_is_refused_before_any_work(change, says, workshop, data, config, tmp_path):
    base = Path(config.parameters["safe_lora"]["base"])
    weights = load_file(base / "model.safetensors")
    save_file({name: change(weight) for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says):
        require_inputs("none-then-safe_lora", workshop, data)


def test_without_a_model_before_the_alignment_there_is_one_clear_error(workshop, data, config, tmp_path):
    with pytest.raises(ConfigError, match=r"safe_lora needs the model before its alignment.*alignment_dataset_name"):
        defend("safe_lora", workshop, data, dataclasses.replace(config, parameters=None))
    with pytest.raises(ConfigError, match="base finetunes nothing"):
        defend("base-then-safe_lora", workshop, data, config)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"some.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(ModelError, match=r"no weight model\.layers\.0"):
        repaired("safe_lora", workshop, data, config, base=str(other))
    for wrong, said in (({"layers": -1}, "layers is -1"), ({"directions": 0}, "directions is 0")):
        with pytest.raises(ConfigError, match=rf"parameters\.safe_lora\.{said}: "):
            repaired("safe_lora", workshop, data, config, **wrong)
