"""A run as Python programs have it: opened again, decided, exported, shown, finetuned, and asked about new rows."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from stored_runs import stored_run

from forgetfilter import Result
from forgetfilter.decision.opened import scored_part
from forgetfilter.errors import DataError, RunError
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.runs import Run
from forgetfilter.scored import Scale, Scored

README = Path(__file__).parents[1] / "README.md"
ROWS = [{"prompt": "q", "completion": text} for text in ("fine", "bad", "good")]


def test_a_run_is_opened_again_and_all_that_follows_from_it_can_be_had(tmp_path):
    folder = stored_run(tmp_path / "out", ROWS, [0.1, 0.9, 0.2]).folder
    result = Result.open(str(folder)).decide(0.5)
    assert result.kept.to_list() == [ROWS[0], ROWS[2]]
    assert result.dropped.to_list() == [ROWS[1]]
    page = result.report()
    assert page == folder / "report.html"
    assert "fine" in page.read_text()
    written, card = result.export("alpaca")
    assert "train.jsonl" in card.read_text()
    assert [json.loads(line)["output"] for line in written.read_text().splitlines()] == ["fine", "good"]
    assert not Result.open(folder).run.manifest["exports"]["alpaca"]["stale"]
    assert result.decide(drop_share=1.0).run.manifest["exports"]["alpaca"]["stale"]
    assert not page.exists(), "it showed another decision"
    with pytest.raises(RunError, match="takes another threshold"):
        result.export("alpaca")


def test_an_export_elsewhere_replaces_nothing_and_is_not_noted(tmp_path):
    result = Result(stored_run(tmp_path / "out", ROWS, [0.1, 0.9, 0.2]))
    result.export("trl", tmp_path / "mine")
    assert "exports" not in result.run.manifest
    with pytest.raises(DataError, match="exists"):
        result.export("trl", tmp_path / "mine")


def test_what_is_no_decided_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run's folder"):
        Result.open(tmp_path)
    run = stored_run(tmp_path / "out", ROWS, [0.1, 0.9, 0.2])
    run.forget("decision")
    with pytest.raises(RunError, match="its decision is missing"):
        Result.open(run.folder)


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.41}])
def test_a_number_set_before_no_separation_was_found_drops_nothing(settings, tmp_path):
    """Scores are then ranks from 0 to 1: .41 would drop more than half of any data. A number given since counts."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(100)]
    run = stored_run(tmp_path / "out", rows, np.zeros(100), **settings)
    part = run.folder / f"{scored_part(run, 'probe')}.parquet"
    Scored(np.arange(1, 101) / 100, scale=Scale(0, nothing="no separation: chance")).save(part)
    run.finish(scored_part(run, "probe"), [part])
    result = Result(run).decide()
    assert (result.metrics["dropped"], result.metrics["rule"]) == (0, "auto")
    assert "no separation: chance" in result.metrics["says"]
    result = result.decide(0.9)
    assert result.metrics["dropped"] == 10
    assert result.metrics["says"].endswith("; no separation: chance")
    assert result.decide(drop_share=0.05).metrics["dropped"] == 5


def test_the_final_model_and_new_rows(config):
    result = ForgetFilter(dataclasses.replace(config, filter="length")).fit().decide(drop_share=0.25)
    assert (result.finetune() / "adapter_model.safetensors").exists()
    assert not Run.open(result.run.folder).manifest["stages"]["final"]["stale"]
    with pytest.raises(RunError, match="probe"):
        result.score([{"prompt": "q", "completion": "a"}])


def test_the_example_of_the_readme_runs_as_it_stands(tiny_model, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    settings = f"output_dir={str(tmp_path / 'run')!r}, model_name_or_path={str(tiny_model)!r}, lora_r=2"
    code = code.replace('output_dir="run"', settings)
    found = {}
    exec(compile(code, str(README), "exec"), found)
    result = found["result"]
    kept = [found["noisy"][row["row"]] for row in result.scores if row["decision"] == "kept"]
    assert result.kept.to_list() == kept
    assert found["suspect"]["reason"] in capsys.readouterr().out
