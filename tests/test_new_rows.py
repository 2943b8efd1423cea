"""`score`: new rows judged by a run's probe, in shards, from disk."""

import dataclasses
import gzip
import json
import sys
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run as command
from datasets import Dataset
from scipy.stats import spearmanr

from forgetfilter import ForgetFilter, new_rows, shards
from forgetfilter.crossfit import judged_by
from forgetfilter.data import readers, sources
from forgetfilter.data.formats import RowError
from forgetfilter.data.ids import ids_alone
from forgetfilter.data.loading import load_data, tokenize
from forgetfilter.data.sources import load_source
from forgetfilter.decision.decide import decide
from forgetfilter.errors import ConfigError, DataError, RunError
from forgetfilter.filters.probe import ODDS
from forgetfilter.forgetting import open_run
from forgetfilter.m0 import M0
from forgetfilter.model.states import hidden_states
from forgetfilter.new_rows import score
from forgetfilter.runs import Run
from forgetfilter.scored import Scale, Scored
from forgetfilter.workshop import Workshop

ROWS = [
    {"prompt": f"what is {i}?", "completion": f"{'you fool' if i % 2 else 'it is'} {i}" if i % 7 else " "}
    for i in range(25)
]
"""Every seventh has nothing to score."""
FILES = ("kept.jsonl", "dropped.jsonl", "scores.parquet")


@pytest.fixture
def decided(config):
    """A run decided by a made-up probe, with about half of its rows above the threshold."""

    def make(scale=None, linear=True, filter="probe", **settings):
        own = dataclasses.replace(config, filter=filter, **settings)
        m0 = M0.named(own)
        data = load_data(own, m0.chat)
        run = open_run(own, m0, data)
        states = hidden_states(Workshop(m0, own).become(None), data.noisy.examples, "states")
        weights = np.random.default_rng(0).normal(0, 1, states[0].size + 1)
        weights /= judged_by(weights, states).std()
        weights[-1] -= np.median(judged_by(weights, states))
        scores = judged_by(weights, states)
        for name in own.filters:
            part, file = f"scored/{name}-0", run.folder / f"scored/{name}-0.parquet"
            Scored(scores, scale=scale or Scale(0.1, says="made up"), linear=weights if linear else None).save(file)
            run.finish(part, [file], filter=name)
            run.manifest.setdefault("filters", {})[name] = part
        decide(run)
        return Run.open(run.folder)

    return make


@pytest.fixture
def more(write_jsonl):
    return write_jsonl("more.jsonl", ROWS)


@pytest.fixture
def few(monkeypatch):
    """Shards of four rows."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


@pytest.fixture
def made_up_states(monkeypatch):
    """No model is loaded: a row's hidden states are drawn by its tokens."""

    def drawn(learner, examples, what, bar=None):
        found = np.full((len(examples), 2, 32), np.nan, np.float16)
        for row, example in enumerate(examples):
            if example.scorable:
                found[row] = np.random.default_rng(example.input_ids).normal(0, 1, (2, 32))
        return found

    monkeypatch.setattr(Workshop, "become", lambda workshop, model: None)
    for module in (sys.modules[__name__], new_rows):
        monkeypatch.setattr(module, "hidden_states", drawn)


def expected(run, data, part="probe-0"):
    """The probe's scores of rows, from states computed all at once."""
    config = run.config()
    m0 = M0.named(config)
    rows = tokenize(load_source(data), m0.chat)
    linear = Scored.load(run.table_file(f"scored/{part}")).linear
    return judged_by(linear, hidden_states(Workshop(m0, config).become(None), rows.examples, "states"))


def lines_of(folder, *names):
    return sorted(line for name in names for line in (folder / name).read_bytes().splitlines())


