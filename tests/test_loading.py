"""Loading: all malformed rows in one pass, and nothing lost in silence."""

import json

import pytest

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import load_data, read_labels, stored_labels, tokenize, write_malformed
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.errors import ConfigError, DataError


@pytest.fixture
def chat(tokenizer):
    return ChatTokenizer(tokenizer, 200)


def test_all_malformed_rows_are_found_and_the_first_twenty_named(tmp_path, chat):
    lines = ['{"prompt": "q", "completion": "a"}'] + ['{"prompt": "q"}', "{broken"] * 12
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        tokenize(load_source(path), chat)
    message = str(caught.value)
    assert "24 of 25 rows are malformed" in message
    assert f"{path}:2: no column 'completion'" in message
    assert f"{path}:3: not valid JSON" in message
    assert f"{path}:21:" in message
    assert f"{path}:22:" not in message
    assert "and 4 more" in message
    assert "--malformed skip" in message


def test_skipped_rows_are_written_down(tmp_path, chat):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": 1, "completion": "b"}\n', encoding="utf-8")
    rows = tokenize(load_source(path), chat, skip=True)
    assert len(rows.examples) == len(rows.source) == 1
    write_malformed(tmp_path / "malformed.jsonl", rows.malformed)
    (entry,) = map(json.loads, (tmp_path / "malformed.jsonl").read_text().splitlines())
    assert (entry["line"], entry["raw"]) == (2, '{"prompt": 1, "completion": "b"}\n')


def test_rows_without_completion_stay_but_are_not_trained(chat):
    rows = tokenize(load_source([{"prompt": "q", "completion": c} for c in ("a", "", " ")]), chat)
    assert [example.scorable for example in rows.examples] == [True, False, False]
    assert len(rows.trainable()) == 1


def test_data_without_anything_to_learn_is_refused(chat):
    with pytest.raises(DataError, match="no row with a completion"):
        tokenize(load_source([{"prompt": "q", "completion": ""}]), chat)


def test_mixed_formats_are_malformed_rows(chat):
    with pytest.raises(DataError, match=r"row 2|:2: no column 'prompt'"):
        tokenize(load_source([{"prompt": "q", "completion": "a"}, {"text": "t"}]), chat)


def test_labels_are_read_from_their_column():
    marks = [1, True, "unsafe", "Unsafe", "1", 0, False, "safe", None, ""]
    assert read_labels(load_source([{"bad": mark} for mark in marks]), "bad") == [True] * 5 + [False] * 5
    with pytest.raises(DataError, match="label_column"):
        read_labels(load_source([{"text": "a"}]), "bad")


def test_labels_are_those_of_the_column_the_config_names():
    source = load_source([{"bad": mark} for mark in (1, 0)])
    assert stored_labels(source, ForgetFilterConfig()) is None
    labels = stored_labels(source, ForgetFilterConfig(label_column="bad"))
    assert labels.tolist() == [True, False]
    assert labels.dtype == bool
    with pytest.raises(DataError, match="'worse' \\(label_column\\)"):
        stored_labels(source, ForgetFilterConfig(label_column="worse"))


def test_both_data_sets_are_those_the_config_names_or_those_given(chat, noisy_file, safe_file):
    config = ForgetFilterConfig(dataset_name=str(noisy_file), safe_dataset_name=str(safe_file), label_column="unsafe")
    data = load_data(config, chat)
    assert (len(data.noisy.examples), len(data.safe.examples)) == (16, 8)
    assert data.facts() == {"noisy": data.noisy.facts(), "safe": data.safe.facts()}
    assert data.facts()["noisy"]["rows"] == 16
    rows = [{"prompt": "q", "completion": "a", "unsafe": 1}]
    given = load_data(config, chat, rows, rows * 2)
    assert (len(given.noisy.examples), len(given.safe.examples)) == (1, 2)
    with pytest.raises(DataError, match="label_column"):
        load_data(config, chat, [{"prompt": "q", "completion": "a"}])
    with pytest.raises(ConfigError, match="--safe_dataset_name"):
        load_data(ForgetFilterConfig(dataset_name=str(noisy_file), safe_dataset_name=None), chat)
