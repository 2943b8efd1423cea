"""Exports: the kept rows as trainers want them."""

import json

import pytest
import yaml

from forgetfilter.data.export import export
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
        "prompt": [{"role": "user", "content": "q\n\ni"}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    rows, _ = exported(SHAREGPT, "sharegpt", "trl", tmp_path)
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2
    single = {"conversations": SHAREGPT[0]["conversations"][:2]}
    rows, _ = exported([*SHAREGPT, single], "sharegpt", "trl", tmp_path)
    assert [set(row) for row in rows] == [{"messages"}, {"messages"}]


def test_llamafactory_gets_every_key_of_its_description(tmp_path):
    rows, files = exported(ALPACA, "alpaca", "llamafactory", tmp_path)
    assert rows[0]["conversations"][1] == {"from": "gpt", "value": "a"}
    (entry,) = json.loads(files[1].read_text()).values()
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
