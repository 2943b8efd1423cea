"""Formats: any row to turns, or one clear reason why not."""

import datetime
import json

import pytest

from forgetfilter.data.formats import (
    RowError,
    as_named,
    detect_format,
    parse_columns,
    read_row,
    require_columns_read,
    unread_columns,
)
from forgetfilter.data.turns import Turn, functions_called, with_call
from forgetfilter.errors import ConfigError, DataError

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
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", [Turn("user", "q\ni", trained=False), ANSWER]),
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
        ({"messages": ["q"]}, "messages", "message 1 of 'messages' is a str, expected an object"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "sharegpt", "'value' is a int"),
    ],
)
def test_a_row_of_the_wrong_shape_says_what_is_wrong(record, row_format, says):
    with pytest.raises(RowError, match=says):
        read_row(record, row_format)


def test_an_empty_list_of_calls_is_none_and_bare_calls_are_read_like_wrapped_ones():
    (turn,) = read_row({"messages": [{"role": "assistant", "content": "hi", "tool_calls": []}]}, "messages")
    assert "tool_calls" not in turn.extra
    bare = {"name": "tide", "arguments": '{"at": "Brest"}'}
    for calls in ([bare], [{"function": bare}]):
        (turn,) = read_row({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages")
        assert turn.extra["tool_calls"] == calls, "as they were given"
        assert functions_called(turn) == [{"name": "tide", "arguments": {"at": "Brest"}}]


def test_what_a_loader_made_of_a_text_is_an_error_and_not_learnt():
    calls = [{"function": {"name": "book", "arguments": {"day": datetime.datetime(2024, 5, 1)}}}]
    with pytest.raises(RowError, match=r"message 1 holds what is no text.*datetime.*give the rows as JSONL"):
        read_row({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages")


def test_unknown_columns_are_named():
    with pytest.raises(DataError, match=r"Columns found: question, reply.*--format"):
        detect_format([{"question": "q", "reply": "a"}], "x.jsonl")


def said(*messages):
    """A row of messages: role, content and what else each has."""
    return {"messages": [{"role": role, "content": content, **more} for role, content, more in messages]}


@pytest.mark.parametrize(
    "untrained", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": None}, {"loss": False}]
)
@pytest.mark.parametrize("keys", [("role", "content", "messages"), ("from", "value", "conversations")])
def test_an_answer_of_no_weight_is_context(untrained, keys):
    role, content, column = keys
    talk = [("user", "q", {}), ("assistant", "wrong", untrained), ("user", "q", {}), ("assistant", "a", {"weight": 1})]
    row = {column: [{role: who, content: text, **more} for who, text, more in talk]}
    turns = read_row(row, "messages" if column == "messages" else "sharegpt")
    assert [turn.trained for turn in turns] == [False, False, False, True]
    with pytest.raises(RowError, match="no assistant turn to learn from"):
        read_row({column: row[column][:2]}, "messages" if column == "messages" else "sharegpt")


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": '{"at": "Brest"}'}}]},
        {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {"at": "Brest"}}}]},
        {"function_call": {"name": "tide", "arguments": '{"at": "Brest"}'}},
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_calls_and_functions_reach_the_turns(call, content):
    function = {"name": "tide", "parameters": {"type": "object"}}
    row = said(("user", "High tide?", {}), ("assistant", content, call), ("tool", "06:12", {"tool_call_id": "1"}))
    wrapped = [{"type": "function", "function": function}]
    for tools in ({"tools": wrapped}, {"functions": [function]}, {"functions": json.dumps([function])}):
        first, second, third = read_row({**row, **tools}, "messages")
        assert first.extra == {"tools": [{"type": "function", "function": function}]}
        assert (second.content, second.trained) == ("", True)
        assert functions_called(second) == [{"name": "tide", "arguments": {"at": "Brest"}}]
        assert third.extra == {"tool_call_id": "1"}


def test_tools_may_be_text_as_llama_factory_writes_them():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]}
    first, second = read_row({**row, "tools": '[{"name": "f"}]'}, "sharegpt")
    assert first.extra == {"tools": [{"type": "function", "function": {"name": "f"}}]}, "as chat templates expect them"
    assert (second.role, second.content, second.is_call) == ("assistant", '{"name": "f"}', True)
    assert read_row({**row, "tools": ""}, "sharegpt")[0].extra == {}


@pytest.mark.parametrize(
    ("row_format", "column", "row"),
    [
        ("messages", "messages", said(("user", "q", {}), ("assistant", "a", {}))),
        ("sharegpt", "conversations", {"conversations": [{"from": "gpt", "value": "a"}]}),
        ("alpaca", "history", {"instruction": "q", "output": "a", "history": [["01", "None"]]}),
        ("messages", "tools", {**said(("user", "q", {}), ("assistant", "a", {})), "tools": [{"name": "f"}]}),
    ],
)  # fmt: skip
def test_a_list_that_is_written_as_text_is_read_as_a_list(row_format, column, row):
    assert read_row({**row, column: json.dumps(row[column])}, row_format) == read_row(row, row_format)
    for text in ('[{"role"', "words", "4", '{"role": "user"}', str([{"role": "user", "content": "q"}])):
        with pytest.raises(RowError, match=f"'{column}' is text that is no JSON list"):
            read_row({**row, column: text}, row_format)


