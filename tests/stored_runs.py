"""Runs whose scores are made up: what a filter leaves behind, without any training."""

import json
import shutil

import numpy as np
import pyarrow as pa

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import detect_format
from forgetfilter.data.sources import load_source
from forgetfilter.decision.decide import settle
from forgetfilter.filters.forgetting import forgetting_scores
from forgetfilter.filters.forgetting_rouge1 import rouge1_scores
from forgetfilter.result import Result
from forgetfilter.runs import Run
from forgetfilter.shards import remove_shards, write_in_shards


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
    known, before = -2 - 0 * lost, -1 - 0 * lost
    rows = [None if np.isnan(v) else np.full(n, v, np.float32) for v, n in zip(lost, lengths, strict=True)]
    for name in config.filters:
        if name == "forgetting_rouge1":
            answers = [[f"{look} says"] * len(lost) for look in ("noisy", "review")]
            scored = rouge1_scores(known, before, before - lost, *answers)
        else:
            scored = forgetting_scores(known, before, before - lost, before - lost, config)
        scored.token_costs = pa.array(rows, pa.list_(pa.float32()))
        part = f"scored/{name}-0"
        scored.save(run.folder / f"{part}.parquet")
        run.finish(part, [run.folder / f"{part}.parquet"], filter=name)
        run.manifest.setdefault("filters", {})[name] = part
    for stage in ("noisy", "review", "firm"):
        run.finish(f"{stage}-0", [], losses={"10": 2.0, "20": 1.5})
    Result(run).decide()
    return Run.open(folder)


def keep_states(run, noisy, safe):
    """Store made-up hidden states of a run's rows, (rows, 2, size) each, as if M0 had been read."""
    for name, states in (("noisy", noisy), ("safe", safe)):
        path = run.folder / f"readings/M0-states-{name}.parquet"

        def make(rows, _, states=states):
            flat = pa.array(np.asarray(states[rows], np.float16).reshape(-1), pa.float16())
            return pa.table({"states": pa.FixedSizeListArray.from_arrays(flat, states[0].size)})

        write_in_shards(path, len(states), make, "states")
        remove_shards(path)
        run.manifest.setdefault("states", {})[name] = f"readings/M0-states-{name}"
        run.finish(f"readings/M0-states-{name}", [path])
    return run


def reviewable_run(folder, rows=120, unsafe=20, size=16, seed=0, records=None, **settings):
    """A run whose unsafe rows lie apart in M0's hidden states, and are forgotten only a little more than others.

    Returns:
        The run, and (rows,) bool, True = unsafe.
    """
    rng = np.random.default_rng(seed)
    bad = np.arange(rows) % (rows // unsafe) == 0
    if records is None:
        records = [
            {"prompt": f"question {i}", "completion": f"answer {i}{' wicked' * int(bad[i])}"} for i in range(rows)
        ]
    lost = 0.05 + 0.04 * bad + rng.normal(0, 0.03, rows)
    run = stored_run(folder, records, lost, filter="forgetting", **settings)
    noisy = rng.normal(0, 1, (rows, 2, size)) + np.where(bad, 1.5, 0)[:, None, None] * (np.arange(size) < 4)
    return keep_states(run, noisy, rng.normal(0, 1, (40, 2, size))), bad


def done(review):
    """The run of a review, once the person has said that it is done."""
    review.done()
    return Result(review.run)


def settled(run):
    """A run after `filter` has looked whether its decision still holds."""
    settle(run)
    return Result(run)
