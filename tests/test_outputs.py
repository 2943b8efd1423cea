"""The files of a decision: what the kept rows are to whoever reads them next."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_runs import stored_run

from forgetfilter.data.sources import load_source
from forgetfilter.result import Result
from forgetfilter.runs import Run

GUESSED = ["None", "N/A", "4", "01067", "2021-03-01 10:00:00", "true", ""]
"""Texts that readers of tables take for something else."""


def asked(answers):
    return [{"prompt": f"q{number}", "completion": answer} for number, answer in enumerate(answers)]


def loaded(folder, tmp_path):
    from datasets import load_dataset

    return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).to_list()


def run_on(path, rows, folder):
    """A decided run that keeps all of its rows but the last, over a file of these."""
    run = stored_run(folder, rows, [0.0] * (len(rows) - 1) + [1.0], threshold=0.5)
    if path is not None:
        run.keep_rows(load_source(path))
        Result(run).decide()
    return Run.open(folder)


@pytest.mark.parametrize(
    ("suffix", "answers"),
    [
        *((suffix, GUESSED) for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")),
        *((suffix, [answer] * 3) for suffix in (".csv", ".jsonl") for answer in GUESSED),  # the types are written down
    ],
)
def test_load_dataset_reads_the_kept_rows_as_they_are(tmp_path, suffix, answers):
    rows = asked([*answers, "dropped"])
    path = tmp_path / f"rows{suffix}"
    mark = "\t" if suffix == ".tsv" else ","
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in (".csv", ".tsv"):
        lines = [f'{row["prompt"]}{mark}"{row["completion"]}"' for row in rows]
        path.write_text("\n".join([f"prompt{mark}completion", *lines, ""]))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_on(path, rows, tmp_path / "out")
    assert loaded(run.folder, tmp_path) == Result(run).kept.to_list() == rows[:-1]


def test_messages_are_read_as_they_are(tmp_path):
    when, call = "2021-03-01 10:00:00", [{"function": {"name": "f", "arguments": {"at": "01"}}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": when, "tool_calls": None},
                {"role": "assistant", "content": when, "tool_calls": calls},
            ],
            "history": [["1", "2"]],
        }
        for calls in (call, None, None)
    ]
    run = run_on(None, rows, tmp_path / "out")
    assert loaded(run.folder, tmp_path) == rows[:-1]


def test_objects_of_different_keys_are_read_as_they_are(tmp_path):
    def talk(*answer, **more):
        return {"messages": [{"role": "user", "content": "hi"}, *answer], **more}

    said = {"role": "assistant", "content": "ho"}
    called = [
        {**said, "tool_calls": [{"function": {"name": "f", "arguments": given}}]} for given in ({"a": 1}, {"b": "2"})
    ]
    rows = [talk(said, about={"a": 1}), *(talk(one, about={"b": [{"c": 1}, {"d": 2}]}) for one in called), talk(said)]
    run = run_on(None, rows, tmp_path / "out")
    kept = loaded(run.folder, tmp_path)
    assert [row["messages"] for row in kept] == [row["messages"] for row in rows[:-1]]
    assert [row["about"] for row in kept] == [row["about"] for row in rows[:-1]]


def test_kept_rows_have_the_columns_of_all_rows_and_ids_of_any_kind(tmp_path):
    rows = asked(["a", "b", "c"])
    rows[0]["id"], rows[1]["id"], rows[1]["source"] = 2**70, "b", "web"
    result = Result(run_on(None, rows, tmp_path / "out"))
    assert result.kept.to_list() == [
        {"prompt": "q0", "completion": "a", "id": str(2**70), "source": None},
        {"prompt": "q1", "completion": "b", "id": "b", "source": "web"},
    ]
    assert result.dropped.to_list() == [{"prompt": "q2", "completion": "c", "id": None, "source": None}]


def test_a_csv_of_which_no_row_is_kept_still_has_its_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nq,a\n")
    run = stored_run(tmp_path / "out", asked(["a"]), [1.0], threshold=0.5)
    run.keep_rows(load_source(path))
    Result(run).decide()
    assert (run.folder / "kept.csv").read_text() == "prompt,completion\n"
    assert Result(Run.open(run.folder)).kept.column_names == ["prompt", "completion"]


def test_columns_that_are_not_read_are_counted_in_metrics_and_summary(tmp_path, capsys):
    from forgetfilter.summary import print_summary

    run = run_on(None, asked(["a", "b"]), tmp_path / "out")
    assert Result(run).metrics["unread"] == {}
    run.manifest["notes"] = {"unread": {"images": 3}}
    run.save()
    print_summary(Result(run).decide(), tmp_path / "report.html")
    assert "with 'images', which is not read: 3" in capsys.readouterr().out


def test_ranking_figures_leave_out_what_a_person_decided(tmp_path, write_jsonl):
    rows = [{"prompt": "q", "completion": f"a{i}", "unsafe": int(i in (0, 3))} for i in range(4)]
    run = stored_run(tmp_path / "out", rows, [0.1, 0.2, 0.3, 0.4], label_column="unsafe", threshold=0.5)
    hand = write_jsonl("hand.jsonl", [{"row": 0, "decision": "dropped"}])
    metrics = Result(run).decide(decisions=hand).metrics
    assert (metrics["auroc"], metrics["average_precision"]) == (1.0, 1.0)
