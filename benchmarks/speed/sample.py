"""What a whole filter costs beside the finetuning that it protects, where forgetting sees a sample: seconds of both.

python benchmarks/speed/sample.py [--rows 100000] half an hour on two cores

The model is tiny and random, so each row costs far more beside the model than in it: what this measures is the
product's own share, such as reading, tokenising, writing, and the probe's fits. Results go to
benchmarks/speed/results/sample.json.
"""

import json
import os
import platform
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

from score import peak_mb, tiny_model, write_rows

from forgetfilter import ForgetFilter, ForgetFilterConfig
from forgetfilter.costs import Cost
from forgetfilter.data.loading import load_data
from forgetfilter.forgetting import finetune
from forgetfilter.m0 import M0
from forgetfilter.workshop import Workshop

RESULTS = Path(__file__).parent / "results" / "sample.json"


def measure(rows):
    """Filter so many rows, then finetune on what is kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "tiny")
        write_rows(folder / "noisy.jsonl", rows)
        write_rows(folder / "safe.jsonl", 300)
        config = ForgetFilterConfig(
            model_name_or_path=str(folder / "tiny"),
            dataset_name=str(folder / "noisy.jsonl"),
            safe_dataset_name=str(folder / "safe.jsonl"),
            output_dir=str(folder / "run"),
        )
        started = time.monotonic()
        result = ForgetFilter(config).fit()
        filtered, memory = time.monotonic() - started, peak_mb()
        kept = result.metrics["kept"]
        manifest = result.run.manifest
        cost = Cost.noted(manifest["stages"][manifest["filters"]["probe"]])
        started = time.monotonic()
        finetune(result.run)
        finetuned = time.monotonic() - started
        m0 = M0.named(config)
        whole = Workshop(m0, config).finetuning_passes(load_data(config, m0.chat).noisy.trainable())
    return {
        "rows": rows,
        "kept": kept,
        "filter_seconds": round(filtered, 1),
        "finetuning_seconds": round(finetuned, 1),
        "ratio": round(filtered / finetuned, 4),
        "ratio_by_count": round(cost.passes / whole, 4),
        "peak_mb": memory,
    }


def main():
    """Measure, and write the result."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    found = measure(parser.parse_args().rows)
    print(found)
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    RESULTS.write_text(json.dumps({"device": device, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
