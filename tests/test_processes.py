"""Several processes: the same scores as one, in shards that survive a kill."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from forgetfilter import signals
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import Turn
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decisions import decide
from forgetfilter.errors import ConfigError
from forgetfilter.models import load_learner, load_tokenizer
from forgetfilter.runs import Run


@pytest.fixture(scope="module")
def examples(learner):
    chat = ChatTokenizer(learner.tokenizer, 200)
    return [
        chat.encode([Turn("user", f"q {i}" * (i % 5), trained=False), Turn("assistant", f"a {i}", trained=True)])
        for i in range(1, 30)
    ]


def test_two_processes_score_and_train_as_one(tiny_model, noisy_file, safe_file, tmp_path):
    def run(name, count, batch):
        flags = {
            "model_name_or_path": tiny_model,
            "dataset_name": noisy_file,
            "safe_dataset_name": safe_file,
            "output_dir": tmp_path / name,
            "dtype": "float32",
            "lora_r": 4,
            "per_device_train_batch_size": batch,
            "max_steps": 10,
        }
        command = ["filter", *(f"--{flag}={value}" for flag, value in flags.items())]
        launch = [sys.executable, "-m"]
        if count > 1:  # without --multi_gpu, accelerate starts a single process on a machine without GPUs
            launch += ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--module"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, "forgetfilter", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / name / "manifest.json").read_text())["processes"] == count
        stages = ("base", "noisy", "review")
        tables = [pq.read_table(tmp_path / name / "stages" / stage / "signals.parquet") for stage in stages]
        decided = decide(Run.open(tmp_path / name), drop_share=0.5).scores["decision"]
        return [table["log_likelihood"].to_numpy() for table in tables], decided

    (one, alone_decides), (two, two_decide) = run("one", 1, 8), run("two", 2, 4)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)  # M0: fixed weights
    for alone, shared in zip(one[1:], two[1:], strict=True):
        np.testing.assert_allclose(alone, shared, atol=1e-3)  # after 10, 20 and 30 steps of training
    assert not np.allclose(one[0], one[1], atol=1e-3)
    assert sorted(alone_decides) == ["dropped"] * 8 + ["kept"] * 8
    assert np.mean(np.array(alone_decides) == np.array(two_decide)) >= 14 / 16  # two rows may change places


def test_shards_found_are_not_measured_again_and_the_file_is_the_same(learner, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "SHARD_ROWS", 10)
    signals.store(learner, examples, ["log_likelihood"], "test", tmp_path / "whole" / "signals.parquet")
    calls, measure = [], signals.measure

    def killed_at_the_last(learner, rows, names, what):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(learner, rows, names, what)

    monkeypatch.setattr(signals, "measure", killed_at_the_last)
    path = tmp_path / "broken" / "signals.parquet"
    with pytest.raises(KeyboardInterrupt):
        signals.store(learner, examples, ["log_likelihood"], "test", path)
    assert not path.exists()
    signals.store(learner, examples, ["log_likelihood"], "test", path)
    assert calls == [10, 10, 9, 9]
    assert path.read_bytes() == (tmp_path / "whole" / "signals.parquet").read_bytes()
    assert not (path.parent / signals.SHARDS).exists()


def test_several_gpus_and_one_process_are_an_error_that_says_what_to_do(tiny_model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = ForgetFilterConfig()
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        load_learner(tiny_model, load_tokenizer(tiny_model, config), config)
