"""Sources: whatever comes in can be written back byte for byte."""

import bz2
import datetime
import gzip
import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetfilter.data import readers
from forgetfilter.data.by_hand import read_statements
from forgetfilter.data.formats import detect_format, read_row
from forgetfilter.data.ids import unusable_ids
from forgetfilter.data.sources import load_source, open_stream
from forgetfilter.errors import DataError


def zipped(data, *names):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return packed.getvalue()


def frame(data):
    """Zstandard's frame of some bytes, by Arrow's codec."""
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as file:
        file.write(data)
    return target.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a",  "date": "2024-01-01"}\n{"text": "b", "n": 1.0}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        '{"text": "caf\\u00e9 é"}\n{"text": "日本"}\n'.encode(),
        b'{"text": "a"}\n{"text": "no newline at the end"}',
    ],
)
def test_jsonl_comes_back_byte_for_byte(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    source = load_source(path)
    source.write(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == content
    source.select([1]).write(tmp_path / "second.jsonl")
    assert content.endswith((tmp_path / "second.jsonl").read_bytes())


def test_chosen_lines_stay_apart_when_the_last_had_no_newline(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    load_source(path).select([1, 0]).write(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"text": "b"}\n{"text": "a"}\n'


def test_blank_lines_and_bom_are_no_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n   \n{"text": "b"}\n')
    source = load_source(path)
    assert source.rows() == [{"text": "a"}, {"text": "b"}]
    assert source.lines == [1, 4]


def test_csv_rows_that_span_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "data.csv"
    content = b'prompt,completion,note\r\n"two\nlines","say ""hi""",1\r\nplain,b,2\r\n'
    path.write_bytes(content)
    source = load_source(path)
    assert source.records[0] == {"prompt": "two\nlines", "completion": 'say "hi"', "note": "1"}
    assert source.lines == [2, 4]
    source.select([0]).write(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == content[: content.index(b"plain")]


def test_json_array_keeps_each_rows_own_text(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n  {"text": "a",   "n": 1.50},\n\n  {"text": "b"}\n]\n', encoding="utf-8")
    source = load_source(path)
    assert source.lines == [2, 4]
    source.select([0]).write(tmp_path / "out.json")
    assert '{"text": "a",   "n": 1.50}' in (tmp_path / "out.json").read_text()
    assert json.loads((tmp_path / "out.json").read_text()) == [{"text": "a", "n": 1.5}]


def test_parquet_and_memory_and_gzip(tmp_path):
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    source = load_source(tmp_path / "data.parquet")
    source.select([1]).write(tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == rows[1:]
    assert load_source(rows).rows() == rows
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert load_source(tmp_path / "data.jsonl.gz").rows() == [{"text": "a"}]


def test_damaged_rows_are_found_with_their_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n[1]\n{"text": "\xff"}\n')
    source = load_source(path)
    assert [source.lines[row] for row in source.errors] == [2, 3, 4]
    assert "not valid JSON" in source.errors[1]
    assert "not UTF-8" in source.errors[3]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.json", b'[{"text": "a"},\n {"text" ]', "data.json:2"),
        ("data.csv", b"", "empty"),
        ("data.csv", b"\nprompt,completion\nq,a\n", "data.csv:1: an empty line, where the column names must stand"),
        ("data.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n', "data.csv:3: not valid CSV"),
        ("data.parquet", b"not parquet", "Parquet"),
        ("data.jsonl.gz", b"not gzip", "cannot be read"),
        ("data.pkl", b"", "unknown kind of file"),
        ("data.csv", b"prompt,completion,completion\nq,a,b\n", "several columns are called 'completion'"),
        ("data.csv", b"prompt;completion\nq;a\n", "columns are parted by ',', not by ';'"),
        ("data.tsv", b"prompt,completion\nq,a\n", r"columns are parted by '\\t', not by ','"),
        ("data.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("data.csv", "text\na".encode("utf-16"), "UTF-16"),
        ("data.json", '[{"text": "a"}]'.encode("utf-16"), "UTF-16"),
        ("data.csv", "text\na".encode("utf-16-le"), "UTF-16"),
        ("data.jsonl", '{"text": "a"}'.encode("utf-16-be"), "UTF-16"),
        ("data.jsonl.bz2", bz2.compress(b"{}" * 999)[:-9], "cannot be read"),
        ("data.jsonl.zst", b"not zstd", "cannot be read"),
        ("data.jsonl.zip", b"not zip", "cannot be read"),
        ("data.zip", b"not zip", "unknown kind of file"),
        ("data.zip", zipped(b"{}", "a.jsonl", "b.jsonl"), "holds 2 files"),
        ("data.zip", zipped(b"{}", "a.exe"), "unknown kind of file"),
    ],
)
def test_damaged_files_say_what_and_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_source(tmp_path / name)


def test_objects_without_keys_which_parquet_cannot_hold_go_into_lines(tmp_path):
    rows = [{"text": "a", "about": {}, "more": [{"x": {}}]}, {"text": "b", "about": {}, "more": []}]
    from datasets import Dataset

    source = load_source(Dataset.from_list(rows)).writable()
    source.write(tmp_path / f"kept{source.suffix}")
    assert load_source(tmp_path / f"kept{source.suffix}").rows() == rows


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
UNEVEN = [
    {"messages": [*TALK, {"role": "assistant", "content": "b"}], "tools": [{"function": {"parameters": {"b": 1}}}]},
    {"messages": [*TALK, {"role": "assistant", "content": "c"}], "tools": [{"function": {"parameters": {"c": "x"}}}]},
]


@pytest.mark.parametrize("kind", ["Dataset", "save_to_disk", "parquet"])
def test_objects_of_different_keys_are_read_alike_from_lines_and_from_tables(tmp_path, write_jsonl, kind):
    """The datasets library keeps them as JSON in a text."""
    from datasets import load_dataset

    path = str(write_jsonl("rows.jsonl", UNEVEN))
    data = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    if kind == "save_to_disk":
        data.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved"
    elif kind == "parquet":
        data.to_parquet(tmp_path / "rows.parquet")
        data = tmp_path / "rows.parquet"
    source = load_source(data)
    for row, expected in zip(source.rows(), load_source(path).rows(), strict=True):
        assert read_row(row, "messages") == read_row(expected, "messages")
    assert detect_format(source.rows(), "x") == "messages"
    source.select([1]).write(tmp_path / "kept.parquet")
    assert load_source(tmp_path / "kept.parquet").rows() == source.rows()[1:]


def test_a_key_that_is_there_twice_is_an_error_of_its_row(tmp_path):
    rows = ['{"text": "a"}', '{"text": "b", "text": "c"}', '{"text": "d", "more": [{"x": 1, "x": 1}]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows.json").write_text(f"[{','.join(rows)}]")
    for name in ("rows.jsonl", "rows.json"):
        source = load_source(tmp_path / name)
        assert source.errors == {1: "'text' is there twice in one object", 2: "'x' is there twice in one object"}
        assert source.rows() == [{"text": "a"}]


@pytest.mark.parametrize("name", ["zeros.jsonl", "zeros.jsonl.gz", "zeros.csv"])
def test_a_line_too_long_for_a_row_is_named_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "LARGEST_LINE", 1 << 10)
    data = b"text\n" + b"0" * 5000 if name.endswith(".csv") else b"\n" + b"0" * 5000
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=rf"{name}:2: a line of more than"):
        load_source(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"version": 1,\n "examples": [{"text": "a"}]}', "one JSON object with 2 keys: 'version', 'examples'"),
        ('{\n  "text": "a"\n}', "one JSON object with 1 keys: 'text'"),
    ],
)
def test_one_object_over_several_lines_is_no_file_of_rows(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=says):
        load_source(tmp_path / "x.json")


def test_an_array_on_one_long_line_is_no_line_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_LINE", 1 << 10)
    rows = [{"text": "a" * 100} for _ in range(50)]
    for start in (b"", b"\xef\xbb\xbf", b" \n \n"):
        (tmp_path / "x.json").write_bytes(start + json.dumps(rows).encode())
        assert load_source(tmp_path / "x.json").rows() == rows


def test_lines_whose_rows_have_a_column_data_are_lines(tmp_path):
    rows = [{"data": [1], "text": "a"}, {"data": [2], "text": "b"}]
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_source(tmp_path / "x.json").rows() == rows


def test_home_is_found_and_configurations_are_of_the_hub_alone(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_jsonl("rows.jsonl", [{"text": "a"}])
    assert load_source("~/rows.jsonl").rows() == [{"text": "a"}]
    for here in (path, tmp_path):
        with pytest.raises(DataError, match="--dataset_config main names a part of a data set on the Hub"):
            load_source(here, "main")
    with pytest.raises(DataError, match="too long for the name of a data set"):
        load_source(json.dumps([{"text": "a"}] * 50))


def test_what_went_wrong_on_the_hub_is_said_with_its_cause(monkeypatch):
    def load(*_, **__):
        try:
            raise ValueError("column names\n  don't match")
        except ValueError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match=r"ValueError: column names don't match"):
        load_source("somebody/something")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl.zip", zipped(b'{"text": "a"}', "ä.jsonl").replace("ä".encode(), b"\xff\xfe")),
        ("x.parquet", frame(b"").join([b"PAR1", b"PAR1"])),
    ],
)
def test_damaged_archives_and_tables_are_errors(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        load_source(tmp_path / name)


def test_a_missing_file_is_not_looked_up_elsewhere(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_source(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch, name):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        load_source(name)


def test_row_ids_are_own_ids_or_content_and_occurrence():
    assert load_source([{"id": 7, "text": "a"}, {"id": 8, "text": "a"}]).ids == ["7", "8"]
    ids = load_source([{"text": "a"}, {"text": "b"}, {"text": "a"}]).ids
    assert ids[0].endswith("-1")
    assert ids[2] == ids[0][:-1] + "2"
    assert ids[1] != ids[0]


LINES = b'{"text": "01"}\n{"text": "N/A"}\n'


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("A.JSONL.GZ", gzip.compress(LINES)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.zst", frame(LINES)),
        ("a.jsonl.zst", frame(LINES[:15]) + frame(LINES[15:])),
        ("a.jsonl.zip", zipped(LINES, "a.jsonl")),
        ("a.zip", zipped(LINES, "inner.jsonl")),
        ("a.csv.bz2", bz2.compress(b"text\n01\nN/A\n")),
        ("a.tsv.zst", frame(b"text\tn\n01\t1\nN/A\t2\n")),
    ],
)
def test_packed_files_are_read_whole_and_in_parts(tmp_path, name, packed):
    (tmp_path / name).write_bytes(packed)
    assert [row["text"] for row in load_source(tmp_path / name).rows()] == ["01", "N/A"]
    assert [len(part) for part, _ in open_stream(tmp_path / name).parts(1)] == [1, 1]
    assert open_stream(tmp_path / name).stem in ("a", "A")


@pytest.mark.parametrize("start", ['{"data": [', '{"v": [1],\n "data": [\n'])
def test_an_object_that_lists_its_rows_as_data_is_read(tmp_path, start):
    (tmp_path / "a.json").write_text(start + '{"text": "a"},\n{"text": "b"}], "w": {}}')
    source = load_source(tmp_path / "a.json")
    assert source.rows() == [{"text": "a"}, {"text": "b"}]
    assert source.raw == [b'{"text": "a"}', b'{"text": "b"}']


def test_lines_in_a_json_file_are_rows_whatever_their_columns(tmp_path):
    (tmp_path / "a.json").write_text('{"data": "x", "text": "a"}\n{"data": [1], "text": "b"}\n')
    assert [row["text"] for row in load_source(tmp_path / "a.json").rows()] == ["a", "b"]


def test_tabs_part_the_columns_of_tsv_files(tmp_path):
    content = b'prompt\tcompletion\nq, r\t"a\t1"\n'
    (tmp_path / "a.tsv").write_bytes(content)
    source = load_source(tmp_path / "a.tsv")
    assert source.rows() == [{"prompt": "q, r", "completion": "a\t1"}]
    source.write(tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_bytes() == content


def test_values_of_a_list_that_json_cannot_hold_are_named():
    with pytest.raises(DataError, match="row 2: JSON cannot hold it"):
        load_source([{"text": "a"}, {"text": "b", "when": datetime.date(2020, 1, 1)}])


def test_a_table_has_every_column_of_every_row_and_guesses_no_type(write_jsonl):
    rows = [
        {"text": "4", "id": 1, "big": 2**70, "odd": {"a": 1}},
        {"text": "N/A", "id": "b", "big": 3, "late": "2021-03-01", "odd": "\udc80"},
    ]
    table = load_source(write_jsonl("a.jsonl", rows)).as_table()
    assert table.to_pylist() == [
        {"text": "4", "id": "1", "big": str(2**70), "odd": '{"a": 1}', "late": None},
        {"text": "N/A", "id": "b", "big": "3", "odd": "\\udc80", "late": "2021-03-01"},
    ]


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([1, 2, 3], None),
        ([None, None, None], None),
        ([1, 2, 1], "2 of 3 rows share their 'id' with another one, first <list>:1"),
        ([1, "1", 2], "2 of 3 rows share"),
        ([1, None, 2], "1 of 3 rows have no 'id' that is text or a whole number, first <list>:2"),
        ([1.5, 2, 3], "1 of 3 rows have no"),
    ],
)
def test_ids_that_cannot_tell_rows_apart_are_found(ids, why):
    source = load_source([{"id": value, "text": str(n)} for n, value in enumerate(ids)])
    found = unusable_ids(source)
    assert found == why if why is None else found.startswith(why)
    assert len(set(source.ids)) == 3
    assert (source.ids == [str(value) for value in ids]) == (ids == [1, 2, 3])


def test_rows_are_named_by_number_where_their_ids_repeat(write_jsonl):
    source = load_source([{"id": 3, "prompt": "q", "completion": text} for text in "abc"])
    told = write_jsonl("told.jsonl", [{"id": "3", "decision": "dropped"}])
    with pytest.raises(DataError, match=r"told\.jsonl:1: .*give 'row', its number from 0, or its id in scores"):
        read_statements(source, told)
    told = write_jsonl("told.jsonl", [{"row": 2, "decision": "dropped"}, {"id": source.ids[0], "decision": "kept"}])
    assert read_statements(source, told) == ({}, {2: "unsafe", 0: "clean"})
