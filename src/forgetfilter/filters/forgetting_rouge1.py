"""forgetting_rouge1: how much worse the model answers each prompt after a review of safe data.

The signal of Zhao et al. (ICML 2024, arXiv 2312.12736): score = ROUGE-1(noisy model) - ROUGE-1(reviewed model), each
between the model's own greedy answer and the row's completion, without the prompt. Words may be of any script.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import base_format
from forgetfilter.data.loading import Data
from forgetfilter.errors import ConfigError
from forgetfilter.filters.forgetting import (
    mean_gain,
    nothing_learnt,
    review_settings,
    token_costs,
)
from forgetfilter.methods import PositiveFloat, traits
from forgetfilter.scored import Scale, Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop

PAPERS_PHI = 0.1
"""The paper's threshold."""
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Words of any script, case folded; where a script has no spaces, its characters."""
    return _WORD.findall(text.casefold())


def rouge1(answer: str, reference: str) -> float:
    """ROUGE-1 F-measure over words, in [0, 1] (Lin 2004); 0 if either side has no word.

    The same as the package rouge-score without stemming, but that package drops all non-ASCII text.
    """
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def require_prompts(workshop: "Workshop", data: Data, parameters: object = None) -> None:
    """Raise ConfigError if the noisy rows have no prompts to answer."""
    if base_format(data.noisy.row_format) == "text":
        raise ConfigError("filter forgetting_rouge1 needs prompts, and rows of format text have none: use forgetting.")


@traits(check=require_prompts)
def forgetting_rouge1(
    workshop: "Workshop",
    data: Data,
    config: ForgetFilterConfig,
    *,
    review_rate: PositiveFloat = 1 / 3,
    review_share: PositiveFloat = 1 / 6,
) -> Scored:
    """Train the noisy and the reviewed model, let both answer, and compare the answers with the completions.

    Args:
        workshop: Trains and asks models.
        data: The noisy and the safe data.
        config: All settings; `noisy` and `review` are those of the stages.
        review_rate: Ratio of the review's learning rate to the noisy stage's.
        review_share: Ratio of the review's steps to the noisy stage's; it has 20 steps at least, 1,000 at most.

    Raises:
        ConfigError: If the rows are of a format without prompts.
    """
    rows, noisy, safe = data.noisy.examples, data.noisy.trainable(), data.safe.trainable()
    require_prompts(workshop, data)
    noisy_settings = config.noisy_stage(len(noisy))
    review = review_settings(config, len(noisy), len(safe), review_rate, review_share)
    stages = {"noisy": (noisy_settings, noisy), "review": (review, safe)}
    workshop.expect(stages, noisy, also="; three models' answers come on top")

    noisy_model = workshop.train("noisy", noisy, noisy_settings)
    reviewed_model = workshop.train("review", safe, review, noisy_model)
    answers = [workshop.answer(rows, model) for model in (None, noisy_model, reviewed_model)]

    references = [example.reference for example in rows]
    known, before, after = (_scores(own, references) for own in answers)
    scored = rouge1_scores(known, before, after, answers[1], answers[2])
    held, held_after = (workshop.read(rows, model).token_log_probs for model in (noisy_model, reviewed_model))
    scored.token_costs = token_costs(held, held_after)
    return scored


def rouge1_scores(
    known: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    answers_before: Sequence[str | None],
    answers_after: Sequence[str | None],
) -> Scored:
    """The paper's forgetting rate: ROUGE-1 before the review minus ROUGE-1 after it.

    Args:
        known: (rows,) ROUGE-1 of M0's answers, in [0, 1]; NaN = not scored.
        before: Likewise of the noisy model's.
        after: Likewise of the reviewed model's.
        answers_before: The noisy model's answers.
        answers_after: The reviewed model's.
    """
    return Scored(
        suspicion=before - after,
        columns={
            "rouge1_before": before,
            "rouge1_after": after,
            "completion_before": np.array(answers_before, object),
            "completion_after": np.array(answers_after, object),
        },
        moments={"M0": known, "noisy data": before, "review": after},
        scale=Scale(
            PAPERS_PHI,
            says="the paper's threshold for ROUGE-1: no promise about clean rows lost",
            nothing=nothing_learnt(mean_gain(known, before), "of ROUGE-1"),
        ),
    )


def _scores(answers: Sequence[str | None], references: Sequence[str]) -> np.ndarray:
    """ROUGE-1 of each answer, (rows,); NaN where there is none."""
    pairs = zip(answers, references, strict=True)
    return np.array([np.nan if answer is None else rouge1(answer, reference) for answer, reference in pairs])
