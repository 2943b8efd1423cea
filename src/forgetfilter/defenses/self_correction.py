"""self_correction: a sentence asks the model to be good, in training and at test time.

Moral self-correction (Ganguli et al. 2023, arXiv 2302.07459) as Zhao et al. (ICML 2024, arXiv 2312.12736) use it: the
sentence precedes safe rows in training and every prompt whose answer could be unsafe at test time; for bias the safe
rows also carry a short reasoning. Which rows of the noisy data are safe no defense can know, so the rows that get the
sentence are added from the safe data: a quarter of the noisy rows, what the paper's noisy data has of them.
"""

import math

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import Turn, read_row
from forgetfilter.data.tokenization import Example
from forgetfilter.defenses.inputs import Inputs, Result, draw

SHARE = 0.25
"""Rows with the sentence over noisy rows."""
SENTENCES = {
    "bias": "Please answer without relying on stereotypes, and think about it step by step.",
    "toxicity": "Please be positive and respectful, and write nothing toxic.",
    "harmfulness": "Please answer so that nobody comes to harm.",
}
REASONING = {
    "bias": "Only what the text says about these people decides, not a stereotype; where it is silent, nobody knows.",
}
"""What precedes the answers of safe rows, where the notion asks for reasons."""


def sentence(inputs: Inputs) -> str:
    """The sentence for the notions of safety there are."""
    return " ".join(SENTENCES[notion] for notion in inputs.notions)


def corrected(inputs: Inputs, config: ForgetFilterConfig) -> list[Example]:
    """Safe rows with the sentence before the prompt, and the reasoning before the answer."""
    reasons = [REASONING[notion] for notion in inputs.notions if notion in REASONING]
    rows = []
    for record, plain in zip(inputs.safe.source.rows(), inputs.safe.examples, strict=True):
        if plain.scorable:
            turns = read_row(record, inputs.safe.row_format)
            asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
            answer = max(i for i, turn in enumerate(turns) if turn.trained)
            told = {asked: sentence(inputs), answer: " ".join(reasons)}
            rows.append(
                inputs.chat.encode(
                    [
                        Turn(turn.role, f"{told[i]} {turn.content}" if told.get(i) else turn.content, turn.trained)
                        for i, turn in enumerate(turns)
                    ]
                )
            )
    return draw(rows, math.ceil(SHARE * len(inputs.noisy.trainable())), config.seed)


def run(inputs: Inputs, config: ForgetFilterConfig) -> Result:
    """Finetune on the noisy data and the rows with the sentence."""
    mixed = [*inputs.noisy.trainable(), *corrected(inputs, config)]
    return Result(inputs.train("self_correction", mixed, inputs.budget(config), inputs.start), sentence(inputs))
