"""A scored run, read once: its settings, its rows and what each filter made of them."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forgetfilter import old_runs
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import stored_labels
from forgetfilter.data.source import Source
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.files import digest, sha256
from forgetfilter.marks import Marks, has_marks
from forgetfilter.runs import Run
from forgetfilter.scored import SUSPICION, Scored

REVIEWED = "review"
"""What the scores that a person's marks taught are called, beside those of the filters."""


@dataclass
class Opened:
    """A scored run.

    Attributes:
        run: Its folder.
        config: Its settings.
        source: The noisy rows as they came in, malformed ones taken out.
        scored: Filter -> its scores; after a review also the scores that the marks taught, as REVIEWED.
        labels: (rows,) bool, True = marked unsafe, for figures alone; None without a label column.
        unreadable: (rows,) bool, whether the model can hardly read a row (data/unreadable.py).
        planted: What is known of each planted row: its notion, and whether it is unsafe; empty where there are none.
    """

    run: Run
    config: ForgetFilterConfig
    source: Source
    scored: dict[str, Scored]
    labels: np.ndarray | None
    unreadable: np.ndarray
    planted: list[dict[str, Any]]

    @classmethod
    def of(cls, run: Run, source: Source | None = None) -> "Opened":
        """Read a run.

        Args:
            run: The run.
            source: Its rows, where they are read already.

        Raises:
            RunError: If a file is damaged, or a filter that config.yaml names has not scored the rows yet.
        """
        config = run.config()
        source = run.rows() if source is None else source
        scored = {name: scores_by(run, name, config) for name in names_scored(run, config)}
        return cls(
            run, config, source, scored, stored_labels(source, config), run.unreadable(len(source)), run.planted()
        )

    def deciding_filter(self, name: str | None) -> str:
        """The filter that decides: the one named, or else what the marks of a review taught, or the run's first.

        Raises:
            ConfigError: If the rows have no scores by it.
        """
        if name is None:
            return REVIEWED if REVIEWED in self.scored else self.config.filters[0]
        if name not in self.scored:
            raise ConfigError(
                f"{self.run.folder}: its rows have no scores by {name!r}, but by {', '.join(self.scored)}. "
                f"`filter` with --filter {','.join([*self.scored, name])} adds them."
            )
        return name


def config_without_lost_file(run: Run) -> ForgetFilterConfig:
    """The run's settings, without the file of trusted rows if it is gone: what it said is in marks.jsonl."""
    config = run.config()
    gone = config.trusted_rows is not None and not Path(config.trusted_rows).is_file()
    return dataclasses.replace(config, trusted_rows=None) if gone and has_marks(run.folder) else config


def names_scored(run: Run, config: ForgetFilterConfig) -> list[str]:
    """The filters of a run, and REVIEWED after a review."""
    part = scored_part(run, REVIEWED)
    return [*config.filters, *([REVIEWED] if part is not None and run.done(part) else [])]


def default_filter(run: Run, config: ForgetFilterConfig) -> str:
    """The filter that decides unless another one is named.

    That is what a review's marks taught, also where the file of its scores is damaged: `decide` makes it again.
    """
    return REVIEWED if scored_part(run, REVIEWED) is not None else config.filters[0]


def scores_by(run: Run, name: str, config: ForgetFilterConfig) -> Scored:
    """A filter's stored scores.

    Raises:
        RunError: If there are none, or their file is damaged.
    """
    part = scored_part(run, name)
    if part is not None and run.done(part):
        return Scored.load(run.table_file(part))
    scored = old_runs.scored(run, name, config)
    if scored is None:
        raise RunError(f"{run.folder}: filter {name} has not scored its rows yet. Finish it with `filter`.")
    return scored


def scored_part(run: Run, name: str) -> str | None:
    """Manifest part that holds a filter's scores; None if there are none, or only those of version 0.1.0."""
    part: str | None = run.manifest.get("filters", {}).get(name)
    return part


def scored_parts(run: Run, names: Iterable[str]) -> dict[str, str | None]:
    """Filter -> the part of the run that holds its scores, for every filter in the files of a decision."""
    return {name: scored_part(run, name) for name in names}


