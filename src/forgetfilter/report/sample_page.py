"""SAMPLE.html: a page to mark rows clean or unsafe. Its export serves as the trusted rows of a threshold."""

import json
from pathlib import Path

from forgetfilter.report.page import asset, write_page


def write_sample_page(sample: Path, data_name: str) -> Path:
    """Write the page beside a sample as `data.export.write_sample` makes it.

    Args:
        sample: The JSONL file.
        data_name: What the sample was drawn from.
    """
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").split("\n") if line]
    data = {
        "title": "Which rows are clean?",
        "about": f"{len(rows)} rows drawn at random from {data_name}. A row is clean if you would be glad to see a "
        "model learn it.",
        "file": f"{sample.stem}-marked.jsonl",
        "words": ["clean", "unsafe"],
        "markName": "mark",
        "rule": {"says": "Mark each row, export, and give the file to filter or decide as --trusted_rows."},
        "rows": {"row": [row["row"] for row in rows], "id": [row["id"] for row in rows]},
        "threshold": None,
        "groups": [],
        "textOf": list(range(len(rows))),
        "texts": [{"turns": [["", row["text"], 0]]} for row in rows],
    }
    path = sample.with_suffix(".html")
    return write_page(path, "ForgetFilter: sample", asset("rows.html"), data, asset("rows.js"))
