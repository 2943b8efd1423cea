"""self_correction: a sentence asks the model to be good, in training and at test time.

Moral self-correction (Ganguli et al. 2023, arXiv 2302.07459) as Zhao et al. (ICML 2024, arXiv 2312.12736) use it. In
training the sentence precedes safe rows; at test time it precedes every prompt whose answer could be unsafe. For bias
the safe rows also carry a short reasoning. A defense cannot know which noisy rows are safe. So it draws rows from the
safe data, gives them the sentence and adds them: one for every four noisy rows, which is the paper's share.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import read_row
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import Example
from forgetfilter.data.turns import preceded
from forgetfilter.defenses.result import Defended, budget, draw
from forgetfilter.errors import DataError
from forgetfilter.methods import NonNegativeFloat, traits
from forgetfilter.workshop import Workshop

CORRECTED_SHARE = 0.25
"""Ratio of rows with the sentence to the rows they are mixed into."""
SENTENCES = {
    "bias": "Please answer without relying on stereotypes, and think about it step by step.",
    "toxicity": "Please be positive and respectful, and write nothing toxic.",
    "harmfulness": "Please answer so that nobody comes to harm.",
}
REASONING = "Only what the text says about these people decides, not a stereotype; where it is silent, nobody knows."
"""Put before the answers of safe rows if bias is the only notion of safety."""


def sentence_and_reasoning(notions: Sequence[str]) -> tuple[str, str]:
    """The sentence for the notions of safety there are, and the reasoning, if any."""
    sentence = " ".join(SENTENCES[notion] for notion in notions)
    return sentence, REASONING if list(notions) == ["bias"] else ""


def require_prompts(workshop: Workshop, data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise DataError if a safe row has no prompt to put the sentence before."""
    for turns in data.safe.source.turns(data.safe.row_format):
        last = max(place for place, turn in enumerate(turns) if turn.trained)
        if not any(turn.role == "user" for turn in turns[:last]):
            raise DataError(f"{data.safe.source.name}: self_correction needs a user's prompt in every safe row.")


def corrected(workshop: Workshop, data: Data, count: int) -> list[Example]:
    """Safe rows with the sentence before the prompt and the reasoning before the answer; only the answer is learnt.

    Args:
        workshop: Its tokenizer makes the rows; its seed draws them.
        data: The safe data, and the notions of safety.
        count: How many.

    Raises:
        DataError: If the safe rows have no prompts to put a sentence before, or none fits max_length with it.
    """
    require_prompts(workshop, data, {})
    sentence, reasoning = sentence_and_reasoning(data.notions)
    examples = []
    for record, plain in zip(data.safe.source.rows(), data.safe.examples, strict=True):
        if not plain.scorable:
            continue
        turns = read_row(record, data.safe.row_format)
        last = max(i for i, turn in enumerate(turns) if turn.trained)
        asked, answer = preceded(turns[:last], sentence), turns[last]
        told = replace(answer, content=f"{reasoning} {answer.content}".strip())
        examples.append(workshop.m0.chat.encode([*(replace(turn, trained=False) for turn in asked), told]))
    whole = [example for example in examples if example.scorable]
    if not whole:
        raise DataError(f"{data.safe.source.name}: no safe row fits max_length with the sentence before it.")
    return draw(whole, count, workshop.config.seed)


@traits(check=require_prompts)
def self_correction(
    workshop: Workshop, data: Data, config: ForgetFilterConfig, *, corrected_share: NonNegativeFloat = CORRECTED_SHARE
) -> Defended:
    """Finetune on the noisy data and the rows with the sentence.

    Args:
        workshop: Trains models.
        data: The noisy and the safe data.
        config: All settings.
        corrected_share: Ratio of rows with the sentence to noisy rows.
    """
    return finetuned_with_sentence("self_correction", workshop, data, config, data.noisy.trainable(), corrected_share)


def finetuned_with_sentence(
    name: str,
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    examples: Sequence[Example],
    corrected_share: float,
) -> Defended:
    """Finetune on examples and on safe rows with the sentence, `corrected_share` of them for each example."""
    mixed = [*examples, *corrected(workshop, data, math.ceil(corrected_share * len(examples)))]
    model = workshop.train(name, mixed, budget(data, config, mixed), workshop.start)
    sentence, reasoning = sentence_and_reasoning(data.notions)
    return Defended(model, sentence=sentence, reasoning=reasoning)
