"""A base model in 4 bits: adapters are trained on it, and what needs whole weights is refused."""

import dataclasses
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_bitsandbytes
from safetensors.torch import load_file, save_file
from test_models import ROWS, example, scores_alone
from tiny_models import tiny_config, tiny_model
from torch import nn

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.defenses import parameters_of
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.forgetting import ForgetFilter, finetune
from forgetfilter.m0 import M0
from forgetfilter.model.weights import _sixteen_bits, load_model
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

EXAMPLES = [example(row) for row in ROWS]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def named(request, config, tokenizer, tmp_path):
    """A model in 4 bits, and a workshop of it."""
    model = tiny_model(tiny_config(request.param))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return model, workshop(dataclasses.replace(config, load_in_4bit=True, model_name_or_path=str(tmp_path / "model")))


def workshop(config):
    return Workshop(M0.named(config), config, Run.start(config, {}))


def rounded(model):
    """The model with each linear layer but the output layer rounded to 4 bits and back, in blocks of 64 entries."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers.pytorch_utils import Conv1D

    kept = {model.get_output_embeddings()}
    for layer in {layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D))} - kept:
        turned = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        back = dequantize_4bit(*quantize_4bit(turned.contiguous(), quant_type="nf4"))
        layer.weight.data = back.T if isinstance(layer, Conv1D) else back
    return model


@needs_bitsandbytes
def test_scores_are_those_of_the_rounded_model(named):
    model, shop = named
    whole = [scores_alone(model, row).mean() for row in ROWS]
    expected = [scores_alone(rounded(model), row).mean() for row in ROWS]
    found = shop.read(EXAMPLES).log_likelihood
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert 1e-3 < np.abs(found - whole).max() < 0.5


@pytest.mark.parametrize(
    ("stored", "turned"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "mxfp4"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
        ({"quant_method": "nosuch"}, False),
        (None, False),
    ],
)
def test_weights_in_few_bits_are_turned_to_16_where_their_kind_allows_it(stored, turned):
    found = _sixteen_bits(SimpleNamespace(quantization_config=stored))
    assert ("quantization_config" in found) == turned
    assert not turned or found["quantization_config"].dequantize


@needs_bitsandbytes
def test_an_adapter_on_a_base_stored_in_4_bits_is_not_rounded_away(config, tokenizer, tmp_path):
    whole, base = tiny_model(tiny_config("llama")), tmp_path / "base"
    whole.save_pretrained(base)
    tokenizer.save_pretrained(base)
    shop = workshop(dataclasses.replace(config, load_in_4bit=True, model_name_or_path=str(base)))
    stored = tmp_path / "stored"
    load_model(base, shop.config, in_4bit=True).save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    adapter = shop.train("noisy", EXAMPLES, shop.config.noisy_stage(len(EXAMPLES)))
    expected = shop.read(EXAMPLES, adapter).log_likelihood
    described = adapter / "adapter_config.json"
    described.write_text(described.read_text().replace(str(base), str(stored)))
    merged = load_model(adapter, ForgetFilterConfig(dtype="float32")).eval()
    found = [scores_alone(merged, row).mean() for row in ROWS]
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_weights_stored_in_8_bits_are_turned_to_16_and_trained_on(config, tokenizer, tmp_path):
    model, folder = tiny_model(tiny_config("llama")), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[f"{name}_scale_inv"] = torch.ones(weights[name].shape[0] // 16, weights[name].shape[1] // 16)
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        model.get_submodule(name.removesuffix(".weight")).weight.data = weights[name].float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(described))
    shop = workshop(dataclasses.replace(config, model_name_or_path=str(folder)))
    expected = [scores_alone(model, row).mean() for row in ROWS]
    np.testing.assert_allclose(shop.read(EXAMPLES).log_likelihood, expected, atol=2e-2)
    assert all(weight.dtype != torch.float8_e4m3fn for weight in shop.learner.model.parameters())
    trained = shop.train("noisy", EXAMPLES, config.noisy_stage(len(EXAMPLES)))
    assert (shop.read(EXAMPLES, trained).log_likelihood > expected).all()


@needs_bitsandbytes
def test_every_adapter_is_trained_and_adapters_alone_are_saved(named):
    _, shop = named
    before = shop.read(EXAMPLES)  # what is read first must not change the weights that are trained on
    frozen = {name: weight.clone() for name, weight in shop.learner.model.named_parameters() if "lora_" not in name}
    folder = shop.train("noisy", EXAMPLES, shop.config.noisy_stage(len(EXAMPLES)))
    after = dict(shop.learner.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())
    saved = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)
    assert (shop.read(EXAMPLES, folder).log_likelihood > before.log_likelihood).all()
    again = Workshop(shop.m0, shop.config, shop.run)
    assert again.train("noisy", EXAMPLES, shop.config.noisy_stage(len(EXAMPLES))) == folder
    assert "learner" not in vars(again)
    gradients = dict(shop.gradients(EXAMPLES))
    assert len(gradients) == len(ROWS)
    assert all(np.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())


@needs_bitsandbytes
def test_an_adapter_is_m0_in_4_bits_with_its_base(named, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, shop = named
    for name, weight in shop.learner.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    shop.learner.save(tmp_path / "adapter")
    own = dataclasses.replace(
        shop.config, model_name_or_path=str(tmp_path / "adapter"), output_dir=str(tmp_path / "again")
    )
    merged = rounded(load_model(tmp_path / "adapter", own).eval())
    expected = [scores_alone(merged, row).mean() for row in ROWS]
    np.testing.assert_allclose(workshop(own).read(EXAMPLES).log_likelihood, expected, atol=1e-4)


@needs_bitsandbytes
def test_a_run_goes_on_in_4_bits_alone(config):
    own = dataclasses.replace(config, load_in_4bit=True, filter="probe")
    run = ForgetFilter(own).fit().run
    assert run.config().load_in_4bit
    model = finetune(run)
    assert {path.suffix for path in model.glob("*adapter*")} == {".safetensors", ".json"}
    assert not [*model.glob("model*.safetensors")]
    ForgetFilter(own).fit()
    assert finetune(run) == model
    with pytest.raises(RunError, match="load_in_4bit"):
        ForgetFilter(dataclasses.replace(own, load_in_4bit=False)).fit()


def test_stages_of_whole_models_keep_their_names():
    assert "load_in_4bit" not in ForgetFilterConfig().training()
    assert ForgetFilterConfig(load_in_4bit=True).training()["load_in_4bit"] is True


def test_4_bits_without_the_package_are_refused_before_any_work(config, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes"):
        ForgetFilter(dataclasses.replace(config, load_in_4bit=True)).fit()


@pytest.mark.parametrize("settings", [{"use_peft": False}, {"alignment_dataset_name": "safe.jsonl"}])
def test_what_needs_whole_weights_is_refused(settings):
    with pytest.raises(ConfigError, match=f"load_in_4bit .*{next(iter(settings))}"):
        ForgetFilterConfig(load_in_4bit=True, **settings)


@pytest.mark.parametrize("name", ["vaccine", "repnoise", "vaccine-then-lisa", "probe-then-int8", "int4"])
def test_defenses_that_make_another_m0_are_refused(name):
    config = ForgetFilterConfig(load_in_4bit=True, unsafe_dataset_name="unsafe.jsonl")
    with pytest.raises(ConfigError, match="does not work with load_in_4bit"):
        parameters_of(name, config)
    assert parameters_of("probe-then-safe_lora", config)