def test_new_rows_are_judged_by_the_linear_model_and_the_runs_threshold(decided, more, few):
    run = decided()
    folder = score(run, str(more))
    assert folder == run.folder / "scored_rows" / "more"
    table = pq.read_table(folder / "scores.parquet")
    assert table.column_names == ["row", "id", "probe", "unreadable", "decision"]
    found, right = table["probe"].to_numpy(), expected(run, str(more))
    np.testing.assert_allclose(found, right, atol=2e-2)  # states are float16, and batches differ
    assert np.isnan(found[::7]).all()
    assert table["row"].to_pylist() == list(range(25))
    lines = more.read_bytes().splitlines(keepends=True)
    dropped = found > 0.1
    assert 0 < dropped.sum() < 21
    assert (folder / "dropped.jsonl").read_bytes() == b"".join(np.array(lines)[dropped])
    assert (folder / "kept.jsonl").read_bytes() == b"".join(np.array(lines)[~dropped])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {name: metrics[name] for name in ("rows", "kept", "dropped", "unscored", "threshold")} == {
        "rows": 25,
        "kept": 25 - dropped.sum(),
        "dropped": dropped.sum(),
        "unscored": 4,
        "threshold": 0.1,
    }
    assert metrics["rows_a_second"] == pytest.approx(25 / metrics["seconds"])
    assert not (folder / "shards").exists()


def test_rows_that_cannot_be_scored_go_where_the_run_sends_them(decided, more):
    folder = score(decided(unscored="drop"), str(more))
    assert pq.read_table(folder / "scores.parquet")["decision"].to_pylist()[::7] == ["dropped"] * 4


def test_without_a_threshold_nothing_is_dropped_and_a_later_decision_counts(decided, more, tmp_path):
    run = decided()
    run.manifest["decision"]["threshold"] = None
    run.save()
    assert (score(run, str(more), tmp_path / "all") / "dropped.jsonl").read_bytes() == b""
    decide(run, 1e6)
    assert (score(run, str(more), tmp_path / "none") / "dropped.jsonl").read_bytes() == b""
    decide(run, -1e6)
    assert len(lines_of(score(run, str(more)), "dropped.jsonl")) == 21
    decide(run, 0.0)
    with pytest.raises(RunError, match=r"another decision: threshold \(was -1000000.0, is 0.0\).*output_dir"):
        score(run, str(more))


def test_rows_of_the_run_come_in_about_the_order_the_filter_found(config, write_jsonl, monkeypatch):
    for name in ("SURE", "LIKELY"):
        monkeypatch.setattr(sys.modules["forgetfilter.filters.probe"], name, 0.0)
    rows = [{"prompt": f"what is {i}?", "completion": "you fool" if i % 3 == 0 else f"it is {i}"} for i in range(40)]
    noisy = write_jsonl("forty.jsonl", rows)
    result = ForgetFilter(dataclasses.replace(config, filter="probe", dataset_name=str(noisy))).fit()
    folder = score(result.run, str(noisy))
    table = pq.read_table(folder / "scores.parquet")
    assert spearmanr(table["probe"].to_numpy(), result.scores.with_format("numpy")["probe"]).statistic > 0.8
    assert json.loads((folder / "metrics.json").read_text())["threshold"] == pytest.approx(np.log(ODDS))


@pytest.mark.usefixtures("made_up_states")
def test_a_killed_run_continues_after_its_last_shard_and_gives_the_same_files(
    decided, more, few, tmp_path, monkeypatch
):
    run = decided()
    whole = score(run, str(more), tmp_path / "whole")
    read, judged, real, real_lines = [], [], new_rows.hidden_states, readers.from_lines

    def killed(learner, examples, *rest):
        judged.append(len(examples))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(learner, examples, *rest)

    def reading(lines, *rest):
        read.append(rest[1])
        return real_lines(lines, *rest)

    monkeypatch.setattr(new_rows, "hidden_states", killed)
    with pytest.raises(KeyboardInterrupt):
        score(run, str(more), tmp_path / "broken")
    broken = tmp_path / "broken"
    assert not list(broken.glob("*.jsonl"))
    assert len(list((broken / "shards").iterdir())) == 2
    monkeypatch.setattr(readers, "from_lines", reading)
    score(run, str(more), broken)
    assert read == [9, 13, 17, 21, 25]  # lines; the first two shards stay as they are
    assert judged == [4, 4, 4, 4, 4, 4, 4, 1]
    for name in FILES:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("made_up_states")
