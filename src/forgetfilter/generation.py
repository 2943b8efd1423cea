"""Greedy completions, in batches, begun where a forward pass over the references leaves off."""

from collections.abc import Sequence

import torch

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.models import Learner
from forgetfilter.progress import progress

MARGIN = 8
"""Tokens a completion may run over its reference before it is stopped."""


@torch.no_grad()
def complete(
    learner: Learner, examples: Sequence[Example], what: str, favourites: Sequence[Sequence[int]] | None = None
) -> list[str]:
    """The learner's greedy answer to each example's prompt, about as long as its reference at most.

    A greedy answer follows its reference for as long as the reference's tokens are the model's favourites,
    which one forward pass tells of all of them; only what comes after the first other token is generated.
    A row's answer doesn't depend on the rows beside it: each is stopped at its own length.

    Args:
        learner: Whose answers.
        examples: Rows with a prompt and a reference.
        what: Name for the progress bar.
        favourites: For each, the likeliest token in place of each trained one (signals.read), if known.

    Returns:
        One text an example, in order; without special tokens.
    """
    model, tokenizer, end = learner.model.eval(), learner.tokenizer, learner.tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in examples]
    if favourites is not None:
        answers = [_follow(example, row) for example, row in zip(examples, favourites, strict=True)]
    limits = [len(example.input_ids) - example.prompt_length + MARGIN for example in examples]
    unfinished = [i for i, answer in enumerate(answers) if answer[-1:] != [end]]
    order = sorted(unfinished, key=lambda i: (limits[i] - len(answers[i]), examples[i].prompt_length))
    size = learner.config.per_device_eval_batch_size
    with progress(what, len(examples), "rows", len(examples) - len(order)) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            begun = [examples[i].input_ids[: examples[i].prompt_length] + answers[i] for i in batch]
            inputs = tokenizer.pad(
                {"input_ids": begun}, padding_side="left", return_attention_mask=True, return_tensors="pt"
            ).to(model.device)
            with learner.generating():
                output = model.generate(
                    **inputs,
                    max_new_tokens=max(limits[i] - len(answers[i]) for i in batch),
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=end,
                )
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, ids in zip(batch, new.tolist(), strict=True):
                answers[i] += ids[: limits[i] - len(answers[i])]
            bar.update(len(batch))
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def _follow(example: Example, favourites: Sequence[int]) -> list[int]:
    """The reference's tokens up to the first that isn't the favourite, and the favourite in its place."""
    reference = [label for label in example.labels[example.prompt_length :] if label != IGNORED]
    answer = []
    for token, favourite in zip(reference, favourites[-len(reference) :], strict=True):
        answer.append(favourite)
        if token != favourite:
            break
    return answer
