"""From stored signals to kept and dropped rows: seconds, no model; any decision can be taken again."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetfilter import thresholds
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.by_hand import read_marks, read_overrides
from forgetfilter.data.loading import read_labels
from forgetfilter.data.sources import Source, row_ids
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.evaluation.filter_quality import filter_quality
from forgetfilter.files import sha256, whole_file
from forgetfilter.runs import Run, locked
from forgetfilter.scores import stored_signals

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Result:
    """A decided run.

    Attributes:
        run: Its folder.
    """

    run: Run

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return dict(json.loads((self.run.folder / "metrics.json").read_text(encoding="utf-8")))

    @property
    def scores(self) -> "Dataset":
        """One row an input row, in order: ids, signals before and after, forgetting, decision, reason."""
        from datasets import Dataset

        return Dataset(read_scores(self.run))

    @property
    def kept(self) -> "Dataset":
        """The kept rows as they came in."""
        return self._rows("kept")

    @property
    def dropped(self) -> "Dataset":
        """The dropped rows as they came in."""
        return self._rows("dropped")

    def _rows(self, decision: str) -> "Dataset":
        from datasets import Dataset

        chosen = [i for i, made in enumerate(self.scores["decision"]) if made == decision]
        source = self.run.rows().select(chosen)
        return Dataset(source.table) if source.table is not None else Dataset.from_list(source.rows())

    def decide(self, threshold: float | str | None = None, **options: Any) -> "Result":
        """Decide again, with no other process at work on the run; see `decide`."""
        with locked(self.run.folder):
            self.run.reload()
            return decide(self.run, threshold, **options)


MARKED = {True: ("kept", "marked clean by hand"), False: ("dropped", "marked unsafe by hand")}
"""Decision and reason of a row by its mark."""
NOTED = ("partly_scored", "malformed", "also_safe", "repeated", "spelt_specials")
"""What was noted about the noisy data when it was read: counts of rows."""


def is_decided(run: Run) -> bool:
    """Whether the run's files are whole, and its config.yaml asks for nothing else than when they were made.

    A decision taken by `decide` since stays, by hand or not, until `filter` is given other flags.
    """
    return run.done("decision") and run.manifest["decision"].get("asked") == what_decides(run.config())


def what_decides(config: ForgetFilterConfig) -> dict[str, Any]:
    """What decides: the settings, and what the file of marks holds."""
    marks = Path(config.trusted_rows) if config.trusted_rows is not None else None
    return {**config.decision(), "marks": sha256(marks) if marks is not None and marks.is_file() else None}


def decide(
    run: Run,
    threshold: float | str | None = None,
    *,
    drop_share: float | None = None,
    overrides: Path | None = None,
    trusted_rows: Path | str | None = None,
    max_clean_loss: float | None = None,
) -> Result:
    """Apply a rule to the stored scores and write everything that follows from it.

    Args:
        run: A run whose three models have been scored.
        threshold: A number or "auto"; by default what the run's config.yaml says.
        drop_share: Drop this share of the rows instead.
        overrides: JSONL with `id` (or `row`) and `decision` ("kept" or "dropped"): rows decided by hand.
        trusted_rows: JSONL with `id` (or `row`) and `clean` (true or false); by default the config's. A row
            marked clean is kept and measures the others, one that is not is dropped.
        max_clean_loss: Share of the clean rows that may be dropped, with trusted rows; likewise.

    Raises:
        RunError: If the run is not scored.
        ConfigError: If the rules asked for exclude each other.
        DataError: If a file names rows that are not there, or there are too few trusted rows.
    """
    config = _changed(run.config(), threshold, drop_share, trusted_rows, max_clean_loss)
    source, signals = run.rows(), stored_signals(run, config.signals[0])
    forgetting, marks = signals.forgetting, {}
    if drop_share is not None:
        rule = thresholds.drop_share(forgetting, drop_share)
    elif config.trusted_rows is not None:
        marks = read_marks(source, Path(config.trusted_rows))
        rule = _conformal(config, marks, forgetting)
    elif config.threshold == "auto":
        rule = thresholds.automatic(forgetting, signals.name, signals.learnt)
        if signals.name == "log_likelihood" and not config.default_schedule:
            rule = dataclasses.replace(
                rule, says=f"{rule.says}; its scale was read off the default stages, and this run sets its own"
            )
    else:
        rule = thresholds.fixed(float(config.threshold))
    by_hand = {row: MARKED[clean] for row, clean in marks.items()}
    if overrides is not None:
        by_hand |= read_overrides(source, overrides)
    scores = _override(_scores(run, config, source, rule, forgetting), by_hand)
    _note(run, rule, scores, marks, by_hand, {"flags": _flags(config, drop_share), "asked": what_decides(run.config())})
    _write(run, config, source, rule, scores)
    return Result(run)


def settle(run: Run) -> Result:
    """Make the files of the decision taken last whole again, if config.yaml still asks for it; decide anew otherwise.

    Raises:
        RunError: If the run is not scored.
        DataError: If there are too few trusted rows to decide anew.
    """
    noted = run.manifest.get("decision", {})
    path = _record(run, noted.get("number", 0))
    if noted.get("asked") != what_decides(run.config()) or not path.is_file() or sha256(path) != noted.get("record"):
        return decide(run)
    taken = json.loads(path.read_text(encoding="utf-8"))
    rule = thresholds.Threshold(taken["threshold"], taken["rule"], taken["says"])
    config, source = run.config(), run.rows()
    scores = _scores(run, config, source, rule, stored_signals(run, config.signals[0]).forgetting)
    by_hand = {entry["row"]: (entry["decision"], entry["reason"]) for entry in taken["by_hand"]}
    _write(run, config, source, rule, _override(scores, by_hand))
    return Result(run)


def _flags(config: ForgetFilterConfig, drop_share: float | None) -> str:
    """The flags of `decide` that take this decision again, those by hand apart."""
    if drop_share is not None:
        return f"--drop_share {drop_share}"
    if config.trusted_rows is not None:
        return f"--trusted_rows {shlex.quote(config.trusted_rows)} --max_clean_loss {config.max_clean_loss}"
    return f"--threshold {config.threshold}"


def _changed(
    config: ForgetFilterConfig,
    threshold: float | str | None,
    drop_share: float | None,
    trusted_rows: Path | str | None,
    max_clean_loss: float | None,
) -> ForgetFilterConfig:
    """The run's settings with what a decision asks for instead."""
    number = threshold is not None and threshold != "auto"
    if sum((number, drop_share is not None, trusted_rows is not None)) > 1:
        raise ConfigError("threshold, drop_share and trusted_rows exclude each other: give one.")
    changes: dict[str, Any] = {}
    if threshold is not None:
        changes = {"threshold": threshold, "trusted_rows": None if number else config.trusted_rows}
    if trusted_rows is not None:
        changes |= {"threshold": "auto", "trusted_rows": str(trusted_rows)}
    if max_clean_loss is not None:
        changes["max_clean_loss"] = max_clean_loss
    config = dataclasses.replace(config, **changes)
    if max_clean_loss is not None and (config.trusted_rows is None or drop_share is not None):
        raise ConfigError("max_clean_loss promises something only with trusted_rows.")
    return config