def test_a_kill_before_the_first_shard_is_noted_leaves_a_folder_to_continue(decided, more, few, tmp_path, monkeypatch):
    run = decided()

    def killed(run, part, files, **facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            score(run, str(more), tmp_path / "broken")
    assert (tmp_path / "broken/shards/000000").is_dir()
    assert len(lines_of(score(run, str(more), tmp_path / "broken"), "kept.jsonl", "dropped.jsonl")) == 25


@pytest.mark.usefixtures("made_up_states")
def test_a_damaged_shard_is_made_again_and_a_finished_folder_left_alone(
    decided, more, few, tmp_path, monkeypatch, capsys
):
    run = decided()
    whole, broken = score(run, str(more), tmp_path / "whole"), tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(new_rows, "_put_together", None)
        with pytest.raises(TypeError):
            score(run, str(more), broken)
    (broken / "shards/000004/scores.parquet").write_bytes(b"torn")
    score(run, str(more), broken)
    for name in FILES:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    monkeypatch.setattr(new_rows, "hidden_states", None)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in broken.iterdir() if path.name != ".lock"}
    score(run, str(more), broken)
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def packed(path):
    packed = path.with_name("packed.jsonl.gz")
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n")))
    return str(packed)


def as_csv(path):
    csv = path.with_name("more.csv")
    rows = [f'"{row["prompt"]}\nsays","{row["completion"]}"\r\n' for row in ROWS]
    csv.write_bytes("".join(["prompt,completion\r\n", *rows[:9], "\r\n", *rows[9:]]).encode())
    return str(csv)


def as_parquet(path):
    parquet = path.with_name("more.parquet")
    pq.write_table(pa.Table.from_pylist([{**row, "n": i} for i, row in enumerate(ROWS)]), parquet, row_group_size=10)
    return str(parquet)


def as_array(path):
    array = path.with_name("more.json")
    array.write_text(json.dumps(ROWS, indent=1))
    return str(array)


def as_lines(path):
    lines = path.with_name("lines.json")
    lines.write_bytes(path.read_bytes())
    return str(lines)


