"""Runs whose scores are made up: what a filter leaves behind, without any training."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.sources import load_source
from forgetfilter.decisions import decide
from forgetfilter.runs import Run


def stored_run(folder, records, lost, *, model="embedded", tokens=None, **settings):
    """A decided run over prompt/completion rows.

    Args:
        folder: Where to.
        records: The rows.
        lost: (rows,) what the review cost each, NaN = unscored; with one nat learnt it is the forgetting score.
        model: M0, by name.
        tokens: For each row its number of scored tokens; by default one.
        settings: More of ForgetFilterConfig.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / f"{folder.name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config = ForgetFilterConfig(
        model_name_or_path=str(model), dataset_name=str(data), output_dir=str(folder), **settings
    )
    counts = {"rows": len(records), "sha256": "0", "malformed": 0, "partly_scored": 0, "format": "prompt_completion"}
    run = Run.start(config, {"model": {"name": str(model), "sha256": "0"}, "noisy": counts, "safe": counts})
    run.keep_rows(load_source(str(data)))
    lost = np.asarray(lost, float)
    lengths = np.ones(len(lost), int) if tokens is None else np.asarray(tokens)
    for look, cost in (("base", np.ones_like(lost)), ("noisy", 0 * lost), ("review", lost), ("firm", lost)):
        values = -1 - np.where(np.isnan(lost), np.nan, cost)
        rows = [None if np.isnan(v) else np.full(n, v, np.float32) for v, n in zip(values, lengths, strict=True)]
        path = run.stage(look) / "signals.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "token_log_probs": pa.array(rows, pa.list_(pa.float32())),
            "log_likelihood": pa.array(values, from_pandas=True),
        }
        pq.write_table(pa.table(columns), path)
        run.mark(f"{look}/signals", [path])
        if look != "base":
            run.mark(look, [], losses={"10": 2.0, "20": 1.5})
    decide(run)
    return Run.open(folder)