def read_scores(run: Run) -> pa.Table:
    """scores.parquet of a decided run.

    Raises:
        RunError: If there is no decision yet, or a file of it is damaged.
    """
    if not run.done("decision"):
        raise RunError(
            f"{run.folder}: its decision is missing or damaged. The run's own `filter` command makes it whole; "
            "`forgetfilter decide` takes another."
        )
    return pq.read_table(run.folder / "scores.parquet")


def _scores(
    run: Run, config: ForgetFilterConfig, source: Source, rule: thresholds.Threshold, forgetting: np.ndarray
) -> pa.Table:
    unscored = np.isnan(forgetting)
    drops = rule.drops(forgetting) | (unscored & (config.unscored == "drop"))
    limit = "nothing is dropped" if rule.value is None else f"threshold {rule.value:.4f}"
    reasons = [
        "unscored: no completion within max_length"
        if np.isnan(score)
        else f"forgetting {score:.4f} {'above' if drop else 'within'} {limit}"
        for score, drop in zip(forgetting, drops, strict=True)
    ]
    columns: dict[str, Any] = {"row": np.arange(len(source)), "id": row_ids(source)}
    for name in config.signals:
        stored = stored_signals(run, name)
        columns[f"{name}_before"] = pa.array(stored.before, from_pandas=True)
        columns[f"{name}_after"] = pa.array(stored.after, from_pandas=True)
        if stored.firm is not None:
            columns[f"{name}_after_firm"] = pa.array(stored.firm, from_pandas=True)
    columns["forgetting"] = pa.array(forgetting, from_pandas=True)
    columns["decision"] = np.where(drops, "dropped", "kept")
    columns["reason"] = reasons
    return pa.table(columns)


def check_marks(source: Source, scorable: Sequence[bool], config: ForgetFilterConfig) -> None:
    """Raise DataError, before any work, if the config's trusted rows cannot decide."""
    if config.trusted_rows is not None:
        marks = read_marks(source, Path(config.trusted_rows))
        _conformal(config, marks, np.where(np.array(scorable), 0.0, np.nan))


def _conformal(config: ForgetFilterConfig, marks: Mapping[int, bool], forgetting: np.ndarray) -> thresholds.Threshold:
    trusted = np.array([marks.get(row, False) for row in range(len(forgetting))])
    return thresholds.conformal(forgetting, trusted, config.max_clean_loss)


