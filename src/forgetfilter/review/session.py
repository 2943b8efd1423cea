"""A review of one run: its rows ranked by the marks said so far, the rows to ask about, and what the marks tell."""

import dataclasses
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.crossfit import judged_by
from forgetfilter.data.by_hand import read_statements
from forgetfilter.data.copies import first_copies, with_copies
from forgetfilter.data.source import Source
from forgetfilter.decision.choice import choose, clean_drawn, decide_by_config, drops, trusted_marks
from forgetfilter.decision.decide import decide
from forgetfilter.decision.opened import REVIEWED, Opened, config_without_lost_file, scored_part
from forgetfilter.decision.rules import Threshold, needed, percent
from forgetfilter.files import digest
from forgetfilter.marks import Mark, Marks, digest_of, word
from forgetfilter.progress import say
from forgetfilter.review.asking import Question, questions
from forgetfilter.review.ranking import PROBABILITY, Ranking
from forgetfilter.review.states import Places, States, states_of
from forgetfilter.runs import Run, locked
from forgetfilter.scored import Scored

SETTLED_AFTER = 10
"""Marks after which it is looked whether they changed anything."""
LEAST_DRAWN = 10
"""Rows drawn at random from which on a figure is given beside the range."""
SURE = 0.95
"""Of so many reviews the range for the unsafe rows left covers the truth."""


@dataclass(frozen=True)
class Status:
    """What the marks tell so far.

    Attributes:
        marks: Rows marked clean or unsafe.
        unsafe: Rows marked unsafe.
        dropped: Rows that a decision taken now would drop.
        kept: Rows that it would keep.
        left: Unsafe rows among those kept and not marked: an estimate, and a range.
        found: About what share of all unsafe rows would be dropped; None while the marks do not tell.
        drawn: Rows drawn at random that are marked: the range rests on them.
        promise: What can be promised about clean rows, in a sentence.
        settled: Whether the last marks changed little.
    """

    marks: int
    unsafe: int
    dropped: int
    kept: int
    left: tuple[int, int, int]
    found: float | None
    drawn: int
    promise: str
    settled: bool

    def line(self) -> str:
        """All of it in a line."""
        about, low, high = self.left
        left = f"{low} to {high} unsafe rows left"
        if self.found is not None:
            tenths = min(round(10 * self.found), 9 if high else 10)  # all of them only if none can be left
            left = f"about {tenths} of 10 unsafe rows found, {about} left ({low} to {high})"
        elif self.drawn >= LEAST_DRAWN:
            left = f"about {about} unsafe rows left ({low} to {high})"
        return (
            f"{self.marks} marked, {self.unsafe} of them unsafe; {left}; {self.dropped} rows would be dropped now; "
            f"{self.promise}" + ("; more marks would change little" if self.settled else "")
        )


