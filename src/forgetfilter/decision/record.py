"""What is recorded of a decision before its files are written: an interruption loses nothing decided by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetfilter.decision.choice import Decision
from forgetfilter.decision.opened import Opened, scored_parts, what_decides
from forgetfilter.files import sha256
from forgetfilter.runs import Run


def note(
    opened: Opened,
    decision: Decision,
    *,
    trusted: Mapping[int, bool],
    of_file: Mapping[int, bool],
    by_hand: Mapping[int, tuple[str, str]],
    flags: str,
    said: str,
) -> None:
    """Record a decision, as the run's last one; its files are not written yet.

    Args:
        opened: The run.
        decision: What was decided.
        trusted: Trusted row -> whether it is clean.
        of_file: The same, as their file says: a person may have said otherwise since.
        by_hand: Row -> decision and reason, of the rows that a person decided.
        flags: Those with which `decide` repeats it.
        said: Hash of all that was said of rows (`Marks.digest`).
    """
    run, threshold = opened.run, decision.threshold
    number = run.manifest.get("decision", {}).get("number", 0) + 1
    about = {"threshold": threshold.value, "rule": threshold.rule, "says": threshold.says, "filter": decision.filter}
    taken = {
        **about,
        "rows": decision.words,
        "marks": [{"row": row, "clean": clean} for row, clean in trusted.items()],
        "file": [{"row": row, "clean": clean} for row, clean in of_file.items()],
        "by_hand": [{"row": row, "decision": made, "reason": why} for row, (made, why) in by_hand.items()],
    }
    path = _path(run, number)
    run.write_json(str(path.relative_to(run.folder)), taken)
    asked = what_decides(run, opened.config)
    filters, record = scored_parts(run, opened.scored), sha256(path)
    run.manifest["decision"] = {
        "number": number, "record": record, **about, "flags": flags, "asked": asked, "filters": filters, "marks": said
    }  # fmt: skip
    run.forget("decision")


def last(run: Run) -> dict[str, Any] | None:
    """The record of a run's last decision; None where there is none, or it is damaged."""
    noted = run.manifest.get("decision", {})
    path = _path(run, noted.get("number", 0))
    if not path.is_file() or sha256(path) != noted.get("record"):
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def last_file(run: Run) -> dict[int, bool]:
    """Trusted row -> whether it is clean by the last file of them; older decisions did not tell it from later words."""
    taken = last(run) or {}
    return {entry["row"]: entry["clean"] for entry in taken.get("file", taken.get("marks", []))}


def rows_by_hand(run: Run) -> set[int]:
    """The rows that a person decided, in the last decision; none where its record is gone."""
    record = last(run)
    return {entry["row"] for entry in record["by_hand"]} if record else set()


def _path(run: Run, number: int) -> Path:
    return run.folder / "decisions" / f"{number:04}.json"
