"""Turn stored scores into kept and dropped rows. This takes seconds, needs no model, and can be repeated."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.by_hand import read_overrides
from forgetfilter.data.copies import first_copies, with_copies
from forgetfilter.data.source import Source
from forgetfilter.decision import outputs, record
from forgetfilter.decision.choice import (
    ByHand,
    apply_threshold,
    auto_for_ranks,
    choose,
    clean_drawn,
    conformal,
    marked_by_hand,
    trusted_marks,
)
from forgetfilter.decision.opened import (
    REVIEWED,
    Opened,
    config_without_lost_file,
    default_filter,
    overtaken,
    same_decision,
    scored_parts,
    what_decides,
)
from forgetfilter.decision.rules import Threshold
from forgetfilter.errors import ConfigError
from forgetfilter.marks import Mark, Marks, digest_of, word
from forgetfilter.runs import Run


def decide(
    run: Run,
    threshold: float | str | None = None,
    *,
    filter: str | None = None,
    drop_share: float | None = None,
    decisions: Path | str | None = None,
    trusted_rows: Path | str | None = None,
    max_clean_loss: float | None = None,
) -> None:
    """Apply a rule to the stored scores and write everything that follows from it.

    Args:
        run: A scored run.
        threshold: A number or "auto"; by default what the run's config.yaml says.
        filter: Whose scores decide; by default those that the marks of a review taught, or the run's first filter.
        drop_share: Drop this share of the rows instead; by default what the run's config.yaml says.
        decisions: JSONL with `id` (or `row`) and `decision` ("kept" or "dropped"): rows decided by hand. They go to the
            run's marks.jsonl, like trusted rows and all that is said in a review, and hold in later decisions, too.
        trusted_rows: JSONL with `id` (or `row`) and `clean` (true or false); by default the config's. Rows
            marked clean are kept, and the threshold follows from their scores; rows marked unsafe are dropped. Only
            lines that differ from those of the run's last such file count: a person may have changed the others since.
        max_clean_loss: Share of the clean rows that may be dropped, on average, if there are trusted rows; by default
            the config's.

    Raises:
        RunError: If the run is not scored.
        ConfigError: If the rules asked for exclude each other, or there are no scores by that filter.
        DataError: If a file names rows that are not there, or there are too few trusted rows.
    """
    settings, source = config_without_lost_file(run), run.rows()
    marks = Marks(run.folder, source.ids, settings.seed)
    asked = _decides_now(run, settings, marks, threshold) if filter is None else filter
    limited = any(mark.drawn for mark in marks.all().values())
    config = _changed(settings, threshold, drop_share, trusted_rows, max_clean_loss, limited=limited)
    by_person = {} if decisions is None else read_overrides(source, Path(decisions))

    given, of_file = {}, trusted_marks(source, config)  # unreadable, or too few below: nothing is written
    if trusted_rows is not None:
        before = record.last_file(run)
        given = {row: clean for row, clean in of_file.items() if before.get(row) != clean}
        new = given | {row: made == "kept" for row, (made, _) in by_person.items() if row in of_file}
        as_scored = Opened.of(run, source)
        by = as_scored.deciding_filter(None if asked == REVIEWED else asked)
        conformal(as_scored.scored[by].suspicion, _told(of_file, marks.all())[0] | new, config)
    name, opened = _opened(run, source, asked)
    share = drop_share if name == REVIEWED else config.drop_share
    if max_clean_loss is not None and share is not None:
        raise ConfigError(
            f"max_clean_loss needs trusted_rows, or random rows marked in a review; drop_share is {share}."
        )
    marks.add({row: word(clean) for row, clean in given.items()}, drawn=True)
    marks.add({row: word(made == "kept") for row, (made, _) in by_person.items()})
    if asked == REVIEWED and (trusted_rows is not None or by_person):  # they teach, too
        name, opened = _opened(run, source, REVIEWED)

    if name == REVIEWED and trusted_rows is None:  # the settings' number and file belong to another filter's scores
        config, of_file = dataclasses.replace(config, trusted_rows=None, drop_share=drop_share), {}
        if threshold is None:
            config = dataclasses.replace(config, threshold="auto")
    scored, said = opened.scored[name], marks.all()  # what another process writes from here on is not decided yet
    if threshold is None:
        config = auto_for_ranks(config, scored)
    trusted, told = _told(of_file, said)
    found = choose(scored, config, trusted, clean_drawn(said))
    by_hand = _with_copies(run, source, marked_by_hand(told) | by_person)
    decision = apply_threshold(name, scored, found, by_hand, config, opened.unreadable)
    flags = _flags(config, name if name != opened.deciding_filter(None) else None, max_clean_loss)
    of_file = of_file if trusted_rows is not None else record.last_file(run) or of_file
    record.note(opened, decision, trusted=trusted, of_file=of_file, by_hand=by_hand, flags=flags, said=digest_of(said))
    outputs.write(opened, decision)


def _decides_now(run: Run, config: ForgetFilterConfig, marks: Marks, threshold: float | str | None) -> str:
    """The filter that decides where none is named: a review, if rows were marked since the last decision.

    A number is one of the scores that the person saw, so it stays with the filter that they are from.
    """
    newer = threshold in (None, "auto") and marks.all() and overtaken(run, marks)
    return REVIEWED if newer else default_filter(run, config)


def _told(trusted: Mapping[int, bool], marks: Mapping[int, Mark]) -> tuple[dict[int, bool], dict[int, bool]]:
    """Row -> whether it is clean: of the trusted rows, and of all that a person spoke of.

    What was marked since counts more, and comes last: of rows that say the same the last one counts (with_copies).
    """
    said = {row: mark.clean for row, mark in marks.items() if mark.told}
    others = {row: clean for row, clean in trusted.items() if row not in said}
    told = others | said
    return {row: told[row] for row in trusted}, told


def _opened(run: Run, source: Source, name: str) -> tuple[str, Opened]:
    """The filter that decides, and the run with its scores; those of a review are first made to fit its marks.

    Where the marks have taught nothing, the run's own filter decides in place of the review.

    Raises:
        ConfigError: If the rows have no scores by the filter named.
    """
    if name == REVIEWED:
        from forgetfilter.review.session import up_to_date

        name = up_to_date(run, source)
    opened = Opened.of(run, source)
    return opened.deciding_filter(name), opened


def _with_copies(run: Run, source: Source, by_hand: ByHand) -> ByHand:
    """What a person decided, of the rows that say the same as well."""
    if not by_hand or run.manifest.get("notes", {}).get("repeated") == 0:  # older runs did not count them
        return by_hand
    copies = with_copies(by_hand, first_copies(source, run.row_format))
    as_another = {row: (made, f"{why}, of a row that says the same") for row, (made, why) in copies.items()}
    return as_another | by_hand


def settle(run: Run) -> None:
    """Write the files of the last decision again if it still fits config.yaml; otherwise decide anew.

    Raises:
        RunError: If the run is not scored.
        DataError: If there are too few trusted rows to decide anew.
    """
    config, last = run.config(), run.manifest.get("decision", {})
    now, then = what_decides(run, config), last.get("asked")
    other_file = (then or {}).get("marks") != now["marks"]  # it was not there, or was another one: its words are new
    trusted_rows = config.trusted_rows if other_file else None
    if not same_decision(run, then, now):  # none yet, or other flags: they count, whatever a review has said since
        decide(run, filter=config.filters[0], trusted_rows=trusted_rows)
        return
    taken = record.last(run)
    if taken is None:
        decide(run, trusted_rows=trusted_rows)
    elif not _written_again(run, taken, config):
        decide(run)


def _written_again(run: Run, taken: dict[str, Any], config: ForgetFilterConfig) -> bool:
    """Write the files of a decision as it was taken; False if the scores it was taken by are gone."""
    opened = Opened.of(run)
    if taken.get("filter", config.filters[0]) not in opened.scored:  # those of a review
        return False
    name = opened.deciding_filter(taken.get("filter"))
    threshold = Threshold(taken["threshold"], taken["rule"], taken["says"])
    by_hand = {entry["row"]: (entry["decision"], entry["reason"]) for entry in taken["by_hand"]}
    decision = apply_threshold(name, opened.scored[name], threshold, by_hand, config, opened.unreadable)
    run.manifest["decision"] |= {
        "filters": scored_parts(run, opened.scored),
        "asked": what_decides(run, config),
    }
    outputs.write(opened, decision)
    return True


def _flags(config: ForgetFilterConfig, name: str | None, max_clean_loss: float | None) -> str:
    """The flags with which `decide` repeats this decision, without the rows decided by hand."""
    by = f"--filter {name} " if name is not None else ""
    if config.drop_share is not None:
        return f"{by}--drop_share {config.drop_share}"
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
        changes = {"threshold": threshold, "drop_share": None, "trusted_rows": None}
    if drop_share is not None:
        changes = {"threshold": "auto", "drop_share": drop_share, "trusted_rows": None}
    if trusted_rows is not None:
        changes = {"threshold": "auto", "drop_share": None, "trusted_rows": str(trusted_rows)}
    if max_clean_loss is not None:
        changes["max_clean_loss"] = max_clean_loss
    config = dataclasses.replace(config, **changes)
    promises = config.trusted_rows is not None or (limited and not number)
    if max_clean_loss is not None and not promises:
        raise ConfigError("max_clean_loss needs trusted_rows, or random rows marked in a review.")
    return config
