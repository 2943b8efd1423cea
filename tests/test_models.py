"""M0 is the model that was named, of whatever architecture, and reads row by row; or it is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import PLACES, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification, GenerationConfig

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.data.turns import Turn
from forgetfilter.errors import DataError, ModelError
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.m0 import M0
from forgetfilter.model.generation import complete
from forgetfilter.model.reading import read
from forgetfilter.model.weights import load_model
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

ROWS = [[*range(5, 45)], [*range(5, 10), 30, 31], [5, 6, 7, *range(40, 60)]]
OF_IMAGES = ("mistral3", "qwen3_vl", "smolvlm", "internvl", "llava")
"""Models of images and text, which have no class of text alone."""
UNUSUAL = ("llama4", "got_ocr2", "falcon", "openai-gpt", "modernbert-decoder", "biogpt", "bert")
"""Composite, with a router, linear layers of a class of their own, no cache, no names of blocks."""
KINDS = ("llama", "qwen2", "gemma3", "gpt2", "nemotron")


def example(ids, prompt=3):
    return Example(ids, [*[IGNORED] * prompt, *ids[prompt:]], prompt, "", cut=False)


@torch.no_grad()
def scores_alone(model, ids, prompt=3):
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[torch.arange(prompt - 1, len(ids) - 1), torch.tensor(ids[prompt:])].numpy()


@pytest.fixture(params=["llama", "gemma3"])
def folder(request, tokenizer, tmp_path):
    """A whole model's folder, of a plain kind and of one whose config holds its text model's; others are swept."""
    model = tiny_model(tiny_config(request.param))
    assert (model.config.get_text_config() is not model.config) == (request.param == "gemma3")
    return saved(model, tokenizer, tmp_path / request.param)


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def named(config, tmp_path):
    """A workshop of the model in a folder, in a run of its own."""

    def named(folder, **settings):
        output = str(tmp_path / f"run-{len([*tmp_path.glob('run-*')])}")
        own = dataclasses.replace(config, model_name_or_path=str(folder), output_dir=output, **settings)
        return Workshop(M0.named(own), own, Run.start(own, {}))

    return named


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stir(learner):
    """Give the adapter weights that change what the model says."""
    torch.manual_seed(1)
    for name, weight in learner.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)


def log_probs(learner):
    return np.concatenate([row.log_probs for row in read(learner, [example(row) for row in ROWS], "rows")])


@pytest.mark.parametrize("kind", [*KINDS, *UNUSUAL, *OF_IMAGES])
def test_a_model_is_trained_read_and_asked_row_by_row(kind, named, tokenizer, tmp_path):
    folder = saved(tiny_model(tiny_config(kind)), tokenizer, tmp_path / "model")
    workshop = named(folder)
    rows = [example(row) for row in ROWS]
    trained = workshop.train("noisy", rows, workshop.config.noisy_stage(len(rows)))
    assert np.isfinite(workshop.read(rows, trained).log_likelihood).all()
    states = workshop.states(rows, "noisy")
    assert states.shape == (3, 2, 32)
    alone = load_model(folder, workshop.config).eval()
    expected = [scores_alone(alone, row).mean() for row in ROWS]
    np.testing.assert_allclose(workshop.read(rows).log_likelihood, expected, atol=1e-4)
    for row, answer in zip(ROWS, workshop.answer(rows), strict=True):
        assert answer == greedy_alone(workshop.become(None), alone, row)


@torch.no_grad()
def greedy_alone(learner, model, row, prompt=3, margin=8):
    ids = row[:prompt]
    while len(ids) < len(row) + margin and ids[-1] != learner.tokenizer.eos_token_id:
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return learner.tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_experts_are_kept_even_as_a_trainer_does_it_and_answers_come_after(named, tokenizer, tmp_path):
    losses = []
    for weight in (0.0, 5.0):
        described = tiny_config("mixtral")
        described.router_aux_loss_coef = weight
        workshop = named(saved(tiny_model(described), tokenizer, tmp_path / f"model-{weight}"))
        rows = [example(row) for row in ROWS]
        workshop.train("noisy", rows, workshop.config.noisy_stage(len(rows)))
        (entry,) = (entry for part, entry in workshop.run.manifest["stages"].items() if part.startswith("noisy"))
        losses.append(next(iter(entry["losses"].values())))
        assert len(workshop.answer(rows, workshop.run.model("noisy"))) == 3  # several at once, with a cache
        assert not workshop.learner.model.config.output_router_logits
    assert losses[1] > losses[0] + 4  # evenly used experts count 1 each, times top 2


def test_an_adapter_of_a_model_of_the_hub_names_it_as_others_can_find_it(named, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("forgetfilter.model.folders.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--them--tiny/snapshots/0a1b"
    saved(tiny_model(tiny_config("llama")), tokenizer, folder)
    learner = named(folder).learner
    learner.save(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("them/tiny", "0a1b")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "them/tiny" in card
    assert str(tmp_path) not in card
    elsewhere = tmp_path / "own/models--them--tiny/snapshots/0a1b"  # where an id leads nobody
    saved(tiny_model(tiny_config("llama")), tokenizer, elsewhere)
    named(elsewhere).learner.save(tmp_path / "another")
    about = json.loads((tmp_path / "another/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(elsewhere)


def test_the_output_layer_takes_no_adapter(named, tokenizer, tmp_path):
    folder = saved(tiny_model(tiny_config("llama")), tokenizer, tmp_path / "model")
    with pytest.raises(ModelError, match="the output layer can have no adapter"):
        named(folder, lora_target_modules="q_proj,lm_head").learner  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_target_modules": "q_prj"}, "q_prj: .* has no such module"),
        ({"lora_target_modules": "q_proj", "lora_layers_to_transform": [999]}, "no block 999; there are 0 to 1"),
    ],
)
def test_places_for_an_adapter_that_are_not_there_are_named_before_any_work(settings, says, config):
    with pytest.raises(ModelError, match=says):
        ForgetFilter(dataclasses.replace(config, **settings)).fit()
    assert not Path(config.output_dir).exists()


def test_a_generation_config_changes_no_answer(folder, named):
    rows = [example(row) for row in ROWS]
    plain = complete(named(folder).learner, rows, "plain")
    likeliest = [token for text in plain for token in make_tokenizer()(text)["input_ids"]][:3]
    GenerationConfig(
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        bad_words_ids=[[token] for token in likeliest],
        suppress_tokens=likeliest,
        min_new_tokens=3,
        do_sample=True,
        temperature=2.0,
    ).save_pretrained(folder)
    learner = named(folder, use_peft=False).learner
    assert learner.model.generation_config.repetition_penalty == 5.0
    assert complete(learner, rows, "penalised") == plain
    learner.save(folder.parent / "again")
    assert json.loads((folder.parent / "again/generation_config.json").read_text())["repetition_penalty"] == 5.0


def test_an_adapter_is_m0_with_its_base(folder, named, cache):
    first = named(folder)
    bare = log_probs(first.learner)
    stir(first.learner)
    expected = log_probs(first.learner)
    assert np.abs(expected - bare).max() > 0.1
    adapter = folder.parent / "adapter"
    first.learner.save(adapter)

    second = named(adapter)
    np.testing.assert_allclose(log_probs(second.learner), expected, atol=1e-3)
    assert second.m0.sha256 not in (first.m0.sha256, named(folder).m0.sha256)
    whole = named(adapter, use_peft=False)
    np.testing.assert_allclose(log_probs(whole.learner), expected, atol=1e-3)
    assert whole.m0.sha256 == second.m0.sha256

    stir(second.learner)
    on_top = log_probs(second.learner)
    assert np.abs(on_top - expected).max() > 0.1
    second.learner.save(folder.parent / "third")
    for settings in ({}, {"use_peft": False}):
        np.testing.assert_allclose(log_probs(named(folder.parent / "third", **settings).learner), on_top, atol=1e-3)


def test_weights_that_are_not_there_are_refused(folder, named):
    path = folder / "model.safetensors"
    weights = load_file(path)
    layer = sorted(name for name in weights if "0" in name and name.endswith("weight") and "vision" not in name)
    save_file({name: value for name, value in weights.items() if name not in layer}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{len(layer)} of the model's tensors are not in its files: .*, \\.\\.\\."):
        named(folder).learner  # noqa: B018


def test_a_reward_model_is_refused(tokenizer, named, tmp_path):
    config = tiny_config("llama", num_labels=1, tie_word_embeddings=False)
    saved(AutoModelForSequenceClassification.from_config(config), tokenizer, tmp_path / "reward")
    with pytest.raises(ModelError, match=r"1 of the model's tensors are not in its files: lm_head\.weight\."):
        named(tmp_path / "reward").learner  # noqa: B018


def test_tied_weights_are_not_missing(tokenizer, named, tmp_path):
    model = tiny_model(tiny_config("llama", tie_word_embeddings=True))
    saved(model, tokenizer, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    np.testing.assert_allclose(
        log_probs(named(tmp_path / "tied").learner),
        np.concatenate([scores_alone(model, row) for row in ROWS]),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("part", "not in its files"),
        ("other", "has no place in its base"),
        ("itself", "as the base of itself"),
        ("pickled", "no adapter_model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(fault, says, named, tiny_model, tokenizer, tmp_path, cache):
    learner = named(tiny_model).learner
    learner.save(tmp_path / "adapter")
    described, path = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/adapter_model.safetensors"
    weights, about = load_file(path), json.loads(described.read_text())
    if fault == "part":
        weights.popitem()
    if fault == "other":
        weights = {name.replace("layers.1", "layers.7"): value for name, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})
    if fault == "itself":
        described.write_text(json.dumps(about | {"base_model_name_or_path": str(tmp_path / "adapter")}))
    if fault == "pickled":
        shutil.move(path, tmp_path / "adapter/other.safetensors")
        (tmp_path / "adapter/adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=says):
        named(tmp_path / "adapter")
    assert not [*(tmp_path / "cache").glob("*/merged-*")]


def test_hidden_states_are_those_of_the_blocks_where_a_model_makes_them_narrower_at_its_end(named, tokenizer, tmp_path):
    """As opt-350m does, which has narrower embeddings than blocks."""
    model = tiny_model(tiny_config("opt", word_embed_proj_dim=16, num_hidden_layers=2))
    assert model.model.decoder.project_out.out_features == 16
    rows = [example(row) for row in ROWS]
    states = named(saved(model, tokenizer, tmp_path / "model")).states(rows, "noisy")
    assert states.shape == (3, 2, 32)
    assert np.isfinite(states).all()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "roberta", "llama"])
def test_rows_end_where_a_model_has_learnt_no_more_positions(kind, named, tokenizer, tmp_path, capsys):
    workshop = named(saved(tiny_model(tiny_config(kind)), tokenizer, tmp_path / "model"), max_length=PLACES + 16)
    longest = {"llama": PLACES + 16, "roberta": PLACES - 2}.get(kind, PLACES)
    said = capsys.readouterr().out
    assert (f"has learnt {longest} positions" in said) == (kind != "llama")
    turns = [[Turn("user", "q" * n, trained=False), Turn("assistant", "a" * 99, trained=True)] for n in (1, 20, 99)]
    rows = [workshop.m0.chat.encode(row) for row in turns]
    assert {len(row.input_ids) for row in rows} == {longest}
    assert np.isnan(workshop.read(rows).log_likelihood).tolist() == [False, False, True]
    answers = complete(workshop.learner, rows, "answers", most_tokens=PLACES + 9)
    assert len(answers) == 3
    short = [complete(workshop.learner, [row], "answer", most_tokens=PLACES + 9)[0] for row in rows]
    assert answers == short


def test_a_token_that_the_model_does_not_know_is_found_before_any_work(named, tokenizer, tmp_path, capsys, safe_file):
    padding, every = make_tokenizer(), make_tokenizer()
    model = tiny_model(tiny_config("llama", vocab_size=len(tokenizer)))
    padding.add_special_tokens({"pad_token": "[PAD]"})
    padding.add_tokens(["<tool>"], special_tokens=True)
    workshop = named(saved(model, padding, tmp_path / "padding"))
    assert workshop.m0.tokenizer.pad_token == workshop.m0.tokenizer.eos_token
    assert np.isfinite(log_probs(workshop.learner)).all()
    unknown = example([5, 6, 7, 8, len(tokenizer) + 1])
    for work in (workshop.read, lambda rows: workshop.train("noisy", rows, workshop.config.noisy_stage(1))):
        with pytest.raises(DataError, match=r"'<tool>'.*embeddings of 258 tokens"):
            work([unknown])

    every.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ModelError, match=r"none of <end>.*resize_token_embeddings"):
        named(saved(model, every, tmp_path / "every"))


def test_adapters_land_on_linear_layers_of_the_text_model_alone(named, tokenizer, tmp_path):
    for kind, settings in (("gemma3", {}), ("gemma3", {"lora_target_modules": "q_proj"}), ("llama4", {})):
        model = tiny_model(tiny_config(kind, tie_word_embeddings=False))
        workshop = named(saved(model, tokenizer, tmp_path / kind), **settings)
        names = [name for name, _ in workshop.learner.model.named_parameters() if "lora_" in name]
        assert any("q_proj" in name for name in names)
        assert not any(part in name for name in names for part in ("vision", "router", "lm_head", "projector"))
        rows = [example(row) for row in ROWS]
        workshop.train("noisy", rows, workshop.config.noisy_stage(len(rows)))
    with pytest.raises(ModelError, match="--lora_target_modules q_proj,v_proj"):
        named(tmp_path / "llama4", lora_target_modules="router").learner  # noqa: B018
