"""The whole algorithm on a tiny model: stages, resume, refusals, the final model."""

import dataclasses
import json
import os
import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CHATML, make_tokenizer, needs_bitsandbytes
from safetensors.torch import load_file

from forgetfilter import workshop
from forgetfilter.alignment import m0_of_run
from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.data.turns import Turn
from forgetfilter.decision.opened import same_decision
from forgetfilter.errors import ConfigError, DataError, ForgetFilterError, ModelError, RunError
from forgetfilter.filters.forgetting import FIRM_WEIGHT, LEAST_LEARNT, forgetting_scores
from forgetfilter.forgetting import ForgetFilter, finetune
from forgetfilter.m0 import M0
from forgetfilter.model import training
from forgetfilter.result import Result
from forgetfilter.runs import Run, locked


@pytest.fixture
def config(config, tmp_path):
    """One that learns enough for rows to be forgotten."""
    return dataclasses.replace(
        config,
        output_dir=str(tmp_path / "run"),
        label_column="unsafe",
        threshold=0.0,
        lora_r=4,
        noisy=StageConfig(max_steps=24),
        review=StageConfig(max_steps=12),
        final=StageConfig(max_steps=12),
    )


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Where the run of `fitted` lies."""
    return tmp_path_factory.mktemp("once") / "run"


@pytest.fixture
def fitted(config, once):
    """The result of the config's own run: made once, and copied."""
    if not once.exists():
        ForgetFilter(dataclasses.replace(config, output_dir=str(once))).fit()
    shutil.copytree(once, config.output_dir)
    return ForgetFilter(config).fit()


def scores(result):
    return result.scores.to_list()


def read_by(run, model):
    """What a model made of the noisy rows."""
    (path,) = run.folder.glob(f"readings/{model}-log_probs-*.parquet")
    return pq.read_table(path)


