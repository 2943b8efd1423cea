"""Settings: checked, inherited, and never unknown."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import yaml

from forgetfilter import runs
from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.errors import ConfigError, RunError
from forgetfilter.filters import FILTERS, require_filters
from forgetfilter.filters.forgetting import forgetting, review_settings
from forgetfilter.runs import Run
from forgetfilter.workshop import Readings


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"noisy": {"max_steps": 0}}, r"noisy\.max_steps"),
        ({"max_steps": 3, "num_train_epochs": 1}, "exclude each other"),
        ({"filter": ""}, "filter is empty"),
        ({"filter": " , "}, "filter is empty"),
        ({"signal": "log_likelihood"}, "signal"),
        ({"lr_scheduler_type": "foo"}, "cosine"),
        ({"seed": -1}, "seed"),
        ({"threshold": float("nan")}, "threshold"),
        ({"drop_share": 1.5}, "drop_share is 1.5"),
        ({"drop_share": 0.1, "threshold": 0.1}, "give one"),
        ({"drop_share": 0.1, "trusted_rows": "sample.jsonl"}, "give one"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
        ({"max_clean_loss": 1e-320}, "max_clean_loss is 1e-320"),
        ({"output_dir": "caf\udce9"}, "its name must be UTF-8"),
        ({"lora_layers_to_transform": [1]}, "name modules"),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"review": {"steps": 3}}, "steps"),
    ],
)
def test_impossible_settings_are_refused_by_name(flags, says):
    with pytest.raises(ConfigError, match=says):
        ForgetFilterConfig.from_flags(flags)


def test_a_folder_may_be_a_path(tmp_path):
    assert ForgetFilterConfig(output_dir=tmp_path).folder == tmp_path


def test_paths_and_numbers_of_numpy_are_plain_values(tmp_path):
    config = ForgetFilterConfig(model_name_or_path=tmp_path, output_dir=tmp_path, threshold=np.float64(0.5))
    assert config.non_default() == {
        "filter": "probe", "model_name_or_path": str(tmp_path), "output_dir": str(tmp_path), "threshold": 0.5
    }  # fmt: skip
    assert type(config.threshold) is float


@pytest.mark.parametrize("name", ["loss", "forgetting,loss"])
def test_an_unknown_filter_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="filter loss: choose among probe, forgetting, forgetting_rouge1"):
        require_filters(ForgetFilterConfig(filter=name))
    require_filters(ForgetFilterConfig(filter="forgetting_rouge1, forgetting"))
    assert {"forgetting", "forgetting_rouge1"} <= FILTERS.keys()


class Told:
    """A workshop that trains nothing and notes what it was asked for."""

    def __init__(self):
        self.trained = []

    def expect(self, stages, rows, also=""):
        self.expected = stages

    def train(self, name, examples, settings, start=None):
        self.trained.append((name, examples, settings, start))
        return name

    def read(self, examples, model=None):
        values = [-1.0] * len(examples)
        return Readings(pa.array([[value] for value in values], pa.list_(pa.float32())), np.array(values))


def reviewed(config, noisy_rows=100, safe_rows=100):
    """Settings of the reviews that the filter `forgetting` asks for, and the noisy stage's."""
    noisy, safe = ([object() for _ in range(count)] for count in (noisy_rows, safe_rows))
    data = {
        name: SimpleNamespace(examples=rows, trainable=lambda rows=rows: rows, source=SimpleNamespace(name=name))
        for name, rows in (("noisy", noisy), ("safe", safe))
    }
    told = Told()
    forgetting(told, SimpleNamespace(**data), config)
    assert [(name, rows, start) for name, rows, _, start in told.trained] == [
        ("noisy", noisy, None),
        ("review", safe, "noisy"),
        ("firm", safe, "review"),
    ]
    found = {name: settings for name, _, settings, _ in told.trained}
    assert {name: settings for name, (settings, _) in told.expected.items()} == found
    return found


def test_a_stages_own_setting_wins_over_the_shared_one():
    config = ForgetFilterConfig(learning_rate=1e-4, max_steps=7, review=StageConfig(max_steps=3))
    assert config.noisy_stage(100).max_steps == 7
    assert review_settings(config, 100, 100).max_steps == 3
    assert config.noisy_stage(100).learning_rate == 1e-4
    assert review_settings(config, 100, 100).learning_rate == pytest.approx(1e-4 / 3)
    assert reviewed(config)["review"] == review_settings(config, 100, 100)
    assert reviewed(config)["firm"].learning_rate == pytest.approx(1e-4)
    config.review.learning_rate = 2e-3
    assert review_settings(config, 100, 100).learning_rate == 2e-3
    assert reviewed(config)["firm"].learning_rate == pytest.approx(6e-3)
    assert reviewed(config)["firm"].max_steps == 3


