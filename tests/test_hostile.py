"""Data, models and settings by somebody who means ill: refused or kept as text, and nothing of theirs is run."""

import dataclasses
import json
import pickle
import shutil

import pytest
from conftest import run
from stored_runs import stored_run

from forgetfilter.forgetting import ForgetFilter


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("command", ["filter", "compare"])
def test_yaml_tags_are_refused(command, capsys, tmp_path):
    made = tmp_path / "made"
    path = tmp_path / "config.yaml"
    path.write_text(f"recipe: curves\noutput_dir: !!python/object/apply:os.mkdir [{made}]\n")
    code, says = run(capsys, command, "--config", path)
    assert code == 2
    assert "python/" in says
    assert "Traceback" not in says
    assert not made.exists()


@pytest.mark.parametrize(
    "line",
    [
        "trust_remote_code: true",
        "noisy: {learning_rate: 0.5}",
    ],
)
def test_a_config_other_than_the_one_a_run_was_made_by_is_refused(line, capsys, tmp_path):
    folder = stored_run(tmp_path / "out", [{"prompt": "q", "completion": "a"}], [0.1]).folder
    code, says = run(capsys, "report", folder)
    assert code == 0, says
    path = folder / "config.yaml"
    path.write_text(f"{path.read_text()}{line}\n")
    for command in ("decide", "finetune", "report"):
        code, says = run(capsys, command, folder)
        assert code == 2, says
        assert line.partition(":")[0] in says
        assert "`filter` command writes it anew" in says


def test_an_error_shows_what_a_terminal_would_obey(capsys, write_jsonl, tmp_path):
    path = write_jsonl("rows.jsonl", [{"\x1b]0;owned\x07": 1}])
    code, says = run(capsys, "sample", path, "--output", tmp_path / "s.jsonl")
    assert code == 2
    assert r"\x1b]0;owned\x07" in says
    assert "\x1b" not in says


def test_half_a_character_stops_no_run(config, capsys, tmp_path):
    """In a column's name, and in what a malformed row says of itself, both of which are written down."""
    good = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{i}"}]} for i in range(8)
    ]
    good[0]["\ud83d"] = "x"
    bad = {"messages": [{"role": "user", "content": [{"type": "\ud83d"}]}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, bad]))
    result = ForgetFilter(dataclasses.replace(config, dataset_name=str(path), malformed="skip", filter="length")).fit()
    assert result.metrics["rows"] == 8
    (line,) = (result.run.folder / "malformed.jsonl").read_text().splitlines()
    assert "part 1 is" in json.loads(line)["error"]


def test_a_damaged_tokenizer_in_a_run_costs_the_shading_alone(capsys, tmp_path, tiny_model):
    rows = [{"prompt": "q", "completion": "a"}]
    folder = stored_run(tmp_path / "out", rows, [0.1], tokenizer=tiny_model).folder
    (folder / "stages/tokenizer/tokenizer.json").write_text("{}")
    code, says = run(capsys, "report", folder)
    assert code == 0, says
    assert "the report shades no tokens" in says


@pytest.fixture
def files(noisy_file, safe_file):
    return ["--dataset_name", noisy_file, "--safe_dataset_name", safe_file]


def test_pickled_weights_are_refused(capsys, tiny_model, files, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    code, says = run(capsys, "filter", "--model_name_or_path", model, *files, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "no .safetensors" in says
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_refused(capsys, tiny_model, learner, tmp_path):
    adapter = tmp_path / "adapter"
    learner.save(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (tmp_path / "qa.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    output = tmp_path / "figures.json"
    code, says = run(capsys, "evaluate", adapter, "--on", f"qa={tmp_path}/qa.jsonl", "--output", output)
    assert code == 2
    assert "safetensors" in says
    assert not (tmp_path / "exploded").exists()
    assert not output.exists()


def test_code_that_comes_with_a_model_is_not_run(capsys, tiny_model, files, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.C", "AutoModelForCausalLM": "bomb.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    code, says = run(capsys, "filter", "--model_name_or_path", model, *files, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "trust_remote_code" in says
    assert not (tmp_path / "exploded").exists()


def test_no_name_in_a_config_leads_out_of_the_runs_folder(capsys, tmp_path, tiny_model, noisy_file, safe_file):
    path = tmp_path / "compare.yaml"
    settings = {"recipe": "curves", "model_name_or_path": str(tiny_model), "dataset_name": str(noisy_file)}
    settings |= {"reviews": {"../../outside": str(safe_file)}, "output_dir": str(tmp_path / "deep" / "er" / "out")}
    path.write_text(json.dumps(settings))
    code, says = run(capsys, "compare", "--config", path)
    assert code == 2
    assert "reviews" in says
    assert not (tmp_path / "deep").exists()


def test_rows_that_look_like_formulas_or_markup_are_written_back_as_they_came(config, tmp_path):
    """A data set is not a place to repair cells in: a spreadsheet must be told to read its columns as text."""
    hostile = ['=HYPERLINK("http://x")', "@SUM(1)", "<script>alert(1)</script>", "../../etc/passwd"]
    lines = ["prompt,completion", *(f'"{text.replace(chr(34), chr(34) * 2)}",{text[:1]}ok' for text in hostile)]
    data = tmp_path / "noisy.csv"
    data.write_text("\n".join(lines) + "\n")
    result = ForgetFilter(dataclasses.replace(config, dataset_name=str(data), filter="random", threshold=0.5)).fit()
    kept = (result.run.folder / "kept.csv").read_text().splitlines()
    dropped = (result.run.folder / "dropped.csv").read_text().splitlines()
    assert sorted(kept + dropped[1:]) == sorted(lines)