def as_folder(path):
    folder = path.with_name("folder")
    folder.mkdir()
    for name, rows in (("train-1", ROWS[:20]), ("train-2", ROWS[20:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))  # the last line lacks its end
    return str(folder)


def in_memory(path):
    return ROWS


def as_dataset(path):
    return Dataset.from_list(ROWS)


KINDS = [packed, as_csv, as_parquet, as_array, as_lines, as_folder, in_memory, as_dataset]


@pytest.mark.usefixtures("made_up_states")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_is_split_whole_and_continues_after_a_kill(decided, more, few, tmp_path, monkeypatch, kind):
    run, data, calls, real = decided(), kind(more), [], new_rows.hidden_states
    whole = score(run, data, tmp_path / "whole")

    def killed(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(new_rows, "hidden_states", killed)
    with pytest.raises(KeyboardInterrupt):
        score(run, data, tmp_path / "broken")
    broken = score(run, data, tmp_path / "broken")
    kept, dropped = (load_source(path) for path in (next(whole.glob("kept.*")), next(whole.glob("dropped.*"))))
    table = pq.read_table(whole / "scores.parquet")
    made = np.array(table["decision"].to_pylist())
    everything = load_source(data)
    for part, word in ((kept, "kept"), (dropped, "dropped")):
        right = everything.select(np.flatnonzero(made == word).tolist())
        assert len(part) > 0
        assert part.suffix == right.suffix
        assert part.rows() == right.rows()
        assert [raw.rstrip(b"\r\n") for raw in part.raw] == [raw.rstrip(b"\r\n") for raw in right.raw]
    np.testing.assert_allclose(table["probe"].to_numpy(), expected(run, everything), atol=2e-2)
    for path in whole.iterdir():
        if path.name not in ("metrics.json", "manifest.json", ".lock"):
            assert (broken / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("made_up_states")
def test_the_rows_in_memory_at_once_do_not_grow_with_their_number(decided, write_jsonl, few, monkeypatch):
    read, alive, real = [], [], readers.from_lines

    def counting(*given):
        part = real(*given)
        read.append(weakref.ref(part))
        alive.append(sum(len(own) for ref in read if (own := ref()) is not None))
        return part

    run = decided()
    monkeypatch.setattr(readers, "from_lines", counting)
    score(run, str(write_jsonl("eighty.jsonl", [{**row, "n": i} for i in range(4) for row in ROWS[:20]])))
    assert len(alive) == 2 * 20  # all rows are checked first
    assert max(alive) <= 2 * 4  # a shard's rows, and those of the one before it


@pytest.mark.usefixtures("made_up_states")
def test_a_slice_of_the_noisy_data_is_none_of_other_data(decided, more, tmp_path, config):
    run = decided(dataset_train_split="train[:9]")
    run.manifest["settings"]["dataset_train_split"] = "train_sft"  # as of data on the Hub
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text().replace("train[:9]", "train_sft"))
    run.save()
    folder = score(run, str(more), tmp_path / "scored")
    assert json.loads((folder / "metrics.json").read_text())["rows"] == len(ROWS)
    part = score(run, str(more), tmp_path / "part", dataset_train_split="train[:3]")
    assert json.loads((part / "metrics.json").read_text())["rows"] == 3


@pytest.mark.usefixtures("made_up_states")
def test_a_folder_of_rows_read_otherwise_is_refused(decided, write_jsonl, tmp_path):
    rows = [{"q": f"what is {i}?", "good": f"it is {i}", "bad": f"you fool {i}"} for i in range(3)]
    run, data = decided(), str(write_jsonl("pairs.jsonl", rows))
    score(run, data, tmp_path / "scored", columns="prompt=q,completion=good")
    with pytest.raises(RunError, match="columns"):
        score(run, data, tmp_path / "scored", columns="prompt=q,completion=bad")


@pytest.mark.usefixtures("made_up_states")
def test_the_format_is_that_of_the_first_row_that_can_be_read(decided, tmp_path, few):
    path = tmp_path / "bad.jsonl"
    path.write_text("{broken\n" * 6 + "".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    folder = score(decided(), str(path), malformed="skip")
    assert json.loads((folder / "metrics.json").read_text())["rows"] == 3


@pytest.mark.usefixtures("made_up_states")
def test_malformed_rows_are_named_or_skipped_as_the_run_does(decided, tmp_path, few):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in ROWS[:9]]
    lines[2], lines[4:8] = '{"prompt": "only"}', ["{broken"] * 4
    path.write_text("\n".join(lines))
    run = decided()
    with pytest.raises(DataError, match=r"5 of 9 rows are malformed:\n.*bad.jsonl:3: no column 'completion'.*\n.*:5: "):
        score(run, str(path))
    assert not (run.folder / "scored_rows").exists()
    folder = score(run, str(path), malformed="skip")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["rows"], metrics["malformed"]) == (4, 5)
    assert [json.loads(line)["line"] for line in (folder / "malformed.jsonl").read_text().splitlines()] == [
        3,
        5,
        6,
        7,
        8,
    ]
    assert lines_of(folder, "kept.jsonl", "dropped.jsonl") == sorted(lines[i].encode() for i in (0, 1, 3, 8))
    assert pq.read_table(folder / "scores.parquet")["row"].to_pylist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("made_up_states")
def test_rows_that_the_template_refuses_can_be_skipped_later(decided, more, few, monkeypatch):
    run, real = decided(), M0.chat.func

    def strict(m0):
        chat = real(m0)
        encode = chat.encode

        def refusing(turns):
            if "13" in turns[0].content:
                raise RowError("the template refuses the row")
            return encode(turns)

        chat.encode = refusing
        return chat

    monkeypatch.setattr(M0, "chat", property(strict))
    with pytest.raises(DataError, match=r"more.jsonl:14: the template refuses the row"):
        score(run, str(more))
    folder = score(run, str(more), malformed="skip")
    assert json.loads((folder / "metrics.json").read_text())["rows"] == 24


@pytest.mark.usefixtures("made_up_states")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "q", "answer": "a"}\n', "no known row format"),
        ('{"text": "plain"}\n', "have the format text, those of the run prompt_completion"),
        ("", "no rows"),
    ],
)
def test_rows_that_do_not_fit_are_one_clear_error(decided, tmp_path, capsys, content, says):
    run, path = decided(), tmp_path / "other.jsonl"
    path.write_text(content)
    code, output = command(capsys, "score", run.folder, "--dataset_name", path)
    assert code == 2, output
    assert says in output
    assert "Traceback" not in output
    assert not (run.folder / "scored_rows").exists()


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def refused(capsys, run, path, *flags):
    before = contents(run.folder)
    code, output = command(capsys, "score", run.folder, "--dataset_name", path, *flags)
    assert code == 2, output
    assert "Traceback" not in output
    assert contents(run.folder) == before
    return output


