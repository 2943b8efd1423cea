"""Many rows in little memory: what is made when it is asked for, and what lies on disk."""

import csv
import gc
import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetfilter import crossfit
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.crossfit import CrossFit, verdicts_of
from forgetfilter.data import columns, lazy
from forgetfilter.data import source as sources
from forgetfilter.data.lazy import AT_ONCE, Lazy, Spool, chosen, column, in_parts, joined, mapped, rearranged
from forgetfilter.data.loading import load_rows
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer, Example, on_disk
from forgetfilter.model import training
from forgetfilter.review import ranking
from forgetfilter.scored import Scored

MANY = AT_ONCE + 300


def long_rows(count, size=400):
    return [{"prompt": f"{n} or not?", "completion": f"{n} " * (size // len(f"{n} "))} for n in range(count)]


def test_a_lazy_sequence_is_like_a_list_and_keeps_nothing():
    made = []

    def make(places):
        made.append(len(places))
        return [f"item {place}" for place in places.tolist()]

    items = Lazy(2500, make)
    assert made == []
    assert (len(items), items[3], items[-1]) == (2500, "item 3", "item 2499")
    assert items[10:14:2] == ["item 10", "item 12"]
    with pytest.raises(IndexError):
        items[2500]
    made.clear()
    whole = list(items)
    assert made == [AT_ONCE, AT_ONCE, 2500 - 2 * AT_ONCE]
    assert items == whole
    assert whole == items
    assert items != whole[:-1]
    assert items != [*whole[:-1], ""]
    assert chosen(chosen(items, range(100, 200)), [5, 0]) == ["item 105", "item 100"]
    assert joined(chosen(items, [7]), ["a", "b"])[::-1] == ["b", "a", "item 7"]
    assert [len(part) for part in in_parts(column(np.arange(5)), 2)] == [2, 2, 1]


def test_spooled_rows_come_back_in_any_order_and_leave_no_file(tmp_path):
    spool, rows = (
        Spool(tmp_path / "not" / "there"),
        [b"", b"one", b"\n", b"x" * 10_000, "\udc80".encode("utf-8", "replace")],
    )
    for row in rows:
        spool.append(row)
    found = spool.rows()
    spool.append(b"later")
    assert list(found) == rows
    assert chosen(found, [4, 0, 3, 3, 1]) == [rows[place] for place in (4, 0, 3, 3, 1)]
    assert list(spool.rows()) == [*rows, b"later"]
    assert not list(tmp_path.iterdir())


def test_long_rows_are_read_one_by_one(monkeypatch):
    monkeypatch.setattr(lazy, "LARGEST_READ", 10)
    spool = Spool(None)
    for size in (6, 0, 6, 20):
        spool.append(b"x" * size)
    assert [len(row) for row in spool.rows()] == [6, 0, 6, 20]


def test_examples_on_disk_are_the_same():
    examples = [
        Example([1, 2, 300_000], [-100, 2, 300_000], 1, "half a character: \udc80", cut=True),
        Example([], [], 0, "", cut=False),
        Example([0, 0], [-100, 0], 1, "nought", cut=False, spelt_specials=True),
    ]
    assert list(on_disk(iter(examples), None)) == examples


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": write_csv,
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_memory_of_a_data_set_does_not_grow_with_what_its_rows_say(tmp_path, kind):
    rows = long_rows(MANY)
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, rows)
    load_source(path)  # what is made once for all
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
    source = load_source(path, scratch_folder=tmp_path)
    kept = source.select(np.arange(0, MANY, 2))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 60 * MANY  # where each row ends and its line; a row says 400 bytes
    assert source.rows() == rows
    kept.write(tmp_path / f"kept{kept.suffix}")
    assert load_source(tmp_path / f"kept{kept.suffix}").rows() == rows[::2]
    assert kept.place(1) == (f"{path}, row 3" if kind == "parquet" else f"{path}:{source.lines[2]}")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, f"kept{kept.suffix}"])


def test_tokens_are_not_held_in_memory(tmp_path, tokenizer, write_jsonl):
    rows, chat = write_jsonl("rows.jsonl", long_rows(MANY, 100)), ChatTokenizer(tokenizer, 256)
    config = ForgetFilterConfig(output_dir=str(tmp_path / "run"))
    first = chat.encode(load_source(rows).turns("prompt_completion")[0])
    gc.collect()
    tracemalloc.start()
    found = load_rows(str(rows), "dataset_name", chat, config)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 100 * MANY  # a row has 120 tokens
    assert found.examples[0] == first
    assert len(found.trainable()) == len(found.select(range(1, MANY)).trainable()) + 1 == MANY
    assert not (tmp_path / "run").exists()


