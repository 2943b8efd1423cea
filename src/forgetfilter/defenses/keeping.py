"""keeping: finetune M0 on the rows that a filter keeps; so every filter is a defense.

forget_filter is keeping("forgetting"): Zhao et al. (ICML 2024, arXiv 2312.12736).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, Rows
from forgetfilter.data.unreadable import unreadable
from forgetfilter.decision.choice import Decision, decide_by_config
from forgetfilter.defenses.result import Defended, Kept, budget
from forgetfilter.errors import TrainingError
from forgetfilter.filters.scoring import score
from forgetfilter.methods import traits
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop


def filter_rows(name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig) -> tuple[Rows, Kept]:
    """The rows that a filter keeps by the config's rule, and what it decided.

    The filter trains from M0, even if the defense's finetuning starts from another model.

    Raises:
        TrainingError: If it keeps nothing that can be learnt.
    """
    scored = score(workshop, data, name)
    decision = decision_of(name, scored, data.noisy, workshop, config)
    rows = data.noisy.select(np.flatnonzero(~decision.dropped).tolist())
    if not rows.trainable():
        raise TrainingError(f"{workshop.run.folder}: filter {name} kept no row, so there is nothing to finetune on.")
    return rows, Kept(scored, decision)


def decision_of(name: str, scored: Scored, rows: Rows, workshop: Workshop, config: ForgetFilterConfig) -> Decision:
    """What the config's rule makes of a filter's scores, rows that are hardly readable among them."""
    dropping = config.unreadable == "drop"
    hard = unreadable(rows.source, rows.row_format, workshop.m0.tokenizer) if dropping else None
    return decide_by_config(name, scored, rows.source, config, hard)


def keep_for_training(
    name: str, workshop: Workshop, data: Data, config: ForgetFilterConfig
) -> tuple[Data, ForgetFilterConfig, Kept]:
    """The data that a filter leaves to another defense, the config under which it sees each row as often, and why."""
    rows, kept = filter_rows(name, workshop, data, config)
    steps = budget(data, config, rows.trainable()).max_steps
    final = dataclasses.replace(config.final, max_steps=steps, num_train_epochs=None)
    return dataclasses.replace(data, noisy=rows), dataclasses.replace(config, final=final), kept


def keeping(name: str) -> Callable[[Workshop, Data, ForgetFilterConfig], Defended]:
    """The defense that finetunes on what a filter keeps.

    Args:
        name: The filter's, of FILTERS.
    """

    @traits(keeps_by=name)
    def defense(workshop: Workshop, data: Data, config: ForgetFilterConfig) -> Defended:
        """Filter, then finetune on what is kept, each row as often as `none` sees it."""
        rows, kept = filter_rows(name, workshop, data, config)
        examples = rows.trainable()
        settings = budget(data, config, examples)
        return Defended(workshop.train(f"kept_by_{name}", examples, settings, workshop.start), kept=kept)

    return defense
