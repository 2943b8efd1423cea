"""The files of a decision: kept and dropped rows, scores, metrics, and the card of the data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter.data.card import CARD, card_head
from forgetfilter.data.lazy import in_parts
from forgetfilter.data.source import DELIMITERS, Source
from forgetfilter.decision.choice import Decision, decision_digest, drops
from forgetfilter.decision.opened import Opened, read_scores
from forgetfilter.decision.planted_figures import planted_figures
from forgetfilter.evaluation.filter_quality import filter_quality
from forgetfilter.files import whole_file, write_text
from forgetfilter.runs import Run
from forgetfilter.scored import ANSWER, Scored

TYPED = "kept_rows.parquet"
"""Beside a kept.csv: the same rows for programs that would guess the types of its columns."""
COUNTED_AT_READING = ("partly_scored", "malformed", "also_safe", "repeated", "spelt_specials")
"""What was noted about the noisy data when it was read: counts of rows."""

COUNT_IN_WORDS = {
    "unscored": "unscored",
    "partly_scored": "cut at max_length, so scored in part",
    "malformed": "malformed",
    "also_safe": "also among the safe rows",
    "repeated": "that say the same as an earlier row, whose score they share",
    "unreadable": "that the model can hardly read, such as ciphers (`filter --unreadable drop` drops them)",
    "spelt_specials": "that spell special tokens or a change of turn, which stay text",
}
"""Counts worth a line, in words."""


def last_digest(run: Run) -> str:
    """The hash of what a run's last decision says of each row."""
    return decision_digest(read_scores(run, ["decision"])["decision"].to_pylist())


def write(opened: Opened, decision: Decision) -> None:
    """Write scores, kept and dropped rows, metrics and card; the manifest comes last: it has their checksums."""
    run, source = opened.run, opened.source
    (run.folder / "report.html").unlink(missing_ok=True)  # it shows the previous decision
    files = [run.folder / name for name in (f"kept{source.suffix}", f"dropped{source.suffix}")]
    parts = [source.select(np.flatnonzero(chosen).tolist()) for chosen in (~decision.dropped, decision.dropped)]
    for path, part in zip(files, parts, strict=True):
        with whole_file(path) as temporary:
            part.write(temporary)
    if source.suffix in DELIMITERS:
        files.append(run.folder / TYPED)
        with whole_file(files[-1]) as temporary:
            _write_typed(source, ~decision.dropped, temporary)
    with whole_file(run.folder / "scores.parquet") as temporary:
        pq.write_table(scores_table(source, opened.scored, decision), temporary)
    hard = {"unreadable": int(opened.unreadable.sum())}
    metrics = {**counts_at_reading(run), **hard, **decision_figures(opened.scored, decision, opened.labels)}
    scored = opened.scored[decision.filter]
    if opened.planted and scored.planted is not None:
        by, threshold = decision.filter, decision.threshold
        yours = _scores_called(list(scored.planted)[-1], by, opened.scored)
        unreadable = np.array([row.get("unreadable", False) for row in opened.planted])
        dropped = drops(scored.planted[by], threshold, opened.config, unreadable)
        decides = threshold.value is not None
        metrics["planted"] = planted_figures(opened.planted, scored.planted, by, dropped, yours, decides=decides)
    run.write_json("metrics.json", metrics)
    card = card_head(parts[0], TYPED if source.suffix in DELIMITERS else files[0].name)
    card += _card(str(opened.config.dataset_name or "a data set"), metrics, files[0].name)
    card += f"\nChat template: {run.template_note}.\n" if run.template_note else ""
    write_text(run.folder / CARD, card)
    final = run.manifest["stages"].get("final")
    if final is not None:
        final["stale"] = final.get("decision") != decision.digest()
    for export in run.manifest.get("exports", {}).values():
        export["stale"] = export["decision"] != decision.digest()
    run.finish("decision", [*files, run.folder / "scores.parquet", run.folder / "metrics.json"])


def _scores_called(name: str, by: str, scored: Mapping[str, Scored]) -> np.ndarray:
    """(rows,) a witness' scores of the user's rows: where a probe has learnt from it, those that the probe keeps."""
    if name == by:
        return scored[by].suspicion
    kept = (found.columns[name] for found in (scored[by], *scored.values()) if name in found.columns)
    return next(kept, scored[name].suspicion if name in scored else scored[by].suspicion)


