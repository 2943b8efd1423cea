"""OUT/report.html: what a run decided, row by row."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.config import EMBEDDED_MODEL, ForgetFilterConfig, looks_of
from forgetfilter.data.formats import read_row
from forgetfilter.data.loading import require_column
from forgetfilter.data.sources import Source, row_ids
from forgetfilter.decisions import read_scores, stored_labels
from forgetfilter.report.page import asset, escaped, write_page
from forgetfilter.report.shading import LONGEST, cost, load_chat, shaded
from forgetfilter.runs import Run
from forgetfilter.scores import stored_signals
from forgetfilter.summary import NOTES

TEXT_BYTES = 6_000_000
"""What the rows' texts may take of the page; those far from the threshold stay out where it is not enough."""
TOP = 200
"""Most forgotten rows whose texts come before those near the threshold."""
ROWS_WITH_IDS = 20_000
"""Rows up to which each one's id is on the page; beyond, rows are named by their number."""
GROUP_COLUMNS = ("source", "group")
"""Columns that name a row's group, if the data has one and no other is asked for."""
GROUPS, OTHERS = 12, "(all others)"
"""Groups told apart at most, the largest ones; and what the rest is called."""


def write_report(run: Run, group_column: str | None = None) -> Path:
    """Write OUT/report.html.

    Args:
        run: A decided run.
        group_column: Column of the data that groups rows, also in later reports of the run; by default "source" or
            "group", if there is one.

    Raises:
        RunError: If the run has no decision.
        DataError: If no row has the column.
    """
    scores, source, config = read_scores(run), run.rows(), run.config()
    require_column(source, group_column, "group_column")
    if group_column is not None:
        run.manifest["group_column"] = group_column
        run.save()
    column, names, groups = _groups(source, run.manifest.get("group_column"), config.label_column)
    forgetting = scores["forgetting"].to_numpy().astype(float)
    order = np.argsort(-np.nan_to_num(forgetting, nan=-np.inf), kind="stable").tolist()
    decision = run.manifest["decision"]
    threshold = decision["threshold"]
    if threshold is not None and not np.isfinite(threshold):  # everything scored goes
        threshold = float(np.nanmin(forgetting)) - 1e-6
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    labels = stored_labels(source, config)
    dropped = np.array(scores["decision"]) == "dropped"
    by_hand = np.array([reason.endswith("by hand") for reason in scores["reason"].to_pylist()], bool)
    places, texts = _texts(run, config, source, scores, _wanted(forgetting[order], threshold), order)
    folder = shlex.quote(str(run.folder))
    ids = row_ids(source) if len(source) <= ROWS_WITH_IDS else None

    def bits(values: np.ndarray) -> str:
        return "".join("1" if values[row] else "0" for row in order)

    data = {
        "title": "What was kept and what was dropped",
        "about": f"{Path(str(config.dataset_name or 'a data set')).name}, {metrics['rows']} rows, "
        f"filtered by {config.model_name_or_path} in {run.folder}",
        "folder": folder,
        "flags": decision.get("flags", ""),
        "file": "decisions.jsonl",
        "words": ["kept", "dropped"],
        "markName": "decision",
        "threshold": threshold,
        "notes": [[words, metrics[name]] for name, words in NOTES.items() if metrics[name]],
        "rule": {"name": metrics["rule"], "signal": metrics["signal"], "says": metrics["says"]},
        "rows": {
            "row": order,
            "id": None if ids is None else [ids[row] for row in order],
            "score": [None if np.isnan(forgetting[row]) else round(float(forgetting[row]), 7) for row in order],
            "dropped": bits(dropped),
            "hand": bits(by_hand),
            "unsafe": None if labels is None else bits(labels),
            "group": [groups[row] for row in order] if names else None,
        },
        "groups": names,
        "groupName": column,
        "textOf": places,
        "texts": texts,
        "leftOut": len(order) - len(places),
        "commands": _commands(config, folder),
        "losses": _losses(run),
        "curves": _curves(run, config, names, groups, dropped),
        "facts": _facts(run, config),
    }
    return write_page(run.folder / "report.html", "ForgetFilter: report", asset("rows.html"), data, asset("rows.js"))


def _groups(source: Source, asked: str | None, label: str | None) -> tuple[str, list[str], list[int]]:
    """The column, names of the groups, and each row's; nothing where the data has no such column."""
    columns = [asked] if asked is not None else [column for column in GROUP_COLUMNS if column != label]
    records = source.rows()
    column = next((column for column in columns if any(column in record for record in records)), None)
    if column is None:
        return "", [], []
    values = [str(record.get(column))[:60] for record in records]
    names = [name for name, _ in Counter(values).most_common(GROUPS)]
    if len(set(values)) > GROUPS:
        names[-1] = OTHERS
    number = {name: i for i, name in enumerate(names)}
    return column, names, [number.get(value, len(names) - 1) for value in values]


