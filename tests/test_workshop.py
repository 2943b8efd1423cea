"""The workshop: everything once, from any start, and found again whatever it was called."""

import dataclasses
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetfilter import workshop as workshops
from forgetfilter.config import StageConfig
from forgetfilter.data.loading import load_data
from forgetfilter.errors import ModelError
from forgetfilter.forgetting import ForgetFilter, finetune
from forgetfilter.hooks import Hooks
from forgetfilter.m0 import M0
from forgetfilter.model.batches import label_logits
from forgetfilter.model.memory import to_device
from forgetfilter.model.tokenizer import load_tokenizer
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def data(workshop, config):
    return load_data(config, workshop.m0.chat)


@pytest.fixture
def rows(data):
    return data.noisy.trainable()


@pytest.fixture
def settings(config):
    return config.noisy_stage(16)


@pytest.fixture
def trained(monkeypatch):
    """Names of what was trained, in order."""
    calls = []
    real = workshops.train

    def note(learner, examples, settings, checkpoints, what, *more, **others):
        calls.append(what.removesuffix(" stage"))
        return real(learner, examples, settings, checkpoints, what, *more, **others)

    monkeypatch.setattr(workshops, "train", note)
    return calls


@pytest.fixture
def another(workshop, config, tmp_path):
    """A workshop of the same M0 in another run, with other settings if any are given."""

    def another(name, **settings):
        own = dataclasses.replace(config, output_dir=str(tmp_path / name), **settings)
        return Workshop(workshop.m0, own, Run.start(own, {}))

    return another


def adapter(folder):
    return load_file(folder / WEIGHTS)


def same(one, other):
    return all(value.equal(adapter(other)[name]) for name, value in adapter(one).items())


def test_a_stage_is_trained_once_and_found_by_any_name(workshop, rows, settings, trained):
    one = workshop.train("one", rows, settings)
    assert one == workshop.run.model("one")
    assert one.parent.parent == workshop.run.folder / "stages"
    assert workshop.train("one", rows, settings) == workshop.train("two", rows, settings) == one
    assert trained == ["one"]
    again = Workshop(workshop.m0, workshop.config, Run.open(workshop.run.folder))
    assert again.train("three", rows, settings) == one
    assert "learner" not in vars(again)  # nothing was loaded for it
    longer = dataclasses.replace(settings, max_steps=7)
    others = {
        workshop.train("one", rows[1:], settings),
        workshop.train("one", rows, longer),
        workshop.train("one", rows, settings, one),
        workshop.train("one", rows, settings, in_order=True),
        workshop.train("two", rows, settings, in_order=True),  # with an order or hooks the name tells what is done
        workshop.train("three", rows, settings, hooks=Hooks(each_step=lambda step: None)),
    }
    assert workshop.train("three", rows, settings, hooks=Hooks(each_step=lambda step: None)) in others
    # in a folder of the same settings but for the seed, as recipes have several
    other_seed = Workshop(workshop.m0, dataclasses.replace(workshop.config, seed=1), workshop.run)
    others.add(other_seed.train("one", rows, settings))
    assert len(others) == 7
    assert one not in others
    assert len(trained) == 8


def test_a_training_leaves_the_forward_pass_as_it_was(another, rows, settings):
    """accelerate would have all logits in float32 from then on, in every reading."""
    made = another("half", dtype="bfloat16")
    assert made.learner.bf16
    for start in (None, made.train("one", rows, settings)):
        made.train(f"from {start}", rows, settings, start)
        batch = made.learner.collate([rows[0].input_ids], [rows[0].labels])
        with torch.no_grad(), made.learner.mixed:
            assert label_logits(made.learner.model, batch)[0].dtype == torch.bfloat16
    assert not {"forward", "_original_forward"} & vars(made.learner.model).keys()


def test_another_model_is_read_whatever_m0s_adapter_is_on(another, tiny_model):
    own = another("own", lora_target_modules="q_proj", lora_layers_to_transform=[1])
    assert own.other(tiny_model).config.lora_target_modules == "all-linear"
    assert own.other(tiny_model).config.lora_layers_to_transform is None
    of_others = dataclasses.replace(own.config, lora_target_modules="c_attn")  # as GPT-2's are called
    assert Workshop(own.m0, of_others).other(tiny_model).config.use_peft


