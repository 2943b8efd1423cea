"""Turn stored scores into kept and dropped rows. This takes seconds, needs no model, and can be repeated."""

import dataclasses
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from forgetfilter import old_runs
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.by_hand import read_marks, read_overrides
from forgetfilter.data.copies import first_copies, with_copies
from forgetfilter.data.lazy import Lazy
from forgetfilter.data.loading import Rows
from forgetfilter.data.sources import Source
from forgetfilter.decision import outputs, rules
from forgetfilter.decision.opened import (
    REVIEWED,
    Opened,
    decided_rows,
    default_filter,
    overtaken,
    read_scores,
    scored_part,
    what_decides,
)
from forgetfilter.decision.outputs import Decision
from forgetfilter.decision.rules import Threshold
from forgetfilter.errors import ConfigError
from forgetfilter.files import sha256
from forgetfilter.marks import NAME as MARKS
from forgetfilter.marks import Mark, Marks, word
from forgetfilter.runs import Run, locked
from forgetfilter.scored import ANSWER, Scored

if TYPE_CHECKING:
    from datasets import Dataset

    from forgetfilter.review.session import Review

ByHand = dict[int, tuple[str, str]]
"""Row -> decision and reason, of the rows that a person decided."""
MARKED = {True: ("kept", "marked clean by hand"), False: ("dropped", "marked unsafe by hand")}
"""Decision and reason of a row by its mark."""


@dataclass
class Result:
    """A decided run.

    Attributes:
        run: Its folder.
    """

    run: Run

    @cached_property
    def review(self) -> "Review":
        """The run's review: marks, and the ranking they give; see forgetfilter.review.session."""
        from forgetfilter.review.session import Review

        return Review(self.run)

    def ask(self, count: int = 1) -> list[int]:
        """The rows to mark next."""
        return [question.row for question in self.review.ask(count)]

    def mark(self, said: Mapping[int, str | None]) -> str:
        """Mark rows "clean" or "unsafe", or None to take a mark back; returns what the marks tell so far, in a line.

        All that `forgetfilter review` does: a mark is on disk at once, and everything is ranked anew. `decide` takes
        the decision.

        Raises:
            DataError: If there is no such row, or no such mark.
            RunError: If the hidden states of the run's rows cannot be had.
        """
        self.review.mark(said)
        return self.review.status().line()

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        return dict(json.loads((self.run.folder / "metrics.json").read_text(encoding="utf-8")))

    @property
    def scores(self) -> "Dataset":
        """One row for each input row, in order: id, every filter's score (higher = more suspect), decision, reason."""
        from datasets import Dataset

        return Dataset(read_scores(self.run))

    @property
    def kept(self) -> "Dataset":
        """The kept rows as they came in, with all columns that any row has; see `Source.as_table`."""
        return self._rows("kept")

    @property
    def dropped(self) -> "Dataset":
        """The dropped rows as they came in."""
        return self._rows("dropped")

    def _rows(self, decision: str) -> "Dataset":
        from datasets import Dataset

        return Dataset(self.run.rows().as_table().take(pa.array(decided_rows(self.run, decision), pa.int64())))

    def decide(self, threshold: float | str | None = None, **options: Any) -> "Result":
        """Decide again, under the lock of the run's folder; see the function `decide`."""
        with locked(self.run.folder):
            self.run.reload()
            if "review" in vars(self):  # rows were marked, or asked for
                options.setdefault("filter", REVIEWED)
            return decide(self.run, threshold, **options)


