"""Training trouble is said and, where it can be, overcome; the same run gives the same numbers."""

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.errors import ConfigError, ModelError, TrainingError
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.model import folders, generation, reading, training
from forgetfilter.model.learner import load_learner
from forgetfilter.model.states import hidden_states
from forgetfilter.model.tokenizer import load_tokenizer


def scores(result):
    return pq.read_table(result.run.folder / "scores.parquet")["forgetting"].to_pylist()


def no_more_memory():
    torch.empty(2**60, dtype=torch.uint8)  # a RuntimeError on the CPU


def at_most(rows, real):
    """label_logits where the memory holds so many rows."""

    def label_logits(model, batch):
        if batch["row_tokens"].shape[0] > rows:
            no_more_memory()
        return real(model, batch)

    return label_logits


def test_a_batch_too_large_for_the_memory_is_split_and_the_result_is_the_same(config, tmp_path, monkeypatch, capsys):
    plain = ForgetFilter(dataclasses.replace(config, output_dir=str(tmp_path / "plain"))).fit()
    monkeypatch.setattr(training, "labelled", at_most(3, training.labelled))
    monkeypatch.setattr(reading, "label_logits", at_most(3, reading.label_logits))
    split = ForgetFilter(config).fit()
    assert "noisy stage: out of memory, going on with batches of 4, 2 to an" in capsys.readouterr().out
    assert scores(split) == pytest.approx(scores(plain), abs=2e-3)


def test_answers_are_generated_in_smaller_batches_where_the_memory_is_small(learner, noisy_file):
    chat = ChatTokenizer(learner.tokenizer, 256)
    examples = load_rows(str(noisy_file), "data", chat, ForgetFilterConfig()).examples
    expected = generation.complete(learner, examples, "plain")
    real = learner.model.generate

    def generate(**inputs):
        if len(inputs["input_ids"]) > 3:
            no_more_memory()
        return real(**inputs)

    assert learner.generates
    learner.model.generate = generate
    try:
        assert generation.complete(learner, examples, "split") == expected
    finally:
        del learner.model.generate


@pytest.mark.parametrize(
    ("room", "name", "says"),
    [
        (training, "labelled", "noisy stage: the memory does not hold a batch of 1"),
        (reading, "label_logits", "the memory does not hold a row"),
    ],
)
def test_a_row_the_memory_does_not_hold_is_one_clear_error(room, name, says, config, monkeypatch):
    monkeypatch.setattr(room, name, at_most(0, getattr(room, name)))
    with pytest.raises(TrainingError, match=says):
        ForgetFilter(config).fit()


@pytest.mark.parametrize("logged", [True, False])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint(config, logged, monkeypatch):
    """Also where it comes after the last log, and a checkpoint was written meanwhile."""
    save, written = training._Progress.on_save, []

    def on_save(*given, **more):
        written.append(save(*given, **more))

    if not logged:
        monkeypatch.setattr(training._Progress, "on_log", lambda *_, **__: None)
    monkeypatch.setattr(training._Progress, "on_save", on_save)
    config = dataclasses.replace(config, noisy=StageConfig(max_steps=13, learning_rate=1e30))
    with pytest.raises(TrainingError, match="noisy stage: the loss is nan"):
        ForgetFilter(config).fit()
    assert bool(written) != logged
    assert not list(Path(config.output_dir).rglob("checkpoint-*"))


def test_nothing_learnt_is_a_result(config):
    config = dataclasses.replace(config, noisy=StageConfig(max_steps=1, learning_rate=1e-9))
    result = ForgetFilter(config).fit()
    assert result.metrics["dropped"] == 0
    assert "nothing was learnt" in result.metrics["says"]


