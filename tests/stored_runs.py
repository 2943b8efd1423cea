"""Runs whose scores are made up: what a filter leaves behind, without any training."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import detect_format
from forgetfilter.data.sources import load_source
from forgetfilter.decisions import decide
from forgetfilter.runs import Run


def stored_run(folder, records, lost, *, tokenizer=None, tokens=None, **settings):
    """A decided run over prompt/completion or text rows.

    Args:
        folder: Where to.
        records: The rows.
        lost: (rows,) what the review cost each, NaN = unscored; with one nat learnt it is the forgetting score.
        tokenizer: Folder of M0's tokenizer; by default the run has kept none.
        tokens: For each row its number of scored tokens; by default one.
        settings: More of ForgetFilterConfig.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / f"{folder.name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = ForgetFilterConfig(dataset_name=str(data), output_dir=str(folder), **settings)
    counts = dict.fromkeys(("malformed", "partly_scored", "also_safe", "repeated", "spelt_specials"), 0)
    counts |= {"rows": len(records), "sha256": "0", "format": detect_format(records, "rows")}
    run = Run.start(config, {"model": {"name": "M0", "sha256": "0"}, "noisy": counts, "safe": counts})
    if tokenizer is not None:
        shutil.copytree(tokenizer, run.stage("tokenizer"))
    run.keep_rows(load_source(str(data)))
    lost = np.asarray(lost, float)
    lengths = np.ones(len(lost), int) if tokens is None else np.asarray(tokens)
    costs = {"base": np.ones_like(lost), "noisy": 0 * lost, "review": lost, "firm": lost}
    for look in config.looks:
        values = -1 - np.where(np.isnan(lost), np.nan, costs[look])
        rows = [None if np.isnan(v) else np.full(n, v, np.float32) for v, n in zip(values, lengths, strict=True)]
        path = run.stage(look) / "signals.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "token_log_probs": pa.array(rows, pa.list_(pa.float32())),
            "log_likelihood": pa.array(values, from_pandas=True),
            "rouge1": pa.array(values, from_pandas=True),
            "completion": pa.array([f"{look} says"] * len(lost)),
        }
        pq.write_table(pa.table(columns), path)
        run.mark(f"{look}/signals", [path])
        if look != "base":
            run.mark(look, [], losses={"10": 2.0, "20": 1.5})
    decide(run)
    return Run.open(folder)
