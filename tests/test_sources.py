"""Sources: whatever comes in can be written back byte for byte."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetfilter.data.sources import load_source, row_ids
from forgetfilter.errors import DataError


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
        ("data.parquet", b"not parquet", "Parquet"),
        ("data.jsonl.gz", b"not gzip", "cannot be read"),
        ("data.pkl", b"", "unknown kind of file"),
    ],
)
def test_damaged_files_say_what_and_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_source(tmp_path / name)


def test_a_missing_file_is_not_looked_up_elsewhere(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_source(tmp_path / "nothing.jsonl")


def test_row_ids_are_own_ids_or_content_and_occurrence():
    assert row_ids(load_source([{"id": 7, "text": "a"}, {"id": 8, "text": "a"}])) == ["7", "8"]
    ids = row_ids(load_source([{"text": "a"}, {"text": "b"}, {"text": "a"}]))
    assert ids[0].endswith("-1")
    assert ids[2] == ids[0][:-1] + "2"
    assert ids[1] != ids[0]


def test_a_folders_readme_does_not_lead_out_of_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "train.jsonl", folder / "test.jsonl", tmp_path / "secret.jsonl"):
        path.write_text(json.dumps({"text": path.stem}) + "\n")
    assert load_source(folder).rows() == [{"text": "train"}]
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret.jsonl\n---\n")
    with pytest.raises(DataError, match="leads out of the folder"):
        load_source(folder)