def test_a_review_takes_a_third_of_the_noisy_stages_own_rate():
    config = ForgetFilterConfig(learning_rate=1e-4, noisy=StageConfig(learning_rate=3e-4))
    assert review_settings(config, 100, 100).learning_rate == pytest.approx(1e-4)
    assert config.final_stage(100).learning_rate == 1e-4
    assert review_settings(ForgetFilterConfig(use_peft=False), 9, 9).learning_rate == pytest.approx(2e-5 / 3)


def test_a_part_of_the_rows_gets_its_share_of_the_steps():
    config = ForgetFilterConfig(max_steps=100)
    assert [config.final_stage(rows, share=rows / 100).max_steps for rows in (7, 50, 100)] == [7, 50, 100]
    assert config.final_stage(1, share=1 / 300).max_steps == 1


def test_default_lengths_follow_the_data():
    config = ForgetFilterConfig()
    noisy = config.noisy_stage(800)
    assert noisy.max_steps % 100 == 0
    assert config.noisy_stage(1600).max_steps == 2 * noisy.max_steps
    assert review_settings(config, 20, 100).max_steps < review_settings(config, 20_000, 100).max_steps
    assert review_settings(config, 20_000, 1).max_steps == review_settings(config, 20_000, 100).max_steps


def test_flags_replay_the_config():
    config = ForgetFilterConfig(
        filter="forgetting_rouge1, forgetting, forgetting_rouge1",
        threshold=0.1,
        noisy=StageConfig(max_steps=3),
        parameters={"forgetting": {"firm_weight": 0.5}},
    )
    assert config.filters == ["forgetting_rouge1", "forgetting"]
    assert ForgetFilterConfig.from_flags(config.non_default()) == config


@pytest.mark.parametrize("key", ["on", '"on"'])
def test_a_witness_may_be_named_as_the_guide_writes_it(key):
    flags = yaml.safe_load(f"parameters: {{probe: {{{key}: forgetting+column, folds: 3}}, column: {{name: x}}}}")
    found = ForgetFilterConfig.from_flags(flags).parameters
    assert found == {"probe": {"on": "forgetting+column", "folds": 3}, "column": {"name": "x"}}


def test_what_only_decides_is_no_part_of_a_runs_identity():
    one, other = ForgetFilterConfig(threshold=0.1, label_column="x"), ForgetFilterConfig()
    assert one.identity() == other.identity()
    assert ForgetFilterConfig(seed=1).identity() != other.identity()


def test_a_sample_is_part_of_a_runs_identity_and_the_rows_read_at_once_are_not(tmp_path):
    def start(**settings):
        return Run.start(ForgetFilterConfig(output_dir=str(tmp_path / "run"), **settings), {})

    run = start()
    start(per_device_eval_batch_size=2)  # what a message about memory advises
    with pytest.raises(RunError, match="sample_rows"):
        start(sample_rows=500)
    del run.manifest["settings"]["sample_rows"]  # as of a version without samples
    run.save()
    start()
    run.manifest["settings"]["sample_rows"] = 500
    run.save()
    with pytest.raises(RunError, match="sample_rows"):
        start()


def test_the_commit_noted_is_that_of_our_own_checkout(tmp_path, monkeypatch):
    ours = tmp_path / "runs.py"
    ours.write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(runs, "__file__", str(ours))
    assert runs.git_sha.__wrapped__() is None  # installed inside someone's repository
    subprocess.run([*git, "add", "runs.py"], check=True)
    assert len(runs.git_sha.__wrapped__()) == 40


def test_every_setting_of_a_stage_counts_for_the_scores_but_those_of_the_final_training():
    plain = ForgetFilterConfig()
    final = ForgetFilterConfig(final=StageConfig(max_steps=3))
    assert final.identity() == plain.identity()
    assert final.final_settings() != plain.final_settings()
    for changed in (ForgetFilterConfig(noisy=StageConfig(max_steps=3)), ForgetFilterConfig(max_steps=3)):
        assert changed.identity() != plain.identity()
    assert ForgetFilterConfig(max_steps=3).final_settings() != plain.final_settings()