def _wanted(scores: np.ndarray, threshold: float | None) -> list[int]:
    """Places in the order in which their texts are wanted: the top ones, then from the threshold on up and down."""
    above = 0 if threshold is None else int((scores > threshold).sum())
    top = min(TOP, len(scores))
    up, down = list(range(above - 1, top - 1, -1)), list(range(max(above, top), len(scores)))
    both = min(len(up), len(down))
    near = [place for pair in zip(up[:both], down[:both], strict=True) for place in pair]
    return [*range(top), *near, *up[both:], *down[both:]]


def _texts(
    run: Run, config: ForgetFilterConfig, source: Source, scores: pa.Table, wanted: Sequence[int], order: Sequence[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The texts there is room for, and the places of their rows."""
    stages = [stage for stage in ("noisy", "review", "firm") if run.done(f"{stage}/signals")]
    tables = {stage: pq.read_table(run.stage(stage) / "signals.parquet") for stage in stages}
    chat, records = load_chat(run.stage("tokenizer"), config), source.rows()
    names = [name for name in scores.column_names if name.endswith(("_before", "_after", "_after_firm"))]
    places: list[int] = []
    texts: list[dict[str, Any]] = []
    room = TEXT_BYTES
    for place in wanted:
        row = order[place]
        lost = cost({stage: table["token_log_probs"][row].as_py() for stage, table in tables.items()})
        turns = read_row(records[row], run.manifest["noisy"]["format"])
        text = {
            "turns": shaded(turns, lost, chat),
            "reason": scores["reason"][row].as_py(),
            "scores": {name.replace("_", " "): scores[name][row].as_py() for name in names},
        }
        if "rouge1" in config.signals:
            answers = {stage: tables[stage]["completion"][row].as_py() or "" for stage in ("noisy", "review")}
            names_of = {"noisy": "before the review", "review": "after it"}
            text["answers"] = {names_of[stage]: answer[:LONGEST] for stage, answer in answers.items()}
        room -= len(escaped(text).encode("utf-8", "replace")) + 8
        if room < 0:
            break
        places.append(place)
        texts.append(text)
    return places, texts


def _commands(config: ForgetFilterConfig, folder: str) -> list[str]:
    name = config.model_name_or_path
    model = "MODEL" if name == EMBEDDED_MODEL else shlex.quote(name)
    return [
        f"forgetfilter finetune {folder}",
        f"forgetfilter export {folder} --format trl",
        f"trl sft --model_name_or_path {model} --dataset_name {folder}/export/trl",
    ]


def _losses(run: Run) -> list[dict[str, Any]]:
    """The training losses of the stages that are stored, a chart each."""
    charts = []
    for stage in ("noisy", "review", "firm", "final"):
        entry = run.manifest["stages"].get(stage, {})
        losses = entry.get("losses")
        if losses:
            name = f"{stage} stage" + (" (of another decision)" if entry.get("stale") else "")
            charts.append({"name": name, "at": list(map(str, losses)), "lines": {"loss": list(losses.values())}})
    return charts


def _curves(
    run: Run, config: ForgetFilterConfig, names: Sequence[str], groups: Sequence[int], dropped: np.ndarray
) -> list[dict[str, Any]]:
    """Learning and forgetting: the mean signal of each group, or of kept and dropped rows, after each stage."""
    name = config.signals[0]
    stored = stored_signals(run, name)
    looks = dict(zip(looks_of([name]), (stored.base, stored.before, stored.after, stored.firm), strict=False))
    which = {group: np.array(groups) == i for i, group in enumerate(names)}
    which = which or {"kept": ~dropped, "dropped": dropped}
    lines = {
        group: [round(float(np.nanmean(values[rows])), 4) for values in looks.values() if values is not None]
        for group, rows in which.items()
        if not np.isnan(stored.before[rows]).all()
    }
    at = {"base": "M0", "noisy": "noisy data", "review": "review", "firm": "firm review"}
    return [{"name": name.replace("_", " "), "at": [at[look] for look in looks], "lines": lines}]


def _facts(run: Run, config: ForgetFilterConfig) -> list[tuple[str, str]]:
    """Settings that were given, versions, what the data and the weights were."""
    manifest = run.manifest
    facts = [(name, json.dumps(value, ensure_ascii=False)) for name, value in config.non_default().items()]
    facts += [("weights, SHA-256", manifest["model"]["sha256"]), ("noisy data, SHA-256", manifest["noisy"]["sha256"])]
    facts += [("safe rows", str(manifest["safe"]["rows"])), ("started", manifest["started"])]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [*facts, ("versions", versions), ("decision", f"number {manifest['decision']['number']}")]