def test_a_model_that_the_memory_does_not_hold_says_what_to_do(learner, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner.model, "to", full)
    with pytest.raises(ModelError, match="--load_in_4bit true"):
        to_device(learner.model, torch.device("cpu"))


def test_a_damaged_stage_is_trained_again_in_its_place(workshop, rows, settings, trained):
    one = workshop.train("one", rows, settings)
    whole = (one / WEIGHTS).read_bytes()
    (one / WEIGHTS).write_bytes(whole[:-10])
    assert workshop.train("two", rows, settings) == one
    assert (one / WEIGHTS).read_bytes() == whole
    assert len(trained) == 2


def test_a_training_starts_from_a_model_outside_the_run(workshop, another, data, rows, settings, trained, tmp_path):
    first = workshop.train("first", rows, settings)
    safe = data.safe.trainable()
    inside = workshop.train("second", safe, settings, first)
    elsewhere = shutil.copytree(first, tmp_path / "elsewhere" / "mine")
    shutil.rmtree(first.parent)

    abroad = another("abroad")
    second = abroad.train("second", safe, settings, elsewhere)
    assert second.parent.name == inside.parent.name
    assert same(second, inside)
    assert not same(second, abroad.train("second", safe, settings))
    assert trained == ["first", "second", "second", "second"]

    moved = shutil.move(elsewhere, tmp_path / "moved")
    assert abroad.train("second", safe, settings, moved) == second
    assert workshop.train("second", safe, settings, moved) == inside  # the run it was trained in no longer holds it
    assert len(trained) == 4

    changed = adapter(moved)
    save_file({name: value * 2 for name, value in changed.items()}, moved / WEIGHTS, metadata={"format": "pt"})
    assert abroad.train("second", safe, settings, moved) != second
    assert len(trained) == 5


def test_a_model_outside_the_run_is_read(workshop, another, rows, settings, tmp_path):
    model = workshop.train("first", rows, settings)
    elsewhere = shutil.copytree(model, tmp_path / "mine")
    found = another("abroad").read(rows, elsewhere)
    np.testing.assert_array_equal(found.log_likelihood, workshop.read(rows, model).log_likelihood)
    assert (found.log_likelihood != workshop.read(rows).log_likelihood).any()


def test_a_model_is_read_once_and_a_damaged_reading_made_again(workshop, rows, settings, monkeypatch):
    model = workshop.train("first", rows, settings)
    read, real = [], workshops.read
    monkeypatch.setattr(workshops, "read", lambda *given: (read.append(given[2]), real(*given))[1])
    first = workshop.read(rows, model)
    assert first.log_likelihood.shape == (len(rows),)
    for row, log_probs in zip(first.log_likelihood, first.token_log_probs.to_pylist(), strict=True):
        assert row == pytest.approx(np.mean(log_probs))
    np.testing.assert_array_equal(workshop.read(rows, model).log_likelihood, first.log_likelihood)
    assert read == ["first: scoring"]
    answers = workshop.answer(rows, model)
    assert workshop.answer(rows, model) == answers
    assert read == ["first: scoring", "first: following"]
    workshop.read(rows[1:], model)
    workshop.read(rows)
    assert read[2:] == ["first: scoring", "M0: scoring"]
    for path in workshop.run.folder.glob("readings/first-log_probs-*.parquet"):
        path.write_bytes(path.read_bytes()[:-10])
    np.testing.assert_array_equal(workshop.read(rows, model).log_likelihood, first.log_likelihood)
    assert read[4:] == ["first: scoring"]