def decide(
    run: Run,
    threshold: float | str | None = None,
    *,
    filter: str | None = None,
    drop_share: float | None = None,
    overrides: Path | None = None,
    trusted_rows: Path | str | None = None,
    max_clean_loss: float | None = None,
) -> Result:
    """Apply a rule to the stored scores and write everything that follows from it.

    Args:
        run: A scored run.
        threshold: A number or "auto"; by default what the run's config.yaml says.
        filter: Whose scores decide; by default those that the marks of a review taught, or the run's first filter.
        drop_share: Drop this share of the rows instead.
        overrides: JSONL with `id` (or `row`) and `decision` ("kept" or "dropped"): rows decided by hand. They go to the
            run's marks.jsonl, like trusted rows and all that is said in a review, and hold in later decisions, too.
        trusted_rows: JSONL with `id` (or `row`) and `clean` (true or false); by default the config's. Rows
            marked clean are kept, and the threshold follows from their scores; rows marked unsafe are dropped.
        max_clean_loss: Share of the clean rows that may be dropped, on average, if there are trusted rows; by default
            the config's.

    Raises:
        RunError: If the run is not scored.
        ConfigError: If the rules asked for exclude each other, or there are no scores by that filter.
        DataError: If a file names rows that are not there, or there are too few trusted rows.
    """
    settings, source = reachable(run), run.rows()
    marks = Marks(run.folder, source.ids, settings.seed)
    by_number = threshold not in (None, "auto")  # a number is one of scores that were seen
    name = filter or default_filter(run, settings)
    if filter is None and not by_number and marks.all() and overtaken(run, marks):
        name = REVIEWED
    limited = any(mark.drawn for mark in marks.all().values())
    config = _changed(settings, threshold, drop_share, trusted_rows, max_clean_loss, limited=limited)
    chosen = {} if overrides is None else read_overrides(source, overrides)
    by_review, asked = name == REVIEWED, name
    if by_review:
        from forgetfilter.review.session import up_to_date

        name, asked = up_to_date(run, source), settings.filters[0]  # whether it can be had: before anything is written
    opened = Opened.of(run, source)
    judge = opened.by(asked)
    if trusted_rows is not None:
        trusted = trusted_marks(source, config)
        _conformal(opened.scored[judge].suspicion, trusted, config.max_clean_loss)  # too few: likewise
        marks.add({row: word(clean) for row, clean in trusted.items()}, drawn=True)
    marks.add({row: word(decision == "kept") for row, (decision, _) in chosen.items()})
    if by_review and (trusted_rows is not None or chosen):  # they teach, too
        name, opened = up_to_date(run, source), Opened.of(run, source)
    scored = opened.scored[opened.by(name)]
    if name == REVIEWED and trusted_rows is None:  # the settings' number and file belong to another filter's scores
        config = dataclasses.replace(config, trusted_rows=None)
        if threshold is None:
            config = dataclasses.replace(config, threshold="auto")
    said = {row: mark.clean for row, mark in marks.all().items() if mark.said != "skipped"}
    trusted = {} if drop_share is not None else trusted_marks(source, config)
    trusted = {row: said.get(row, clean) for row, clean in trusted.items()}  # a later word counts more
    told = {**{row: clean for row, clean in trusted.items() if row not in said}, **said}
    found = choose(scored, config, trusted, drop_share, clean_drawn(marks.all()))
    by_hand = {**marked_by_hand(told), **chosen}
    if by_hand and outputs.noted(run)["repeated"]:
        copies = with_copies(by_hand, first_copies(source, run.manifest["noisy"]["format"]))
        as_another = {row: (made, f"{why}, of a row that says the same") for row, (made, why) in copies.items()}
        by_hand = {**as_another, **by_hand}
    decision = decided(name, scored, found, by_hand, config, opened.unreadable)
    flags = _flags(config, drop_share, name if name != opened.by(None) else None, max_clean_loss)
    _note(opened, decision, trusted, by_hand, flags, marks.digest())
    outputs.write(opened, decision)
    return Result(run)


def choose(
    scored: Scored,
    config: ForgetFilterConfig,
    marks: Mapping[int, bool],
    drop_share: float | None = None,
    drawn: Collection[int] = (),
) -> Threshold:
    """The threshold, by the rule that the settings ask for.

    Args:
        scored: Scores of the deciding filter.
        config: The settings.
        marks: Row -> whether a person marked it clean; empty without trusted rows.
        drop_share: Drop this share of the rows instead.
        drawn: Rows drawn at random that a person called clean: if there are enough, they limit the automatic rule.

    Raises:
        DataError: If there are too few trusted rows.
    """
    if drop_share is not None:
        return rules.drop_share(scored.suspicion, drop_share)
    if config.trusted_rows is not None:
        return _conformal(scored.suspicion, marks, config.max_clean_loss)
    if config.threshold == "auto":
        found = rules.automatic(scored.suspicion, scored.scale)
        return rules.limited(found, scored.suspicion, _at(drawn, len(scored.suspicion)), config.max_clean_loss)
    return rules.fixed(float(config.threshold))


