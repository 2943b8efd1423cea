"""OUT/report.html: what a run decided, row by row."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forgetfilter.config import EMBEDDED_MODEL, ForgetFilterConfig
from forgetfilter.data.formats import read_row
from forgetfilter.data.loading import require_column
from forgetfilter.data.source import Source
from forgetfilter.decision.opened import Opened, read_scores
from forgetfilter.decision.outputs import counts_in_words
from forgetfilter.decision.record import rows_by_hand
from forgetfilter.marks import has_marks
from forgetfilter.report.page import asset, escaped, write_page
from forgetfilter.report.shading import costs_of, cut, load_chat, shaded
from forgetfilter.runs import Run
from forgetfilter.scored import Scored

TEXT_BYTES = 6_000_000
"""Most bytes that the rows' texts may take on the page; rows far from the threshold are left out first."""
TOP = 200
"""Most suspect rows whose texts come before those near the threshold."""
ROWS_WITH_IDS = 20_000
"""Rows up to which each one's id is on the page; beyond, rows are named by their number."""
GROUP_COLUMNS = ("source", "group")
"""Columns that name a row's group, if the data has one and no other is asked for."""
GROUPS, OTHERS = 12, "(all others)"
"""Largest number of groups shown, the largest groups; and the name for the rest."""


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
    scores, opened = read_scores(run, ["decision", "reason"]), Opened.of(run)
    source, config = opened.source, opened.config
    require_column(source, group_column, "group_column")
    if group_column is not None:
        run.manifest["group_column"] = group_column
        run.save()
    column, names, groups = _groups(source, run.manifest.get("group_column"), config.label_column)
    decision = run.manifest["decision"]
    name = opened.deciding_filter(decision.get("filter"))
    scored = opened.scored[name]
    suspicion = scored.suspicion
    order = np.argsort(-np.nan_to_num(suspicion, nan=-np.inf), kind="stable").tolist()
    threshold = decision["threshold"]
    if threshold is not None and not np.isfinite(threshold):  # every scored row is dropped
        threshold = float(np.nanmin(suspicion)) - 1e-6
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    dropped = pc.equal(scores["decision"], "dropped").to_numpy()
    wanted = ((place, order[place]) for place in _wanted(suspicion[order], threshold))
    places, texts = _texts(opened, scored, scores["reason"], wanted)
    folder = shlex.quote(str(run.folder))
    data = {
        "title": "What was kept and what was dropped",
        "about": f"{Path(str(config.dataset_name or 'a data set')).name}, {metrics['rows']} rows, "
        f"scored by {config.model_name_or_path} in {run.folder}",
        "folder": folder,
        "flags": decision.get("flags", ""),
        "by": "" if name == opened.deciding_filter(None) else f"--filter {name} ",
        "file": "decisions.jsonl",
        "words": ["kept", "dropped"],
        "remembered": has_marks(run.folder),
        "markName": "decision",
        "threshold": threshold,
        "notes": [*counts_in_words(metrics), *_planted_tiles(metrics)],
        "planted": metrics.get("planted", {}).get("says", ""),
        "rule": {"name": metrics["rule"], "filter": name, "says": metrics["says"]},
        "rows": _rows(opened, suspicion, order, dropped, groups if names else None),
        "groups": names,
        "groupName": column,
        "textOf": places,
        "texts": texts,
        "leftOut": len(order) - len(places),
        "commands": _commands(run, config),
        "losses": _losses(run),
        "curves": _curves(name, scored, names, groups, dropped),
        "facts": _facts(run, config),
    }
    return write_page(run.folder / "report.html", "ForgetFilter: report", asset("rows.html"), data, asset("rows.js"))


def _planted_tiles(metrics: Mapping[str, Any]) -> list[list[str]]:
    """What became of the planted rows, if any were planted."""
    found = metrics.get("planted")
    return [["planted unsafe rows dropped", f"{found['found']} of {found['unsafe']}"]] if found else []


def _rows(
    opened: Opened, suspicion: np.ndarray, order: Sequence[int], dropped: np.ndarray, groups: Sequence[int] | None
) -> dict[str, Any]:
    """What the page knows of every row, from most to least suspect: marks as texts of 0 and 1."""
    ids = opened.source.ids if len(opened.source) <= ROWS_WITH_IDS else None
    by_hand = np.isin(np.arange(len(opened.source)), list(rows_by_hand(opened.run)))
    fixed = opened.unreadable if opened.config.unreadable == "drop" else np.zeros(len(opened.source), bool)

    def bits(values: np.ndarray) -> str:
        return "".join("1" if values[row] else "0" for row in order)

    return {
        "row": order,
        "id": None if ids is None else [ids[row] for row in order],
        "score": [None if np.isnan(suspicion[row]) else round(float(suspicion[row]), 7) for row in order],
        "dropped": bits(dropped),
        "hand": bits(by_hand),
        "fixed": bits(fixed),
        "unsafe": None if opened.labels is None else bits(opened.labels),
        "group": None if groups is None else [groups[row] for row in order],
    }


