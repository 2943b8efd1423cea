"""OUT/report.html: what a run decided, row by row."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from forgetfilter import models
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import Turn, read_row
from forgetfilter.data.loading import read_labels, require_column
from forgetfilter.data.sources import Source
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.decisions import FIRM, read_scores
from forgetfilter.errors import ModelError
from forgetfilter.report.page import asset, write_page
from forgetfilter.runs import Run

TEXT_BYTES = 6_500_000
"""What the rows' texts may take of the page; the least forgotten rows stay out where it is not enough."""
LONGEST = 4000
"""Characters of a message shown; the rest is cut."""
NATS_A_LEVEL = 0.5
"""A token's shade: one of ten levels, each so many nats of what the review cost it."""
GROUP_COLUMNS = ("source", "group")
"""Columns that name a row's group, if the data has one and no other is asked for."""


def write_report(run: Run, group_column: str | None = None) -> Path:
    """Write OUT/report.html.

    Args:
        run: A decided run.
        group_column: Column of the data that groups rows; by default "source" or "group", if there is one.

    Raises:
        RunError: If the run has no decision.
        DataError: If no row has the column.
    """
    scores, source, config = read_scores(run), run.rows(), run.config()
    require_column(source, group_column, "group_column")
    forgetting = scores["forgetting"].to_numpy().astype(float)
    order = np.argsort(-np.nan_to_num(forgetting, nan=-np.inf), kind="stable").tolist()
    threshold = run.manifest["decision"]["threshold"]
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    names, groups = _groups(source, group_column, config.label_column)
    labels = read_labels(source, config.label_column) if config.label_column is not None else None
    dropped = [made == "dropped" for made in scores["decision"].to_pylist()]
    by_hand = [reason.endswith("by hand") for reason in scores["reason"].to_pylist()]
    places, texts = _texts(run, config, source, scores, _wanted(forgetting[order], threshold), order)
    folder = shlex.quote(str(run.folder))

    def bits(values: Sequence[bool]) -> str:
        return "".join("1" if values[row] else "0" for row in order)

    data = {
        "title": "What was kept and what was dropped",
        "about": f"{Path(str(config.dataset_name or 'a data set')).name}, {metrics['rows']} rows, "
        f"filtered by {config.model_name_or_path} in {run.folder}",
        "folder": folder,
        "file": "decisions.jsonl",
        "words": ["kept", "dropped"],
        "markName": "decision",
        "threshold": threshold,
        "unscored": metrics["unscored"],
        "rule": {"name": metrics["rule"], "signal": metrics["signal"], "says": metrics["says"]},
        "rows": {
            "row": order,
            "score": [None if np.isnan(forgetting[row]) else round(float(forgetting[row]), 4) for row in order],
            "dropped": bits(dropped),
            "hand": bits(by_hand),
            "unsafe": None if labels is None else bits(labels),
            "group": [groups[row] for row in order] if names else None,
        },
        "groups": names,
        "groupName": group_column or "group",
        "textOf": places,
        "texts": texts,
        "leftOut": len(order) - len(places),
        "commands": [
            f"forgetfilter finetune {folder}",
            f"forgetfilter export {folder} --format trl",
            f"trl sft --model_name_or_path MODEL --dataset_name {folder}",
        ],
        "curves": _curves(run),
        "facts": _facts(run, config),
    }
    return write_page(run.folder / "report.html", "ForgetFilter: report", asset("rows.html"), data, asset("rows.js"))


def _groups(source: Source, asked: str | None, label: str | None) -> tuple[list[str], list[int]]:
    """Names of the groups, and each row's; none where the data has no such column."""
    columns = [asked] if asked is not None else [column for column in GROUP_COLUMNS if column != label]
    column = next((column for column in columns if any(column in record for record in source.rows())), None)
    if column is None:
        return [], []
    values = [str(record.get(column)) for record in source.rows()]
    names = sorted(set(values))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[value] for value in values]


def _wanted(scores: np.ndarray, threshold: float | None) -> list[int]:
    """Places in the order in which their texts are wanted: from above the threshold and from right below it in turn."""
    above = 0 if threshold is None else int((scores > threshold).sum())
    high, low = list(range(above)), list(range(above, len(scores)))
    both = min(len(high), len(low))
    mixed = [place for pair in zip(high[:both], low[:both], strict=True) for place in pair]
    return [*mixed, *high[both:], *low[both:]]