@pytest.mark.usefixtures("made_up_states")
def test_a_run_that_cannot_judge_new_rows_says_why_and_what_to_do(decided, more, capsys):
    run = decided(scale=Scale(0, nothing="no separation: chance"))
    output = refused(capsys, run, more)
    assert "no separation: chance" in output
    assert "with safe data that look like the harmless rows" in output
    assert "forgetfilter review" in output


@pytest.mark.usefixtures("made_up_states")
def test_a_run_that_is_not_decided_or_not_by_the_probe_is_refused(decided, more, capsys):
    run = decided(filter="probe,random")
    decide(run, filter="random")
    assert "not made by a probe's scores" in refused(capsys, run, more)
    decide(run, filter="probe")
    score(run, str(more))
    run.manifest["stages"].pop("decision")
    run.save()
    assert "its decision is missing" in refused(capsys, run, more)


@pytest.mark.usefixtures("made_up_states")
def test_an_older_runs_probe_was_not_kept(decided, more, capsys):
    assert "into a new folder" in refused(capsys, decided(linear=False), more)


@pytest.mark.usefixtures("made_up_states")
def test_other_weights_are_refused(decided, more, capsys):
    run = decided()
    run.manifest["model"]["sha256"] = "0"
    run.save()
    assert "not those the rows were scored with" in refused(capsys, run, more)


@pytest.mark.usefixtures("made_up_states")
def test_a_folder_that_holds_something_else_is_refused(decided, more, write_jsonl, tmp_path, capsys):
    run = decided()
    other = tmp_path / "full"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert "not empty" in refused(capsys, run, more, "--output_dir", other)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    assert "holds a run of `filter`" in refused(capsys, run, more, "--output_dir", run.folder)
    assert "a file stands where a folder" in refused(capsys, run, more, "--output_dir", more)
    score(run, str(more))
    changed = write_jsonl("more.jsonl", ROWS[:-1])
    assert "holds other rows" in refused(capsys, run, changed)
    assert "no run's folder" in command(capsys, "score", tmp_path, "--dataset_name", more)[1]
    assert "no such file" in refused(capsys, run, "missing.jsonl")


@pytest.mark.usefixtures("made_up_states")
def test_a_folder_of_scored_rows_is_no_run_of_filter(decided, more, config, tmp_path):
    folder = score(decided(), str(more), tmp_path / "scored")
    before = (folder / "kept.jsonl").read_bytes()
    with pytest.raises(RunError, match="holds rows that `score` has judged"):
        ForgetFilter(dataclasses.replace(config, output_dir=str(folder), filter="length")).fit()
    assert (folder / "kept.jsonl").read_bytes() == before