def test_tokens_of_a_training_are_not_held_in_memory(tmp_path):
    def example(number):
        return Example([number] * 120, [-100, *[number] * 119], 1, "", cut=False)

    held = pa.total_allocated_bytes()
    examples = Lazy(MANY, lambda places: [example(place) for place in places.tolist()])
    rows = training._on_disk(examples, tmp_path / "run")
    assert pa.total_allocated_bytes() - held < 100 * MANY
    assert len(rows) == MANY > AT_ONCE
    assert rows[MANY - 1] == {"input_ids": example(MANY - 1).input_ids, "labels": example(MANY - 1).labels}
    assert not list(tmp_path.iterdir())


VALUES = {
    "numbers": [1, 2.5, None],
    "too large for a float": [2**60 + 1, 0.5, 1],
    "over": [2**63, -1, 1],
    "late": [None, None, "text"],
    "texts and numbers": ["4", 4, None],
    "yes or 1": [True, 1, None],
    "nested": [[{"role": "user"}], [], [{"role": "user", "weight": 0}]],
    "odd": [{"a": 1}, {"a": "b"}, "c"],
}


@pytest.mark.parametrize("name", VALUES)
def test_columns_have_the_same_types_however_many_rows_are_looked_at_at_a_time(monkeypatch, name):
    source = load_source([{"n": n, name: value} for n, value in enumerate(VALUES[name])])
    whole, schema = source.as_table(), source.schema()
    for room in (sources, columns):
        monkeypatch.setattr(room, "GROUP", 1)
    assert source.as_table().to_pylist() == whole.to_pylist()
    assert source.as_table().schema == whole.schema
    assert source.schema() == schema


def test_a_column_that_comes_late_is_null_before(monkeypatch):
    for room in (sources, columns):
        monkeypatch.setattr(room, "GROUP", 2)
    rows = [{"a": n} for n in range(5)] + [{"b": "x"}]
    assert load_source(rows).as_table().to_pylist() == [{"a": n, "b": None} for n in range(5)] + [{"a": None, "b": "x"}]


def test_ids_count_the_same_content_in_the_order_of_the_rows():
    ids = load_source([{"text": text} for text in "abacaba"]).ids
    assert [one.rpartition("-")[2] for one in ids] == list("1121324"[:7])
    assert len({one.rpartition("-")[0] for one in ids}) == 3


def test_arrays_on_disk_are_rearranged(tmp_path):
    values = mapped((3000, 2), np.float16, tmp_path)
    values[:] = np.arange(6000).reshape(-1, 2) % 1000
    rows = np.random.default_rng(0).integers(0, 3000, 2500)
    np.testing.assert_array_equal(rearranged(values, rows, tmp_path), values[rows])
    assert not list(tmp_path.iterdir())


def test_probes_judge_the_same_however_many_rows_are_in_memory(monkeypatch):
    draw = np.random.default_rng(0)
    states, safe = draw.normal(3, 2, (90, 6)).astype(np.float16), draw.normal(3, 2, (20, 6)).astype(np.float16)
    states[[4, 50]], states[7] = states[3], np.nan
    verdicts = verdicts_of(states[:, 0].astype(float), 0.25, 0.5)
    whole = CrossFit(states, safe)
    expected = whole(verdicts)
    monkeypatch.setattr(crossfit, "AT_ONCE", 7)
    parts = CrossFit(states, safe)
    found = parts(verdicts)
    np.testing.assert_array_equal(parts.groups, whole.groups)
    np.testing.assert_allclose(found.noisy, expected.noisy, atol=1e-4)
    np.testing.assert_allclose(found.linear, expected.linear, atol=1e-4)
    assert np.isnan(found.noisy).nonzero()[0].tolist() == [7]


def test_a_mark_takes_no_longer_for_many_rows_without_verdicts_of_their_own(monkeypatch):
    draw = np.random.default_rng(0)
    noisy = draw.normal(0, 1, (400, 2, 4))
    noisy[:40] += 2
    monkeypatch.setattr(ranking, "MOST_VERDICTS", 50)
    ranked = ranking.Ranking(Scored(draw.random(400)), np.zeros(400, bool), noisy, noisy[-20:], seed=0)
    assert (~np.isnan(ranked.teaching)).sum() == 50
    found = ranked(dict.fromkeys(range(6), True)).suspicion
    assert np.sort(np.argsort(-found)[:30]).max() < 60  # the others that look like the marked rows come first
