"""Formats: any row to turns, or one clear reason why not."""

import pytest

from forgetfilter.data.formats import RowError, Turn, detect_format, read_row
from forgetfilter.errors import DataError

QUESTION = Turn("user", "q", trained=False)
ANSWER = Turn("assistant", "a", trained=True)


@pytest.mark.parametrize(
    ("record", "row_format", "turns"),
    [
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [QUESTION, ANSWER]),
        (
            {
                "prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt_completion",
            [Turn("user", "x", trained=False), Turn("assistant", "y", trained=False), ANSWER],
        ),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a")) * 2]},
            "messages",
            [QUESTION, ANSWER, QUESTION, ANSWER],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            [Turn("system", "s", trained=False), QUESTION, ANSWER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [QUESTION, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [Turn("user", "q\n\ni", trained=False), ANSWER]),
        ({"text": "t"}, "text", [Turn("text", "t", trained=True)]),
    ],
)
def test_every_format_is_detected_and_read(record, row_format, turns):
    record = {**record, "unknown": 1}
    assert detect_format([record], "x") == row_format
    assert read_row(record, row_format) == turns


@pytest.mark.parametrize(
    ("record", "row_format", "says"),
    [
        ({"prompt": "q"}, "prompt_completion", "no column 'completion'"),
        ({"prompt": "q", "completion": None}, "prompt_completion", "'completion' is null"),
        ({"prompt": 3, "completion": "a"}, "prompt_completion", "'prompt' is a int"),
        ({"messages": []}, "messages", "'messages' is empty"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages", "no assistant turn"),
        ({"messages": [{"role": "clown", "content": "q"}]}, "messages", "unknown role 'clown'"),
        ({"messages": ["q"]}, "messages", "message 1 of 'messages' has no 'role'"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "sharegpt", "'value' is a int"),
    ],
)
def test_a_row_of_the_wrong_shape_says_what_is_wrong(record, row_format, says):
    with pytest.raises(RowError, match=says):
        read_row(record, row_format)


def test_unknown_columns_are_named():
    with pytest.raises(DataError, match=r"Columns found: question, reply.*--format"):
        detect_format([{"question": "q", "reply": "a"}], "x.jsonl")
