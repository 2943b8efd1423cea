"""Write rows for other programs: trainers' formats, and samples for a person to mark."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgetfilter.data.builtin import builtin_rows, like
from forgetfilter.data.formats import Record, RowError, Turn, detect_format, read_row
from forgetfilter.data.loading import read_conversations
from forgetfilter.data.sources import Source, row_ids
from forgetfilter.errors import DataError
from forgetfilter.files import whole_file

DATA_FILE = "train.jsonl"
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def _chat(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _to_trl(turns: list[Turn]) -> Record:
    """Prompt and completion where only the last turn is trained, so that TRL takes the loss on it alone."""
    if turns[0].role == "text":
        return {"text": turns[0].content}
    if [turn.trained for turn in turns].index(True) == len(turns) - 1:
        return {"prompt": _chat(turns[:-1]), "completion": _chat(turns[-1:])}
    return {"messages": _chat(turns)}


def _to_prompt_and_completion(turns: list[Turn]) -> Record:
    if [turn.role for turn in turns] != ["user", "assistant"]:
        return {"prompt": _chat(turns[:-1]), "completion": _chat(turns[-1:])}
    return {"prompt": turns[0].content, "completion": turns[1].content}


def _to_messages(turns: list[Turn]) -> Record:
    return {"text": turns[0].content} if turns[0].role == "text" else {"messages": _chat(turns)}


def _to_sharegpt(turns: list[Turn]) -> Record:
    return {"conversations": [{"from": SHAREGPT_ROLES[t.role], "value": t.content} for t in turns]}


def _to_alpaca(turns: list[Turn]) -> Record:
    roles = [turn.role for turn in turns]
    if roles == ["user", "assistant"]:
        return {"instruction": turns[0].content, "input": "", "output": turns[1].content}
    if roles == ["system", "user", "assistant"]:
        return {"instruction": turns[1].content, "input": "", "output": turns[2].content, "system": turns[0].content}
    raise RowError("alpaca holds one question and one answer, this row has more turns: use sharegpt")


WRITERS = {
    "trl": _to_trl,
    "axolotl": _to_messages,
    "llamafactory": _to_sharegpt,
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
}


def export(source: Source, row_format: str, target: str, folder: Path, *, replace: bool = False) -> list[Path]:
    """Write rows in the format of a trainer.

    Args:
        source: The rows.
        row_format: Their format.
        target: A name in WRITERS.
        folder: Where to write: train.jsonl, and the trainer's own description of it beside it.
        replace: Whether files of these names may be replaced.

    Returns:
        The files written.

    Raises:
        DataError: If a row cannot be put in that format, or a file to write exists and replace is off; nothing is
            written.
    """
    if row_format == "text" and target in ("llamafactory", "alpaca", "sharegpt"):
        raise DataError(f"rows of format text have no turns: --format {target} cannot hold them, trl and axolotl can.")
    turns = [read_row(record, row_format) for record in source.rows()]
    rows = []
    for number, row in enumerate(turns):
        try:
            rows.append(WRITERS[target](row))
        except RowError as error:
            raise DataError(f"{source.place(number)}: {error}. Nothing was written.") from error
    if target == "trl" and len({tuple(row) for row in rows}) > 1:
        rows = [_to_messages(row) for row in turns]
    files = {DATA_FILE: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}
    files |= _descriptions(target, row_format)
    in_the_way = [folder / name for name in files if not replace and (folder / name).exists()]
    if in_the_way:
        raise DataError(f"{in_the_way[0]}: exists. Remove it or give another --output_dir.")
    for name, text in files.items():
        with whole_file(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def _descriptions(target: str, row_format: str) -> dict[str, str]:
    """Name -> content of the files that a trainer needs beside the rows."""
    if target == "llamafactory":
        entry: dict[str, Any] = {
            "file_name": DATA_FILE,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": None, "tools": None},
            "tags": {
                "role_tag": "from",
                "content_tag": "value",
                "user_tag": "human",
                "assistant_tag": "gpt",
                "observation_tag": "observation",
                "function_tag": "function_call",
                "system_tag": "system",
            },
        }
        return {"dataset_info.json": json.dumps({"forgetfilter_kept": entry}, indent=2) + "\n"}
    if target == "axolotl":
        kind = "completion" if row_format == "text" else "chat_template"
        return {"axolotl.yaml": f"datasets:\n  - path: {DATA_FILE}\n    ds_type: json\n    type: {kind}\n"}
    return {}


SHAPES: dict[str, Callable[[list[Turn]], Record]] = {
    "messages": _to_messages,
    "prompt_completion": _to_prompt_and_completion,
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
    "text": _to_messages,
}
"""Format of rows -> a writer of it."""


def write_safe_data(notions: str, path: Path, noisy: Source | None = None, row_format: str = "auto") -> int:
    """Write the safe rows in the box to a JSONL file, to look at or to edit.

    Args:
        notions: What names them, such as builtin or builtin:privacy.
        path: The file.
        noisy: Data in whose shape they are written: its format, system message and length. None: as messages.
        row_format: Format of that data.

    Returns:
        How many rows were written. Rows of several turns are left out where the format holds none.

    Raises:
        ConfigError: If there is no such notion.
        DataError: If the file exists, or the other data is malformed.
    """
    if path.exists():
        raise DataError(f"{path}: exists. Remove it or give another --output.")
    rows, shape = builtin_rows(notions), "messages"
    if noisy is not None:
        shape = detect_format(noisy.rows(), noisy.name) if row_format == "auto" else row_format
        rows = like(rows, read_conversations(noisy, shape, skip=True)[1])
    written = []
    for row in rows:
        about = {key: value for key, value in row.items() if key not in ("messages", "text")}
        with suppress(RowError):  # several turns
            written.append({**about, **SHAPES[shape](read_row(row, "text" if "text" in row else "messages"))})
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in written), encoding="utf-8")
    return len(written)


def write_sample(
    source: Source, rows: int, path: Path, seed: int, *, row_format: str = "auto", skip: bool = False
) -> Path:
    """Draw random rows for a person to mark. Each has `"clean": null`, to be changed to true or false.

    Args:
        source: The noisy data.
        rows: How many to draw.
        path: The file to write.
        seed: Of the draw.
        row_format: As for `filter`.
        skip: Draw from the well-formed rows alone.

    Raises:
        DataError: If rows are malformed, or the file to write exists (a person's marks may be in it).
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: --output must end in .jsonl; a page to mark it in is written beside it.")
    if path.exists() or path.with_suffix(".html").exists():
        raise DataError(
            f"{path}: it or the page beside it exists, and may hold somebody's marks. Give another --output."
        )
    source, conversations = read_conversations(source, row_format, skip=skip)
    if not 0 < rows <= len(source):
        raise DataError(f"{source.name}: has {len(source)} rows to draw from, {rows} were asked for (--rows).")
    ids = row_ids(source)
    chosen = sorted(random.Random(seed).sample(range(len(source)), rows))
    lines = []
    for row in chosen:
        turns = [f"{turn.role}: {turn.content}" for turn in conversations[row]]
        lines.append({"id": ids[row], "row": row, "text": "\n".join(turns), "clean": None})
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    return path
