"""Ten thousand damaged files through loading and deciding: the right result or one clear error, never a traceback."""

import bz2
import csv
import gzip
import io
import json
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_runs import stored_run

from faults.conftest import FIGURES
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import load_rows
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.errors import ForgetFilterError
from forgetfilter.result import Result

pytestmark = pytest.mark.faults
ROWS = [
    {"prompt": "what?", "completion": "that"},
    {"prompt": "emoji \U0001f600", "completion": "\U0001f9e8\U0001f9e8"},
    {"prompt": "ما هذا؟", "completion": "这是什么"},
    {"prompt": "a <|im_end|> b", "completion": "<|im_start|>system"},
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLED = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": "q", "name": "someone"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "reasoning_content": "because", "train": True},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "label": False,
}
ALPACA = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]}
CHATS = [
    [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}]
    for row in ROWS
]


def in_cells(rows, name):
    """A CSV file whose cells hold what `name` says of the rows, as JSON."""
    table = io.StringIO()
    csv.writer(table).writerows(
        [["id", name], *([f"0{number}", json.dumps(row[name])] for number, row in enumerate(rows))]
    )
    return table.getvalue().encode()


def seeds():
    """Good files of every kind, by the name they would have."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet)
    chats = "".join(json.dumps(chat[0]) + "\n" for chat in CHATS).encode()
    frame, archive = pa.BufferOutputStream(), io.BytesIO()
    with pa.CompressedOutputStream(frame, "zstd") as file:
        file.write(table.getvalue().encode())
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("inner.jsonl", lines)
    sharegpt = json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3)
    return {
        "a.jsonl": lines,
        "b.json": json.dumps(ROWS).encode(),
        "c.csv": table.getvalue().encode(),
        "d.parquet": parquet.getvalue(),
        "e.jsonl.gz": gzip.compress(lines),
        "f.jsonl": chats,
        "g.json": sharegpt.encode(),
        "h.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "i.tsv": table.getvalue().replace(",", "\t").encode(),
        "j.jsonl.bz2": bz2.compress(lines),
        "k.csv.zst": frame.getvalue().to_pybytes(),
        "l.zip": archive.getvalue(),
        "m.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
        "n.jsonl": (json.dumps(CALLED) + "\n").encode() * 3,
        "o.json": json.dumps([ALPACA] * 3).encode(),
        "p.csv": in_cells([chat[0] for chat in CHATS], "messages"),
        "q.csv": in_cells([{"conversations": CALLED["messages"]}] * 3, "conversations"),
        "r.jsonl": lines.decode().encode("utf-16"),
        "s.csv": table.getvalue().encode("utf-16-le"),
        "t.parquet.gz": gzip.compress(parquet.getvalue()),
    }


def damaged(data, rng):
    """Some bytes flipped, cut out, doubled, or replaced by what breaks parsers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at:at] = rng.choice([b"\0", b"\xff", b"\r", b"\n", b'"', b"{", b"]", b"\\u", b"NaN", b"\xed\xa0\x80"])
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            data[at:at] = rng.choice([b"[", b'{"a":']) * rng.choice([3, 3000])
        else:
            data[at : at + 1] = rng.choice([b"null", b"1e999", b"[]", b'""', b"true"])
    return bytes(data)


def attempt(work):
    """Run it; whether it raised what nobody meant to."""
    try:
        work()
    except ForgetFilterError:
        return False
    except Exception as error:
        print(f"traceback: {type(error).__name__}: {error}")
        return True
    return False


def note(files, tracebacks):
    FIGURES["files fuzzed"] = FIGURES.get("files fuzzed", 0) + files
    FIGURES["tracebacks"] = FIGURES.get("tracebacks", 0) + tracebacks


@pytest.mark.parametrize("name", list(seeds()))
@pytest.mark.parametrize("malformed", ["error", "skip"])
def test_damaged_data_files(name, malformed, tokenizer, tmp_path):
    chat, config = ChatTokenizer(tokenizer, 256), ForgetFilterConfig(malformed=malformed)
    rng, path, good = random.Random(name + malformed), tmp_path / name, seeds()[name]
    bad, count, loaded = 0, 520, []
    for _ in range(count):
        path.write_bytes(damaged(good, rng))

        def load():
            rows = load_rows(str(path), "dataset_name", chat, config)
            assert len(rows.examples) == len(rows.source)
            lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if name == "a.jsonl" else None
            assert lines in (None, len(rows.examples) + len(rows.malformed))
            loaded.append(len(rows.examples))

        bad += attempt(load)
    note(count, bad)
    assert bad == 0
    assert loaded or name not in ("a.jsonl", "b.json", "c.csv"), "some damage leaves a file that can be read"


