"""The head of a data set's card, by which the datasets library reads the rows beside it as they are."""

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import yaml

from forgetfilter.data.source import DELIMITERS, Source

CARD = "README.md"
"""The card's file. That of a model is the user's to edit, or to remove."""


def card_head(rows: Source, file: str) -> str:
    """What `datasets.load_dataset` reads from the head of a card: the file of rows, and that nothing is guessed.

    Without the types of its columns a text such as 4, N/A or 2021-03-01 would be read as a number, null or a date. A
    card cannot say them of CSV: name a Parquet file of the same rows there.

    Args:
        rows: The rows.
        file: The file's name in the folder.
    """
    about: dict[str, Any] = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": file}]}]}
    schema = None if rows.suffix in DELIMITERS or rows.table is not None else rows.schema()
    if schema:
        uneven = rows.uneven() if any(pa.types.is_nested(column.type) for column in schema) else set()
        features = [{"name": column.name, **_feature(column.type, column.name, uneven)} for column in schema]
        about["dataset_info"] = {"config_name": "default", "features": features}
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def _feature(kind: pa.DataType, place: str, uneven: Collection[str]) -> dict[str, Any]:
    """A column's type as data set cards spell it.

    A struct gives every object all keys, with null for those it lacks. Where null would say something else (a message
    without calls, a function's arguments), objects are JSON, which datasets 4.7 and newer read.
    """
    if pa.types.is_list(kind):
        ((name, inner),) = _feature(kind.value_type, place, uneven).items()
        return {"list": {name: inner} if name == "list" else inner}
    if pa.types.is_struct(kind):
        nested = any(pa.types.is_nested(part.type) for part in kind)
        if place in uneven and ("." in place or nested):
            return {"dtype": "json"}
        parts = [{"name": part.name, **_feature(part.type, f"{place}.{part.name}", uneven)} for part in kind]
        return {"struct": parts}
    return {"dtype": "float64" if pa.types.is_float64(kind) else str(kind)}