def _groups(source: Source, asked: str | None, label: str | None) -> tuple[str, list[str], list[int]]:
    """The column, names of the groups, and each row's; nothing where the data has no such column."""
    columns = [asked] if asked is not None else [column for column in GROUP_COLUMNS if column != label]
    records = source.rows()
    there = {name for record in records for name in columns if name in record}
    column = next((name for name in columns if name in there), None)
    if column is None:
        return "", [], []
    values = [str(record.get(column))[:60] for record in records]
    names = [name for name, _ in Counter(values).most_common(GROUPS)]
    if len(set(values)) > GROUPS:
        names[-1] = OTHERS
    number = {name: i for i, name in enumerate(names)}
    return column, names, [number.get(value, len(names) - 1) for value in values]


def _wanted(scores: np.ndarray, threshold: float | None) -> Iterator[int]:
    """Places in order of how much their texts are wanted: the top ones, then both ways from the threshold outwards."""
    above = 0 if threshold is None else int((scores > threshold).sum())
    top = min(TOP, len(scores))
    up, down = range(above - 1, top - 1, -1), range(max(above, top), len(scores))
    both = min(len(up), len(down))
    near = chain.from_iterable(zip(up[:both], down[:both], strict=True))
    return chain(range(top), near, up[both:], down[both:])


def _texts(
    opened: Opened, scored: Scored, reasons: pa.ChunkedArray, wanted: Iterable[tuple[int, int]]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The texts that there is room for, and the places of their rows.

    Args:
        opened: The run.
        scored: What the filter that decides made of the rows.
        reasons: Why each row was kept or dropped.
        wanted: Place and row of each text, in the order in which they are wanted.
    """
    run, source = opened.run, opened.source
    chat, records = load_chat(run.stage("tokenizer"), opened.config), source.rows()
    columns = {name.replace("_", " "): values for name, values in _columns(opened).items()}
    places: list[int] = []
    texts: list[dict[str, Any]] = []
    room = TEXT_BYTES
    for place, row in wanted:
        turns = read_row(records[row], run.row_format)
        said = {name: _shown(values[row]) for name, values in columns.items()}
        text = {
            "turns": shaded(turns, costs_of(scored, row), chat),
            "reason": reasons[row].as_py(),
            "scores": {name: value for name, value in said.items() if columns[name].dtype != object},
            "answers": {name: value or "" for name, value in said.items() if columns[name].dtype == object},
        }
        room -= len(escaped(text).encode("utf-8", "replace")) + 8
        if room < 0:
            break
        places.append(place)
        texts.append(text)
    return places, texts


def _columns(opened: Opened) -> dict[str, np.ndarray]:
    """What every filter says of the rows: its columns, and where several scored them, its scores."""
    found: dict[str, np.ndarray] = {}
    for name, scored in opened.scored.items():
        if len(opened.scored) > 1:
            found[name] = scored.suspicion
        found |= scored.columns
    return found


def _shown(value: Any) -> float | str | None:
    """A value for the page: a text cut where it is long, a number, or nothing."""
    if value is None or isinstance(value, str):
        return value and cut(value)
    return None if np.isnan(value) else float(value)


def _commands(run: Run, config: ForgetFilterConfig) -> list[str]:
    name, folder = config.model_name_or_path, shlex.quote(str(run.folder))
    template = f" --chat_template_path {folder}/stages/tokenizer/chat_template.jinja" * (run.template_note is not None)
    model = "MODEL" if name == EMBEDDED_MODEL else shlex.quote(name)
    return [
        f"forgetfilter finetune {folder}",
        f"forgetfilter export {folder} --format trl",
        f"trl sft --model_name_or_path {model} --dataset_name {folder}/export/trl{template}",
    ]


def _losses(run: Run) -> list[dict[str, Any]]:
    """The training losses of the stages that are stored, a chart each."""
    charts = []
    for part, entry in run.manifest["stages"].items():
        losses = entry.get("losses")
        if losses:
            name = f"{part.partition('-')[0]} stage" + (" (of another decision)" if entry.get("stale") else "")
            charts.append({"name": name, "at": list(map(str, losses)), "lines": {"loss": list(losses.values())}})
    return charts


def _curves(
    name: str, scored: Scored, names: Sequence[str], groups: Sequence[int], dropped: np.ndarray
) -> list[dict[str, Any]]:
    """Learning curves: how well each group, or the kept and the dropped rows, were held at each moment, on average."""
    if not scored.moments:
        return []
    which = {group: np.array(groups) == i for i, group in enumerate(names)}
    which = which or {"kept": ~dropped, "dropped": dropped}
    lines = {
        group: [round(float(np.nanmean(values[rows])), 4) for values in scored.moments.values()]
        for group, rows in which.items()
        if all((~np.isnan(values[rows])).any() for values in scored.moments.values())
    }
    return [{"name": name.replace("_", " "), "at": list(scored.moments), "lines": lines}]


def _facts(run: Run, config: ForgetFilterConfig) -> list[tuple[str, str]]:
    """Settings that were given, versions, what the data and the weights were."""
    manifest = run.manifest
    facts = [(name, json.dumps(value, ensure_ascii=False)) for name, value in config.non_default().items()]
    facts += [("weights, SHA-256", manifest["model"]["sha256"]), ("noisy data, SHA-256", manifest["noisy"]["sha256"])]
    facts += [("chat template", run.template_note)] if run.template_note else []
    facts += [("safe rows", str(manifest["safe"]["rows"])), ("started", manifest["started"])]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [*facts, ("versions", versions), ("decision", f"number {manifest['decision']['number']}")]
