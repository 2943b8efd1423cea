"""Folders: their rows are those of their files, whatever these are called and hold."""

import csv
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetfilter.data.sources import load_source, open_stream
from forgetfilter.errors import DataError

GUESSED = ["None", "N/A", "null", "NaN", "4", "01067", "1e3", "true", "2021-03-01", "2021-03-01 10:00:00", "", "a\r\nb"]
"""Texts that readers of tables take for something else."""
TEXT = st.sampled_from(GUESSED) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NAMES = [
    "train",
    "test",
    "dev",
    "my_test_drive",
    "training_camp",
    "b c",
    "Z",
    "sub/train",
    "sub/deeper/x",
    "validation/y",
]
KINDS = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]
ROW = st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional={"note": TEXT})
FILES = st.dictionaries(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(KINDS)), st.lists(ROW, min_size=1, max_size=3), max_size=5
)


def write(path, rows):
    """A file of rows, of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, names, delimiter="\t" if path.suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def known(rows):
    """Rows without their nulls: a table has one where a row of another file has a column more."""
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(FILES, st.integers(1, 4))
def test_the_rows_of_a_folder_are_those_of_its_files_in_the_order_of_their_names(files, size):
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder / "a file that names no split.jsonl", [{"prompt": "q", "completion": "4"}])
        for (name, kind), rows in files.items():
            write(folder / f"{name}{kind}", rows)
        paths = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).parts)
        expected = [row for path in paths for row in known(load_source(path).rows())]
        source = load_source(folder)
        assert known(source.rows()) == expected
        assert source.files == [str(path) for path in paths for _ in load_source(path).rows()]
        parts = [part for part, _ in open_stream(folder).parts(size)]
        assert [row for part in parts for row in known(part.rows())] == expected
        assert all(len(part) <= size for part in parts)
        again = folder / f"again{source.suffix}"
        source.write(again)
        assert known(load_source(again).rows()) == expected
    finally:
        shutil.rmtree(folder)


ONE, TWO = {"prompt": "q", "completion": "01"}, {"prompt": "r", "completion": "N/A"}


@pytest.mark.parametrize(
    ("files", "suffix"),
    [
        ({"a.csv": [ONE], "b.csv": [TWO]}, ".csv"),
        ({"a.csv": [ONE], "b.csv": [{**TWO, "more": "1"}]}, ".jsonl"),
        ({"a.csv": [ONE], "b.tsv": [TWO]}, ".jsonl"),
        ({"a.json": [ONE], "b.json": [TWO, ONE]}, ".json"),
        ({"a.jsonl": [ONE], "b.json": [TWO]}, ".jsonl"),
        ({"a.parquet": [ONE], "b.parquet": [{**TWO, "more": 1}]}, ".parquet"),
        ({"a.parquet": [{**ONE, "n": 1}], "b.parquet": [{**TWO, "n": "x"}]}, ".jsonl"),
        ({"a.parquet": [ONE], "b.jsonl": [{**TWO, "more": 1}]}, ".jsonl"),
    ],
)
def test_rows_of_several_files_go_into_one_of_a_kind_that_holds_them(tmp_path, files, suffix):
    for name, rows in files.items():
        write(tmp_path / "data" / name, rows)
    source = load_source(tmp_path / "data")
    assert source.suffix == suffix
    source.write(tmp_path / f"out{suffix}")
    assert known(load_source(tmp_path / f"out{suffix}").rows()) == [row for rows in files.values() for row in rows]


def test_a_header_that_is_not_utf8_is_read_as_in_a_single_file(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_bytes("prompt,completion,größe\nq,a,1\n".encode("latin-1"))
    assert load_source(tmp_path / "data").rows() == load_source(tmp_path / "data" / "a.csv").rows()


def test_quoted_headers_of_tsv_are_the_same(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tsv").write_bytes(b'"prompt"\t"completion"\nq\ta\n')
    (tmp_path / "data" / "b.tsv").write_bytes(b"prompt\tcompletion\nr\tb\n")
    assert load_source(tmp_path / "data").suffix == ".tsv"


def test_csv_headers_may_be_written_in_other_ways(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_bytes(b'"prompt",completion\r\n"q",  01\r\n')
    (tmp_path / "data" / "b.csv").write_bytes(b"prompt,completion\nr,None\n")
    source = load_source(tmp_path / "data")
    source.write(tmp_path / f"kept{source.suffix}")
    assert (tmp_path / "kept.csv").read_bytes() == b'"prompt",completion\r\n"q",  01\r\nr,None\n'
    assert [row["prompt"] for row in load_source(tmp_path / "kept.csv").rows()] == ["q", "r"]


def test_csv_files_with_one_header_are_put_together_byte_for_byte(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_bytes(b'prompt,completion\r\n"q",  01\r\n')
    (tmp_path / "data" / "b.csv").write_bytes(b"prompt,completion\r\nr,None\r\n")
    load_source(tmp_path / "data").write(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == b'prompt,completion\r\n"q",  01\r\nr,None\r\n'


def test_a_damaged_row_is_named_by_its_file(tmp_path):
    write(tmp_path / "a.jsonl", [ONE])
    (tmp_path / "b.jsonl").write_text('{"prompt": "q"}\n{"prompt"\n')
    source = load_source(tmp_path)
    assert source.place(2) == f"{tmp_path / 'b.jsonl'}:2"
    assert source.select([2]).place(0) == source.place(2)
    assert "not valid JSON" in source.errors[2]


def test_values_that_json_cannot_hold_are_no_rows_beside_json(tmp_path):
    write(tmp_path / "a.jsonl", [ONE])
    write(tmp_path / "b.parquet", [{**ONE, "bytes": b"\0"}])
    with pytest.raises(DataError, match=r"b\.parquet, row 1: a value fits no line of JSON"):
        load_source(tmp_path)


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_links_that_are_not_followed_are_named(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (folder, tmp_path / "elsewhere"):
        (place / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (folder / "linked.jsonl").symlink_to(tmp_path / "elsewhere" / "a.jsonl")
    assert len(load_source(folder)) == 2
    (folder / "shard_b").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match="cannot be read: shard_b"):
        load_source(folder)


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    """Root may open all, so it is played here."""
    for name in ("a.jsonl", "closed/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "q", "completion": "a"}\n')
    assert len(load_source(tmp_path)) == 2
    monkeypatch.setattr("forgetfilter.data.folders.os.access", lambda path, mode: path.name != "closed")
    with pytest.raises(DataError, match="cannot be read: closed"):
        load_source(tmp_path)


def test_only_a_run_of_ours_is_read_as_its_kept_rows(tmp_path):
    for name in ("kept", "more"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "manifest.json").write_text('{"stages": {}}')
    assert len(load_source(tmp_path)) == 1
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert len(load_source(tmp_path)) == 3


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train-00000-of-00001-0123456789abcdef.jsonl", "validation-00000-of-00001.jsonl"),
        ("train_data.jsonl", "test_data.jsonl"),
        ("set-train-v1.1.json", "set-test-v1.1.json"),
        ("sft.train.jsonl", "sft.test.jsonl"),
        ("training.jsonl", "testing_set.jsonl"),
        ("Train.jsonl", "dev.jsonl"),
    ],
)
def test_files_named_by_splits_are_read_split_by_split_and_that_is_said(tmp_path, names, capsys):
    for name in names:
        write(tmp_path / name, [{"text": name}])
    assert load_source(tmp_path).rows() == [{"text": names[0]}]
    other = "test" if "test" in names[1] else "validation"
    called = {"testing_set.jsonl": "testing", "dev.jsonl": "dev"}.get(names[1], other)
    assert f"split train is read, {called} not" in capsys.readouterr().out
    assert load_source(tmp_path, split=other).rows() == load_source(tmp_path, split=called).rows()
    assert load_source(tmp_path, split=other).rows() == [{"text": names[1]}]
    with pytest.raises(DataError, match="has no split 'holdout', but "):
        load_source(tmp_path, split="holdout")


def test_a_folder_in_which_a_file_names_no_split_is_read_whole_and_that_is_said(tmp_path, capsys):
    for name in ("train", "test", "samples"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "a"}])
    assert len(load_source(tmp_path)) == 3
    assert "files are read, of test, train, too, since samples.jsonl names no split" in capsys.readouterr().out


def test_a_folder_of_one_split_is_read_whole_and_that_is_said(tmp_path, capsys):
    for name in ("my-test-set.jsonl", "test_2.jsonl"):
        write(tmp_path / name, [{"text": name}])
    assert len(load_source(tmp_path)) == len(load_source(tmp_path, split="test")) == 2
    assert "all of its files are of split test, and are read" in capsys.readouterr().out
    assert len(load_source(tmp_path, split="train[:1]")) == 1
    with pytest.raises(DataError, match="has no split 'dev', but test"):
        load_source(tmp_path, split="dev")


def test_a_named_split_of_shards_is_found(tmp_path):
    for name in ("train_sft-00000-of-00002", "train_sft-00001-of-00002", "test_sft-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", [{"text": name}])
    assert [row["text"][-14:] for row in load_source(tmp_path, split="train_sft").rows()] == [
        "00000-of-00002",
        "00001-of-00002",
    ]


@pytest.mark.parametrize("kind", ["file", "folder", "shards", "saved", "saved splits"])
def test_slices_take_rows_and_other_splits_are_refused(tmp_path, kind):
    from datasets import Dataset, DatasetDict

    rows = [{"text": str(number)} for number in range(20)]
    data = tmp_path / "data"
    if kind == "file":
        data = write(tmp_path / "data.jsonl", rows)
    elif kind == "folder":
        write(data / "train.jsonl", rows)
    elif kind == "shards":
        write(data / "a.jsonl", rows[:7])
        write(data / "b.csv", rows[7:])
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(data)
    else:
        DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(data)

    def texts(split):
        return [int(row["text"]) for row in load_source(data, split=split).rows()]

    assert texts("train") == list(range(20))
    assert texts("train[:5]") == list(range(5))
    assert texts("train[-2:]") == [18, 19]
    assert texts("train[25%:50%]") == list(range(5, 10))
    sliced = open_stream(data, split="train[5:10]")
    assert [row["text"] for part, _ in sliced.parts(2) for row in part.rows()] == list("56789")
    assert sliced.fingerprint() != open_stream(data).fingerprint()
    for wrong in ("dev", "dev[:5]", "train[:x]", "train+dev"):
        with pytest.raises(DataError, match="--dataset_train_split"):
            load_source(data, split=wrong)


def test_saved_splits_are_read_one_by_one(tmp_path, capsys):
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert load_source(tmp_path / "data", split="test").rows() == [{"text": "test"}]
    assert "split test is read, train not" in capsys.readouterr().out
    (state,) = (tmp_path / "data" / "train").glob("state.json")
    state.write_text(state.read_text().replace("data-00000", "../data-00000"))
    with pytest.raises(DataError, match="leads out of the folder"):
        load_source(tmp_path / "data")


def test_a_damaged_folder_of_save_to_disk_is_an_error(tmp_path):
    from datasets import Dataset

    table = pa.table({"text": ["long enough to be found"] * 8})
    Dataset(table).save_to_disk(tmp_path / "data")
    (path,) = (tmp_path / "data").glob("*.arrow")
    ends = b"".join((23 * row).to_bytes(4, "little") for row in range(9))
    data = path.read_bytes()
    assert ends in data
    path.write_bytes(data.replace(ends, ends[:-4] + (1 << 30).to_bytes(4, "little")))
    with pytest.raises(DataError, match="Is the file whole"):
        load_source(tmp_path / "data")


def test_what_is_not_read_is_named(tmp_path):
    write(tmp_path / "a.jsonl", [ONE])
    (tmp_path / "rows.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of its files, folders and links cannot be read: rows\.xlsx"):
        load_source(tmp_path)


def test_papers_beside_the_rows_and_hidden_files_are_no_rows(tmp_path):
    write(tmp_path / "a.jsonl", [ONE])
    for name in (
        "README.md",
        "LICENSE",
        ".hidden.jsonl",
        "_metadata",
        "dataset_info.json",
        ".cache/x.jsonl",
        "load.py",
        "dataset_infos.json",
        *(f"notes{kind}" for kind in (".yaml", ".yml", ".html", ".png", ".svg")),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("---\nconfigs:\n- config_name: default\n  data_files: ../secret.jsonl\n---\n")
    assert load_source(tmp_path).rows() == [ONE]


def test_a_run_inside_of_a_folder_of_data_is_none_of_it(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    run = tmp_path / "out"
    (run / "stages").mkdir(parents=True)
    for name in ("manifest.json", "kept.jsonl", "stages/model.safetensors"):
        (run / name).write_text('{"stages": {}}\n')
    assert load_source(tmp_path).rows()[:] == [{"text": "a"}]
    assert "is not read: out." in capsys.readouterr().out
    (run / "manifest.json").write_text('{"of": "something else"}\n')
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_source(tmp_path)


def test_a_folder_without_rows_says_so(tmp_path):
    with pytest.raises(DataError, match="has no file with rows"):
        load_source(tmp_path)