def test_rows_also_safe_repeated_or_with_special_tokens_spelt_out_are_counted(config, write_jsonl, capsys):
    rows = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    safe = [json.loads(line) for line in Path(config.safe_dataset_name).read_text().splitlines()]
    rows += [*safe[:3], *rows[:2], {"prompt": "go <|im_end|>\n<|im_start|>system", "completion": "no"}]
    config = dataclasses.replace(config, filter="length", dataset_name=str(write_jsonl("both.jsonl", rows)))
    result = ForgetFilter(config).fit()
    assert [result.metrics[name] for name in ("also_safe", "repeated", "spelt_specials")] == [3, 2, 1]
    from forgetfilter.summary import print_summary

    print_summary(result, Path("report.html"))
    assert "also among the safe rows: 3" in capsys.readouterr().out


def test_a_folder_of_the_cache_is_filled_once_however_many_want_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    filled, both = [], threading.Barrier(2)

    def fill(folder):
        time.sleep(0.2)  # long enough for the other to want it, too
        (folder / "weights").write_text("whole")
        filled.append(folder)

    def want():
        both.wait()
        assert (folders.cached("model", fill) / "weights").read_text() == "whole"
        return True

    with ThreadPoolExecutor(2) as pool:
        assert [found.result() for found in [pool.submit(want), pool.submit(want)]] == [True, True]
    assert len(filled) == 1


def test_the_same_run_gives_the_same_numbers_whatever_the_batch(config, tmp_path):
    one, two = (ForgetFilter(dataclasses.replace(config, output_dir=str(tmp_path / name))).fit() for name in "ab")
    assert scores(one) == scores(two)
    small = dataclasses.replace(config, output_dir=str(tmp_path / "c"), per_device_eval_batch_size=1)
    assert scores(ForgetFilter(small).fit()) == pytest.approx(scores(one), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            ("config.json", text)
            for text in ("[1]", "{", '{"model_type": 5}', '{"model_type": "llama", "vocab_size": "x"}')
        ),
        *(("tokenizer.json", text) for text in ('{"a": 1}', "3")),
        *(("adapter_config.json", text) for text in ("[]", "{}", '{"base_model_name_or_path": 3}')),
        ("model.safetensors", "not weights"),
    ],
)
def test_a_model_whose_files_are_of_another_shape_is_one_clear_error(name, content, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / name).write_text(content)
    if name == "adapter_config.json":
        (folder / "tokenizer_config.json").unlink()
    config = ForgetFilterConfig(dtype="float32")
    with pytest.raises(ModelError):
        load_learner(folder, load_tokenizer(folders.tokenizer_folder(folder), config), config)


def test_losses_go_to_the_trackers_asked_for(config, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((args.run_name, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Tracker)
    ForgetFilter(dataclasses.replace(config, report_to="ours")).fit()
    assert {name for name, _ in seen} == {"noisy stage", "review stage", "firm stage"}
    assert any("loss" in logs for _, logs in seen)


def test_a_tracker_that_is_not_there_is_an_error_before_any_work(config):
    with pytest.raises(ConfigError, match="--report_to nonsense"):
        ForgetFilter(dataclasses.replace(config, report_to="nonsense")).fit()
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("look", [reading.read, hidden_states])
def test_a_model_that_gives_no_numbers_is_an_error(look, tiny_model, noisy_file, monkeypatch):
    """Else all rows would be unscored, and kept."""
    learner = load_learner(tiny_model, load_tokenizer(tiny_model, ForgetFilterConfig()), ForgetFilterConfig())
    chat = ChatTokenizer(learner.tokenizer, 256)
    examples = load_rows(str(noisy_file), "dataset_name", chat, ForgetFilterConfig()).examples
    weight = learner.model.get_input_embeddings().weight
    weight.data = torch.full_like(weight, torch.nan)
    with pytest.raises(TrainingError, match="gives no numbers"):
        look(learner, examples, "rows")


def test_without_a_compiler_a_long_training_says_so_and_goes_on(learner, monkeypatch, capsys):
    def none(*_, **__):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", none)
    monkeypatch.setattr(learner, "compiled", False)
    learner.prepare(float("inf"))
    assert "torch.compile does not work here (RuntimeError)" in capsys.readouterr().out
    assert not learner.compiled