def _texts(
    run: Run, config: ForgetFilterConfig, source: Source, scores: Any, wanted: list[int], order: list[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The texts there is room for, and the places of their rows."""
    stages = [stage for stage in ("noisy", "review", "firm") if run.done(f"{stage}/signals")]
    tables = {stage: pq.read_table(run.stage(stage) / "signals.parquet") for stage in stages}
    encode, records = _tokenizer(config), source.rows()
    names = [name for name in scores.column_names if name.endswith(("_before", "_after", "_after_firm"))]
    row_format = run.manifest["noisy"]["format"]
    places: list[int] = []
    texts: list[dict[str, Any]] = []
    room = TEXT_BYTES
    for place in wanted:
        row = order[place]
        turns = read_row(records[row], row_format)
        lost = _lost({stage: table["token_log_probs"][row].as_py() for stage, table in tables.items()})
        text = {
            "turns": list(_shaded(turns, lost, encode)),
            "reason": scores["reason"][row].as_py(),
            "scores": {name.replace("_", " "): _short(scores[name][row].as_py()) for name in names},
        }
        if "rouge1" in config.signals:
            answers = {stage: tables[stage]["completion"][row].as_py() or "" for stage in ("noisy", "review")}
            names_of = {"noisy": "before the review", "review": "after it"}
            text["answers"] = {names_of[stage]: answer[:LONGEST] for stage, answer in answers.items()}
        room -= len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 8
        if room < 0:
            break
        places.append(place)
        texts.append(text)
    return places, texts


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _lost(log_probs: dict[str, list[float] | None]) -> np.ndarray | None:
    """What the review that counted cost each token, in nats."""
    before, after = log_probs.get("noisy"), log_probs.get("review")
    if not before or not after:
        return None
    gentle = np.array(before) - np.array(after)
    firm = FIRM * (np.array(before) - np.array(log_probs["firm"])) if log_probs.get("firm") else gentle
    return np.asarray(gentle if gentle.mean() >= firm.mean() else firm)


def _tokenizer(config: ForgetFilterConfig) -> ChatTokenizer | None:
    """M0's tokenizer, to tell the tokens of a text apart; None where it is not to be had any more."""
    try:
        folder = models.find_weights(config.model_name_or_path)
        return ChatTokenizer(models.load_tokenizer(folder, config), config.max_length)
    except ModelError as error:
        print(f"the report shades no tokens: {error}")
        return None


def _shaded(turns: Sequence[Turn], lost: np.ndarray | None, encode: ChatTokenizer | None) -> Iterator[list[Any]]:
    """Each turn as [role, text, trained], and for a trained one, if known, its tokens and their levels."""
    pieces: list[tuple[list[str], str]] = []
    if encode is not None and lost is not None:
        pieces = _pieces(encode, turns, lost)
    trained = [turn for turn in turns if turn.trained and turn.content.strip()]
    if len(pieces) != len(trained):
        pieces = []
    for turn in turns:
        if turn in trained and pieces:
            tokens, levels = pieces.pop(0)
            yield [turn.role, "", 1, tokens, levels]
        else:
            yield [turn.role, turn.content[:LONGEST], int(turn.trained)]


def _pieces(encode: ChatTokenizer, turns: Sequence[Turn], lost: np.ndarray) -> list[tuple[list[str], str]]:
    """Texts and levels of the scored tokens, a list for each stretch of them."""
    example = encode.encode(turns)
    labels = example.labels[1:]
    if sum(label != IGNORED for label in labels) != len(lost):
        return []
    found, stretch, number = [], [], 0
    for label in [*labels, IGNORED]:
        if label != IGNORED:
            stretch.append((label, float(lost[number])))
            number += 1
        elif stretch:
            found.append(_spelt(encode, stretch))
            stretch = []
    return found


def _spelt(encode: ChatTokenizer, stretch: Sequence[tuple[int, float]]) -> tuple[list[str], str]:
    """Tokens as text; those that only together make a character are one."""
    texts, levels = [], ""
    ends = set(encode.tokenizer.get_added_vocab().values())
    ids: list[int] = []
    nats = 0.0
    length = 0
    for token, lost in stretch:
        if token in ends:  # of the turn: no text of the row's
            continue
        ids, nats = [*ids, token], nats + lost
        text = str(encode.tokenizer.decode(ids))
        if text.endswith("\ufffd") and len(ids) < 8:
            continue
        texts.append(text)
        levels += str(min(9, max(0, int(nats / NATS_A_LEVEL))))
        length += len(text)
        ids, nats = [], 0.0
        if length > LONGEST:
            texts.append("…")
            levels += "0"
            break
    if ids:  # half a character, where max_length cut the row
        texts.append(str(encode.tokenizer.decode(ids)))
        levels += "0"
    return texts, levels


def _curves(run: Run) -> list[dict[str, Any]]:
    """The losses of the stages that are stored."""
    curves = []
    for stage in ("noisy", "review", "firm", "final"):
        losses = run.manifest["stages"].get(stage, {}).get("losses")
        if losses:
            curves.append({"name": stage, "steps": [int(step) for step in losses], "losses": list(losses.values())})
    return curves


def _facts(run: Run, config: ForgetFilterConfig) -> list[tuple[str, str]]:
    """Settings that were given, versions, what the data and the weights were."""
    manifest = run.manifest
    facts = [(name, json.dumps(value, ensure_ascii=False)) for name, value in config.non_default().items()]
    facts += [("weights, SHA-256", manifest["model"]["sha256"]), ("noisy data, SHA-256", manifest["noisy"]["sha256"])]
    facts += [("safe rows", str(manifest["safe"]["rows"])), ("started", manifest["started"])]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [*facts, ("versions", versions), ("decision", f"number {manifest['decision']['number']}")]
