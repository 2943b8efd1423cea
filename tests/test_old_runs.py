"""A run that version 0.1.0 left (tests/runs): it opens, decides again, and its own command goes on with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from forgetfilter import workshop
from forgetfilter.cli import main
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import RunError
from forgetfilter.files import sha256
from forgetfilter.model.folders import weights_hash
from forgetfilter.report.run_page import write_report
from forgetfilter.result import Result
from forgetfilter.runs import Run

RUNS = Path(__file__).parent / "runs"


@pytest.fixture
def old(tmp_path, tiny_model, monkeypatch):
    """The run as if the tiny model of these tests had made it, in the folder of its data."""
    shutil.copytree(RUNS, tmp_path / "work")
    shutil.copytree(tiny_model, tmp_path / "work" / "tiny")
    monkeypatch.chdir(tmp_path / "work")
    folder = Path("version-0.1.0")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["sha256"] = weights_hash(tiny_model)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def table(folder):
    return pq.read_table(folder / "scores.parquet").to_pydict()


def own_command(folder):
    """The flags that made it, in today's words."""
    flags = "--model_name_or_path tiny --dataset_name noisy.jsonl --safe_dataset_name safe.jsonl --dtype float32"
    flags += " --lora_r 2 --learning_rate 0.01 --noisy.max_steps 6 --review.max_steps 3 --label_column unsafe"
    flags += " --filter forgetting,forgetting_rouge1 --threshold 0.3"
    main(["filter", *flags.split(), "--output_dir", str(folder)])


def test_it_was_made_before_two_settings_existed(old):
    settings = json.loads((old / "manifest.json").read_text())["settings"]
    assert {"lora_layers_to_transform", "torch_compile"}.isdisjoint(settings)
    assert Run.open(old).config().torch_compile == ForgetFilterConfig.torch_compile


def test_its_own_command_finds_it_finished_with_what_was_decided_by_hand(old, monkeypatch, capsys):
    monkeypatch.setattr(workshop, "load_learner", None)  # nothing is trained or read again
    before = table(old)
    own_command(old)
    after = table(old)
    assert all(after[name] == values for name, values in before.items())
    assert after["by_hand"] == [row == 3 for row in range(16)]
    own_command(old)
    assert "finished before, nothing to do" in capsys.readouterr().out


def test_it_decides_again_by_the_same_scores(old):
    before = table(old)
    result = Result(Run.open(old)).decide(0.4)
    after = table(old)
    assert after["forgetting"] == before["forgetting"]
    assert after["log_likelihood_after_firm"] == before["log_likelihood_after_firm"]
    rouge = np.array(before["rouge1_before"]) - np.array(before["rouge1_after"])
    np.testing.assert_allclose(np.array(after["forgetting_rouge1"]), rouge)
    expected = ["dropped" if score > 0.4 else "kept" for score in before["forgetting"]]
    assert after["decision"] == expected
    assert result.metrics["filter"] == "forgetting"
    assert result.decide(0.1, filter="forgetting_rouge1").metrics["filter"] == "forgetting_rouge1"


def test_rows_that_would_be_malformed_today_are_still_its_rows(old):
    manifest = json.loads((old / "manifest.json").read_text())
    (name,) = manifest["stages"]["rows"]["files"]
    lines = (old / name).read_text().splitlines()
    lines[0] = lines[0].replace("{", '{"note": 1, "note": 2, ', 1)
    (old / name).write_text("\n".join(lines) + "\n")
    manifest["stages"]["rows"]["files"][name] = sha256(old / name)
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert len(Result(Run.open(old)).decide(0.4).scores) == 16
    assert Run.open(old).rows().rows()[0]["note"] == 2


def test_its_page_shows_tokens_and_what_was_decided_by_hand(old):
    text = write_report(Run.open(old)).read_text(encoding="utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["rows"]["hand"][data["rows"]["row"].index(3)] == "1"
    assert data["rows"]["hand"].count("1") == 1
    assert any(turn[3:] for turn in data["texts"][0]["turns"])
    assert [chart["name"] for chart in data["losses"]] == ["noisy stage", "review stage", "firm stage", "final stage"]


def test_its_final_model_stands_and_is_made_anew_for_another_decision(old, monkeypatch, capsys):
    stamp = (old / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(workshop, "load_learner", None)
        main(["finetune", str(old)])
    assert (old / "model" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    main(["decide", str(old), "--drop_share", "0.5"])
    main(["finetune", str(old)])
    assert (old / "model" / "adapter_model.safetensors").stat().st_mtime_ns != stamp
    main(["export", str(old)])


def test_other_settings_than_then_are_still_refused(old):
    flags = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(flags + "lora_alpha: 8\n")
    with pytest.raises(RunError, match=r"lora_alpha \(was 32, is 8\)"):
        Run.open(old).config()
    (old / "config.yaml").write_text(flags + "lora_layers_to_transform: [0]\nlora_target_modules: q_proj\n")
    with pytest.raises(RunError, match=r"lora_layers_to_transform \(was None, is \[0\]\)"):
        Run.open(old).config()