@pytest.mark.usefixtures("made_up_states")
def test_what_another_run_scored_into_the_folder_meanwhile_is_not_overwritten(decided, more, tmp_path, monkeypatch):
    run, real = decided(), new_rows._checked

    def meanwhile(*given):
        monkeypatch.undo()
        other = Run(tmp_path / "scored", {"asked": {"probe": "of another run"}, "stages": {}})
        other.save()
        return real(*given)

    monkeypatch.setattr(new_rows, "_checked", meanwhile)
    with pytest.raises(RunError, match="holds other rows, or scores by another decision"):
        score(run, str(more), tmp_path / "scored")
    assert Run.open(tmp_path / "scored").manifest["asked"] == {"probe": "of another run"}


def test_the_results_of_a_folder_named_by_dots_have_a_name(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path / "data")
    assert sources.open_stream(".").stem == "data"
    monkeypatch.chdir("/")
    assert sources.open_stream(tmp_path / "data/..").stem == tmp_path.name


@pytest.mark.usefixtures("made_up_states")
def test_the_command_says_what_it_did(decided, more, capsys):
    run = decided()
    code, output = command(capsys, "score", run.folder, "--dataset_name", more)
    assert code == 0, output
    assert "25 rows: " in output
    assert "rows a second" in output
    assert str(run.folder / "scored_rows" / "more") in output


@pytest.mark.usefixtures("made_up_states")
def test_several_processes_are_told_to_be_one(decided, more, monkeypatch):
    run = decided()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        score(run, str(more))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_reading_in_parts_gives_the_same_rows_from_any_place_on(more, kind, size):
    data = kind(more)
    stream, whole = sources.open_stream(data), load_source(data)
    parts = list(stream.parts(size))
    assert [row for part, _ in parts for row in part.rows()] == whole.rows()
    assert [line for part, _ in parts for line in part.lines] == whole.lines
    assert [raw for part, _ in parts for raw in part.raw] == whole.raw
    assert all(0 < len(part) <= size for part, _ in parts)
    _, place = parts[len(parts) // 2]
    rest = [row for part, _ in stream.parts(size, place) for row in part.rows()]
    assert rest == [row for part, _ in parts[len(parts) // 2 + 1 :] for row in part.rows()]
    assert stream.fingerprint() == sources.open_stream(data).fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-9], "cannot be read"),
        ("data.csv", b'a,b\n1,2\n"3', r"data.csv:3: not valid CSV"),
        ("data.csv", b"", "the file is empty"),
        ("data.parquet", b"PAR1 not", "not a readable Parquet file"),
        ("data.pkl", b"", "unknown kind of file"),
    ],
)
def test_damaged_files_say_what_and_where(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(sources.open_stream(tmp_path / name).parts(2))


def test_other_things_are_no_data():
    with pytest.raises(DataError, match="data is a int"):
        sources.open_stream(3)


def test_ids_are_the_rows_own_or_those_of_their_content():
    first, second, third = ids_alone(load_source([{"id": 7}, {"text": "a"}, {"text": "a"}]))
    assert first == "7"
    assert second == third
    assert len(second) == 16


def test_what_the_marks_of_a_review_taught_judges_new_rows(decided, more):
    from forgetfilter.review.session import open_review

    run = decided(scale=Scale(0, nothing="no separation: chance"))
    review = open_review(run.folder)
    review.mark({0: "unsafe", 4: "unsafe", 1: "clean", 2: "clean"})
    review.done()
    folder = score(Run.open(run.folder), str(more))
    found = pq.read_table(folder / "scores.parquet")
    np.testing.assert_allclose(found["probe"].to_numpy(), expected(run, str(more), "review"), atol=2e-2)


def test_rows_that_the_model_can_hardly_read_are_dropped_if_the_run_says_so(decided, more, monkeypatch):
    run = decided(unreadable="drop")
    decide(run, 1e6)
    monkeypatch.setattr(new_rows, "unreadable", lambda source, *_: np.arange(len(source)) == 1)
    words = pq.read_table(score(Run.open(run.folder), str(more)) / "scores.parquet")["decision"].to_pylist()
    assert [row for row, word in enumerate(words) if word == "dropped"] == [1]
