"""Batched greedy completions."""

from collections.abc import Sequence

import torch

from forgetfilter.data.tokenization import Example
from forgetfilter.models import Learner
from forgetfilter.progress import progress

MARGIN = 8
"""Tokens a completion may run over its reference before it is stopped."""


@torch.inference_mode()
def complete(learner: Learner, examples: Sequence[Example], what: str) -> list[str]:
    """The learner's greedy answer to each example's prompt, about as long as its reference at most.

    A row's answer doesn't depend on the rows beside it: each is stopped at its own length.

    Returns:
        One text an example, in order; without special tokens.
    """
    model, tokenizer = learner.model.eval(), learner.tokenizer
    limits = [len(e.input_ids) - e.prompt_length + MARGIN for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (limits[i], examples[i].prompt_length))
    size = learner.config.per_device_eval_batch_size
    texts = [""] * len(examples)
    with progress(what, len(examples), "rows") as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            prompts = [examples[i].input_ids[: examples[i].prompt_length] for i in batch]
            inputs = tokenizer.pad(
                {"input_ids": prompts}, padding_side="left", return_attention_mask=True, return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=max(limits[i] for i in batch),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, ids in zip(batch, new.tolist(), strict=True):
                texts[i] = str(tokenizer.decode(ids[: limits[i]], skip_special_tokens=True))
            bar.update(len(batch))
    return texts