def test_text_that_needs_no_list_stays_text():
    row = {"prompt": '[{"role": "user", "content": "q"}]', "completion": "[4]"}
    assert [turn.content for turn in read_row(row, "prompt_completion")] == list(row.values())


def test_a_message_of_somebody_else_that_says_it_is_trained_is_noted_and_not_learnt():
    row = said(("system", "s", {"train": True}), ("user", "q", {"train": True}), ("assistant", "a", {"train": True}))
    assert [turn.trained for turn in read_row(row, "messages")] == [False, False, True]
    assert [turn.extra for turn in read_row(row, "messages")] == [{"train": True}, {"train": True}, {}]
    assert read_row(said(("user", "q", {"train": False}), ("assistant", "a", {})), "messages")[0].extra == {}


def test_reasoning_goes_with_its_answer():
    _, answer = read_row(said(("user", "q", {}), ("assistant", "a", {"reasoning_content": "r"})), "messages")
    assert answer.extra == {"reasoning_content": "r"}


def test_roles_of_other_programs_are_known():
    row = said(("developer", "s", {}), ("user", "q", {}), ("function", "f", {}), ("chatgpt", "a", {}))
    assert [turn.role for turn in read_row(row, "messages")] == ["system", "user", "tool", "assistant"]


def test_parts_of_text_are_one_text_and_pictures_are_named():
    parts = [{"type": "text", "text": "one "}, "two", {"type": "text", "text": " three", "image_url": None}]
    row = said(("user", parts, {}), ("assistant", [{"type": "text", "text": "a"}], {}))
    assert [turn.content for turn in read_row(row, "messages")] == ["one two three", "a"]
    with pytest.raises(RowError, match="part 2 is 'image_url', and only text can be read"):
        read_row(said(("user", [*parts[:1], {"type": "image_url", "image_url": "x"}], {})), "messages")


def test_prompt_and_completion_may_be_messages_or_text_in_any_mixture():
    asked, answered = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    for prompt in ("q", asked):
        for completion in ("a", answered):
            assert read_row({"prompt": prompt, "completion": completion}, "prompt_completion") == [QUESTION, ANSWER]
    with pytest.raises(RowError, match="--columns messages=NAME"):
        read_row({"prompt": "q", "completion": asked + answered}, "prompt_completion")


def test_alpaca_rows_have_a_system_message_and_exchanges_before():
    row = {"instruction": "And in winter?", "output": "Wool.", "system": "s", "history": [["In summer?", "Linen."]]}
    turns = read_row(row, "alpaca")
    assert [(turn.role, turn.content, turn.trained) for turn in turns] == [
        ("system", "s", False),
        ("user", "In summer?", False),
        ("assistant", "Linen.", True),
        ("user", "And in winter?", False),
        ("assistant", "Wool.", True),
    ]
    assert read_row({**row, "system": None, "history": None}, "alpaca") == turns[3:]
    for history in ("x", [["q"]], [["q", 1]], [1]):
        with pytest.raises(RowError, match="'history'"):
            read_row({**row, "history": history}, "alpaca")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, []),
        ({"label": True, "images": []}, []),
        ({"label": 0}, []),
        ({"label": False, "images": ["a.png"]}, ["images", "label"]),
        ({"audios": ["a.wav"]}, ["audios"]),
        ({"label": "False"}, ["label"]),
        ({"label": "unsafe"}, []),
        ({"kto_tag": False}, ["kto_tag"]),
        ({"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, ["chosen"]),
        ({"system": "s"}, ["system"]),
        ({"system": ""}, []),
    ],
)
def test_columns_that_change_training_and_are_not_read_are_named(more, names):
    assert unread_columns({"prompt": "q", "completion": "a", **more}, "prompt_completion") == names


def test_a_part_of_the_prompt_that_named_columns_leave_out_is_named():
    swift = {"query": "q", "response": "a", "history": [["b", "c"]], "input": ""}
    assert unread_columns(swift, "prompt_completion(prompt=query,completion=response)") == ["history"]
    assert unread_columns(swift, "alpaca(instruction=query,output=response)") == []
    given = {"input": "q", "output": "a"}
    assert unread_columns(given, "prompt_completion(prompt=input,completion=output)") == []


def test_calls_and_answers_of_tools_under_ms_swifts_names():
    said = [("user", "q"), ("tool_call", '{"name": "f", "arguments": {}}'), ("tool_response", "4"), ("assistant", "a")]
    turns = read_row({"messages": [{"role": role, "content": text} for role, text in said]}, "messages")
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert [turn.trained for turn in turns] == [False, True, False, True]
    assert functions_called(with_call(turns[1])) == [{"name": "f", "arguments": {}}]


