"""M0's hidden states of a run's rows: those that the run holds, or else read now."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forgetfilter import processes
from forgetfilter.alignment import m0_of_run
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.lazy import rearranged
from forgetfilter.data.loading import Data, load_safe, tokenize
from forgetfilter.data.single_answers import single_answers
from forgetfilter.errors import RunError
from forgetfilter.model.states import stored_states
from forgetfilter.runs import Run, locked
from forgetfilter.scored import ANSWER, Scored
from forgetfilter.workshop import Workshop


class States(NamedTuple):
    """Hidden states, (rows, 2, size) each.

    Attributes:
        noisy: Of all noisy rows; of a conversation those of its most suspect answer.
        planted: Of the planted rows; of a conversation those of each answer.
        planted_of: (answers,) the number of the planted row that each of them belongs to.
        safe: Of the safe rows.
    """

    noisy: np.ndarray
    planted: np.ndarray
    planted_of: np.ndarray
    safe: np.ndarray


@dataclass
class Places:
    """Where the states of each row stand among those that a run holds.

    A run holds those of the rows that its filter saw: one of each that say the same (an older version: all of them),
    then the planted ones; of conversations, those of each answer.

    Attributes:
        run: The run.
        base: The scores of that filter.
        first: (rows,) for each row the first one that says the same.
        planted: How many rows are planted.
    """

    run: Run
    base: Scored
    first: np.ndarray
    planted: int

    def possible(self) -> set[int]:
        """How many states the run can hold."""
        answers, seen = self.run.answers(), len(np.unique(self.first)) + self.planted
        if answers is not None:
            return {int(answers.sum())}
        return {seen} if self.planted else {seen, len(self.first)}

    def apart(self, states: np.ndarray, answers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The states of all noisy rows and of the planted ones, and which planted row each of these is of.

        Args:
            states: Those that the run holds.
            answers: Of conversations, how many answers each row has that the filter saw.
        """
        counts = np.ones(len(states), int) if answers is None else answers
        whole = len(counts) == len(self.first) and not self.planted  # the filter saw every row, and no others
        seen = np.arange(len(self.first)) if whole else np.unique(self.first)
        places = np.cumsum(counts)[: len(seen)] - counts[: len(seen)]
        if answers is not None:  # of a conversation those of its most suspect answer
            places = places + np.nan_to_num(self.base.columns[ANSWER][seen], nan=1).astype(int) - 1
        own = places if whole else places[np.searchsorted(seen, self.first)]
        planted = states[counts[: len(seen)].sum() :]
        planted_of = np.repeat(np.arange(len(counts) - len(seen)), counts[len(seen) :])
        same = np.array_equal(own, np.arange(len(states)))
        return states if same else rearranged(states, own, self.run.folder), planted, planted_of


def states_of(run: Run, config: ForgetFilterConfig, places: Places, *, holds_lock: bool) -> States:
    """The hidden states of a run's rows.

    Args:
        run: The run.
        config: Its settings.
        places: Where the states of each row stand among those of the run.
        holds_lock: Whether the caller has locked the run's folder.

    Raises:
        RunError: If the safe rows are not those of the run, or its M0 has changed, and states must be read.
    """
    parts = run.manifest.get("states", {})
    if {"noisy", "safe"} <= parts.keys() and all(run.done(part) for part in parts.values()):
        noisy, safe = (stored_states(run.table_file(parts[name])) for name in ("noisy", "safe"))
        if len(noisy) in places.possible():
            return States(*places.apart(noisy, run.answers()), safe)
    processes.require_one("reading hidden states for a review")
    with nullcontext() if holds_lock else locked(run.folder):
        run.reload()
        return _read_now(run, config, places)


def _read_now(run: Run, config: ForgetFilterConfig, places: Places) -> States:
    """The states of the noisy and of the safe rows, from M0."""
    m0 = m0_of_run(run, config)
    noisy = tokenize(run.rows(), m0.chat, row_format=run.row_format)
    safe = load_safe(noisy, m0.chat, config)
    if safe.facts()["sha256"] != run.manifest["safe"]["sha256"]:
        raise RunError(
            f"{config.safe_dataset_name}: holds other rows than the safe ones of this run. If these were given "
            "as Python objects, run `filter` with the filter probe as well, which keeps what a review needs."
        )
    once, counts = noisy.select(np.flatnonzero(~noisy.copies()).tolist()), None
    answers = single_answers(once, m0.chat) if ANSWER in places.base.columns else None
    if answers is not None:
        once, counts = answers[0], np.bincount(answers[1])
    of_noisy, of_safe = Workshop(m0, config, run).states_of(Data(once, safe))
    return States(*places.apart(of_noisy, counts), of_safe)