def is_decided(run: Run, config: ForgetFilterConfig) -> bool:
    """Whether the files of the last decision are intact, and config.yaml still asks for the same.

    A decision taken later by `decide`, by hand or not, stays until `filter` is given other flags.
    """
    noted = run.manifest.get("decision", {})
    shown = noted.get("filters", {config.filters[0]: None}) == scored_parts(run, names_scored(run, config))
    figures = (noted.get("asked") or {}).get("label_column") == config.label_column
    same = same_decision(run, noted.get("asked"), what_decides(run, config))
    return shown and figures and run.done("decision") and same


def same_decision(run: Run, noted: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> bool:
    """Whether a run's decision was made with the settings, and by the scores, asked for now.

    A setting that did not exist then was at its default; a filter or marks that were not noted were the same. Scores
    that a later version made again are the same if every row has the same. Labels are for figures and decide nothing;
    a file of marks may have moved.
    """
    if noted is None:
        return False
    then = {**asked, **ForgetFilterConfig().decision(), **noted, "label_column": asked["label_column"]}
    if asked["marks"] is not None and then["marks"] == asked["marks"]:
        then["trusted_rows"] = asked["trusted_rows"]
    if then["scored"] != asked["scored"] and _equal(run, then["scored"], asked["scored"]):
        then["scored"] = asked["scored"]
    return then == dict(asked)


def _equal(run: Run, *parts: str | None) -> bool:
    """Whether parts of a run hold the same score of each row."""
    files = [run.table_file(part) for part in parts if part is not None]
    if len(files) < len(parts) or not all(file.exists() for file in files):
        return False
    one, other = (pq.read_table(file, columns=[SUSPICION]) for file in files)
    return bool(one.equals(other))


def what_decides(run: Run, config: ForgetFilterConfig) -> dict[str, Any]:
    """Everything a decision depends on: settings, filter, its scores, and the contents of the file of marks."""
    by = config.filters[0]
    return {**decision_settings(config), "filter": by, "scored": scored_part(run, by)}


def decision_settings(config: ForgetFilterConfig) -> dict[str, Any]:
    """The settings that turn scores into decisions, and a hash of the file of marks; None where there is none."""
    marks = Path(config.trusted_rows) if config.trusted_rows is not None else None
    found = sha256(marks) if marks is not None and marks.is_file() else None
    return {**config.decision(), "marks": found}


def overtaken(run: Run, said: Marks) -> bool:
    """Whether rows were marked after the run's last decision."""
    return bool(run.manifest.get("decision", {}).get("marks", digest({})) != said.digest())


def require_marks_decided(run: Run) -> None:
    """Raise RunError if rows were marked after the last decision, which would then not be that of the person."""
    if has_marks(run.folder) and overtaken(run, Marks(run.folder, run.rows().ids, run.config().seed)):
        folder = shlex.quote(str(run.folder))
        raise RunError(
            f"{run.folder}: rows were marked after the last decision. First press Done in "
            f"`forgetfilter review {folder}`, or run `forgetfilter decide {folder}`."
        )


def decided_rows(run: Run, decision: str) -> np.ndarray:
    """The numbers of the rows that the last decision kept, or dropped; errors as those of `read_scores`."""
    return np.flatnonzero(pc.equal(read_scores(run, ["decision"])["decision"], decision).to_numpy())


def kept_rows(run: Run, use: str) -> np.ndarray:
    """The numbers of the kept rows, for a use that needs some: raises RunError if none was kept."""
    kept = decided_rows(run, "kept")
    if not len(kept):
        raise RunError(
            f"{run.folder}: no row was kept, so there is nothing to {use}. "
            "`forgetfilter decide` takes another threshold."
        )
    return kept


def read_scores(run: Run, columns: Sequence[str] | None = None) -> pa.Table:
    """scores.parquet of a decided run, or some columns of it.

    Raises:
        RunError: If there is no decision yet, or a file of it is damaged.
    """
    if not run.done("decision"):
        raise RunError(
            f"{run.folder}: its decision is missing or damaged. The run's own `filter` command restores it; "
            "`forgetfilter decide` takes another."
        )
    return pq.read_table(run.folder / "scores.parquet", columns=columns)
