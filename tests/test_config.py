"""Settings: checked, inherited, and never unknown."""

import pytest

from forgetfilter.config import ForgetFilterConfig, StageConfig
from forgetfilter.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"noisy": {"max_steps": 0}}, r"noisy\.max_steps"),
        ({"max_steps": 3, "num_train_epochs": 1}, "exclude each other"),
        ({"signal": "loss"}, "log_likelihood, rouge1"),
        ({"signal": ""}, "signal is empty"),
        ({"lr_scheduler_type": "foo"}, "cosine"),
        ({"seed": -1}, "seed"),
        ({"threshold": float("nan")}, "threshold"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_layers_to_transform": [1]}, "name modules"),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"review": {"steps": 3}}, "steps"),
    ],
)
def test_impossible_settings_are_refused_by_name(flags, says):
    with pytest.raises(ConfigError, match=says):
        ForgetFilterConfig.from_flags(flags)


def test_a_stages_own_setting_wins_over_the_shared_one():
    config = ForgetFilterConfig(learning_rate=1e-4, max_steps=7, review=StageConfig(max_steps=3))
    assert config.stage("noisy", 100).max_steps == 7
    assert config.stage("review", 100).max_steps == 3
    assert config.stage("noisy", 100).learning_rate == 1e-4
    assert config.stage("review", 100).learning_rate == pytest.approx(1e-4 / 3)
    config.review.learning_rate = 2e-3
    assert config.stage("review", 100).learning_rate == 2e-3
    assert config.stage("firm", 100).learning_rate == pytest.approx(6e-3)
    assert config.stage("firm", 100).max_steps == 3


def test_a_part_of_the_rows_gets_its_share_of_the_steps():
    config = ForgetFilterConfig(max_steps=100)
    assert [config.stage("final", rows, share=rows / 100).max_steps for rows in (7, 50, 100)] == [7, 50, 100]
    assert config.stage("final", 1, share=1 / 300).max_steps == 1


def test_default_lengths_follow_the_data():
    config = ForgetFilterConfig()
    noisy = config.stage("noisy", 800)
    assert noisy.max_steps % 100 == 0
    assert config.stage("noisy", 1600).max_steps == 2 * noisy.max_steps
    assert config.stage("review", 100, 10).max_steps < config.stage("review", 100, 10_000).max_steps


def test_flags_replay_the_config():
    config = ForgetFilterConfig(signal="rouge1, log_likelihood", threshold=0.1, noisy=StageConfig(max_steps=3))
    assert config.signals == ["rouge1", "log_likelihood"]
    assert ForgetFilterConfig.from_flags(config.non_default()) == config


def test_what_only_decides_is_no_part_of_a_runs_identity():
    one, other = ForgetFilterConfig(threshold=0.1, label_column="x"), ForgetFilterConfig()
    assert one.identity() == other.identity()
    assert ForgetFilterConfig(seed=1).identity() != other.identity()