def test_a_model_made_without_training_is_kept_once(workshop, rows, settings):
    model, filled = workshop.train("first", rows, settings), []

    def scaled(factor):
        def fill(folder):
            filled.append(factor)
            shutil.copy(model / "adapter_config.json", folder)
            weights = {name: value * (factor if "lora_B" in name else 1) for name, value in adapter(model).items()}
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

        return fill

    half = workshop.keep("scaled", scaled(0.5), {"factor": 0.5, "of": model.parent.name})
    assert workshop.keep("scaled", scaled(0.5), {"of": model.parent.name, "factor": 0.5}) == half
    assert filled == [0.5]
    none = workshop.keep("scaled", scaled(0.0), {"factor": 0.0, "of": model.parent.name})
    named = workshop.keep("other", scaled(0.5), {"factor": 0.5, "of": model.parent.name})
    assert len({model, half, none, named}) == 4
    assert filled == [0.5, 0.0, 0.5]
    again = Workshop(workshop.m0, workshop.config, Run.open(workshop.run.folder))
    assert again.keep("scaled", scaled(0.5), {"factor": 0.5, "of": model.parent.name}) == half
    assert filled == [0.5, 0.0, 0.5]
    (half / WEIGHTS).unlink()
    workshop.keep("scaled", scaled(0.5), {"factor": 0.5, "of": model.parent.name})
    assert filled == [0.5, 0.0, 0.5, 0.5]

    m0, noisy, no = (workshop.read(rows, of).log_likelihood for of in (None, model, none))
    np.testing.assert_allclose(no, m0, atol=1e-5)  # an adapter whose B is 0 is none
    between = workshop.read(rows, half).log_likelihood
    assert (np.abs(between - m0) > 1e-4).any()
    assert (np.abs(between - noisy) > 1e-4).any()
    on = workshop.train("on", rows, settings, none)
    assert on != model


def test_a_model_that_could_not_be_made_is_not_kept(workshop):
    def fails(folder):
        (folder / WEIGHTS).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.keep("broken", fails, None)
    assert not list(workshop.run.folder.glob("stages/broken-*/model"))
    made = workshop.keep("broken", lambda folder: (folder / WEIGHTS).write_text("whole"), None)
    assert (made / WEIGHTS).read_text() == "whole"


