"""What a model does with rows, tried on a few of them: are its scores and answers those of each row alone?"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import GenerationConfig

from forgetfilter.data.tokenization import IGNORED
from forgetfilter.errors import ForgetFilterError, ModelError
from forgetfilter.model.batches import PACKED, label_logits, packs

if TYPE_CHECKING:
    from forgetfilter.model.learner import Learner

SENTENCE = "Each row of a batch is read by itself: what stands in one of them says nothing of the others."
OPENING, TOKENS = 4, 24
"""Tokens that the three rows have in common, and tokens of the longest of them."""
ASKED, ANSWERED = (9, 4), 3
"""Tokens of the two prompts that answers are tried on, and of each answer."""
EXACT, ROUNDED = 1e-3, 0.25
"""Nats by which a token's score may differ between two ways of computing it, in the mean or in the middle: in float32,
and in 16 bits, where it differs by 0.07 from rounding alone. Rows that see each other differ by whole nats."""


@torch.no_grad()
def settle_batches(learner: "Learner") -> None:
    """Let a model take packed rows if it then scores each as it scores the row alone; else it takes padded ones.

    Raises:
        ModelError: If the model fails on a row, sees the tokens that it should predict, or scores a padded row
            otherwise than the row alone.
    """
    model = learner.model.eval()
    longest = _tokens(learner)
    head, tail = longest[:OPENING], longest[OPENING:]
    rows = [longest, head + tail[::-1], head + tail[::2]]
    close = _close(learner)
    try:
        alone = [_scores(learner, [row])[0] for row in rows]
        padded = _scores(learner, rows)
        begun = _scores(learner, [longest[: TOKENS // 2]])
    except ForgetFilterError:
        raise
    except Exception as error:  # models may fail in any way
        raise ModelError(
            f"{learner.folder}: the model fails on a row: {type(error).__name__}: {error}. If an adapter is to blame, "
            "name the modules that get one: --lora_target_modules q_proj,v_proj."
        ) from error
    if _apart(begun, [alone[0][: len(begun[0])]], Tensor.median) > close:
        raise ModelError(f"{learner.folder}: no causal language model: what it predicts depends on later tokens.")
    if _apart(padded, alone, Tensor.median) > close:
        raise ModelError(f"{learner.folder}: reads a row in a padded batch otherwise than the row alone.")
    if not _may_pack(model):
        return
    usual = _attention(model.config)
    try:
        model.set_attn_implementation(PACKED)
        alike = packs(model) and _apart(_scores(learner, rows), alone, Tensor.mean) <= close
    except Exception:  # whatever the reason: padded batches are right
        alike = False
    if not alike:
        model.set_attn_implementation(usual)


def _tokens(learner: "Learner") -> list[int]:
    """Some tokens of text, as many as TOKENS or as the model has positions."""
    tokens = learner.tokenizer(SENTENCE)["input_ids"] or [learner.tokenizer.eos_token_id]
    return (tokens * TOKENS)[: min(TOKENS, learner.longest or TOKENS)]


def _close(learner: "Learner") -> float:
    """By how much two ways of computing a token's score may differ."""
    return ROUNDED if learner.bf16 or learner.model.dtype != torch.float32 else EXACT


@torch.no_grad()
def writes_as_alone(learner: "Learner") -> bool:
    """Whether `generate` gives answers to two prompts of unequal length the scores that the model gives each alone."""
    from forgetfilter.model.generation import prefilled

    prompts = [_tokens(learner)[:length] for length in ASKED]
    settings = GenerationConfig(
        max_new_tokens=ANSWERED,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=learner.tokenizer.pad_token_id,
    )
    padded = learner.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs = {name: padded[name].to(learner.model.device) for name in ("input_ids", "attention_mask")}
    try:
        begun = {"cache": prefilled(learner, prompts)} if learner.packs else {}
        found = learner.model.generate(**inputs, **begun, generation_config=settings)
        for prompt, row, logits in zip(prompts, found.sequences, torch.stack(found.logits, 1), strict=True):
            told = log_softmax(logits.float(), -1).gather(-1, row[-ANSWERED:, None])[:, 0]
            own = row[-len(prompt) - ANSWERED :].tolist()
            batch = learner.collate([own], [[*[IGNORED] * len(prompt), *own[len(prompt) :]]])
            alone = -cross_entropy(*label_logits(learner.model, batch), reduction="none").float()
            if not (told - alone).abs().mean() <= _close(learner):
                return False
    except Exception:  # whatever the reason: answers can be written without it
        return False
    return True


def _may_pack(model: Any) -> bool:
    """Whether a model says that all its layers have attention, over the whole row, by an exchangeable function."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return model._supports_attention_backend and not model._is_stateful and {*layers} == {"full_attention"}


def _attention(config: Any) -> dict[str, Any]:
    """The attention function of a model and of each model in it, as set_attn_implementation takes them."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    nested = {name: _attention(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **nested}


def _scores(learner: "Learner", rows: Sequence[list[int]]) -> list[Tensor]:
    """For each row the log-probabilities of its tokens after the opening, in nats."""
    batch = learner.collate(rows, [[*[IGNORED] * OPENING, *row[OPENING:]] for row in rows])
    with learner.mixed:
        logits, targets = label_logits(learner.model, batch)
    scores = -cross_entropy(logits.float(), targets, reduction="none")
    return list(scores.split([len(row) - OPENING for row in rows]))


def _apart(some: Sequence[Tensor], others: Sequence[Tensor], one_number: Callable[[Tensor], Tensor]) -> float:
    """By how much two scores of the same rows differ, in the worst row: the mean or the median of its tokens."""
    return max(float(one_number((one - other).abs())) for one, other in zip(some, others, strict=True))