def decided(
    name: str,
    scored: Scored,
    threshold: Threshold,
    by_hand: Mapping[int, tuple[str, str]],
    config: ForgetFilterConfig,
    unreadable: np.ndarray | None = None,
) -> Decision:
    """Apply a threshold, then what is asked for rows that no score says anything about, then what a person decided.

    Args:
        name: The deciding filter.
        scored: Its scores.
        threshold: The number above which a row is dropped.
        by_hand: Row -> decision and reason.
        config: The settings: whether rows without a score, and those that are hardly readable, are dropped.
        unreadable: (rows,) bool, the rows that are hardly readable.
    """
    hard = np.zeros(len(scored.suspicion), bool) if unreadable is None else unreadable
    dropped = drops(scored.suspicion, threshold, config, hard)
    answers = scored.columns.get(ANSWER)
    hand = np.zeros(len(dropped), bool)
    for row, (decision, _) in by_hand.items():
        dropped[row] = decision == "dropped"
        hand[row] = True

    def reason(row: int) -> str:
        if row in by_hand:
            return by_hand[row][1]
        said = _reason(name, scored.suspicion[row], threshold.value)
        if answers is not None and not np.isnan(answers[row]):
            said += f"; answer {answers[row]:.0f} is the most suspect"
        return f"hardly readable; {said}" if hard[row] else said

    reasons = Lazy(len(dropped), lambda rows: [reason(row) for row in rows.tolist()])
    return Decision(name, threshold, dropped, reasons, hand)


def drops(
    suspicion: np.ndarray, threshold: Threshold, config: ForgetFilterConfig, unreadable: np.ndarray
) -> np.ndarray:
    """(rows,) bool: which rows are dropped unless a person says otherwise; see `decided`."""
    found = threshold.drops(suspicion)
    if config.unscored == "drop":
        found = found | np.isnan(suspicion)
    return found | unreadable if config.unreadable == "drop" else found


def decide_by_config(
    name: str, scored: Scored, source: Source, config: ForgetFilterConfig, unreadable: np.ndarray | None = None
) -> Decision:
    """The decision that the config's rule and trusted rows give; writes nothing.

    Args:
        name: The deciding filter.
        scored: Its scores.
        source: The rows.
        config: The settings.
        unreadable: (rows,) bool, the rows that are hardly readable.

    Raises:
        DataError: If the file of marks cannot be read, or there are too few trusted rows.
    """
    marks = trusted_marks(source, config)
    threshold = choose(scored, config, marks)
    return decided(name, scored, threshold, marked_by_hand(marks), config, unreadable)


def _reason(name: str, score: float, threshold: float | None) -> str:
    """Why a row is kept or dropped by its score."""
    if np.isnan(score):
        return "unscored: no completion within max_length"
    if threshold is None:
        return f"{name} {score:.4f}, no threshold: nothing is dropped"
    return f"{name} {score:.4f} {'above' if score > threshold else 'within'} threshold {threshold:.4f}"


def settle(run: Run) -> Result:
    """Write the files of the last decision again if it still fits config.yaml; otherwise decide anew.

    Raises:
        RunError: If the run is not scored.
        DataError: If there are too few trusted rows to decide anew.
    """
    noted, config = run.manifest.get("decision", {}), run.config()
    path = _record(run, noted.get("number", 0))
    asked = what_decides(run, config)
    same = old_runs.same_decision(noted.get("asked"), asked)
    is_new = noted.get("asked", {}).get("marks") != asked["marks"]
    said = config.trusted_rows if is_new else None  # a file that was not there, or was another one: its words are new
    if not same:  # nothing is decided, or other flags were given: they count, whatever a review has said meanwhile
        return decide(run, filter=config.filters[0], trusted_rows=said)
    if not path.is_file() or sha256(path) != noted.get("record"):
        return decide(run, trusted_rows=said)
    taken = json.loads(path.read_text(encoding="utf-8"))
    opened = Opened.of(run)
    if taken.get("filter", config.filters[0]) not in opened.scored:  # the scores of a review are gone
        return decide(run)
    name = opened.by(taken.get("filter"))
    threshold = Threshold(taken["threshold"], taken["rule"], taken["says"])
    by_hand = {entry["row"]: (entry["decision"], entry["reason"]) for entry in taken["by_hand"]}
    decision = decided(name, opened.scored[name], threshold, by_hand, config, opened.unreadable)
    noted["filters"] = filters_shown(opened)
    outputs.write(opened, decision)
    return Result(run)


def filters_shown(opened: Opened) -> dict[str, str | None]:
    """Filter -> the part of the run that holds its scores, for every filter in the files of a decision."""
    return {name: scored_part(opened.run, name) for name in opened.scored}


def rows_by_hand(run: Run) -> set[int]:
    """The rows that a person decided, in the last decision."""
    path = _record(run, run.manifest["decision"]["number"])
    return {entry["row"] for entry in json.loads(path.read_text(encoding="utf-8"))["by_hand"]}


