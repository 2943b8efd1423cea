"""What scores, a rule and a person's words make of each row. Nothing is written here."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.by_hand import read_marks
from forgetfilter.data.lazy import Lazy
from forgetfilter.data.loading import Rows
from forgetfilter.data.source import Source
from forgetfilter.decision import rules
from forgetfilter.decision.rules import Threshold
from forgetfilter.marks import Mark
from forgetfilter.scored import ANSWER, Scored

ByHand = dict[int, tuple[str, str]]
"""Row -> decision and reason, of the rows that a person decided."""
MARKED = {True: ("kept", "marked clean by hand"), False: ("dropped", "marked unsafe by hand")}
"""Decision and reason of a row by its mark."""


@dataclass
class Decision:
    """What was decided of every row.

    Attributes:
        filter: The filter whose scores decided.
        threshold: The threshold, and the rule that found it.
        dropped: (rows,) bool.
        reasons: For each row a text that says why.
        by_hand: (rows,) bool, True = a person decided.
    """

    filter: str
    threshold: Threshold
    dropped: np.ndarray
    reasons: Sequence[str]
    by_hand: np.ndarray

    @property
    def words(self) -> list[str]:
        """For each row "kept" or "dropped"."""
        return ["dropped" if drop else "kept" for drop in self.dropped]

    def digest(self) -> str:
        """A hash of which rows are kept; it tells whether a final model was trained on these."""
        return decision_digest(self.words)


def decision_digest(words: Sequence[str]) -> str:
    """A hash of "kept" or "dropped" for each row."""
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()


def choose(
    scored: Scored,
    config: ForgetFilterConfig,
    marks: Mapping[int, bool],
    drawn: Collection[int] = (),
) -> Threshold:
    """The threshold, by the rule that the settings ask for.

    Args:
        scored: Scores of the deciding filter.
        config: The settings.
        marks: Row -> whether a person marked it clean; empty without trusted rows.
        drawn: Rows drawn at random that a person called clean: if there are enough, they limit the automatic rule.

    Raises:
        DataError: If there are too few trusted rows.
    """
    if config.drop_share is not None:
        return rules.drop_share(scored.suspicion, config.drop_share)
    if config.trusted_rows is not None:
        return conformal(scored.suspicion, marks, config)
    if config.threshold == "auto":
        found = rules.automatic(scored.suspicion, scored.scale)
        return rules.raise_to_promise(found, scored.suspicion, _at(drawn, len(scored.suspicion)), config.max_clean_loss)
    return rules.fixed(float(config.threshold), "" if scored.scale is None else scored.scale.nothing)


def auto_for_ranks(config: ForgetFilterConfig, scored: Scored) -> ForgetFilterConfig:
    """The settings, with `threshold: auto` in place of a number if the scores are ranks: it was meant for log-odds."""
    number = config.threshold != "auto" and config.drop_share is None and config.trusted_rows is None
    ranks = scored.scale is not None and not scored.scale.separates
    return dataclasses.replace(config, threshold="auto") if number and ranks else config


def apply_threshold(
    name: str,
    scored: Scored,
    threshold: Threshold,
    by_hand: Mapping[int, tuple[str, str]],
    config: ForgetFilterConfig,
    unreadable: np.ndarray | None = None,
) -> Decision:
    """Apply a threshold; drop unscored and unreadable rows if the settings say so; then take what a person decided.

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
    beside = f"; {hard.sum()} hardly readable rows are dropped beside"
    if config.unreadable == "drop" and hard.any() and not threshold.says.endswith(beside):  # else it is on record
        threshold = dataclasses.replace(threshold, says=threshold.says + beside)
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
    """(rows,) bool: which rows are dropped unless a person says otherwise; see `apply_threshold`."""
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
    threshold = choose(scored, auto_for_ranks(config, scored), marks)
    return apply_threshold(name, scored, threshold, marked_by_hand(marks), config, unreadable)


def _reason(name: str, score: float, threshold: float | None) -> str:
    """Why a row is kept or dropped by its score."""
    if np.isnan(score):
        return f"unscored: no completion within max_length, or none that {name} can judge"
    if threshold is None:
        return f"{name} {score:.4f}, no threshold: nothing is dropped"
    return f"{name} {score:.4f} {'above' if score > threshold else 'within'} threshold {threshold:.4f}"


def marked_by_hand(marks: Mapping[int, bool]) -> ByHand:
    """Decision and reason of the rows that a person marked clean (true) or unsafe (false)."""
    return {row: MARKED[clean] for row, clean in marks.items()}


def clean_drawn(said: Mapping[int, Mark]) -> list[int]:
    """The rows drawn at random that a person called clean."""
    return [row for row, mark in said.items() if mark.drawn and mark.clean]


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
        conformal(scores, marks, config)


def conformal(suspicion: np.ndarray, trusted: Mapping[int, bool], config: ForgetFilterConfig) -> Threshold:
    """The threshold that loses at most `max_clean_loss` of the clean rows, by the trusted ones (rules.conformal).

    Args:
        suspicion: (rows,) scores, higher = more suspect.
        trusted: Row -> whether a person called it clean.
        config: The settings.

    Raises:
        DataError: If too few trusted rows are clean.
    """
    clean = _at([row for row, is_clean in trusted.items() if is_clean], len(suspicion))
    return rules.conformal(suspicion, clean, config.max_clean_loss)


def _at(places: Collection[int], rows: int) -> np.ndarray:
    """(rows,) bool, True at the places."""
    return np.isin(np.arange(rows), list(places))