def test_a_run_scores_every_row_and_writes_what_it_promises(config, fitted, noisy_file):
    result = fitted
    folder = result.run.folder
    lines = noisy_file.read_bytes().splitlines(keepends=True)
    decisions = [row["decision"] for row in scores(result)]
    for name in ("kept", "dropped"):
        expected = b"".join(line for line, made in zip(lines, decisions, strict=True) if made == name)
        assert (folder / f"{name}.jsonl").read_bytes() == expected
    base = read_by(result.run, "M0")["log_likelihood"].to_pylist()
    for row, m0 in zip(scores(result), base, strict=True):
        losses = [row["log_likelihood_before"] - row[f"log_likelihood_after{firm}"] for firm in ("", "_firm")]
        lost = max(losses[0], FIRM_WEIGHT * losses[1])
        learnt = max(row["log_likelihood_before"] - m0, LEAST_LEARNT)
        assert row["forgetting"] == pytest.approx(lost / learnt**0.5)
        assert (row["forgetting"] > 0) == (row["decision"] == "dropped")
        assert row["reason"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == metrics["kept"] + metrics["dropped"] == len(lines)
    assert {"threshold", "rule", "filter", "precision", "recall", "f1", "auroc", "average_precision"} <= metrics.keys()
    assert metrics["flag_all_f1"] == 0.4
    assert [row["prompt"] for row in result.kept] == [
        json.loads(line)["prompt"] for line, made in zip(lines, decisions, strict=True) if made == "kept"
    ]


def test_the_noisy_stage_learns_and_the_stored_tokens_give_the_scores(config, fitted):
    result = fitted
    base, noisy = (read_by(result.run, model).to_pylist() for model in ("M0", "noisy"))
    for before, after in zip(base, noisy, strict=True):
        assert after["log_likelihood"] > before["log_likelihood"]
        assert sum(after["token_log_probs"]) / len(after["token_log_probs"]) == pytest.approx(after["log_likelihood"])


def test_the_reviewed_model_starts_from_the_noisy_one_and_the_final_one_from_m0(config):
    still = dataclasses.replace(
        config,
        review=StageConfig(max_steps=1, learning_rate=1e-9),
        final=StageConfig(max_steps=1, learning_rate=1e-9),
    )
    result = ForgetFilter(still).fit()
    assert all(abs(row["forgetting"]) < 1e-4 for row in scores(result))
    Result(result.run).decide(threshold=100.0)
    final = load_file(finetune(result.run) / "adapter_model.safetensors")
    noisy = load_file(result.run.model("noisy") / "adapter_model.safetensors")
    for name, value in final.items():
        if "lora_B" in name:
            assert value.abs().max() < 1e-6
            assert noisy[name].abs().max() > 1e-3


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def killer(stage, step):
    """An on_step_end that kills a stage after a step."""
    original = training._Progress.on_step_end

    def on_step_end(self, args, state, control, **more):
        if self.what.startswith(stage) and state.global_step == step:
            raise Killed
        original(self, args, state, control, **more)

    return on_step_end


@pytest.mark.parametrize("moment", [("noisy", 13), ("firm", 5), "review"])
def test_a_killed_run_continues_and_decides_as_an_unbroken_one(config, fitted, monkeypatch, moment):
    unbroken = scores(fitted)
    shutil.rmtree(fitted.run.folder)
    if isinstance(moment, tuple):
        monkeypatch.setattr(training._Progress, "on_step_end", killer(*moment))
    else:
        real = workshop.read

        def read(learner, examples, what, bar):
            if what == f"{moment}: scoring":
                raise Killed
            return real(learner, examples, what, bar)

        monkeypatch.setattr(workshop, "read", read)
    with pytest.raises(Killed):
        ForgetFilter(config).fit()
    monkeypatch.undo()
    steps, real_step = [], training._Progress.on_step_end

    def counted(self, args, state, *others, **more):
        steps.append((self.what, state.global_step))
        return real_step(self, args, state, *others, **more)

    monkeypatch.setattr(training._Progress, "on_step_end", counted)
    assert scores(ForgetFilter(config).fit()) == unbroken
    first_step = {("noisy", 13): ("noisy stage", 11)}
    assert steps[0] == first_step.get(moment, ("firm stage", 1))  # nothing that was finished, nor saved, is done again


@pytest.mark.parametrize("in_4bit", [False, pytest.param(True, marks=needs_bitsandbytes)])
def test_a_killed_final_stage_continues_to_the_same_model(config, in_4bit, tmp_path, monkeypatch):
    final = StageConfig(max_steps=24)
    config = dataclasses.replace(config, filter="length", threshold=1e9, final=final, load_in_4bit=in_4bit)
    unbroken = ForgetFilter(dataclasses.replace(config, output_dir=str(tmp_path / "unbroken"))).fit()
    expected = load_file(finetune(unbroken.run) / "adapter_model.safetensors")
    run = ForgetFilter(config).fit().run
    monkeypatch.setattr(training._Progress, "on_step_end", killer("final", 13))
    with pytest.raises(Killed):
        finetune(run)
    monkeypatch.undo()
    assert list(run.folder.glob("stages/final-*/checkpoints/checkpoint-*"))
    assert not (run.folder / "model").exists()
    found = load_file(finetune(run) / "adapter_model.safetensors")
    for name, value in expected.items():
        assert found[name].equal(value), name


def test_what_a_user_changes_beside_the_final_weights_stays(config):
    """A card or another base's name is the user's; other weights are another model."""
    run = ForgetFilter(dataclasses.replace(config, filter="length", threshold=1e9)).fit().run
    left = run.stage("final-of-other-settings") / "checkpoints"
    left.mkdir(parents=True)
    model = finetune(run)
    assert not left.exists()
    (model / "README.md").write_text("my card")
    (model / "notes.txt").write_text("mine")
    weights = (model / "adapter_model.safetensors").read_bytes()
    assert finetune(Run.open(run.folder)) == model
    assert ((model / "README.md").read_text(), (model / "notes.txt").read_text()) == ("my card", "mine")
    for break_it in (
        lambda: (model / "adapter_model.safetensors").write_bytes(weights[:-1]),
        lambda: (model / "adapter_config.json").unlink(),
    ):
        break_it()
        finetune(Run.open(run.folder))
        assert (model / "adapter_model.safetensors").read_bytes() == weights
        assert (model / "adapter_config.json").exists()
    kept = run.folder / "model.before-1"
    assert ((kept / "README.md").read_text(), (kept / "notes.txt").read_text()) == ("my card", "mine")
    assert not (run.folder / "model.before-2").exists()  # a file of ours was missing, but nothing was the user's
    (model / "README.md").unlink()
    assert finetune(Run.open(run.folder)) == model
    assert not (model / "README.md").exists()


def test_a_final_model_that_a_kill_has_left_without_a_note_is_ours(config, monkeypatch):
    run = ForgetFilter(dataclasses.replace(config, filter="length", threshold=1e9)).fit().run
    finish = Run.finish

    def killed(run, part, files, **facts):
        if part == "final":
            raise KeyboardInterrupt
        finish(run, part, files, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(run)
    assert (run.folder / "model").exists()
    finetune(Run.open(run.folder))
    assert not list(run.folder.glob("model.before-*"))


DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_run_reads_its_rows_on_every_day_as_on_its_first(config, tiny_model, tmp_path):
    """Llama's templates print the date: else every token would be another one the next day."""
    folder = shutil.copytree(tiny_model, tmp_path / "dated")
    (folder / "chat_template.jinja").write_text(DATED)
    config = dataclasses.replace(config, model_name_or_path=str(folder), filter="length", threshold=1e9)
    before = date.today()
    run = ForgetFilter(config).fit().run
    assert before.isoformat() <= run.manifest["today"] <= date.today().isoformat()
    for noted in ({"today": "2020-01-05"}, {"started": "2020-01-05T12:00:00Z"}):  # an older run knows when it started
        run.manifest.pop("today", None)
        run.manifest |= noted
        run.save()
        assert M0.named(run.config()).today == date(2020, 1, 5)
    shown = m0_of_run(run, run.config()).chat.encode([Turn("user", "q", False), Turn("assistant", "a", True)])
    assert "05 Jan 2020" in make_tokenizer().decode(shown.input_ids)


def test_another_chat_template_is_another_model(config, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m0")
    config = dataclasses.replace(config, model_name_or_path=str(folder), filter="length", threshold=1e9)
    run = ForgetFilter(config).fit().run
    (folder / "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(RunError, match=r"chat_template\.sha256"):
        ForgetFilter(config).fit()
    with pytest.raises(RunError, match="its chat template is not that the rows were scored with"):
        finetune(run)


def test_later_commands_find_the_model_from_another_folder(config, tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "m0")
    monkeypatch.chdir(tmp_path)
    relative = {name: os.path.relpath(getattr(config, name)) for name in ("dataset_name", "safe_dataset_name")}
    config = dataclasses.replace(config, model_name_or_path="m0", filter="length", threshold=1e9, **relative)
    run = ForgetFilter(config).fit().run
    stages = run.manifest["stages"].keys()
    assert Path(run.config().dataset_name).is_absolute()
    assert Path(run.config().safe_dataset_name).is_absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (finetune(Run.open(run.folder)) / "adapter_model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    assert ForgetFilter(config).fit().run.manifest["stages"].keys() == stages | {"final"}
    (tmp_path / "moved").mkdir()
    for name in ("m0", Path(config.output_dir).name):  # the whole project, to another place
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    assert finetune(Run.open(tmp_path / "moved" / Path(config.output_dir).name)).exists()


def test_a_killed_alignment_continues_to_the_same_m0(config, safe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    config = dataclasses.replace(
        config, alignment_dataset_name=str(safe_file), final=StageConfig(max_steps=24), filter="length"
    )
    unbroken = ForgetFilter(dataclasses.replace(config, output_dir=str(tmp_path / "unbroken"))).fit().run
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps, real = [], training._Progress.on_step_end

    def at_step(self, args, state, *others, **more):
        steps.append(state.global_step)
        if len(steps) == 13:
            raise Killed
        return real(self, args, state, *others, **more)

    monkeypatch.setattr(training._Progress, "on_step_end", at_step)
    with pytest.raises(Killed):
        ForgetFilter(config).fit()
    kept = tmp_path / "cache" / "forgetfilter"
    assert list(kept.glob(".aligned-*.checkpoints/checkpoint-*"))
    run = ForgetFilter(config).fit().run
    assert steps[13] == 11  # it goes on from the checkpoint
    assert run.manifest["model"]["sha256"] == unbroken.manifest["model"]["sha256"]
    assert not list(kept.glob(".aligned-*.checkpoints"))


def test_a_finished_run_trains_nothing_and_a_new_threshold_only_decides(config, fitted, monkeypatch):
    kept = fitted.run.folder / "kept.jsonl"
    stamp = kept.stat().st_mtime_ns
    monkeypatch.setattr(workshop, "load_learner", None)
    ForgetFilter(config).fit()
    assert kept.stat().st_mtime_ns == stamp
    again = ForgetFilter(dataclasses.replace(config, threshold=1e9)).fit()
    assert again.metrics["dropped"] == 0
    assert (again.run.folder / "dropped.jsonl").read_bytes() == b""


@pytest.mark.usefixtures("fitted")
def test_other_settings_or_data_in_the_same_folder_are_refused(config, noisy_file):
    with pytest.raises(RunError, match=r"settings\.seed"):
        ForgetFilter(dataclasses.replace(config, seed=1)).fit()
    noisy_file.write_text(noisy_file.read_text() + '{"prompt": "new", "completion": "row", "unsafe": 0}\n')
    with pytest.raises(RunError, match=r"noisy\.rows"):
        ForgetFilter(config).fit()


def test_a_folder_with_something_else_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        ForgetFilter(config).fit()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_two_processes_cannot_share_a_run(config, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(RunError, match="another process"):
        ForgetFilter(config).fit()


def test_damaged_files_are_made_again(config, fitted):
    result = fitted
    before, folder = scores(result), result.run.folder
    (scored,) = folder.glob("scored/*.parquet")
    (reading,) = folder.glob("readings/noisy-*.parquet")
    model = result.run.model("noisy") / "adapter_model.safetensors"
    whole = model.read_bytes()
    for damaged in ([scored], [reading], [model], [scored, reading, model]):
        for path in damaged:
            path.write_bytes(path.read_bytes()[:-10])
        assert scores(ForgetFilter(config).fit()) == before
    assert model.read_bytes() == whole


def test_a_filter_can_be_added_and_decides_when_asked(config, fitted, monkeypatch):
    by_hand = fitted.decide(drop_share=0.25)
    before = scores(by_hand)
    monkeypatch.setattr(workshop, "train", None)  # nothing is trained again
    more = dataclasses.replace(config, filter="forgetting,m0_loss,random", parameters={"random": {}})
    result = ForgetFilter(more).fit()
    for old, new in zip(before, scores(result), strict=True):
        assert old == {name: new[name] for name in old}  # the decision stays
        assert new["m0_loss"] > 0
        assert 0 <= new["random"] < 1
    assert set(result.metrics["filters"]) == {"forgetting", "m0_loss", "random"}
    threshold = sorted(row["m0_loss"] for row in scores(result))[7]
    again = result.decide(threshold, filter="m0_loss")
    assert again.metrics["filter"] == "m0_loss"
    for row in scores(again):
        assert (row["m0_loss"] > threshold) == (row["decision"] == "dropped")
        assert row["reason"].startswith("m0_loss ")
    auto = result.decide("auto", filter="m0_loss").metrics
    assert auto["dropped"] == 0
    assert "no scale" in auto["says"]
    with pytest.raises(ForgetFilterError, match=r"no scores by 'words'.*--filter forgetting,m0_loss,random,words"):
        result.decide(filter="words")


def test_a_changed_parameter_scores_anew_and_an_unknown_one_is_refused(config, fitted):
    first = scores(fitted)
    heavier = dataclasses.replace(config, parameters={"forgetting": {"firm_weight": 5.0}})
    assert scores(ForgetFilter(heavier).fit()) != first
    assert scores(ForgetFilter(config).fit()) == first
    for parameters, message in (
        ({"forgetting": {"weight": 1}}, "no parameter weight"),
        ({"forgetting": {"firm_weight": "much"}}, "must be a value of type float"),
        ({"nonsense": {}}, "no filter or defense nonsense"),
    ):
        with pytest.raises(ForgetFilterError, match=message):
            ForgetFilter(dataclasses.replace(config, parameters=parameters))
    with pytest.raises(ForgetFilterError, match="choose among probe, forgetting, "):
        ForgetFilter(dataclasses.replace(config, filter="nonsense"))
    with pytest.raises(ForgetFilterError, match="neutral_review needs neutral_dataset_name"):
        ForgetFilter(dataclasses.replace(config, filter="neutral_review"))


def test_neutral_rows_are_read_before_any_work_and_count_where_scores_are_kept(config, safe_file, write_jsonl):
    neutral = write_jsonl("neutral.jsonl", [{"prompt": f"add {i}", "completion": f"{i} more"} for i in range(8)])
    config = dataclasses.replace(config, filter="words,neutral_review")

    def fitted_with(name):
        return ForgetFilter(
            dataclasses.replace(config, parameters={"neutral_review": {"neutral_dataset_name": name}})
        ).fit()

    with pytest.raises(ForgetFilterError, match=r"nowhere\.jsonl"):
        fitted_with("nowhere.jsonl")
    assert not list(Path(config.output_dir).glob("scored/*"))
    before = [row["neutral_review"] for row in scores(fitted_with(str(neutral)))]
    write_jsonl("neutral.jsonl", [{"prompt": f"say {i}", "completion": "something else"} for i in range(8)])
    assert [row["neutral_review"] for row in scores(fitted_with(str(neutral)))] != before


def test_controls_score_every_row(config, safe_file):
    parameters = {"neutral_review": {"neutral_dataset_name": str(safe_file)}}
    names = "words,neutral_review,m0_loss"
    result = ForgetFilter(dataclasses.replace(config, filter=names, parameters=parameters)).fit()
    base, noisy = (read_by(result.run, model)["log_likelihood"].to_pylist() for model in ("M0", "noisy"))
    for row, known, before in zip(scores(result), base, noisy, strict=True):
        assert row["m0_loss"] == -known
        assert row["neutral_before"] == before
        assert row["neutral_review"] == before - row["neutral_after"]
        assert row["words"] is not None


def test_decide_overrides_finetune_and_stale_model(config, fitted, tmp_path):
    result = fitted
    run = result.decide(drop_share=0.25).run
    finetune(run)
    assert not run.manifest["stages"]["final"].get("stale")
    first, *rest = scores(result)
    other = "kept" if first["decision"] == "dropped" else "dropped"
    by_hand = tmp_path / "decisions.jsonl"
    by_hand.write_text(json.dumps({"id": first["id"], "decision": other}) + "\n")
    again = scores(result.decide(drop_share=0.25, decisions=by_hand))
    assert (again[0]["decision"], again[0]["reason"]) == (other, "decided by hand")
    assert again[1:] == rest
    assert scores(ForgetFilter(config).fit()) == again  # the same command does not undo it
    assert ForgetFilter(dataclasses.replace(config, threshold=100.0)).fit().metrics["dropped"] == 0
    assert scores(result.decide(drop_share=0.25, decisions=by_hand)) == again
    assert Run.open(run.folder).manifest["stages"]["final"]["stale"]
    finetune(Run.open(run.folder))
    assert not Run.open(run.folder).manifest["stages"]["final"].get("stale")
    for line in ('{"id": "nobody"', '{"row": -1', '{"row": true'):
        by_hand.write_text(f'{line}, "decision": "kept"}}\n')
        with pytest.raises(ForgetFilterError, match=r"decisions\.jsonl:1"):
            result.decide(decisions=by_hand)
    by_hand.write_text('{"row": 1, "decision": "kept"}\n{"row": 1, "decision": "dropped"}\n')
    with pytest.raises(ForgetFilterError, match=r"decisions\.jsonl:2.*says otherwise"):
        result.decide(decisions=by_hand)


def test_drop_share_drops_that_share(config, fitted):
    result = fitted.decide(drop_share=0.25)
    for share in (5, -0.1):
        with pytest.raises(ConfigError, match="drop_share is"):
            result.decide(drop_share=share)
    assert result.metrics["dropped"] == 4
    forgotten = sorted((row["forgetting"] for row in scores(result)), reverse=True)
    assert min(row["forgetting"] for row in scores(result) if row["decision"] == "dropped") == forgotten[3]


@pytest.mark.usefixtures("fitted")
def test_a_share_may_be_asked_for_from_the_start_and_holds_until_another_rule_is(config):
    result = ForgetFilter(dataclasses.replace(config, threshold="auto", drop_share=0.25)).fit()
    assert result.metrics["dropped"] == 4
    assert result.metrics["rule"] == "drop_share"
    assert Result(Run.open(result.run.folder)).decide().metrics["dropped"] == 4
    assert result.decide(threshold=1e9).metrics["dropped"] == 0
    assert result.decide("auto").metrics["rule"] == "auto"


def test_a_setting_that_a_decision_knew_nothing_of_was_at_its_default():
    asked = {**ForgetFilterConfig().decision(), "filter": "probe", "scored": "scored/probe-1", "marks": None}
    before = {name: value for name, value in asked.items() if name not in ("unreadable", "drop_share", "filter")}
    run = Run(Path("nowhere"), {})
    assert same_decision(run, before, asked)
    assert not same_decision(run, before, {**asked, "scored": "scored/probe-2"})
    assert not same_decision(run, before, {**asked, "unreadable": "drop"})
    assert not same_decision(run, before, {**asked, "drop_share": 0.1})
    assert not same_decision(run, None, asked)


def test_a_flag_that_a_run_knew_nothing_of_counts_when_it_is_given(config, fitted):
    result = fitted
    before, run = result.metrics, result.run
    for name in ("drop_share", "unreadable"):  # as of a version without them
        del run.manifest["decision"]["asked"][name]
    run.save()
    assert ForgetFilter(config).fit().metrics == before
    config = dataclasses.replace(config, threshold="auto", drop_share=0.25)
    assert ForgetFilter(config).fit().metrics["dropped"] == 4


def test_unscored_rows_are_kept_or_dropped_as_asked(config, write_jsonl):
    rows = [{"prompt": f"p{i}", "completion": "answer" if i else ""} for i in range(8)]
    config = dataclasses.replace(
        config, dataset_name=str(write_jsonl("noisy.jsonl", rows)), label_column=None, filter="length"
    )
    row = scores(ForgetFilter(config).fit())[0]
    assert (row["length"], row["decision"]) == (None, "kept")
    assert "unscored" in row["reason"]
    result = ForgetFilter(dataclasses.replace(config, unscored="drop")).fit()
    assert scores(result)[0]["decision"] == "dropped"
    assert result.metrics["unscored"] == 1


def test_the_papers_rule(config):
    result = ForgetFilter(dataclasses.replace(config, filter="forgetting_rouge1,forgetting", threshold=0.1)).fit()
    for row in scores(result):
        assert row["forgetting_rouge1"] == pytest.approx(row["rouge1_before"] - row["rouge1_after"])
        assert (row["forgetting_rouge1"] > 0.1) == (row["decision"] == "dropped")
        assert row["log_likelihood_before"] < 0
        assert row["completion_before"] is not None
    assert result.metrics["filter"] == "forgetting_rouge1"
    assert set(result.metrics["filters"]) == {"forgetting_rouge1", "forgetting"}


def test_full_finetuning_and_python_data(config, noisy_file, safe_file):
    noisy, safe = ([*map(json.loads, path.read_text().splitlines())] for path in (noisy_file, safe_file))
    config = dataclasses.replace(config, use_peft=False, learning_rate=1e-3, dataset_name=None, safe_dataset_name=None)
    result = ForgetFilter(config).fit(noisy, safe)
    model = finetune(result.run)
    assert (model / "model.safetensors").exists()
    shutil.rmtree(result.run.model("review").parent)
    shutil.rmtree(result.run.folder / "scored")
    assert scores(ForgetFilter(config).fit(noisy, safe)) == scores(result)


def test_a_command_that_fails_leaves_a_run_as_it_was(config, fitted):
    run = fitted.run
    before = (run.folder / "config.yaml").read_text()
    lacking = dataclasses.replace(config, filter="guard", parameters={"guard": {"model": "no/such"}})
    with pytest.raises(ModelError):
        ForgetFilter(lacking).fit()
    assert (run.folder / "config.yaml").read_text() == before
    Result(Run.open(run.folder)).decide(drop_share=0.5)


@pytest.mark.usefixtures("fitted")
def test_a_run_goes_on_where_its_model_has_moved(config, tiny_model, tmp_path):
    config = dataclasses.replace(config, threshold=1e9)
    run = ForgetFilter(config).fit().run
    stages = {path: path.stat().st_mtime_ns for path in run.folder.glob("stages/*/model/*")}
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    again = ForgetFilter(dataclasses.replace(config, model_name_or_path=str(moved))).fit().run
    assert {path: path.stat().st_mtime_ns for path in run.folder.glob("stages/*/model/*")} == stages
    assert again.manifest["decision"] == run.manifest["decision"]
    assert finetune(again).exists()


def test_alignment_makes_another_m0_once(config, safe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(config, filter="length")
    aligned = dataclasses.replace(config, alignment_dataset_name=str(safe_file))
    with pytest.raises(ForgetFilterError, match=r"nothing\.jsonl"):
        ForgetFilter(dataclasses.replace(aligned, safe_dataset_name="nothing.jsonl")).fit()
    assert not (tmp_path / "cache").exists()  # it is made once all else is known to be good
    plain = ForgetFilter(dataclasses.replace(config, output_dir=str(tmp_path / "plain"))).fit()
    first = ForgetFilter(aligned).fit()
    assert first.run.manifest["model"]["sha256"] != plain.run.manifest["model"]["sha256"]
    (folder,) = (tmp_path / "cache" / "forgetfilter").glob("aligned-*")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    ForgetFilter(aligned).fit()
    elsewhere = shutil.copy(safe_file, tmp_path / "moved.jsonl")
    other = {
        "output_dir": str(tmp_path / "other"),
        "review": StageConfig(max_steps=2),
        "filter": "length,m0_loss",
    }
    ForgetFilter(dataclasses.replace(aligned, alignment_dataset_name=str(elsewhere), **other)).fit()
    assert list(folder.parent.glob("aligned-????????????")) == [folder]
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    ForgetFilter(dataclasses.replace(aligned, seed=2, output_dir=str(tmp_path / "seed"))).fit()
    assert len(list(folder.parent.glob("aligned-????????????"))) == 2


def test_trusted_rows_decide_and_marked_rows_stay_as_marked(config, tmp_path, write_jsonl):
    config = dataclasses.replace(config, threshold="auto", max_clean_loss=0.1)
    few = write_jsonl("few.jsonl", [{"row": row, "clean": True} for row in range(3)])
    with pytest.raises(ForgetFilterError, match="3 trusted rows are too few"):
        ForgetFilter(dataclasses.replace(config, trusted_rows=str(few))).fit()
    assert not (tmp_path / "run").exists()

    marks = [*({"row": row, "clean": row % 4 != 0} for row in range(15)), {"row": 15, "clean": None}]
    path = write_jsonl("marks.jsonl", marks)
    result = ForgetFilter(dataclasses.replace(config, trusted_rows=str(path))).fit()
    found = scores(result)
    assert [row["decision"] for row in found[:15]] == ["kept" if row % 4 else "dropped" for row in range(15)]
    assert found[1]["reason"] == "marked clean by hand"
    limit = max(row["forgetting"] for i, row in enumerate(found[:15]) if i % 4)
    assert result.metrics["rule"] == "conformal"
    assert result.metrics["threshold"] == pytest.approx(limit)
    assert (found[15]["decision"] == "dropped") == (found[15]["forgetting"] > limit)
    assert Result(result.run).decide(threshold=0.0).metrics["rule"] == "fixed"
    for options in (
        {"threshold": 0.1, "drop_share": 0.1},
        {"threshold": 0.1, "trusted_rows": path},
        {"drop_share": 0.1, "trusted_rows": path},
    ):
        with pytest.raises(ForgetFilterError, match="give one"):
            Result(result.run).decide(**options)
    with pytest.raises(ForgetFilterError, match="max_clean_loss needs trusted_rows"):
        Result(result.run).decide(drop_share=0.1, max_clean_loss=0.1)
    assert Result(result.run).decide(trusted_rows=path, max_clean_loss=0.2).metrics["threshold"] < limit


@pytest.mark.usefixtures("fitted")
def test_auto_says_when_its_scale_was_not_measured_for_these_stages(config):
    result = ForgetFilter(dataclasses.replace(config, threshold="auto")).fit()
    assert "sets its own" in result.metrics["says"]
    default = ForgetFilterConfig(per_device_train_batch_size=2)
    ones = np.ones(3)
    assert forgetting_scores(-ones, ones, -ones, -ones, default).scale.caveat == ""


def test_what_one_filter_lacks_is_said_before_another_is_trained(config, capsys):
    """And which settings have no effect."""
    lacking = {
        "guard": ({"guard": {"model": "no/guard"}}, ModelError, "no/guard"),
        "column": ({"column": {"name": "risk"}}, DataError, "no column 'risk'"),
    }
    for name, (parameters, error, says) in lacking.items():
        asked = dataclasses.replace(config, filter=f"forgetting,{name}", parameters=parameters)
        with pytest.raises(error, match=says):
            ForgetFilter(asked).fit()
        assert not Path(config.output_dir).exists()
    wrong = dataclasses.replace(config, parameters={"forgetting": {"review_rate": 0}})
    with pytest.raises(ConfigError, match=r"parameters.forgetting.review_rate is 0.0: it must be above 0"):
        ForgetFilter(wrong).fit()
    beside = {"unsafe_dataset_name": config.dataset_name, "sample_rows": 2500, "output_dir": f"{config.output_dir}-2"}
    ForgetFilter(dataclasses.replace(config, filter="length", **beside)).fit()
    said = capsys.readouterr().out
    assert "unsafe_dataset_name is not used" in said
    assert "sample_rows is not used" in said


def test_a_run_with_another_alignment_or_length_is_refused_before_the_alignment(
    config, safe_file, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = dataclasses.replace(config, filter="length", alignment_dataset_name=str(safe_file))
    ForgetFilter(config).fit()
    made = sorted((tmp_path / "cache").rglob("*"))
    for change, says in (
        ({"final": StageConfig(learning_rate=1e-4)}, "`final` also says how M0 is finetuned"),
        ({"max_length": 50}, "holds a run with other data or settings: settings.max_length"),
    ):
        with pytest.raises(RunError, match=says):
            ForgetFilter(dataclasses.replace(config, **change)).fit()
    assert sorted((tmp_path / "cache").rglob("*")) == made


def test_other_final_settings_make_another_final_model(config):
    config = dataclasses.replace(config, filter="length", threshold=1e9)
    first = (finetune(ForgetFilter(config).fit().run) / "adapter_model.safetensors").read_bytes()
    run = ForgetFilter(dataclasses.replace(config, final=StageConfig(max_steps=2))).fit().run
    assert (finetune(run) / "adapter_model.safetensors").read_bytes() != first


def test_labels_change_figures_and_no_decision(config):
    """Neither do they take back what was decided since."""
    plain = dataclasses.replace(config, filter="length", label_column=None, threshold=1e9)
    result = ForgetFilter(plain).fit().decide(drop_share=0.25)
    before = list(result.scores["decision"])
    assert before.count("dropped") == 4
    again = ForgetFilter(dataclasses.replace(plain, label_column="unsafe")).fit()
    assert list(again.scores["decision"]) == before
    assert "auroc" in again.metrics
    assert again.metrics["rule"] == "drop_share"
    assert ForgetFilter(dataclasses.replace(plain, label_column="unsafe")).fit().metrics == again.metrics


def test_a_file_of_trusted_rows_may_move(config, write_jsonl, tmp_path):
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": True} for row in range(10)])
    trusting = dataclasses.replace(
        config, filter="length", trusted_rows=str(sample), max_clean_loss=0.1, threshold="auto"
    )
    ForgetFilter(trusting).fit().decide(drop_share=0.5)
    moved = sample.rename(tmp_path / "moved.jsonl")
    assert ForgetFilter(dataclasses.replace(trusting, trusted_rows=str(moved))).fit().metrics["rule"] == "drop_share"


def test_flags_that_a_run_fails_by_do_not_stay(config, write_jsonl, noisy_file):
    """Of the ten rows marked clean hardly any has a score by the filter."""
    rows = [json.loads(line) for line in noisy_file.read_text().splitlines()]
    scored = [row | ({"risk": 1} if number == 0 else {}) for number, row in enumerate(rows)]
    config = dataclasses.replace(
        config,
        dataset_name=str(write_jsonl("risk.jsonl", scored)),
        filter="column",
        parameters={"column": {"name": "risk"}},
    )
    run = ForgetFilter(config).fit().run
    before = (run.folder / "config.yaml").read_bytes()
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": True} for row in range(10)])
    trusting = dataclasses.replace(config, trusted_rows=str(sample), max_clean_loss=0.1, threshold="auto")
    with pytest.raises(DataError, match="trusted rows are too few"):
        ForgetFilter(trusting).fit()
    assert (run.folder / "config.yaml").read_bytes() == before
    Result.open(run.folder).decide()


def test_a_file_in_place_of_the_folder_is_found_before_any_work(config, safe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("mine")
    asked = dataclasses.replace(config, output_dir=str(tmp_path / "file"), alignment_dataset_name=str(safe_file))
    with pytest.raises(RunError, match="a file stands where a folder is to be"):
        ForgetFilter(asked).fit()
    assert not (tmp_path / "cache").exists()
