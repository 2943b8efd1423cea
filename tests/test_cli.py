"""The command line: instant help, one clear error, exit code 2, no traceback."""

import errno
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import run
from stored_runs import stored_run

from forgetfilter.cli import HANDLERS, _stoppable, main
from forgetfilter.command_parser import files_first
from forgetfilter.flags import build_parser

DATA = ["filter", "--dataset_name", "x.jsonl", "--safe_dataset_name", "y.jsonl", "--output_dir", "nowhere"]


def test_help_is_instant():
    """It loads nothing that takes seconds."""
    code = (
        "import sys\nfrom forgetfilter import cli\ntry:\n    cli.main(['--help'])\nfinally:\n"
        "    print([name for name in ('torch', 'transformers', 'datasets', 'sklearn') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("filter --dataset_nme x", "--dataset_nme x. Did you mean --dataset_name? `forgetfilter filter --help`"),
        ("filter --planted_row x", "Did you mean --planted_rows?"),
        ("decid OUT", "Did you mean decide?"),
        ("filter --threshold high", "--threshold high: expected auto or float"),
        ("filter --format pdf", "--format pdf: expected auto, prompt_completion, messages"),
        ("filter --noisy.max_steps many", "--noisy.max_steps many: expected int"),
        ("score OUT", "missing: --dataset_name. `forgetfilter score --help`"),
        ("evaluate", "missing: MODEL, --on. `forgetfilter evaluate --help`"),
        ("decide", "missing: RUN. `forgetfilter decide --help`"),
        ("filter --zzzzzz 1", "unrecognized arguments: --zzzzzz 1. `forgetfilter filter --help`"),
        ("filter --config typo.yaml", "does not accept option 'seeed'. Did you mean seed?"),
    ],
)
def test_what_is_mistyped_is_one_line_with_the_nearest_name(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("seeed: 1")
    code, said = run(capsys, *arguments.split())
    assert code == 2
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["filter", "--bogus", "1"], "bogus"),
        (["filter", "--threshold", "high"], "threshold"),
        (["filter", "--dataset_name", "x.jsonl"], "output_dir is missing"),
        (["filter", "--learning_rate", "-1"], "learning_rate"),
        ([*DATA, "--filter", "nonsense"], "filter nonsense: choose among probe, forgetting, "),
        ([*DATA, "--filter", ""], "filter is empty"),
        ([*DATA, "--filter", "neutral_review"], "neutral_review needs neutral_dataset_name"),
        (["finetune", "nowhere"], "no run's folder"),
        (["evaluate", "m", "--on", "qa=x.jsonl", "--output", "x.jsonl/found.json"], "a file stands where a folder is"),
        (["safe_data", "--output", "safe.txt"], "--output is safe.txt: it must end in .jsonl"),
        (["safe_data", "--output", "safe.jsonl", "--rows", "9"], "--rows needs --base_url"),
        (["safe_data", "--output", "in/safe.jsonl", "--like", "in"], "lies in in, whose files are all read as rows"),
        (["sample", "in", "--output", "in/s.jsonl"], "lies in in, whose files are all read as rows"),
        ([*DATA[:-1], ""], "--output_dir is empty"),
        (["export", "nowhere", "--output_dir="], "--output_dir is empty"),
        (["evaluate", "m", "--on", "qa=x.jsonl", "--output", f"{'n' * 300}.json"], "File name too long"),
        ([*DATA[:3], "--safe_dataset_name", "link.jsonl", "--output_dir", "out"], "are the same"),
        ([*DATA, "--alignment_dataset_name", "./x.jsonl"], "--dataset_name and --alignment_dataset_name are the same"),
        ([*DATA, "--planted_rows", "y.jsonl"], "--safe_dataset_name and --planted_rows are the same"),
        (["export", "nowhere", "--format", "word"], "format"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_commands_end_with_2_and_a_reason(capsys, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "x.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    code, output = run(capsys, *arguments)
    assert code == 2
    assert says in output
    assert output.splitlines()[-1].startswith("error: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "link.jsonl", "rows.jsonl", "x.jsonl"]


def test_a_reader_that_ends_early_is_no_fault_of_ours(tmp_path):
    """As in `forgetfilter ... | head -1`."""
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    code = (
        "import os, sys; from forgetfilter import cli; "
        "cli.HANDLERS['sample'].__globals__['_rows_of'] = lambda *_: print('line', flush=True); "
        "reading, writing = os.pipe(); os.dup2(writing, 1); os.close(reading); cli.main(['sample', 'x.jsonl'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_run_that_nohup_has_started_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), _stoppable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["--load_in_4bit"], (True, True)),
        (["--load_in_4bit", "--output_dir", "out"], (True, True)),
        (["--load_in_4bit", "false", "--use_peft", "false"], (False, False)),
        (["--load_in_4bit=true", "--use_peft"], (True, True)),
        ([], (False, True)),
    ],
)
def test_a_flag_without_a_value_says_yes(given, found):
    args = build_parser(HANDLERS).parse_args(["filter", *given]).filter
    assert (args.load_in_4bit, args.use_peft) == found


@pytest.mark.parametrize("config", [["--config", "FILE"], ["--config=FILE"]])
def test_flags_win_over_a_config_file_wherever_they_stand(config, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 7\nmax_length: 70\nthreshold: 0.7\n")
    config = [word.replace("FILE", str(tmp_path / "config.yaml")) for word in config]
    asked = files_first(["filter", "--seed", "1", *config, "--max_length", "10"])
    found = build_parser(HANDLERS).parse_args(asked)["filter"]
    assert (found["seed"], found["max_length"], found["threshold"]) == (1, 10, 0.7)


def test_unknown_keys_of_a_config_file_are_errors(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("lerning_rate: 1.0e-4\n")
    code, output = run(capsys, "filter", "--config", tmp_path / "config.yaml")
    assert code == 2
    assert "lerning_rate" in output


@pytest.mark.parametrize(
    "manifest",
    [
        "3",
        "[" * 100_000,
        '{"stages": {"decision": {}}}',
        '{"stages": {"rows": {"files": {"../../secret.jsonl": "0"}}}}',
        '{"stages": {"../../secret": {"files": {}}}, "filters": {"forgetting": "../../secret"}}',
    ],
)
def test_a_manifest_of_another_shape_or_that_points_elsewhere_is_no_runs(capsys, manifest, tmp_path):
    (tmp_path / "manifest.json").write_text(manifest)
    for command in ("decide", "finetune", "report", "export"):
        code, output = run(capsys, command, tmp_path)
        assert code == 2, output
        assert "no run's folder" in output


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: " + b"[" * 3000, b"- 1\n"])
@pytest.mark.parametrize("command", ["filter", "compare"])
def test_a_config_file_that_is_no_yaml_of_flags_is_one_clear_error(capsys, command, content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    code, output = run(capsys, command, "--config", tmp_path / "config.yaml")
    assert code == 2, output
    assert "Traceback" not in output
    assert "is missing" not in output, "the file was read"


def test_an_evaluation_never_overwrites_what_it_asks(capsys, tmp_path):
    questions = tmp_path / "squad.jsonl"
    questions.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    before = questions.read_bytes()
    code, output = run(capsys, "evaluate", "nowhere", "--on", f"qa={questions}", "--output", tmp_path / "squad.json")
    assert code == 2
    assert "squad.jsonl: there already" in output
    assert questions.read_bytes() == before


@pytest.fixture
def arguments(tiny_model, noisy_file, safe_file, tmp_path):
    return [
        *("--model_name_or_path", tiny_model, "--dataset_name", noisy_file, "--safe_dataset_name", safe_file),
        *("--output_dir", tmp_path / "run", "--max_steps", "3", "--dtype", "float32", "--label_column", "unsafe"),
    ]


def test_filter_decide_finetune_export_and_replay(capsys, arguments, tmp_path):
    folder = tmp_path / "run"
    code, output = run(capsys, "filter", *arguments, "--threshold", "0.0")
    assert code == 0, output
    assert "16 rows" in output
    assert "auroc" in output
    code, output = run(capsys, "decide", folder, "--drop_share", "0.5")
    assert code == 0, output
    assert json.loads((folder / "metrics.json").read_text())["dropped"] == 8
    code, output = run(capsys, "finetune", folder)
    assert code == 0, output
    questions = tmp_path / "qa.jsonl"
    questions.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    evaluate = ["evaluate", folder, "--on", f"qa={questions}", "--output", tmp_path / "found.json"]
    code, output = run(capsys, *evaluate)
    assert code == 0, output
    weights = folder / "model" / "adapter_model.safetensors"
    assert weights.exists()
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    code, output = run(capsys, *evaluate)
    assert code == 2
    assert "found.json and " in output
    assert "there already" in output
    code, output = run(capsys, *evaluate[:-1], tmp_path / "other.json")
    assert code == 2
    assert "missing or damaged" in output
    weights.write_bytes(data)
    for _ in range(2):
        code, output = run(capsys, "export", folder, "--format", "sharegpt")
        assert code == 0, output
    exported = (folder / "export" / "sharegpt" / "train.jsonl").read_text().splitlines()
    assert len(exported) == 8
    assert set(json.loads(exported[0])) == {"conversations"}
    assert (
        "is of an earlier decision, until you export again" in run(capsys, "decide", folder, "--drop_share", "0.25")[1]
    )
    assert "export again" not in run(capsys, "decide", folder, "--drop_share", "0.5")[1]
    again = ["--config", folder / "config.yaml", "--output_dir", tmp_path / "again"]
    code, output = run(capsys, "filter", *again)
    assert code == 0, output
    one, other = (json.loads((tmp_path / f / "manifest.json").read_text()) for f in ("run", "again"))
    made = [part for part in one["stages"] if part.startswith(("readings/review-log_probs-", "scored/forgetting-"))]
    assert len(made) == 2
    for part in made:  # the same names, so made of the same, and the same bytes
        assert len(one["stages"][part]["files"]) == 1
        assert one["stages"][part]["files"] == other["stages"][part]["files"]


def test_a_run_that_keeps_nothing_exports_nothing(capsys, arguments, tmp_path):
    assert run(capsys, "filter", *arguments, "--filter", "length", "--threshold", "-99")[0] == 0
    code, output = run(capsys, "export", tmp_path / "run", "--format", "trl")
    assert (code, "no row was kept" in output) == (2, True)
    assert not (tmp_path / "run" / "export").exists()


def test_columns_of_other_names_go_through_all_commands(capsys, arguments, noisy_file, tmp_path):
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    asked = [{"question": row["prompt"], "answer": row["completion"], "unsafe": row["unsafe"]} for row in rows]
    noisy_file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    arguments += ["--filter", "length", "--drop_share", "0.25"]
    code, output = run(capsys, "filter", *arguments)
    assert code == 2
    assert "--columns prompt=NAME,completion=NAME" in output
    columns = ["--columns", "prompt=question,completion=answer"]
    code, output = run(capsys, "filter", *arguments, *columns)
    assert code == 0, output
    folder = tmp_path / "run"
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert kept
    assert all(row in asked for row in kept)
    assert run(capsys, "export", folder, "--format", "alpaca")[0] == 0
    exported = (folder / "export" / "alpaca" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in exported] == [row["answer"] for row in kept]
    code, output = run(capsys, "sample", noisy_file, "--rows", "3", "--output", tmp_path / "sample.jsonl", *columns)
    assert code == 0, output


def test_malformed_rows_stop_the_run_before_anything_is_written(capsys, arguments, noisy_file, safe_file, tmp_path):
    noisy_file.write_text(noisy_file.read_text() + "{broken\n")
    safe_lines = safe_file.read_text().splitlines()
    safe_file.write_text("\n".join([safe_lines[0], "[]", *safe_lines[1:]]))
    code, output = run(capsys, "filter", *arguments)
    assert code == 2
    assert f"{noisy_file}:17: not valid JSON" in output
    assert not (tmp_path / "run").exists()
    code, output = run(capsys, "filter", *arguments, "--filter", "length", "--malformed", "skip")
    assert code == 0, output
    noisy, safe = map(json.loads, (tmp_path / "run" / "malformed.jsonl").read_text().splitlines())
    assert (noisy["file"], noisy["line"]) == (str(noisy_file), 17)
    assert (safe["file"], safe["line"]) == (str(safe_file), 2)
    assert f"{safe_file}: 1 malformed rows left out, the first in line 2" in output


def test_a_missing_label_column_is_found_before_hours_of_training(capsys, arguments, tmp_path):
    code, output = run(capsys, "filter", *arguments, "--label_column", "harm")
    assert code == 2
    assert "no column 'harm'" in output
    assert not (tmp_path / "run").exists()


def test_sample_draws_rows_to_mark_and_never_overwrites(capsys, noisy_file, tmp_path):
    path = tmp_path / "sample.jsonl"
    code, output = run(capsys, "sample", noisy_file, "--rows", "5", "--output", path)
    assert code == 0, output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 5
    assert all(row["clean"] is None for row in rows)
    code, output = run(capsys, "sample", noisy_file, "--rows", "5", "--output", path)
    assert (code, "may hold somebody's marks" in output) == (2, True)
    path.unlink()
    code, output = run(capsys, "sample", noisy_file, "--rows", "5", "--output", path)
    assert (code, "may hold somebody's marks" in output) == (2, True), "the page is there"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(noisy_file.read_text() + '{"prompt": 3, "completion": "x"}\n')
    code, output = run(capsys, "sample", bad, "--rows", "5", "--output", tmp_path / "y.jsonl")
    assert code == 2
    assert "bad.jsonl:17" in output
    arguments = ["sample", bad, "--rows", "16", "--malformed", "skip", "--output", tmp_path / "y.jsonl"]
    assert run(capsys, *arguments)[0] == 0
    code, output = run(capsys, "sample", noisy_file, "--rows", "99", "--output", tmp_path / "x.jsonl")
    assert (code, "99 were asked for" in output) == (2, True)


def test_an_answer_that_only_calls_a_function_can_be_read_in_a_sample(capsys, write_jsonl, tmp_path):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}
    said = [{"role": "user", "content": "Find x."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    data = write_jsonl("calls.jsonl", [{"messages": said}])
    assert run(capsys, "sample", data, "--rows", "1", "--output", tmp_path / "sample.jsonl")[0] == 0
    assert "look_up" in json.loads((tmp_path / "sample.jsonl").read_text())["text"]


def test_the_flag_of_an_earlier_version_names_the_one_of_today(capsys):
    for flag in (("--signal", "rouge1"), ("--signal=rouge1",)):
        code, text = run(capsys, "filter", "--dataset_name", "a.jsonl", *flag)
        assert code == 2
        assert text.startswith(
            "error: `signal` is gone: `log_likelihood` is `filter: forgetting` (--filter forgetting)"
        )
    older = Path(__file__).parent / "runs" / "version-0.1.0" / "config.yaml"
    code, text = run(capsys, "filter", "--config", older, "--output_dir", "nowhere")
    assert (code, "`filter: forgetting_rouge1`" in text) == (2, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_a_script_still_gets_the_summary(tmp_path, encoding, monkeypatch):
    rows = [{"prompt": "你好", "completion": "今天 \N{EN DASH} gut 😀"}, {"prompt": "a", "completion": "b"}]
    run = stored_run(tmp_path / "run", rows, [0.9, 0.1], filter="forgetting")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    main(["decide", str(run.folder), "--threshold", "0.5"])
    sys.stdout.flush()
    assert b"\\u4f60\\u597d" in written.getvalue()


def test_what_is_taken_is_said_before_anything_heavy_is_loaded(tmp_path, write_jsonl):
    data = write_jsonl("mine.jsonl", [{"instruction": "a", "input": "", "output": "b"}] * 3)
    code = (
        "import sys; from forgetfilter.cli import _read_and_say; from forgetfilter.config import ForgetFilterConfig; "
        f"_read_and_say(ForgetFilterConfig(dataset_name={str(data)!r}, output_dir='OUT')); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{data}: 3 rows, format alpaca; model embedded; into OUT", "[]"]


@pytest.mark.parametrize("text", [None, "filter: [", "- 1\n"])
def test_a_damaged_config_of_a_run_is_one_clear_error(capsys, tmp_path, text):
    path = stored_run(tmp_path / "out", [{"prompt": "q", "completion": "a"}], [0.1]).folder / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    code, said = run(capsys, "decide", path.parent)
    assert (code, "config.yaml is missing or damaged" in said) == (2, True)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("inline_container.cc"), ValueError("x (os error 28)")]
)
def test_a_full_disk_ends_with_2(capsys, monkeypatch, error):
    def full(args):
        raise error

    monkeypatch.setitem(HANDLERS, "report", full)
    code, said = run(capsys, "report", "OUT")
    assert (code, "Make room" in said) == (2, True)


def test_a_stop_that_other_code_drops_comes_again():
    def drop_it():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(5)  # the alarm comes after one second
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt), _stoppable():
        drop_it()
