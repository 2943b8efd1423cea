"""Signals: how well a model still holds each row. Higher = better held."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.errors import ConfigError
from forgetfilter.generation import complete
from forgetfilter.models import Learner, collate, label_logits
from forgetfilter.progress import progress

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Words of any script, case folded; where a script has no spaces, its characters."""
    return _WORD.findall(text.casefold())


def rouge1(answer: str, reference: str) -> float:
    """ROUGE-1 F-measure over words, in [0, 1] (Lin 2004); 0 if either side has no word.

    rouge-score's definition without stemming, except that it drops all non-ASCII text and this doesn't.
    """
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def mean_log_probability(log_probs: np.ndarray | None) -> float | None:
    """The log_likelihood signal: mean log-probability of a row's trained tokens, in nats; at most 0."""
    return None if log_probs is None else float(np.mean(log_probs, dtype=np.float64))


@torch.inference_mode()
def token_log_probs(learner: Learner, examples: Sequence[Example], what: str) -> list[np.ndarray | None]:
    """Log-probability of each trained token, teacher-forced; logits are made at those positions alone.

    Returns:
        For each example a float32 array (trained tokens,), in nats; None for rows that cannot be scored.
    """
    model, pad = learner.model.eval(), learner.tokenizer.pad_token_id
    found: list[np.ndarray | None] = [None] * len(examples)
    order = sorted((i for i, e in enumerate(examples) if e.scorable), key=lambda i: len(examples[i].input_ids))
    size = learner.config.per_device_eval_batch_size
    with progress(what, len(order), "rows") as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, mask, labels = collate([examples[i] for i in batch], pad, model.device)
            logits, targets = label_logits(model, ids, mask, labels)
            scores = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0].cpu()
            for i, row in zip(batch, scores.split((labels[:, 1:] != IGNORED).sum(1).tolist()), strict=True):
                found[i] = row.numpy()
            bar.update(len(batch))
    return found


def measure(learner: Learner, examples: Sequence[Example], signals: Sequence[str], what: str) -> pa.Table:
    """All signals of a model on every row.

    Returns:
        Columns token_log_probs (list of float32) and log_likelihood, and for rouge1 also completion
        (the model's greedy answer) and rouge1; null where a row cannot be scored.
    """
    log_probs = token_log_probs(learner, examples, f"{what}: scoring")
    columns = {
        "token_log_probs": pa.array(log_probs, pa.list_(pa.float32())),
        "log_likelihood": pa.array([mean_log_probability(row) for row in log_probs], pa.float64()),
    }
    if "rouge1" in signals:
        scorable = [i for i, example in enumerate(examples) if example.scorable]
        if any(examples[i].prompt_length == 0 for i in scorable):
            raise ConfigError("signal rouge1 needs prompts, and rows of format text have none: use log_likelihood.")
        answers = complete(learner, [examples[i] for i in scorable], f"{what}: answering")
        texts = dict(zip(scorable, answers, strict=True))
        values = {i: rouge1(text, examples[i].reference) for i, text in texts.items()}
        columns["completion"] = pa.array([texts.get(i) for i in range(len(examples))], pa.string())
        columns["rouge1"] = pa.array([values.get(i) for i in range(len(examples))], pa.float64())
    return pa.table(columns)
