"""forget_filter: finetune M0 on the rows ForgetFilter keeps (Zhao et al., ICML 2024, arXiv 2312.12736)."""

import dataclasses
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.tokenization import Example
from forgetfilter.defenses.inputs import Inputs, Result
from forgetfilter.errors import RunError
from forgetfilter.forgetting import ForgetFilter


def kept(inputs: Inputs, config: ForgetFilterConfig) -> tuple[list[Example], dict[str, Any]]:
    """The examples a run of the filter keeps, and its metrics; the filter starts from M0, wherever finetuning does.

    Its noisy model is what `none` gives where both have the same settings, and is then not trained twice.

    Raises:
        RunError: If it keeps nothing.
    """
    noisy, safe = inputs.noisy, inputs.safe
    settings = config.stage("noisy", len(noisy.trainable()))
    folder = inputs.run.stage(inputs.stage("filter", [*noisy.examples, *safe.examples], settings, None))
    filter_ = ForgetFilter(
        dataclasses.replace(
            config,
            model_name_or_path=str(inputs.learner.folder),
            alignment_dataset_name=None,
            output_dir=str(folder),
        ),
        inputs.learner,
    )
    result = filter_.fit(noisy.source, safe.source)
    if settings == inputs.budget(config, noisy.trainable()):
        inputs.adopt("none", noisy.trainable(), settings, None, result.run.stage("noisy") / "model")
    decisions = zip(noisy.examples, result.scores["decision"], strict=True)
    examples = [example for example, made in decisions if made == "kept" and example.scorable]
    if not examples:
        raise RunError(f"{folder}: the filter kept no row, so there is nothing to finetune on.")
    return examples, result.metrics


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Filter, then finetune on what is kept, each row as often as `none` sees it."""
    examples, metrics = kept(inputs, config)
    return Result(inputs.train("forget_filter", examples, inputs.budget(config, examples), inputs.start), facts=metrics)
