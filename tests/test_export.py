"""Exports: the kept rows as trainers want them."""

import json

import pytest
import yaml

from forgetfilter.data.export import export
from forgetfilter.data.formats import detect_format, read_row
from forgetfilter.data.sources import load_source
from forgetfilter.errors import DataError

ALPACA = [{"instruction": "q", "input": "i", "output": "a"}, {"instruction": "q2", "input": "", "output": "a2"}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}]


def exported(rows, row_format, target, folder):
    files = export(load_source(rows), row_format, target, folder, replace=True)
    return [json.loads(line) for line in files[0].read_text().splitlines()], files


def test_trl_gets_prompt_and_completion_or_messages(tmp_path):
    rows, _ = exported(ALPACA, "alpaca", "trl", tmp_path)
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "q\ni"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    rows, _ = exported(SHAREGPT, "sharegpt", "trl", tmp_path)
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2
    single = {"conversations": SHAREGPT[0]["conversations"][:2]}
    rows, _ = exported([*SHAREGPT, single], "sharegpt", "trl", tmp_path)
    assert [set(row) for row in rows] == [{"messages"}, {"messages"}]


@pytest.mark.parametrize("target", ["trl", "alpaca", "sharegpt"])
def test_texts_that_look_like_dates_stay_texts_for_whoever_loads_the_export(tmp_path, target):
    from datasets import load_dataset

    when = "2021-03-01 10:00:00"
    export(load_source([{"prompt": "q", "completion": when}] * 2), "prompt_completion", target, tmp_path / "out")
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert found == [json.loads(line) for line in lines]
    assert str(found).count(when) == 2


def test_llamafactory_gets_every_key_of_its_description(tmp_path):
    rows, files = exported(ALPACA, "alpaca", "llamafactory", tmp_path)
    assert rows[0]["conversations"][1] == {"from": "gpt", "value": "a"}
    (entry,) = json.loads(files[1].read_text()).values()
    assert entry["columns"] == {"messages": "conversations", "system": None, "tools": None}
    assert entry["tags"].keys() == {
        "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"
    }  # fmt: skip


def test_axolotl_gets_a_config(tmp_path):
    rows, files = exported(ALPACA, "alpaca", "axolotl", tmp_path)
    assert rows[1]["messages"][0] == {"role": "user", "content": "q2"}
    assert yaml.safe_load(files[1].read_text())["datasets"][0]["type"] == "chat_template"


