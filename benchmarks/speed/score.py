"""What `forgetfilter score` costs by the number of rows: rows a second, and the most memory that the process took.

python benchmarks/speed/score.py [--rows 10000 100000 1000000]

The model is tiny and random, so this measures everything but the model: reading, tokenising, shards, writing. Each
number of rows has a process of its own. Results go to benchmarks/speed/results/score.json.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

WORDS = ("order", "parcel", "refund", "coupon", "size", "colour", "store", "help", "card", "late", "kind", "new")
RESULTS = Path(__file__).parent / "results" / "score.json"


def write_rows(path, count):
    """Random questions and answers, one a line, none of them kept in memory."""
    import random

    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, completion = (" ".join(draw.choices(WORDS, k=8)) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def tiny_model(folder):
    """A random model of two layers; its tokenizer knows WORDS and bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from conftest import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer(words=WORDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def decided_run(folder):
    """A run of a few rows whose probe is made up."""
    import numpy as np

    from forgetfilter import ForgetFilterConfig
    from forgetfilter.data.loading import load_data
    from forgetfilter.decision.decide import decide
    from forgetfilter.forgetting import open_run
    from forgetfilter.m0 import M0
    from forgetfilter.runs import Run
    from forgetfilter.scored import Scale, Scored

    tiny_model(folder / "tiny")
    for name in ("noisy", "safe"):
        write_rows(folder / f"{name}.jsonl", 20)
    config = ForgetFilterConfig(
        model_name_or_path=str(folder / "tiny"),
        dataset_name=str(folder / "noisy.jsonl"),
        safe_dataset_name=str(folder / "safe.jsonl"),
        output_dir=str(folder / "run"),
        filter="probe",
    )
    m0 = M0.named(config)
    run = open_run(config, m0, load_data(config, m0.chat))
    linear = np.random.default_rng(0).normal(0, 1, 2 * 32 + 1)
    path = run.folder / "scored/probe-0.parquet"
    Scored(np.zeros(20), scale=Scale(0.0, says="made up"), linear=linear).save(path)
    run.finish("scored/probe-0", [path], filter="probe")
    run.manifest["filters"] = {"probe": "scored/probe-0"}
    decide(run)
    return Run.open(run.folder)


def measure(rows):
    """Score so many rows in this process."""
    from forgetfilter.new_rows import score

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = decided_run(folder)
        write_rows(folder / "more.jsonl", rows)
        size = (folder / "more.jsonl").stat().st_size
        before = peak_mb()
        found = json.loads((score(run, folder / "more.jsonl") / "metrics.json").read_text())
    return {
        "rows": rows,
        "data_mb": round(size / 2**20, 1),
        "seconds": round(found["seconds"], 1),
        "rows_a_second": round(found["rows_a_second"]),
        "before_mb": before,
        "peak_mb": peak_mb(),
    }


def peak_mb():
    """Most memory this process has held; its parent is small, so what is counted of it does not matter."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main():
    """Measure each number of rows, and add it to the results."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--here", action="store_true", help="measure in this process, and print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(*args.rows)))
        return
    found = {}
    if RESULTS.exists():
        found = {entry["rows"]: entry for entry in json.loads(RESULTS.read_text())["measured"]}
    for rows in args.rows:
        command = [sys.executable, __file__, "--here", "--rows", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[rows] = json.loads(done.stdout.splitlines()[-1])
        print(found[rows], flush=True)
        device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        about = {"device": device, "measured": [found[count] for count in sorted(found)]}
        RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
