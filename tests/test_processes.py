"""Several processes: the same scores as one, in shards that survive a kill."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.commands.config import load_config_from_file
from safetensors.numpy import load_file

from forgetfilter import ForgetFilter, cli, processes, shards, shelf
from forgetfilter import workshop as workshops
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError, TrainingError
from forgetfilter.model import memory, sharding
from forgetfilter.model.learner import load_learner
from forgetfilter.model.tokenizer import load_tokenizer
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop


@pytest.fixture(scope="module")
def examples(tokenizer):
    chat = ChatTokenizer(tokenizer, 200)
    return [
        chat.encode([Turn("user", f"q {i}" * (i % 5), trained=False), Turn("assistant", f"a {i}", trained=True)])
        for i in range(1, 30)
    ]


MODELS = ("M0", "noisy", "review", "firm")
CONFIG_FILES = Path(__file__).parents[1] / "docs" / "accelerate"
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
"""What accelerate tells its processes of a config file with DeepSpeed's ZeRO stage 3."""
COMMANDS = """
import sys
from torch.distributed.tensor import DTensor
from forgetfilter import cli
from forgetfilter.runs import Run
from forgetfilter.m0 import M0
from forgetfilter.workshop import Workshop

*flags, folder, more = sys.argv[1:]
cli.main(["filter", *flags])
cli.main(["finetune", folder])
cli.main(["score", folder, "--dataset_name", more])
config = Run.open(folder).config()
frozen = [p for p in Workshop(M0.named(config), config).learner.model.parameters() if not p.requires_grad]
print("share:", sum(p.to_local().numel() for p in frozen) / sum(p.numel() for p in frozen))
"""


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """Flags of a run whose probe learns from a column, and which trains, answers and takes gradients as well."""
    folder = tmp_path_factory.mktemp("data")
    unsafe = [{"prompt": f"what is {i}?", "completion": f"YOU FOOL {i}", "hint": 1} for i in range(0, 64, 4)]
    clean = [{"prompt": f"what is {i}?", "completion": f"it is {i}", "hint": 0} for i in range(64) if i % 4]
    safe = [{"prompt": f"tell me {i}", "completion": f"gladly {i}"} for i in range(8)]
    for name, rows in (("noisy", unsafe + clean), ("safe", safe)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": folder / "noisy.jsonl",
        "safe_dataset_name": folder / "safe.jsonl",
        "dtype": "float32",
        "lora_r": 4,
        "max_steps": 20,  # of the review, which is killed after a checkpoint
        "noisy.max_steps": 8,
        "final.max_steps": 8,
        "per_device_eval_batch_size": 12,
        "filter": "probe,forgetting,forgetting_rouge1,gradient_norm",
        "parameters": json.dumps({"probe": {"on": "column"}, "column": {"name": "hint", "threshold": 0.5}}),
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    rows = [
        {"prompt": f"what is {i}?", "completion": f"{'it is' if i % 3 else 'YOU FOOL'} {i}"} for i in range(90, 101)
    ]
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(flags, more, tmp_path_factory):
    """The folder of a finished run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    cli.main(["filter", *flags, f"--output_dir={folder}", "--per_device_train_batch_size=8"])
    cli.main(["finetune", str(folder)])
    cli.main(["score", str(folder), "--dataset_name", str(more)])
    return folder


def start(*command, **environment):
    """Start a Python command in the background."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], env=known, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def apart(one, other):
    """By how much the scores of all rows differ between two runs: for each model, and the worst of all filters."""
    found = {}
    for model in MODELS:
        (first,), (second,) = (list((run / "readings").glob(f"{model}-log_probs-*")) for run in (one, other))
        tables = [pq.read_table(path)["log_likelihood"].to_numpy() for path in (first, second)]
        found[model] = np.abs(tables[0] - tables[1]).max()
    tables = [pq.read_table(run / "scores.parquet") for run in (one, other)]
    for name in ("probe", "forgetting", "forgetting_rouge1", "gradient_norm"):
        found[name] = np.abs(tables[0][name].to_numpy() - tables[1][name].to_numpy()).max()
    return found


@pytest.mark.faults
def test_two_processes_score_and_train_as_one(alone, flags, tmp_path):
    # without --multi_gpu, accelerate starts a single process on a machine without GPUs
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--module", "forgetfilter", "filter")
    process = start(*launch, *flags, f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=4")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert Run.open(tmp_path / "two").manifest["processes"] == 2
    assert max(apart(alone, tmp_path / "two").values()) < 1e-4
    assert (tmp_path / "two" / "kept.jsonl").read_bytes() == (alone / "kept.jsonl").read_bytes()


@pytest.mark.faults
def test_a_sharded_model_gives_what_a_whole_one_does_after_a_kill_and_on_two_machines(alone, flags, more, tmp_path):
    folder, script = tmp_path / "run", tmp_path / "commands.py"
    flags = [*flags, f"--output_dir={folder}", "--per_device_train_batch_size=4"]
    script.write_text(COMMANDS, encoding="utf-8")
    launch = (
        "accelerate.commands.launch",
        "--config_file",
        CONFIG_FILES / "8b.yaml",
        "--module",
        "forgetfilter",
        "filter",
    )
    killed, began = start(*launch, *flags), time.monotonic()
    while not list(folder.glob("stages/review-*/checkpoints/*/whole.json")):
        assert killed.poll() is None, killed.communicate()[1][-3000:]
        assert time.monotonic() < began + 300
        time.sleep(0.02)
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    killed.communicate()
    (noisy,) = folder.glob("stages/noisy-*/model/adapter_model.safetensors")
    made = noisy.stat().st_mtime_ns

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ("torch.distributed.run", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    machines = [start(*nodes, f"--node_rank={i}", script, *flags, folder, more, **ZERO3) for i in range(2)]
    told, said = zip(*(machine.communicate(timeout=300) for machine in machines), strict=True)
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]

    shares = [float(line.removeprefix("share: ")) for line in "".join(told).splitlines() if line.startswith("share: ")]
    assert shares == [0.5, 0.5]
    assert noisy.stat().st_mtime_ns == made
    assert re.search("review stage: (10|20)/20 steps", said[0])
    assert "review stage: 0/20 steps" not in said[0]
    assert max(apart(alone, folder).values()) < 1e-4
    for name in ("kept.jsonl", "scored_rows/more/kept.jsonl", "scored_rows/more/dropped.jsonl"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
        assert (alone / name).read_bytes()
    final, whole = (load_file(run / "model/adapter_model.safetensors") for run in (folder, alone))
    assert final.keys() == whole.keys()
    assert all(np.abs(final[name] - whole[name]).max() < 1e-4 for name in whole)


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

    def killed_at_the_last(learner, rows, told, bar):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(learner, rows, told, bar)

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
    broken.run.manifest["stages"] = {}  # killed before the file was noted: hashing it takes time, too
    shutil.rmtree(folder)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            getattr(broken, what)(examples)
    assert len(calls) == 7
    getattr(broken, what)(examples)
    assert len(calls) == 7
    assert (folder / path.name).read_bytes() == path.read_bytes()


def test_processes_load_a_model_together_whoever_has_shards_left(workshop, examples, monkeypatch):
    """Loading waits for all of them. One that had made its shards before a kill would wait for the file of all."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "wait_for_everyone", lambda: None)
    loaded = []

    def nothing_left(path, rows, make, what):
        loaded.append("learner" in vars(workshop))
        raise KeyboardInterrupt

    monkeypatch.setattr(shelf, "write_in_shards", nothing_left)
    for what in (workshop.read, workshop.answer, lambda rows: workshop.states(rows, "noisy")):
        vars(workshop).pop("learner", None)
        with pytest.raises(KeyboardInterrupt):
            what(examples)
    assert loaded == [True] * 3


def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 2)
    made, shown = [], []

    def make(rows, bar):
        made.append(rows.start)
        shown.append((bar.n, bar.total))
        if rows.start == 4 and len(made) == 3:
            raise KeyboardInterrupt
        return pa.table({"row": list(range(5))[rows]})

    path = tmp_path / "table.parquet"
    with pytest.raises(KeyboardInterrupt):
        shards.write_in_shards(path, 5, make, "rows")
    first, _ = sorted((tmp_path / "table.shards").iterdir())
    first.write_bytes(first.read_bytes()[:-10])
    shards.write_in_shards(path, 5, make, "rows")
    assert made == [0, 2, 4, 0, 4]
    assert shown == [(0, 5), (2, 5), (4, 5), (2, 5), (4, 5)]  # one bar for all shards, with what is done already
    assert pq.read_table(path)["row"].to_pylist() == [0, 1, 2, 3, 4]
    shards.remove_shards(path)
    assert not path.with_suffix(".shards").exists()


def test_several_gpus_and_one_process_are_an_error_that_says_what_to_do(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = ForgetFilterConfig()
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        load_learner(tiny_model, load_tokenizer(tiny_model, config), config)


@pytest.mark.parametrize(("name", "count"), [("8b", 2), ("70b", 8)])
def test_the_config_files_of_the_docs_are_accelerates(name, count):
    config = load_config_from_file(str(CONFIG_FILES / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == ("FSDP", count)


@pytest.mark.parametrize(
    ("told", "sharded"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, True),
        (ZERO3, True),
        ({**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "3.json"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "1.json"}, False),
        ({"ACCELERATE_USE_FSDP": "false"}, False),
    ],
)
def test_a_config_file_that_asks_for_sharding_is_heard_by_us_alone(told, sharded, tmp_path, monkeypatch):
    for stage in (1, 3):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert processes.sharded.__wrapped__() == sharded
    assert ("true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))) == (
        "ACCELERATE_USE_DEEPSPEED" in told and not sharded
    )


def test_a_file_that_is_none_of_deepspeed_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "zero.json"
    for name, value in {**ZERO3, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    for text in ("{", "[]", '{"zero_optimization": 3}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"zero\.json"):
            processes.sharded.__wrapped__()


@pytest.mark.parametrize(
    ("settings", "told", "words"),
    [
        ({"use_peft": False}, {}, "--use_peft false"),
        ({"torch_compile": True}, {}, "--torch_compile"),
        ({"load_in_4bit": True}, {}, "--load_in_4bit"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({}, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing true"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_an_error_before_any_work(config, settings, told, words, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    asked = dataclasses.replace(config, **settings)
    sharding.refuse_unshardable(asked)
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(ConfigError, match=words):
        ForgetFilter(asked).fit()
    assert not Path(asked.output_dir).exists()


def test_integers_are_not_sharded():
    layer = torch.nn.Linear(2, 2)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantized"):
        sharding.shard(layer, torch.device("cpu"))


def test_a_sharded_model_out_of_memory_is_an_error_and_not_tried_again(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError), memory.one_memory_error():
        raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(processes, "sharded", lambda: True)
    for error in (RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("x"), MemoryError()):
        with pytest.raises(TrainingError, match="--per_device_eval_batch_size"), memory.one_memory_error():
            raise error
    with pytest.raises(RuntimeError, match="something else"), memory.one_memory_error():
        raise RuntimeError("something else")


@pytest.mark.parametrize(("backend", "count"), [("gloo", 1), ("nccl", 0)])
def test_connections_of_processes_on_cpus_are_closed_at_exit(backend, count, monkeypatch):
    """Where gloo's were not, one in five processes was aborted at its end, its work done."""
    at_exit, closed = [], []
    monkeypatch.setattr("atexit.register", at_exit.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: closed.append(1))
    processes._hang_up_at_exit.__wrapped__()
    for work in at_exit:
        work()
    assert len(closed) == count