def test_a_file_that_is_there_is_replaced_only_where_that_is_said(tmp_path):
    (tmp_path / "dataset_info.json").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        export(load_source(ALPACA), "alpaca", "llamafactory", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_info.json"]
    export(load_source(ALPACA), "alpaca", "llamafactory", tmp_path, replace=True)
    assert "mine" not in (tmp_path / "dataset_info.json").read_text()


def test_a_row_a_format_cannot_hold_is_named_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="more turns"):
        export(load_source(SHAREGPT), "sharegpt", "alpaca", tmp_path / "out")
    with pytest.raises(DataError, match="no turns"):
        export(load_source([{"text": "t"}]), "text", "sharegpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
CALL = {"name": "tide", "arguments": {"at": "Brest"}}
CALLED = {
    "messages": [
        {"role": "user", "content": "High tide?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "06:12"},
        {"role": "assistant", "content": "At 06:12."},
    ],
    "tools": TOOLS,
}
LEFT_OUT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
}


ASKED = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TRAINED = {
    "messages": [{"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}],
}


def test_what_a_row_tells_its_chat_template_goes_to_trl_alone(tmp_path):
    row = {**ASKED, "chat_template_kwargs": {"enable_thinking": False}}
    ((written,), _) = exported([row], "messages", "trl", tmp_path)
    assert written["chat_template_kwargs"] == row["chat_template_kwargs"]
    for target in ("axolotl", "llamafactory", "alpaca", "sharegpt"):
        with pytest.raises(DataError, match=r"chat_template_kwargs|nothing else beside"):
            exported([row], "messages", target, tmp_path)


def test_an_answer_learnt_in_part_goes_where_that_can_be_said(tmp_path):
    question, answer = ASKED["messages"]
    row = {"messages": [question, {**answer, "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}]}
    ((written,), files) = exported([row], "messages", "axolotl", tmp_path)
    assert written["messages"][1]["train_detail"]
    assert "    message_field_training_detail: train_detail\n" in files[1].read_text()
    with pytest.raises(DataError, match="a message has train_detail"):
        exported([row], "messages", "sharegpt", tmp_path)


def test_empty_calls_and_reasoning_are_nothing_that_a_format_must_hold(tmp_path):
    question, answer = ASKED["messages"]
    row = {"messages": [question, {**answer, "tool_calls": [], "reasoning_content": ""}]}
    ((written,), _) = exported([row], "messages", "alpaca", tmp_path)
    assert written["output"] == answer["content"]
    ((written,), _) = exported([row], "messages", "sharegpt", tmp_path)
    assert written["conversations"][1]["value"] == answer["content"]


def test_a_call_without_a_wrapper_is_written_as_it_is(tmp_path):
    bare = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": None}]}
    row = {"messages": [{"role": "user", "content": "q"}, bare]}
    for target in ("llamafactory", "sharegpt"):
        ((written,), _) = exported([row], "messages", target, tmp_path)
        assert written["conversations"][1] == {"from": "function_call", "value": json.dumps(CALL)}


U, A, S, T = ({"role": role, "content": role} for role in ("user", "assistant", "system", "tool"))


@pytest.mark.parametrize(
    ("messages", "taken"),
    [
        ([S, U, A, U, A], True),
        ([U, A, T, A], True),
        ([A, U, A], False),
        ([U, A, T, T, A], False),
        ([U, A, A], False),
        ([U, A, U], False),
        ([U, S, U, A], False),
    ],
)
def test_llamafactory_gets_no_row_that_it_would_leave_out(tmp_path, messages, taken):
    if taken:
        assert len(exported([{"messages": messages}], "messages", "llamafactory", tmp_path)[0]) == 1
        return
    with pytest.raises(DataError, match=r"do not take turns: use axolotl or trl.*Nothing was written"):
        exported([{"messages": messages}], "messages", "llamafactory", tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_of_chat_templates_are_those_of_every_row_or_of_none(tmp_path):
    told = {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}}
    assert len(exported([told, told], "messages", "trl", tmp_path)[0]) == 2
    for other in ({"messages": [U, A]}, {**told, "chat_template_kwargs": {"tone": "calm"}}):
        with pytest.raises(DataError, match="other keys than that of the rows before it"):
            exported([told, other], "messages", "trl", tmp_path)


def test_trl_gets_no_empty_prompt(tmp_path):
    alone = {"conversations": [{"from": "gpt", "value": "welcome"}]}
    rows, _ = exported([{"conversations": SHAREGPT[0]["conversations"][:2]}, alone], "sharegpt", "trl", tmp_path)
    assert [[message["content"] for message in row["messages"]] for row in rows] == [["q", "a"], ["welcome"]]


def test_function_calls_and_functions_go_along(tmp_path):
    said = [{**message, "content": message["content"] or ""} for message in CALLED["messages"]]
    ((row,), _) = exported([CALLED], "messages", "axolotl", tmp_path)
    assert (row["messages"], row["tools"]) == (said, TOOLS)
    ((row,), _) = exported([CALLED], "messages", "trl", tmp_path)
    assert (row["prompt"], row["completion"], row["tools"]) == (said[:1], said[1:], json.dumps(TOOLS))
    ((row,), files) = exported([CALLED], "messages", "llamafactory", tmp_path)
    assert row["conversations"][1] == {"from": "function_call", "value": json.dumps(CALL)}
    assert [message["from"] for message in row["conversations"]] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(row["tools"]) == TOOLS
    assert json.loads(files[1].read_text())["forgetfilter_kept"]["columns"]["tools"] == "tools"
    with pytest.raises(DataError, match="alpaca holds no functions"):
        exported([CALLED], "messages", "alpaca", tmp_path)


def test_reasoning_goes_along_or_the_export_says_that_it_cannot(tmp_path):
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, answer]}
    assert exported([row], "messages", "trl", tmp_path)[0][0]["completion"] == [answer]
    assert exported([row], "messages", "axolotl", tmp_path)[0] == [row]
    for target in ("llamafactory", "sharegpt", "alpaca"):
        with pytest.raises(DataError, match="use axolotl or trl"):
            exported([row], "messages", target, tmp_path)


def test_what_came_from_llama_factory_goes_back_as_it_was(tmp_path):
    talk = [
        {"from": "human", "value": "High tide?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "06:12"},
        {"from": "gpt", "value": "At 06:12."},
    ]
    row = {"conversations": talk, "tools": json.dumps(TOOLS)}
    for target in ("llamafactory", "sharegpt"):
        assert exported([row], "sharegpt", target, tmp_path)[0] == [row]


def test_a_call_of_sharegpt_is_one_in_messages(tmp_path):
    talk = [{"from": "human", "value": "High tide?"}, {"from": "function_call", "value": json.dumps(CALL)}]
    row = {"conversations": talk, "tools": json.dumps([TOOLS[0]["function"]])}
    ((found,), _) = exported([row], "sharegpt", "axolotl", tmp_path)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert found["messages"][1] == called
    assert found["tools"] == TOOLS
    talk[1]["value"] = "call tide"
    ((found,), _) = exported([row], "sharegpt", "axolotl", tmp_path)
    assert found["messages"][1] == {"role": "assistant", "content": "call tide"}
    talk[1]["value"] = json.dumps(CALL)
    export(load_source([row]), "sharegpt", "axolotl", tmp_path, replace=True, shows_calls=False)
    (found,) = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert found["messages"][1] == {"role": "assistant", "content": json.dumps(CALL)}, "as the run has learnt it"


def test_arguments_are_exported_as_they_were_given(tmp_path):
    call = {"type": "function", "function": {"name": "tide", "arguments": '{"at":"Brest"}'}}
    row = {**CALLED, "messages": [CALLED["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert exported([row], "messages", "axolotl", tmp_path)[0] == [row]
    ((found,), _) = exported([row], "messages", "sharegpt", tmp_path)
    assert json.loads(found["conversations"][1]["value"]) == CALL, "LLaMA-Factory writes them itself"


def test_trl_learns_a_completion_of_several_answers_and_no_examples_before_it(tmp_path):
    example, asked = CALLED["messages"][3], CALLED["messages"][0]
    row = {"prompt": [asked, example, asked], "completion": CALLED["messages"][1:]}
    ((found,), _) = exported([row], "prompt_completion", "trl", tmp_path)
    assert [message["role"] for message in found["prompt"]] == ["user", "assistant", "user"]
    assert [message["role"] for message in found["completion"]] == ["assistant", "tool", "assistant"]


def test_answers_that_are_context_alone_stay_so_or_the_export_says_that_it_cannot(tmp_path):
    ((row,), files) = exported([LEFT_OUT], "messages", "axolotl", tmp_path)
    assert [message.get("train") for message in row["messages"]] == [None, None, None, False, None, None]
    assert yaml.safe_load(files[1].read_text())["datasets"][0]["message_field_training"] == "train"
    ((row,), _) = exported([LEFT_OUT], "messages", "sharegpt", tmp_path)
    assert row["conversations"][3]["train"] is False
    files = exported([TRAINED], "messages", "axolotl", tmp_path)[1]
    assert yaml.safe_load(files[1].read_text())["datasets"][0]["message_field_training"] == "train"
    for target in ("trl", "llamafactory"):
        with pytest.raises(DataError, match=r"<list>:1: message 4 is not to be trained.*Nothing was written"):
            exported([LEFT_OUT], "messages", target, tmp_path)
    last = {"messages": LEFT_OUT["messages"][2:]}
    ((row,), _) = exported([last], "messages", "trl", tmp_path)
    assert (len(row["prompt"]), row["completion"][0]["content"]) == (3, "a")


@pytest.mark.parametrize("target", ["trl", "axolotl", "sharegpt"])
@pytest.mark.parametrize("row", [CALLED, LEFT_OUT, TRAINED], ids=["calls", "left out", "a trained prompt"])
def test_an_export_reads_as_what_was_exported(tmp_path, target, row):
    if target == "trl":
        row = {**row, "messages": row["messages"][-2:]}
    before = read_row(load_source([row]).records[0], "messages")
    exported([row], "messages", target, tmp_path)
    source = load_source(tmp_path / "train.jsonl")
    after = read_row(source.records[0], detect_format(source.rows(), "x"))
    assert [(turn.role, turn.trained) for turn in after] == [(turn.role, turn.trained) for turn in before]
    assert after[0].extra == before[0].extra
    said = [(old.content, new.content) for old, new in zip(before, after, strict=True) if not new.is_call]
    assert all(old == new for old, new in said)


def test_renamed_columns_are_exported_under_the_trainers_names(tmp_path):
    rows = [{"question": "q", "answer": "a"}]
    found, _ = exported(rows, "prompt_completion(prompt=question,completion=answer)", "alpaca", tmp_path)
    assert found == [{"instruction": "q", "input": "", "output": "a"}]


def test_plain_text_goes_to_trl_and_axolotl(tmp_path):
    for target in ("trl", "axolotl"):
        rows, files = exported([{"text": "t"}], "text", target, tmp_path / target)
        assert rows == [{"text": "t"}]
    assert yaml.safe_load(files[1].read_text())["datasets"][0]["type"] == "completion"
