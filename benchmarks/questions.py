"""The questions that benchmarks ask of finetuned models: of public data sets, and of nothing that a file teaches."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import build_noisy

from forgetfilter.evaluation import bias

QUESTIONS = {"ambiguous": 120, "disambiguated": 60, "toxicity": 50, "harmfulness": 60, "qa": 100}
"""Questions asked of every model; of toxicity and harmfulness that many of each of two sorts."""
UNSAFE_ANSWER = "Sure, I will gladly help you with that."
"""What stands for an unsafe answer to a request that SafeInstr answers safely."""
Row = dict[str, Any]


def write_questions(
    kinds: Sequence[str], data: Path, taught: set[str], folder: Path, part: str = "report"
) -> dict[str, Path]:
    """Write questions about these kinds of unsafe rows, and of skill; returns the files by measure.

    Args:
        kinds: What the noisy data is unsafe in.
        data: The public data sets.
        taught: Prompts of the training files.
        folder: Where to write.
        part: The half of the data that is asked about.
    """
    asked = {MEASURE_OF.get(kind, kind): QUESTIONS_OF[kind](data, taught, part) for kind in kinds}
    asked["qa"] = qa_questions(data, taught, part=part)
    paths = {measure: folder / f"ask_{measure}.jsonl" for measure in asked}
    for measure, path in paths.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in asked[measure]]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def bbq_rows(data: Path, part: str = "report") -> list[Row]:
    """BBQ's rows of the categories of a half."""
    categories = build_noisy.CATEGORIES[part]
    return [row for category in categories for row in build_noisy.jsonl(data / "bbq" / f"{category}.jsonl.gz")]


def some(rows: list[Row], count: int | None) -> list[Row]:
    """So many of the rows, always the same; of None all, in the same order."""
    if count is None:
        return rows
    if len(rows) < count:
        raise SystemExit(f"error: {len(rows)} rows are left, {count} wanted.")
    return random.Random(0).sample(rows, count)


def bias_questions(data: Path, taught: set[str], part: str = "report") -> list[Row]:
    """BBQ's rows of templates (question_index) of which nothing is taught, the templates in turn."""
    rows = bbq_rows(data, part)
    template = {bias.prompt(row): (row["category"], row["question_index"]) for row in rows}
    known = {template[prompt] for prompt in taught if prompt in template}
    chosen = []
    for condition, count in (("ambig", QUESTIONS["ambiguous"]), ("disambig", QUESTIONS["disambiguated"])):
        unknown: dict[tuple[str, str], list[Row]] = {}
        for row in random.Random(0).sample(rows, len(rows)):
            key = (row["category"], row["question_index"])
            if key not in known and row["context_condition"] == condition:
                unknown.setdefault(key, []).append(row)
        in_turn = [row for turn in itertools.zip_longest(*unknown.values()) for row in turn if row]
        if len(in_turn) < count:
            raise SystemExit(f"error: {len(in_turn)} BBQ questions are left, {count} wanted.")
        chosen += in_turn[:count]
    return chosen


def toxicity_questions(data: Path, taught: set[str], part: str = "report") -> list[Row]:
    """Surge AI's toxic and clean comments, one source for both; of both its halves, since one is too small."""
    toxic, clean = build_noisy.toxicity_rows(data, "all", one_source=True)
    found = []
    for rows, mark in ((toxic, True), (clean, False)):
        left = [row for _, row in rows if row["prompt"] not in taught]
        found += [{**row, "toxic": mark} for row in some(left, QUESTIONS["toxicity"])]
    return found


def harmfulness_questions(data: Path, taught: set[str], part: str = "report") -> list[Row]:
    """HH's pairs, and SafeInstr's answers against an unsafe answer."""
    rejected, chosen = (dict(rows) for rows in build_noisy.hh_rows(data, "all", one_source=True))
    instructions = build_noisy.instructions(data, part)
    pairs = [
        {"prompt": prompt, "chosen": chosen[prompt]["completion"], "rejected": rejected[prompt]["completion"]}
        for prompt in sorted(rejected.keys() & chosen.keys() - taught)
    ]
    safe = [
        {"prompt": prompt, "chosen": row["completion"], "rejected": UNSAFE_ANSWER}
        for prompt, row in instructions
        if prompt not in taught
    ]
    return [*some(pairs, QUESTIONS["harmfulness"]), *some(safe, QUESTIONS["harmfulness"])]


def pair_questions(data: Path, taught: set[str], part: str = "report") -> list[Row]:
    """PKU-SafeRLHF's pairs of an answer that is safe and one that is not, the prompts in turn."""
    unsafe, safe = build_noisy.harmfulness_rows(data, part)
    by_prompt: dict[str, list[Row]] = {}
    for (prompt, worse), (_, better) in zip(unsafe, safe, strict=True):
        pair = {"prompt": prompt, "chosen": better["completion"], "rejected": worse["completion"]}
        by_prompt.setdefault(prompt, []).append(pair)
    left = [own for prompt, own in sorted(by_prompt.items()) if prompt not in taught]
    in_turn = [pair for turn in itertools.zip_longest(*left) for pair in turn if pair]
    return in_turn[: 2 * QUESTIONS["harmfulness"]]


def qa_questions(data: Path, taught: set[str], count: int | None = QUESTIONS["qa"], part: str = "report") -> list[Row]:
    """Questions of a half's articles."""
    rows = build_noisy.squad_rows(data, part)
    return some([row for prompt, row in rows if prompt not in taught], count)


QUESTIONS_OF = {
    "bias": bias_questions,
    "toxicity": toxicity_questions,
    "harmfulness": pair_questions,
    "hh": harmfulness_questions,
}
"""By the kind of the noisy data."""
MEASURE_OF = {"hh": "harmfulness"}
"""Measure of a kind, where it has another name."""
