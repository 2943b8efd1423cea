"""Loading: all malformed rows in one pass, and nothing lost in silence."""

import csv
import dataclasses
import json

import pytest
from conftest import make_tokenizer

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import (
    find_format,
    load_data,
    load_rows,
    read_labels,
    remarks,
    stored_labels,
    tokenize,
)
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.errors import ConfigError, DataError
from forgetfilter.files import write_jsonl


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
    write_jsonl(tmp_path / "malformed.jsonl", rows.malformed)
    (entry,) = map(json.loads, (tmp_path / "malformed.jsonl").read_text().splitlines())
    assert (entry["line"], entry["raw"]) == (2, '{"prompt": 1, "completion": "b"}\n')


def test_where_all_rows_are_malformed_the_first_is_named_though_they_are_skipped(tmp_path, chat):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": 1, "completion": "b"}\n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match=r"all of its 3 rows are malformed, the first in line 1: 'prompt'"):
        tokenize(load_source(path), chat, skip=True)


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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"prompt": "q", "completion": "a"},\n{"prompt": "q", "completion": "a"}]', "let its name end in .json"),
        ('[{"prompt": "q", "completion": "a"}]', "let its name end in .json"),
        ('{\n "prompt": "q",\n "completion": "a"\n}\n', "span several lines"),
        ("prompt,completion\nq,a\n", "data.jsonl:1: not valid JSON"),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_a_file_of_which_no_line_can_be_read_says_why(tmp_path, chat, text, says, skip):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        tokenize(load_source(path), chat, skip=skip)
    assert "Columns found" not in str(caught.value)


def spoken(rows, chat, label_column=None):
    return "\n".join(remarks(tokenize(load_source(rows), chat), label_column))


def test_repeated_ids_odd_labels_and_columns_not_read_get_a_word(chat):
    rows = [{"prompt": f"q{i}", "completion": "a", "id": i, "bad": int(i < 5)} for i in range(20)]
    assert spoken(rows, chat, "bad") == ""
    assert "2 of 20 rows share their 'id'" in spoken([*rows[:-1], {**rows[-1], "id": 0}], chat)
    for bad, says in (("toxic", "0 of 20 rows are unsafe"), (1, "20 of 20 rows are unsafe"), (None, "0 of 20")):
        said = spoken([{**row, "bad": bad} for row in rows], chat, "bad")
        assert says in said
        assert f"{bad!r} (20 rows)" in said
    judged = [{**row, "label": i > 2, "images": ["a.png"][: i % 2]} for i, row in enumerate(rows)]
    assert "3 rows have 'label', which is not read" in spoken(judged, chat)
    assert "10 rows have 'images'" in spoken(judged, chat)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("{{ message.thinking }}", True),
        ("{{ m['reasoning_content'] }}", True),
        ("{% if enable_thinking or thinking %}", False),
    ],
)
def test_reasoning_is_read_where_the_template_names_a_key_that_has_it(template, read):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += f"{{# {template} #}}"
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "so"}]
    rows = tokenize(load_source([{"messages": said}]), ChatTokenizer(tokenizer, 1000))
    assert rows.unread == ({} if read else {"reasoning_content": 1})


def test_prompts_that_a_trainer_would_learn_are_counted(chat):
    said = [{"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": said}, {"messages": [{"role": "user", "content": "q"}, said[1]]}]
    assert "1 rows have 'train: true beside answers', which is not read" in spoken(rows, chat)
    alike, other = tokenize(load_source(rows), chat).examples
    assert alike == other