KEYS = st.sampled_from(
    [
        *("prompt", "completion", "messages", "conversations", "instruction", "output", "text", "role", "content"),
        *("system", "history", "tools", "functions", "tool_calls", "function_call", "function", "arguments", "weight"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(KEYS | st.text(max_size=4), JSON, max_size=4), max_size=4)


@pytest.mark.parametrize("malformed", ["error", "skip"])
def test_folders_of_damaged_files(malformed, tokenizer, tmp_path):
    chat, config = ChatTokenizer(tokenizer, 256), ForgetFilterConfig(malformed=malformed)
    rng, good, bad, count = random.Random(malformed), seeds(), 0, 300
    for number in range(count):
        folder = tmp_path / str(number)
        (folder / "inner").mkdir(parents=True)
        for place in (folder, folder, folder / "inner"):
            name = rng.choice(list(good))
            (place / name).write_bytes(damaged(good[name], rng) if rng.random() < 0.5 else good[name])

        def load(folder=folder):
            rows = load_rows(str(folder), "dataset_name", chat, config)
            assert len(rows.examples) == len(rows.source) == len(rows.source.files)

        bad += attempt(load)
    note(count, bad)
    assert bad == 0


@pytest.mark.parametrize("splits", [False, True], ids=["one", "splits"])
def test_damaged_folders_of_save_to_disk(splits, tokenizer, tmp_path):
    from datasets import Dataset, DatasetDict

    chat, config = ChatTokenizer(tokenizer, 256), ForgetFilterConfig()
    rng, bad, count, folder = random.Random(str(splits)), 0, 250, tmp_path / "saved"
    whole = Dataset.from_list(ROWS)
    (DatasetDict({"train": whole, "test": whole}) if splits else whole).save_to_disk(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(count):
        path = rng.choice(files)
        good = path.read_bytes()
        path.write_bytes(damaged(good, rng))
        bad += attempt(lambda: load_rows(str(folder), "dataset_name", chat, config))
        path.write_bytes(good)
    note(count, bad)
    assert bad == 0
    assert load_rows(str(folder), "dataset_name", chat, config).source.rows() == ROWS


def test_rows_of_any_shape(tokenizer, tmp_path):
    chat, path = ChatTokenizer(tokenizer, 256), tmp_path / "rows.jsonl"
    tally = [0, 0]

    @settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(RECORDS, st.sampled_from(["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text"]))
    def fuzz(records, row_format):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        tally[0] += 1
        config = ForgetFilterConfig(format=row_format)
        tally[1] += attempt(lambda: load_rows(str(path), "dataset_name", chat, config))

    fuzz()
    note(*tally)
    assert tally[1] == 0


@pytest.mark.parametrize("option", ["decisions", "trusted_rows"])
def test_damaged_decisions_and_marks(option, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(60)]
    run = stored_run(tmp_path / "out", rows, [i / 60 for i in range(60)])
    before = (run.folder / "kept.jsonl").read_bytes()
    said = {"decisions": {"decision": "kept"}, "trusted_rows": {"clean": True}}[option]
    good = "".join(json.dumps({"row": i, **said}) + "\n" for i in range(55)).encode()
    rng, path, bad = random.Random(option), tmp_path / "said.jsonl", 0
    for _ in range(400):
        path.write_bytes(damaged(good, rng))
        bad += attempt(lambda: Result(run).decide(**{option: path}))
        kept, dropped = ((run.folder / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "dropped"))
        assert len(kept) + len(dropped) == 60
    note(400, bad)
    assert bad == 0
    (run.folder / "marks.jsonl").unlink()  # without what was said all is as before
    Result(run).decide()
    assert (run.folder / "kept.jsonl").read_bytes() == before


def test_a_line_of_fifty_megabytes_and_one_nested_deep(tokenizer, tmp_path):
    chat, path = ChatTokenizer(tokenizer, 256), tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "long", "completion": "x" * 50_000_000}) + "\n")
    (example,) = load_rows(str(path), "data", chat, ForgetFilterConfig()).examples
    assert example.cut
    path.write_text('{"prompt": ' + "[" * 100_000 + "\n" + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ForgetFilterError, match=r"long.jsonl:1: nested too deep"):
        load_rows(str(path), "data", chat, ForgetFilterConfig())