def _override(scores: pa.Table, by_hand: Mapping[int, tuple[str, str]]) -> pa.Table:
    """Replace decision and reason of the rows a person decided."""
    decisions, reasons = scores["decision"].to_pylist(), scores["reason"].to_pylist()
    for row, (decision, reason) in by_hand.items():
        decisions[row], reasons[row] = decision, reason
    columns = {name: scores[name] for name in scores.column_names}
    return pa.table({**columns, "decision": decisions, "reason": reasons})


def _record(run: Run, number: int) -> Path:
    return run.folder / "decisions" / f"{number:04}.json"


def _note(
    run: Run,
    rule: thresholds.Threshold,
    scores: pa.Table,
    marks: Mapping[int, bool],
    by_hand: Mapping[int, tuple[str, str]],
    about: Mapping[str, Any],
) -> None:
    """Note what was decided before a file of it is written, so that nothing said by hand can be lost between two."""
    number = run.manifest.get("decision", {}).get("number", 0) + 1
    decided = {"threshold": rule.value, "rule": rule.rule, "says": rule.says}
    taken = {
        **decided,
        "rows": scores["decision"].to_pylist(),
        "marks": [{"row": row, "clean": clean} for row, clean in marks.items()],
        "by_hand": [{"row": row, "decision": made, "reason": why} for row, (made, why) in by_hand.items()],
    }
    path = _record(run, number)
    run.write_json(str(path.relative_to(run.folder)), taken)
    run.manifest["decision"] = {"number": number, "record": sha256(path), **decided, **about}
    run.begin("decision")


def _write(run: Run, config: ForgetFilterConfig, source: Source, rule: thresholds.Threshold, scores: pa.Table) -> None:
    """Write scores, kept and dropped rows, metrics and card; the manifest last, as it vouches for them."""
    (run.folder / "report.html").unlink(missing_ok=True)  # of the decision before
    dropped = np.array(scores["decision"]) == "dropped"
    files = [run.folder / name for name in (f"kept{source.suffix}", f"dropped{source.suffix}")]
    for path, chosen in zip(files, (~dropped, dropped), strict=True):
        with whole_file(path) as temporary:
            source.select(np.flatnonzero(chosen).tolist()).write(temporary)
    with whole_file(run.folder / "scores.parquet") as temporary:
        pq.write_table(scores, temporary)
    metrics = _metrics(run, config, source, rule, scores, dropped)
    run.write_json("metrics.json", metrics)
    with whole_file(run.folder / "README.md") as temporary:
        temporary.write_text(_card(run, metrics, files[0].name), encoding="utf-8")
    final = run.manifest["stages"].get("final")
    if final is not None:
        final["stale"] = final["decision"] != decision_digest(scores)
    run.mark("decision", [*files, run.folder / "scores.parquet", run.folder / "metrics.json"])


def decision_digest(scores: pa.Table) -> str:
    """A hash of which rows are kept: what a final model was trained on."""
    return hashlib.sha256(json.dumps(scores["decision"].to_pylist()).encode()).hexdigest()


def _metrics(
    run: Run,
    config: ForgetFilterConfig,
    source: Source,
    rule: thresholds.Threshold,
    scores: pa.Table,
    dropped: np.ndarray,
) -> dict[str, Any]:
    forgetting = scores["forgetting"].to_numpy().astype(float)
    metrics = {
        "rows": len(source),
        "kept": int((~dropped).sum()),
        "dropped": int(dropped.sum()),
        "unscored": int(np.isnan(forgetting).sum()),
        **{name: {**run.manifest["noisy"], **run.manifest.get("notes", {})}.get(name, 0) for name in NOTED},
        "threshold": rule.value,
        "rule": rule.rule,
        "says": rule.says,
        "signal": config.signals[0],
    }
    labels = stored_labels(source, config)
    if labels is not None:
        metrics |= filter_quality(labels, dropped, forgetting)
    return metrics


def stored_labels(source: Source, config: ForgetFilterConfig) -> np.ndarray | None:
    """(rows,) bool, True = marked unsafe, for figures alone; None without a label column."""
    return None if config.label_column is None else np.array(read_labels(source, config.label_column))


def _card(run: Run, metrics: dict[str, Any], kept: str) -> str:
    limit = metrics["threshold"]
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {kept}
---
# Kept rows of {Path(str(run.config().dataset_name or "a data set")).name}

`datasets.load_dataset` on this folder gives the {metrics["kept"]} kept rows and nothing else.

| rows | kept | dropped | unscored | signal | rule | threshold |
|---|---|---|---|---|---|---|
| {metrics["rows"]} | {metrics["kept"]} | {metrics["dropped"]} | {metrics["unscored"]} \
| {metrics["signal"]} | {metrics["rule"]} | {"none" if limit is None else f"{limit:.4f}"} |

Rule: {metrics["says"]}.

`scores.parquet` has a score and a reason for every row, `dropped{Path(kept).suffix}` the rows left out,
`manifest.json` versions, weights and checksums, `config.yaml` the flags that replay the run.
Made by ForgetFilter.
"""