def _write_typed(source: Source, chosen: np.ndarray, path: Path) -> None:
    """Write some rows to a Parquet file, with the types that the columns have in all rows."""
    tables, first = source.tables(), 0
    none = next(tables)
    with pq.ParquetWriter(path, none.schema) as writer:
        for table in tables:
            writer.write_table(table.filter(pa.array(chosen[first : first + len(table)])))
            first += len(table)


def scores_table(source: Source, scored: Mapping[str, Scored], decision: Decision) -> pa.Table:
    """One row for each noisy row, in order: ids, every filter's scores and columns, and what was decided."""
    columns: dict[str, Any] = {"row": np.arange(len(source)), "id": _column(source.ids)}

    def has_copies(name: str) -> bool:
        """Whether a filter, such as the probe, has another one's scores among its columns."""
        return not scored.keys().isdisjoint(scored[name].columns)

    for name in sorted(scored, key=has_copies):  # a filter's own columns come before copies of them
        found = scored[name]
        for column, values in found.columns.items():
            columns.setdefault(column, pa.array(values, from_pandas=True))
        columns[name] = pa.array(found.suspicion, from_pandas=True)
    answers = scored[decision.filter].columns.get(ANSWER)
    if answers is not None:  # each filter has its own; that of the one that decides counts
        columns[ANSWER] = pa.array(answers, from_pandas=True)
    decided = {"decision": _column(decision.words), "reason": _column(decision.reasons), "by_hand": decision.by_hand}
    return pa.table({**columns, **decided})


def _column(texts: Sequence[str]) -> pa.ChunkedArray:
    """Texts as a column, without a moment at which all of them are Python's own."""
    return pa.chunked_array([pa.array(part, pa.string()) for part in in_parts(texts)], pa.string())


def counts_at_reading(run: Run) -> dict[str, Any]:
    """What was noted about the noisy data when it was read: counts of rows, and those with each column not read."""
    found = {**run.manifest["noisy"], **run.manifest.get("notes", {})}
    return {**{name: found.get(name, 0) for name in COUNTED_AT_READING}, "unread": found.get("unread", {})}


def counts_in_words(metrics: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What else there is to say of the rows: in words, and of how many rows it is true. Older runs know less."""
    unread = [(f"with {name!r}, which is not read", count) for name, count in metrics.get("unread", {}).items()]
    return [(words, metrics[name]) for name, words in COUNT_IN_WORDS.items() if metrics.get(name)] + unread


def decision_figures(scored: Mapping[str, Scored], decision: Decision, labels: np.ndarray | None) -> dict[str, Any]:
    """Counts, rule and threshold of a decision; with labels also how well it agrees with them.

    AUROC and average precision leave out the rows that a person decided.

    Args:
        scored: Filter -> its scores.
        decision: What was decided.
        labels: (rows,) bool, True = marked unsafe.
    """
    suspicion = scored[decision.filter].suspicion
    found: dict[str, Any] = {
        "rows": len(decision.dropped),
        "kept": int((~decision.dropped).sum()),
        "dropped": int(decision.dropped.sum()),
        "unscored": int(np.isnan(suspicion).sum()),
        "by_hand": int(decision.by_hand.sum()),
        "filter": decision.filter,
        "rule": decision.threshold.rule,
        "threshold": decision.threshold.value,
        "says": decision.threshold.says,
    }
    if labels is None:
        return found
    found |= filter_quality(labels, decision.dropped, suspicion)
    untold = ~decision.by_hand  # what a person said of a row may have taught its score
    ranked = {}
    for name, own in scored.items():
        figures = filter_quality(labels[untold], decision.dropped[untold], own.suspicion[untold])
        ranked[name] = {figure: figures[figure] for figure in ("auroc", "average_precision")}
    found |= ranked[decision.filter]
    if len(scored) > 1:
        found["filters"] = ranked
    return found


def _card(data_name: str, metrics: Mapping[str, Any], kept: str) -> str:
    limit = metrics["threshold"]
    return f"""# Kept rows of {Path(data_name).name}

`datasets.load_dataset` on this folder gives the {metrics["kept"]} kept rows and nothing else.

| rows | kept | dropped | unscored | filter | rule | threshold |
|---|---|---|---|---|---|---|
| {metrics["rows"]} | {metrics["kept"]} | {metrics["dropped"]} | {metrics["unscored"]} \
| {metrics["filter"]} | {metrics["rule"]} | {"none" if limit is None else f"{limit:.4f}"} |

Rule: {metrics["says"]}.

`scores.parquet` has a score and a reason for every row, `dropped{Path(kept).suffix}` the rows left out,
`manifest.json` versions, weights and checksums, `config.yaml` the flags that replay the run.
Made by ForgetFilter.
"""
