"""Recipe curves: one training a stage, a look at every group, resumed without training again."""

import json

import pyarrow.parquet as pq
import pytest
import yaml

from forgetfilter import experiments, workshop
from forgetfilter.cli import main
from forgetfilter.errors import ConfigError, DataError, RunError
from forgetfilter.experiments import curves
from forgetfilter.runs import Run

pytestmark = pytest.mark.usefixtures("nothing_drawn")


@pytest.fixture
def settings(write_jsonl, safe_file, tiny_model, tmp_path):
    def rows(count, start=0):
        return [
            {"prompt": f"what is {i}?", "completion": f"it is {i}", "group": f"g{i % 2}"}
            for i in range(start, start + count)
        ]

    return {
        "recipe": "curves",
        "model_name_or_path": str(tiny_model),
        "dataset_name": str(write_jsonl("noisy.jsonl", rows(16))),
        "untrained_dataset_name": str(
            write_jsonl("untrained.jsonl", [*rows(3, 20), {"prompt": "q", "completion": "", "group": "g0"}])
        ),
        "reviews": {"safe": str(safe_file), "other": str(write_jsonl("other.jsonl", rows(8, 40)))},
        "output_dir": str(tmp_path / "out"),
        "lora_r": 4,
        "looks": 3,
        "noisy": {"max_steps": 8, "learning_rate": 0.01},
        "review": {"max_steps": 4},
    }


@pytest.mark.drawn
def test_every_stage_is_looked_at_by_group_and_drawn(settings, run_recipe, tmp_path):
    shown = run_recipe(settings)
    assert [path.name for path in shown] == ["curves.json", "compare.html", "curves.png", "curves.svg"]
    assert shown[2].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in shown[3].read_bytes()
    found = json.loads(shown[0].read_text())
    assert {stage: curve["steps"] for stage, curve in found.items()} == {
        "noisy": [0, 2, 4, 8],
        "safe": [0, 1, 2, 4],
        "other": [0, 1, 2, 4],
    }
    groups = found["noisy"]["groups"]
    assert {name: group["rows"] for name, group in groups.items()} == {
        "g0": 8,
        "g1": 8,
        "never trained on: g0": 2,
        "never trained on: g1": 1,
    }
    learnt = groups["g0"]["log_likelihood"]
    assert learnt[-1] > learnt[0] + 0.1
    for review in ("safe", "other"):  # each starts where the noisy stage ended
        assert found[review]["groups"]["g0"]["log_likelihood"][0] == pytest.approx(learnt[-1], abs=1e-3)
    assert found["safe"]["groups"]["g0"]["log_likelihood"][-1] != found["other"]["groups"]["g0"]["log_likelihood"][-1]
    table = pq.read_table(Run.open(tmp_path / "out").model("noisy") / "looks.parquet")
    assert table.num_rows == 4 * 20
    assert table["log_likelihood"].null_count == 4  # the row without a completion


def test_stages_that_have_been_looked_at_are_not_trained_again(settings, run_recipe, monkeypatch):
    trained = []
    real = workshop.train

    def stop_at_other(learner, examples, stage, checkpoints, what, hooks, **more):
        name = what.removesuffix(" stage")
        if name == "other" and trained.count("safe") == 1 and "other" not in trained:
            trained.append(name)
            raise KeyboardInterrupt
        trained.append(name)
        return real(learner, examples, stage, checkpoints, what, hooks, **more)

    monkeypatch.setattr(workshop, "train", stop_at_other)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(settings)
    found = run_recipe(settings)[0].read_text()
    assert trained == ["noisy", "safe", "other", "other"]
    assert run_recipe(settings)[0].read_text() == found
    assert len(trained) == 4
    with pytest.raises(RunError, match="looks"):
        run_recipe({**settings, "looks": 2})


def test_one_block_alone_can_be_trained(settings, run_recipe, tmp_path):
    from safetensors.numpy import load_file

    run_recipe({**settings, "lora_layers_to_transform": [1], "lora_target_modules": "q_proj,v_proj"})
    names = load_file(Run.open(tmp_path / "out").model("noisy") / "adapter_model.safetensors")
    assert names
    assert all("layers.1." in name for name in names)


def test_numbers_are_read_as_filter_reads_them(settings, tmp_path, monkeypatch):
    text = yaml.safe_dump({**settings, "noisy": None}, sort_keys=False)
    (tmp_path / "compare.yaml").write_text(text.replace("noisy: null", "noisy: {learning_rate: 5e-4}"))
    given = []
    monkeypatch.setattr(curves, "compare", lambda config, own: given.append((config, own)))
    experiments.compare(tmp_path / "compare.yaml")
    ((config, own),) = given
    assert config.noisy.learning_rate == 5e-4
    assert own.looks == 3


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"recipe": "nonsense"}, ConfigError, "recipe: NAME"),
        ({"reviews": {}}, ConfigError, "one or more"),
        ({"reviews": {"../x": "safe.jsonl"}}, ConfigError, "a name of"),
        ({"nonsense": 1}, ConfigError, "nonsense"),
        ({"looks": 0}, ConfigError, "looks"),
        ({"looks": "many"}, ConfigError, "looks"),
        ({"noisy": "abc"}, ConfigError, "noisy"),
        ({"output_dir": None}, ConfigError, "output_dir"),
        ({"group_column": "colour"}, DataError, "'colour' \\(group_column\\)"),
        ({"reviews": {"safe": "not_there.jsonl"}}, DataError, "not_there"),
    ],
)
def test_bad_settings_are_errors_before_any_work(settings, run_recipe, change, error, says, tmp_path):
    with pytest.raises(error, match=says):
        run_recipe({**settings, **change})
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(tmp_path / "none.yaml")])
    assert stopped.value.code == 2
    assert "none.yaml" in capsys.readouterr().err