def marked_by_hand(marks: Mapping[int, bool]) -> ByHand:
    """Decision and reason of the rows that a person marked clean (true) or unsafe (false)."""
    return {row: MARKED[clean] for row, clean in marks.items()}


def reachable(run: Run) -> ForgetFilterConfig:
    """The run's settings, without the file of trusted rows if it is gone: what it said is in marks.jsonl."""
    config = run.config()
    gone = config.trusted_rows is not None and not Path(config.trusted_rows).is_file()
    return dataclasses.replace(config, trusted_rows=None) if gone and (run.folder / MARKS).exists() else config


def trusted_marks(source: Source, config: ForgetFilterConfig) -> dict[int, bool]:
    """Which rows a person marked clean (true) or unsafe (false); none without trusted rows.

    Raises:
        DataError: If the file cannot be read, or names rows that are not there.
    """
    return {} if config.trusted_rows is None else read_marks(source, Path(config.trusted_rows))


def check_marks(rows: Rows, config: ForgetFilterConfig) -> None:
    """Raise DataError, before any work, if the config's trusted rows are unreadable or too few."""
    if config.trusted_rows is not None:
        marks = trusted_marks(rows.source, config)
        scores = np.array([0.0 if example.scorable else np.nan for example in rows.examples])
        _conformal(scores, marks, config.max_clean_loss)


def _conformal(suspicion: np.ndarray, marks: Mapping[int, bool], max_clean_loss: float) -> Threshold:
    trusted = _at([row for row, clean in marks.items() if clean], len(suspicion))
    return rules.conformal(suspicion, trusted, max_clean_loss)


def _at(places: Collection[int], rows: int) -> np.ndarray:
    """(rows,) bool, True at the places."""
    return np.isin(np.arange(rows), list(places))


def clean_drawn(said: Mapping[int, Mark]) -> list[int]:
    """The rows drawn at random that a person called clean."""
    return [row for row, mark in said.items() if mark.drawn and mark.clean]


def _flags(config: ForgetFilterConfig, drop_share: float | None, name: str | None, max_clean_loss: float | None) -> str:
    """The flags with which `decide` repeats this decision, without the rows decided by hand."""
    by = f"--filter {name} " if name is not None else ""
    if drop_share is not None:
        return f"{by}--drop_share {drop_share}"
    if config.trusted_rows is not None:
        return f"{by}--trusted_rows {shlex.quote(config.trusted_rows)} --max_clean_loss {config.max_clean_loss}"
    limit = "" if max_clean_loss is None else f" --max_clean_loss {max_clean_loss}"
    return f"{by}--threshold {config.threshold}{limit}"


def _changed(
    config: ForgetFilterConfig,
    threshold: float | str | None,
    drop_share: float | None,
    trusted_rows: Path | str | None,
    max_clean_loss: float | None,
    *,
    limited: bool,
) -> ForgetFilterConfig:
    """The run's settings, with the changes that a decision asks for."""
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
    promises = config.trusted_rows is not None or (limited and not number)
    if max_clean_loss is not None and (drop_share is not None or not promises):
        raise ConfigError("max_clean_loss promises something only with trusted_rows, or with rows drawn in a review.")
    return config


def _record(run: Run, number: int) -> Path:
    return run.folder / "decisions" / f"{number:04}.json"


def _note(
    opened: Opened,
    decision: Decision,
    marks: Mapping[int, bool],
    by_hand: Mapping[int, tuple[str, str]],
    flags: str,
    said: str,
) -> None:
    """Record a decision before its files are written, so that an interruption loses nothing decided by hand."""
    run, threshold = opened.run, decision.threshold
    number = run.manifest.get("decision", {}).get("number", 0) + 1
    about = {"threshold": threshold.value, "rule": threshold.rule, "says": threshold.says, "filter": decision.filter}
    taken = {
        **about,
        "rows": decision.words,
        "marks": [{"row": row, "clean": clean} for row, clean in marks.items()],
        "by_hand": [{"row": row, "decision": made, "reason": why} for row, (made, why) in by_hand.items()],
    }
    path = _record(run, number)
    run.write_json(str(path.relative_to(run.folder)), taken)
    asked, filters = what_decides(run, opened.config), filters_shown(opened)
    record = sha256(path)
    run.manifest["decision"] = {
        "number": number, "record": record, **about, "flags": flags, "asked": asked, "filters": filters, "marks": said
    }  # fmt: skip
    run.forget("decision")