def test_a_base_is_one_m0_in_the_cache_for_every_run(workshop, another, rows, settings, trained, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stage = workshop.train("stage", rows, settings)
    expected = workshop.read(rows, stage).log_likelihood
    base = workshop.base("mine", rows, settings)
    assert base.folder.parent == tmp_path / "cache" / "forgetfilter"
    assert base.sha256 != workshop.m0.sha256
    stamp = (base.folder / "model.safetensors").stat().st_mtime_ns
    assert workshop.base("mine", rows, settings).folder == another("abroad").base("mine", rows, settings).folder
    assert trained == ["stage", "mine"]
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == stamp
    folders = [path for path in base.folder.parent.iterdir() if not path.name.startswith(".")]
    assert folders == [base.folder]
    assert not list(workshop.run.folder.glob("stages/mine-*"))

    on_base = Workshop(base, workshop.config, workshop.run)  # as it is, without an adapter
    np.testing.assert_allclose(on_base.read(rows).log_likelihood, expected, atol=1e-4)
    assert on_base.train("stage", rows, settings) != stage  # made of another M0
    assert not np.allclose(workshop.read(rows).log_likelihood, expected, atol=1e-3)  # M0 itself is as it was
    before = workshop.read(rows[:5], stage).log_likelihood
    np.testing.assert_allclose(before, expected[:5], atol=1e-4)

    others = [
        workshop.base("other", rows, settings),
        workshop.base("mine", rows[1:], settings),
        workshop.base("mine", rows, dataclasses.replace(settings, max_steps=2)),
        another("seed", seed=1).base("mine", rows, settings),
    ]
    assert len({base.folder, *(other.folder for other in others)}) == 5


def test_all_weights_are_trained_kept_and_taken_as_a_start(another, rows, settings, trained):
    whole = another("whole", use_peft=False, learning_rate=1e-3)
    gentle = dataclasses.replace(settings, learning_rate=1e-3)
    first = whole.train("first", rows, gentle)
    assert (first / "model.safetensors").exists()
    second = whole.train("second", rows, gentle, first)
    assert whole.train("second", rows, gentle, first) == second
    m0, one, two = (whole.read(rows, model).log_likelihood.mean() for model in (None, first, second))
    assert m0 < one < two
    assert trained == ["first", "second"]


def test_weights_that_are_trained_are_in_32_bits_whatever_the_model_is_read_in(another, rows, settings):
    whole = another("half", use_peft=False, dtype="bfloat16")
    first = whole.train("first", rows, dataclasses.replace(settings, learning_rate=1e-6))
    stored, weights = (load_file(folder / "model.safetensors") for folder in (first, whole.m0.folder))
    assert {weight.dtype for weight in stored.values()} == {torch.float32}
    name = next(name for name in stored if "q_proj" in name)
    assert not torch.equal(stored[name], weights[name].bfloat16().float()), "steps this small are not rounded away"
    whole.read(rows)
    again = whole.become(first).model.state_dict()
    assert torch.equal(again[name], stored[name])


def test_a_final_model_keeps_every_chat_template_of_its_tokenizer(workshop, rows, settings):
    templates = {"default": workshop.m0.tokenizer.chat_template, "tool_use": "{{ messages }}"}
    workshop.m0.tokenizer.chat_template = templates
    model = workshop.train("final", rows, settings, into=workshop.run.folder / "model")
    assert workshop.run.done("final")
    assert load_tokenizer(model, workshop.config).chat_template == templates


def test_the_time_said_is_that_of_all_rows_though_a_sample_is_learnt(workshop, rows, settings, capsys, monkeypatch):
    monkeypatch.setattr(workshops, "seconds_a_row", lambda *_: 60.0)
    said, workshop.config.filter = [], "probe,forgetting"
    for everything in (len(rows), 100 * len(rows)):
        workshop.run.manifest["noisy"] = {"rows": everything}
        workshop.expect({"noisy": (settings, rows)}, rows)
        said.append([int(number) for number in re.findall(r"(\d+) min", capsys.readouterr().out)])
    (alone, final), (sampled, final_of_all) = said
    assert final_of_all == pytest.approx(100 * final, rel=0.05)
    assert sampled == pytest.approx(alone + 99 * len(rows) / 6, abs=1)  # M0's lower half reads all of them


def test_a_final_model_is_found_again_by_its_rows_and_then_stale_no_more(config, write_jsonl, trained):
    rows = [{"prompt": f"p{i}", "completion": "answer" if i else ""} for i in range(8)]
    noisy = str(write_jsonl("noisy.jsonl", rows))
    config = dataclasses.replace(config, dataset_name=noisy, filter="length", threshold=1e9)
    config.final = StageConfig(max_steps=2)
    run = ForgetFilter(config).fit().run
    model = finetune(run)
    ForgetFilter(dataclasses.replace(config, unscored="drop")).fit()  # the first row: it is not trained on
    assert Run.open(run.folder).manifest["stages"]["final"]["stale"]
    assert finetune(run) == model
    assert trained.count("final") == 1
    assert not Run.open(run.folder).manifest["stages"]["final"]["stale"]
    assert finetune(Run.open(run.folder)) == model


@pytest.mark.parametrize("use_peft", [True, False])
def test_gradient_checkpointing_computes_again_and_trains_the_same_model(config, monkeypatch, use_peft):
    from transformers import modeling_layers

    again = []
    run = modeling_layers.GradientCheckpointingLayer.__call__

    def noted(layer, *args, **kwargs):
        again.append(layer.training and getattr(layer, "gradient_checkpointing", False))
        return run(layer, *args, **kwargs)

    monkeypatch.setattr(modeling_layers.GradientCheckpointingLayer, "__call__", noted)
    found = []
    for on in (False, True):
        own = dataclasses.replace(
            config, gradient_checkpointing=on, use_peft=use_peft, output_dir=config.output_dir + str(on)
        )
        workshop = Workshop(M0.named(own), own, Run.start(own, {}))
        rows = load_data(own, workshop.m0.chat).noisy.trainable()
        model = workshop.train("plain", rows, own.noisy_stage(len(rows)))
        found.append(workshop.read(rows, model).log_likelihood)
        assert any(again) == on
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