ASKS, ANSWERS = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def test_a_column_that_is_read_is_not_named_as_unread():
    assert unread_columns({"conversations": [], "system": "s"}, "sharegpt") == []
    assert unread_columns({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion(system=system)") == []
    assert unread_columns({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt_completion(completion=chosen)") == []


@pytest.mark.parametrize(
    ("record", "row_format"),
    [
        ({"prompt": "q", "completion": "a", "how": "s"}, "prompt_completion(system=how)"),
        ({**said(("user", "q", {}), ("assistant", "a", {})), "how": "s"}, "messages(system=how)"),
        ({"instruction": "q", "output": "a", "system": "s"}, "alpaca"),
        ({"conversations": [ASKS, ANSWERS], "system": "s"}, "sharegpt"),
        ({"conversations": [{"from": "system", "value": "s"}, ASKS, ANSWERS], "system": "another"}, "sharegpt"),
    ],
)  # fmt: skip
def test_a_system_message_in_a_column_comes_first_unless_there_is_one(record, row_format):
    assert read_row(record, row_format) == [Turn("system", "s", trained=False), QUESTION, ANSWER]
    assert read_row({**record, "how": None, "system": None}, row_format)[-2:] == [QUESTION, ANSWER]


def test_a_named_column_that_the_format_does_not_read_is_refused():
    record = {"prompt": "q", "completion": "a", "context": "c", "tools": "[]"}
    with pytest.raises(DataError, match=r"no known row format.*Asked for"):
        detect_format([record], "x", "prompt=prompt,completion=completion,input=context")
    assert detect_format([record], "x", "prompt=prompt,tools=tools") == "prompt_completion(prompt=prompt,tools=tools)"
    with pytest.raises(DataError, match="names input, which format prompt_completion does not read"):
        require_columns_read([record], "x", "prompt_completion", "prompt=prompt,input=context")
    with pytest.raises(DataError, match="its first row has no column 'how'"):
        require_columns_read([record], "x", "prompt_completion", "system=how")
    require_columns_read([record], "x", "prompt_completion", "system=context")


def test_empty_alpaca_values_leave_no_gap_and_others_that_are_no_text_are_named():
    row = {"instruction": "q", "input": "", "output": "a"}
    for empty in (None, 0, False, {}):
        assert read_row({**row, "input": empty, "system": empty}, "alpaca") == [QUESTION, ANSWER]
    assert read_row({**row, "instruction": "", "input": "q"}, "alpaca") == [QUESTION, ANSWER]
    with pytest.raises(RowError, match="'input' is a int"):
        read_row({**row, "input": 5}, "alpaca")


def test_what_a_row_tells_its_chat_template_goes_with_its_first_turn():
    row = {**said(("user", "q", {}), ("assistant", "a", {})), "chat_template_kwargs": {"enable_thinking": False}}
    assert read_row(row, "messages")[0].extra == {"chat_template_kwargs": {"enable_thinking": False}}
    as_text = {**row, "chat_template_kwargs": '{"enable_thinking": false}'}  # in a CSV file
    assert read_row(as_text, "messages") == read_row(row, "messages")
    with pytest.raises(RowError, match="'chat_template_kwargs' is a str, expected an object"):
        read_row({**row, "chat_template_kwargs": "x"}, "messages")


@pytest.mark.parametrize(
    ("record", "columns", "row_format"),
    [
        ({"question": "q", "answer": "a", "text": "t"}, "prompt=question,completion=answer", "prompt_completion"),
        ({"prompt": "q", "chosen": "a", "rejected": "x"}, "completion=chosen", "prompt_completion"),
        ({"prompt": "q", "completion": "old", "chosen": "a"}, "completion=chosen", "prompt_completion"),
        ({"prompt": "q", "completion": "x", "chosen": said(("user", "q", {}), ("assistant", "a", {}))["messages"]},
         "messages=chosen", "messages"),
        ({"instruction": "q", "output": "a", "context": ""}, "input=context", "alpaca"),
    ],
)  # fmt: skip
def test_columns_of_other_names_are_read_by_them(record, columns, row_format):
    found = detect_format([record], "x", columns)
    assert found == f"{row_format}({columns})"
    assert read_row(record, found) == [QUESTION, ANSWER]


def test_a_column_that_is_named_is_not_read_under_its_own_name_too():
    named = "alpaca(instruction=input,output=output)"
    record = {"input": "Why?", "output": "Because."}
    assert [turn.content for turn in read_row(record, named)] == ["Why?", "Because."]
    ours = {"instruction": "Why?", "input": "", "output": "Because."}
    assert as_named(ours, named) == record


def test_a_row_without_a_named_column_is_malformed():
    with pytest.raises(RowError, match="no column 'chosen'"):
        read_row({"prompt": "q", "completion": "a"}, "prompt_completion(completion=chosen)")
    with pytest.raises(DataError, match="Asked for: --columns completion=chosen"):
        detect_format([{"prompt": "q", "completion": "a"}], "x", "completion=chosen")


@pytest.mark.parametrize("text", ["prompt", "prompt=", "prompt=a,prompt=b", "question=prompt", ""])
def test_columns_are_pairs_of_our_names_and_the_datas(text):
    with pytest.raises(ConfigError, match="--columns"):
        parse_columns(text)
