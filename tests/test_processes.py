"""Several processes: the same scores as one, in shards that survive a kill."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetfilter import shards
from forgetfilter import workshop as workshops
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import Turn
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decision.decide import decide
from forgetfilter.errors import ConfigError
from forgetfilter.model.learner import load_learner
from forgetfilter.model.weights import load_tokenizer
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop


@pytest.fixture(scope="module")
def examples(tokenizer):
    chat = ChatTokenizer(tokenizer, 200)
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
        paths = [
            list((tmp_path / name / "readings").glob(f"{model}-log_probs-*")) for model in ("M0", "noisy", "review")
        ]
        tables = [pq.read_table(path) for (path,) in paths]
        decided = decide(Run.open(tmp_path / name), drop_share=0.5).scores["decision"]
        return [table["log_likelihood"].to_numpy() for table in tables], decided

    (one, alone_decides), (two, two_decide) = run("one", 1, 8), run("two", 2, 4)
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)  # M0: fixed weights
    for alone, shared in zip(one[1:], two[1:], strict=True):
        np.testing.assert_allclose(alone, shared, atol=1e-3)  # after 10, 20 and 30 steps of training
    assert not np.allclose(one[0], one[1], atol=1e-3)
    assert sorted(alone_decides) == ["dropped"] * 8 + ["kept"] * 8
    assert np.mean(np.array(alone_decides) == np.array(two_decide)) >= 14 / 16  # two rows may change places


@pytest.mark.parametrize("what", ["read", "answer"])
def test_shards_found_are_not_made_again_and_the_file_is_the_same(
    workshop, config, examples, tmp_path, monkeypatch, what
):
    def other(name):
        return Workshop(
            workshop.m0, config, Run.start(dataclasses.replace(config, output_dir=str(tmp_path / name)), {})
        )

    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    whole, broken = other("whole"), other("broken")
    getattr(whole, what)(examples)
    calls, real = [], workshops.read

    def killed_at_the_last(learner, rows, told):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(learner, rows, told)

    monkeypatch.setattr(workshops, "read", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        getattr(broken, what)(examples)
    (path,) = (whole.run.folder / "readings").glob("*.parquet")
    folder = broken.run.folder / "readings"
    assert not list(folder.glob("*.parquet"))
    getattr(broken, what)(examples)
    assert calls == [10, 10, 9, 9]
    assert (folder / path.name).read_bytes() == path.read_bytes()
    assert [file.name for file in folder.iterdir()] == [path.name]  # no shard is left
    getattr(broken, what)(examples)
    assert len(calls) == 4


def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 2)
    made = []

    def make(rows, part):
        made.append((rows.start, part))
        if rows.start == 4 and len(made) == 3:
            raise KeyboardInterrupt
        return pa.table({"row": list(range(5))[rows]})

    path = tmp_path / "table.parquet"
    with pytest.raises(KeyboardInterrupt):
        shards.write_in_shards(path, 5, make)
    first, _ = sorted((tmp_path / "table.shards").iterdir())
    first.write_bytes(first.read_bytes()[:-10])
    shards.write_in_shards(path, 5, make)
    parts = [", rows from 0 of 5", ", rows from 2 of 5", ", rows from 4 of 5"]
    assert made == [*zip((0, 2, 4), parts, strict=True), (0, parts[0]), (4, parts[2])]
    assert pq.read_table(path)["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert not path.with_suffix(".shards").exists()


def test_several_gpus_and_one_process_are_an_error_that_says_what_to_do(tiny_model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = ForgetFilterConfig()
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        load_learner(tiny_model, load_tokenizer(tiny_model, config), config)
