"""neutral_review: what a review of neutral rows makes the noisy model forget.

A control that the paper's reviewers asked for (Zhao et al., ICML 2024, arXiv 2312.12736): if any other data makes a
model forget unsafe rows as well, forgetting is plain distribution shift and has nothing to do with safety. It is held
against forgetting's first review: there is no second one, and nothing is divided by what was learnt.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, Rows, load_rows
from forgetfilter.filters.forgetting import review_settings
from forgetfilter.methods import traits
from forgetfilter.scored import Scored

if TYPE_CHECKING:
    from forgetfilter.workshop import Workshop


def neutral_rows(workshop: "Workshop", data: Data, parameters: Mapping[str, Any]) -> Rows:
    """The neutral rows; raises DataError if they cannot be read."""
    name = parameters["neutral_dataset_name"]
    return load_rows(name, "neutral_dataset_name", workshop.m0.chat, workshop.config)


@traits(check=neutral_rows, files=("neutral_dataset_name",))
def neutral_review(
    workshop: "Workshop", data: Data, config: ForgetFilterConfig, *, neutral_dataset_name: str
) -> Scored:
    """Mean log-probability of the completion's tokens before the neutral review, minus that after it, in nats.

    Args:
        workshop: Trains and reads models.
        data: The noisy and the safe data; the review is as long as one of the safe data.
        config: All settings; `noisy` and `review` are those of the stages.
        neutral_dataset_name: The rows to review: ordinary ones that have nothing to do with safety.

    Raises:
        DataError: If the neutral rows cannot be read.
    """
    neutral = neutral_rows(workshop, data, {"neutral_dataset_name": neutral_dataset_name}).trainable()
    rows, noisy = data.noisy.examples, data.noisy.trainable()
    noisy_settings = config.noisy_stage(len(noisy))
    review = review_settings(config, len(noisy), len(data.safe.trainable()))
    workshop.expect({"noisy": (noisy_settings, noisy), "neutral": (review, neutral)}, noisy)

    noisy_model = workshop.train("noisy", noisy, noisy_settings)
    before = workshop.read(rows, noisy_model).log_likelihood
    after = workshop.read(rows, workshop.train("neutral", neutral, review, noisy_model)).log_likelihood
    return Scored(suspicion=before - after, columns={"neutral_before": before, "neutral_after": after})