class Review:
    """A run under review. All processes that review it share its marks.jsonl.

    Args:
        run: A scored run.
        trust_remote_code: Run model code that comes with the model, if M0 must be read.
        holds_lock: Whether the caller has locked the run's folder.

    Raises:
        RunError: If the run is not scored.
    """

    def __init__(self, run: Run, *, trust_remote_code: bool = False, holds_lock: bool = False) -> None:
        """Read the run, and take over the config's trusted rows as marks."""
        self.run, self.opened = run, Opened.of(run)
        self.config, self._trust, self._holds_lock = config_without_lost_file(run), trust_remote_code, holds_lock
        # the score files that `base` was read from; `filter` may replace them during the review
        self._filters_at_start = _filters(run.manifest.get("filters", {}))
        self._rule = dataclasses.replace(self.config, threshold="auto", drop_share=None, trusted_rows=None)
        scored = self.opened.scored
        self.name = next(
            (name for name in self.config.filters if "verdict" in scored[name].columns), self.config.filters[0]
        )
        self.base = scored[self.name]
        self.marks = Marks(run.folder, self.opened.source.ids, self.config.seed)
        touched, trusted = self.marks.touched(), trusted_marks(self.opened.source, self.config)
        self.marks.add({row: word(clean) for row, clean in trusted.items() if row not in touched}, drawn=True)
        self._lock = RLock()
        self._ranked: tuple[str, Scored] | None = None
        self._dropped: deque[np.ndarray] = deque(maxlen=SETTLED_AFTER + 1)
        self._counted: dict[int, bool] | None = None

    @cached_property
    def ranking(self) -> Ranking:
        """What ranks the rows; its first use takes the time that the features take.

        Raises:
            RunError: If the hidden states of the run's rows cannot be had.
        """
        unsafe, states = self._verdicts() & np.isfinite(self.base.suspicion) & ~self.opened.unreadable, self._states
        if self.base.scale is not None and self.base.scale.nothing and self.config.trusted_rows is None:
            unsafe[:] = False  # a share or a number drops the top of a ranking in which nothing was found
        return Ranking(self.base, unsafe, states.noisy, states.safe, self.config.seed, self.run.folder)

    @cached_property
    def _run_drops(self) -> np.ndarray:
        """(rows,) bool: what the run's own filter and rule drop."""
        return self._decided_by(self.config.filters[0], self.config)

    def _verdicts(self) -> np.ndarray:
        """(rows,) bool: the same by the filter whose ranking the review goes on from, by `auto`."""
        return self._run_drops if self.name == self.config.filters[0] else self._decided_by(self.name, self._rule)

    def _decided_by(self, name: str, config: ForgetFilterConfig) -> np.ndarray:
        """(rows,) bool: what a filter drops by the rule of some settings."""
        scored = self.opened.scored[name]
        return decide_by_config(name, scored, self.opened.source, config, self.opened.unreadable).dropped

    @cached_property
    def witness(self) -> np.ndarray:
        """(rows,) the scores of the filter whose verdicts the run's filter learnt, or its own."""
        part = scored_part(self.run, self.name)
        learnt = self.run.manifest["stages"].get(part, {}).get("parameters", {}).get("on")
        return np.asarray(self.base.columns.get(learnt, self.base.suspicion), float)

    def scored(self) -> Scored:
        """The rows ranked by all marks said so far."""
        return self._ranking_now()[1]

    def _ranking_now(self) -> tuple[str, Scored]:
        """A hash of all marks said so far, and the rows ranked by them."""
        with self._lock:
            said = self.marks.all()
            made_of = digest_of(said)
            if self._ranked is None or self._ranked[0] != made_of:
                marks = {row: mark.unsafe for row, mark in said.items() if mark.told}
                drawn = frozenset(row for row, mark in said.items() if mark.drawn)
                self._ranked = made_of, self._of_planted(self.ranking(marks, drawn))
                if marks != self._counted:  # a skip changes nothing
                    self._counted = marks
                    self._dropped.append(self.dropped())
            return self._ranked

    def threshold(self) -> Threshold:
        """The threshold that a decision taken now would have."""
        return choose(self.scored(), self._rule, {}, drawn=clean_drawn(self.marks.all()))

    def dropped(self) -> np.ndarray:
        """(rows,) bool: what a decision taken now would drop."""
        with self._lock:
            return _as_told(self._by_score(), self._told())

    def _by_score(self) -> np.ndarray:
        """(rows,) bool: what is dropped if nothing is said of it; what the run drops where the marks teach nothing."""
        if not self._taught():
            return self._run_drops.copy()
        return drops(self.scored().suspicion, self.threshold(), self.config, self.opened.unreadable)

    def _taught(self) -> bool:
        """Whether the marks have taught anything, or speak against what the run found."""
        scale, told = self.scored().scale, any(mark.told for mark in self.marks.all().values())
        return told and (scale is None or not scale.nothing or self.ranking.drops_any)

    def _told(self) -> dict[int, bool]:
        """Whether a row is unsafe by what was said of it, or of another one that says the same."""
        said = {row: mark.unsafe for row, mark in self.marks.all().items() if mark.told}
        return with_copies(said, self._first)

    @cached_property
    def _first(self) -> np.ndarray:
        """(rows,) for each row the number of the first one that says the same."""
        return first_copies(self.opened.source, self.run.row_format)

    def mark(self, said: Mapping[int, str | None], *, seen: Mapping[int, object] | None = None) -> None:
        """Write marks to disk; see Marks.add.

        Raises:
            DataError: If there is no such row or mark, or something else was said of one meanwhile.
        """
        with self._lock:
            self.scored()  # so that the ranking before these marks is known
            self.marks.add(said, seen=seen)

    def undo(self, row: int, *, seen: object = None) -> None:
        """Take back the last mark of a row; what was said of it before that counts again. See Marks.undo.

        Raises:
            DataError: If it is not marked, or something else was said of it meanwhile.
        """
        with self._lock:
            self.scored()  # so that the ranking before this is known
            self.marks.undo(row, seen=seen)

    def add_file(self, path: Path) -> int:
        """Take over the marks of a file; returns of how many rows it said something new.

        A line counts no more if the same was said of its row before, and a person has taken it back or said otherwise
        since: the file may be given again.

        Args:
            path: JSONL with `id` (or `row`) and `mark`, `decision` (of report.html) or `clean` (of `sample`, whose rows
                count as drawn at random).

        Raises:
            DataError: If the file cannot be read, or names rows that are not there.
        """
        drawn, others = read_statements(self.opened.source, path)
        before, ever = self.marks.all(), self.marks.ever()
        overtaken = {(row, what) for row, what in ever if row not in before or before[row].said != what}
        left = {row for row, what in [*drawn.items(), *others.items()] if (row, what) in overtaken}
        if left:
            say(f"{path}: {len(left)} lines say what was said of their rows before, and changed since: left out.")
        as_now = {row: before[row].said for row in left.intersection(drawn, before)}  # but they were drawn
        self.marks.add({**{row: what for row, what in drawn.items() if row not in left}, **as_now}, drawn=True)
        self.marks.add({row: what for row, what in others.items() if row not in left})
        return sum(before.get(row) != mark for row, mark in self.marks.all().items())

    def ask(self, count: int = 1) -> list[Question]:
        """The next rows to mark."""
        with self._lock:
            marks = self.marks.all()
            said = [(row, mark.unsafe) for row, mark in marks.items()]
            drawn = {row for row, mark in marks.items() if mark.drawn}
            scores, threshold = self.scored().suspicion, self.threshold().value
            asked = questions(scores, threshold, self.witness, self.marks.order, said, self.ranking.copies, drawn)
            return list(islice(asked, count))

    def status(self) -> Status:
        """What the marks tell."""
        with self._lock:
            scored, said = self.scored(), self.marks.all()
            by_score, told = self._by_score(), self._told()
            kept, dropped = ~by_score, _as_told(by_score, told)
            scorable = np.isfinite(scored.suspicion)
            drawn = [row for row, mark in said.items() if mark.drawn and mark.told and scorable[row]]
            untold = scorable.copy()
            untold[list(told)] = False
            left, found = self._left(drawn, kept & scorable, told), None
            if (probability := scored.columns.get(PROBABILITY)) is not None:
                about = int(np.clip(round(probability[kept & untold].sum()), *left[1:]))
                caught = sum(told.values()) + float(probability[dropped & untold].sum())
                left, found = (about, *left[1:]), caught / (caught + about)
            return Status(
                marks=sum(mark.told for mark in said.values()),
                unsafe=sum(mark.unsafe for mark in said.values()),
                drawn=len(drawn),
                dropped=int(dropped.sum()),
                kept=int((~dropped).sum()),
                left=left,
                found=found,
                promise=self._promise(sum(said[row].clean for row in drawn)),
                settled=len(drawn) >= LEAST_DRAWN and self._settled(said),
            )

    def _left(self, drawn: Sequence[int], kept: np.ndarray, told: Mapping[int, bool]) -> tuple[int, int, int]:
        """About how many unsafe rows are kept and not told, and a range.

        The rows drawn at random tell it of all kept rows but those of which another mark tells.

        Args:
            drawn: The rows drawn at random of which a mark tells.
            kept: (rows,) bool, the rows that their score keeps.
            told: Row -> whether it is unsafe, of all rows that a mark tells of.
        """
        said = self.marks.all()
        found_otherwise = {int(self._first[row]) for row, mark in said.items() if mark.told and not mark.drawn}
        pool = kept & ~np.isin(self._first, list(found_otherwise))
        missed = [said[row].unsafe for row in drawn if pool[row]]
        known = [unsafe for row, unsafe in told.items() if pool[row]]
        others = [unsafe for row, unsafe in told.items() if int(self._first[row]) in found_otherwise]
        elsewhere = sum(others), len(others) - sum(others)
        return unsafe_left(missed, int(pool.sum()), sum(known), int(pool.sum()) - len(known), *elsewhere)

    def _promise(self, clean_drawn: int) -> str:
        """What can be promised about clean rows, by so many of them that were drawn at random."""
        if self.marks.all() and not self._taught() and self.config.trusted_rows is None and self._run_drops.any():
            return "no promise: the marks have changed nothing so far, the run's own rule decides"
        share, more = percent(self.config.max_clean_loss), needed(self.config.max_clean_loss) - clean_drawn
        if more > 0:
            what = f"at most {share} of the clean rows dropped"
            return f"{more} more random rows called clean are needed to promise {what}"
        beside = int(self.opened.unreadable.sum()) if self.config.unreadable == "drop" else 0
        where = f", beside {beside} hardly readable rows" if beside else ""
        rows = f"{clean_drawn} random rows marked clean"
        return f"at most {share} of the clean rows are dropped, on average{where}, by {rows}"

    def done(self) -> None:
        """Take the decision: what was marked stays so, all else is decided by the scores that the marks taught."""
        self.scored()  # reading hidden states locks the run, too
        with self._lock, locked(self.run.folder):
            self.run.reload()
            self.store()
            decide(self.run, filter=REVIEWED)

    def store(self) -> str:
        """Keep the scores in the run, as those of one more filter; the run's folder is locked by the caller.

        Returns:
            The filter to decide by: REVIEWED, or the run's own where no mark has taught anything.
        """
        part, filters = f"scored/{REVIEWED}", self.run.manifest.setdefault("filters", {})
        said, scored = self._ranking_now()
        if not self._taught():
            filters.pop(REVIEWED, None)
            self.run.forget(part)
            return self.config.filters[0]
        scored.save(self.run.table_file(part))
        filters[REVIEWED] = part
        self.run.finish(part, [self.run.table_file(part)], made_of=_made_of(self._filters_at_start, said))
        return REVIEWED

    def _of_planted(self, scored: Scored) -> Scored:
        """Scores together with those of the planted rows, if what the marks taught can judge them."""
        row_of = self._states.planted_of
        if scored.linear is None or not self.opened.planted or len(np.unique(row_of)) != len(self.opened.planted):
            return scored
        judged = Scored(judged_by(scored.linear, self._states.planted)).most_suspect(row_of).suspicion
        return dataclasses.replace(scored, planted={REVIEWED: judged, **(self.base.planted or {})})

    @cached_property
    def _states(self) -> States:
        """M0's hidden states of the run's rows."""
        config = dataclasses.replace(self.config, trust_remote_code=self._trust)
        places = Places(self.run, self.base, self._first, len(self.opened.planted))
        return states_of(self.run, config, places, holds_lock=self._holds_lock)

    def _settled(self, said: Mapping[int, Mark]) -> bool:
        """Whether the last marks found nothing unsafe and changed hardly a decision."""
        told = [mark.unsafe for mark in said.values() if mark.told]
        if len(self._dropped) <= SETTLED_AFTER or any(told[-SETTLED_AFTER:]):
            return False
        changed = int((self._dropped[0] != self._dropped[-1]).sum())
        return changed <= max(1, int(self._dropped[-1].sum()) // 100)


def up_to_date(run: Run, source: Source) -> str:
    """Make a run's scores of its review fit its marks; the run's folder is locked by the caller.

    Args:
        run: The run.
        source: Its rows.

    Returns:
        The filter to decide by; see Review.store.
    """
    part = scored_part(run, REVIEWED)
    marks = Marks(run.folder, source.ids, run.config().seed)
    filters = _filters(run.manifest.get("filters", {}))
    decided_by = _filters(run.manifest.get("decision", {}).get("filters", {}))
    older = marks.digest() if decided_by == filters else None  # an older version noted the marks alone
    if part is not None and (run.done(part, _made_of(filters, marks.digest())) or (older and run.done(part, older))):
        return REVIEWED
    return Review(run, holds_lock=True).store()


def _as_told(dropped: np.ndarray, told: Mapping[int, bool]) -> np.ndarray:
    """(rows,) bool: what is dropped by score, but for the rows that are told of."""
    found = dropped.copy()
    found[list(told)] = list(told.values())
    return found


def _filters(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Filter -> part of the run that holds its scores, without the review's own."""
    return {name: part for name, part in parts.items() if name != REVIEWED}


def _made_of(filters: Mapping[str, Any], marks: str) -> str:
    """A hash of what the scores of a review depend on: that of the marks, and the scores of the run's filters."""
    return digest([marks, filters])


def unsafe_left(
    missed: Sequence[bool], rows: int, unsafe: int, untold: int, unsafe_elsewhere: int = 0, clean_elsewhere: int = 0
) -> tuple[int, int, int]:
    """About how many of some rows are unsafe and not told so far, and a range, by a sample of the rows.

    The range is that of a sample without replacement (hypergeometric distribution): it holds all numbers with which
    neither so few nor so many unsafe rows in the sample are improbable.

    Args:
        missed: For each row of the sample whether it is unsafe.
        rows: How many rows there are.
        unsafe: How many of them are told to be unsafe, the sample's among them.
        untold: How many of them nothing tells of.
        unsafe_elsewhere: Unsafe rows found by their score, maybe after the sample was drawn: it may have been drawn
            from them, too, so the low end of the range counts them among the rows.
        clean_elsewhere: Clean rows found so: the high end counts them.
    """
    if not untold:
        return 0, 0, 0
    drawn, found = len(missed), sum(missed)
    possible, tail = range(unsafe, unsafe + untold + 1), (1 - SURE) / 2

    def not_too_few(all_: int) -> bool:
        return bool(hypergeom.sf(found - 1, rows + unsafe_elsewhere, all_ + unsafe_elsewhere, drawn) > tail)

    def too_many(all_: int) -> bool:
        return bool(hypergeom.cdf(found, rows + clean_elsewhere, all_, drawn) <= tail)

    low, high = bisect_left(possible, True, key=not_too_few), bisect_left(possible, True, key=too_many) - 1
    about = round(found / drawn * rows) - unsafe if drawn else 0
    low = min(low, untold)
    high = max(low, high)
    return int(np.clip(about, low, high)), low, high


def open_review(folder: Path | str, *, trust_remote_code: bool = False) -> Review:
    """Open a run's folder for a review."""
    return Review(Run.filtered(folder), trust_remote_code=trust_remote_code)