def test_messages_in_the_cells_of_a_table_come_back_as_they_were(chat, tmp_path):
    talk = [{"role": "user", "content": "q, r"}, {"role": "assistant", "content": 'a "quoted"\nline'}]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path, again = tmp_path / f"rows{suffix}", tmp_path / f"again{suffix}"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["id", "messages", "note"], ["01", json.dumps(talk, indent=1), "[1]"]])
        rows = tokenize(load_source(path), chat)
        assert rows.examples == tokenize(load_source([{"messages": talk}]), chat).examples
        assert rows.source.as_table().to_pylist() == [
            {"id": "01", "messages": json.dumps(talk, indent=1), "note": "[1]"}
        ]
        rows.source.write(again)
        assert again.read_bytes() == path.read_bytes()
        with path.open("a") as file:
            file.write(delimiter.join(["02", "q", ""]) + "\n")
        line = len(path.read_bytes().splitlines())
        with pytest.raises(DataError, match=f"{path.name}:{line}: 'messages' is text that is no JSON list"):
            tokenize(load_source(path), chat)


def test_a_label_column_is_read_even_if_it_is_called_label(chat):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": bool(i % 2)} for i in range(4)]
    assert load_data(ForgetFilterConfig(), chat, rows, rows).noisy.unread == {"label": 2}
    assert load_data(ForgetFilterConfig(label_column="label"), chat, rows, rows).noisy.unread == {}


def test_what_the_chat_template_never_shows_is_named(chat):
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r", **call}]
    rows = [{"messages": said, "tools": [{"type": "function", "function": {"name": "f"}}]}, {"messages": said[:1] * 2}]
    rows[1]["messages"] = [said[0], {"role": "assistant", "content": "a", "name": "someone"}]
    assert tokenize(load_source(rows), chat).unread == {"tool_calls": 1, "tools": 1, "reasoning_content": 1}
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    template = chat.tokenizer.chat_template.replace("{{ m['content'] }}", "{{ m['content'] }}" + calls)
    template += "{# tools, m.reasoning_content #}"
    knowing = ChatTokenizer(make_tokenizer(template), 200)
    assert tokenize(load_source(rows), knowing).unread == {}
    only = template.replace(calls, "{% if m['content'] is none %}" + calls + "{% endif %}")  # as of DeepSeek-R1-Distill
    assert tokenize(load_source(rows), ChatTokenizer(make_tokenizer(only), 200)).unread == {"tool_calls": 1}


def test_what_is_not_read_of_other_data_is_said_too(chat, capsys):
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    load_data(ForgetFilterConfig(label_column="label"), chat, rows, rows)
    assert capsys.readouterr().out.count("1 rows have 'label', which is not read") == 1, "of the safe rows alone"


def test_columns_are_those_of_the_noisy_data_and_of_others_that_have_them(chat, write_jsonl):
    asked = write_jsonl("asked.jsonl", [{"question": "q", "answer": "a"}])
    plain = write_jsonl("plain.jsonl", [{"prompt": "q", "completion": "a"}])
    config = ForgetFilterConfig(columns="prompt=question,completion=answer")
    named = "prompt_completion(prompt=question,completion=answer)"
    assert load_rows(str(asked), "dataset_name", chat, config).row_format == named
    assert load_rows(str(asked), "safe_dataset_name", chat, config).row_format == named
    assert load_rows(str(plain), "safe_dataset_name", chat, config).row_format == "prompt_completion"
    with pytest.raises(DataError, match="--columns prompt=question"):
        load_rows(str(plain), "dataset_name", chat, config)
    assert find_format(load_source(asked), "prompt_completion", config.columns) == named


def test_a_slice_is_one_of_the_noisy_data_alone(chat, noisy_file, safe_file):
    config = ForgetFilterConfig(
        dataset_name=str(noisy_file), safe_dataset_name=str(safe_file), dataset_train_split="train[:5]"
    )
    data = load_data(config, chat)
    assert (len(data.noisy.examples), len(data.safe.examples)) == (5, 8)


def test_noisy_rows_that_are_known_to_be_unsafe_are_counted(config, chat, noisy_file, capsys):
    load_data(dataclasses.replace(config, unsafe_dataset_name=str(noisy_file)), chat)
    assert "16 of the noisy rows are among those known to be unsafe" in capsys.readouterr().out
