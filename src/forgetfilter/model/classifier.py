"""Models that judge texts: toxicity classifiers, guards with a classification head; and what kind of guard one is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.model.folders import find_weights
from forgetfilter.model.memory import in_halves, to_device
from forgetfilter.model.tokenizer import load_tokenizer
from forgetfilter.model.weights import pick_device, pick_dtype, refuse_missing
from forgetfilter.progress import progress

LONGEST, RESERVED = 512, 2
"""Longest text in tokens where a model does not say; positions that models of RoBERTa's kind count but do not use."""


@dataclass
class Classified:
    """What a text classification model says.

    Attributes:
        logits: (texts, labels) float32.
        labels: Their names.
        independent: Whether each label is a question of its own (several may hold), and not one of them an alternative.
        passes: Tokens read times millions of weights.
    """

    logits: np.ndarray
    labels: list[str]
    independent: bool
    passes: float


@torch.no_grad()
def classify(name: str, texts: Sequence[str], config: ForgetFilterConfig) -> Classified:
    """Logits of each text; a text that is longer than the model can read loses its end.

    Args:
        name: Hub id or folder of the model; only safetensors are loaded.
        texts: What to classify.
        config: Batch size and dtype.

    Raises:
        ModelError: If there is no such model, or it has no classification head.
    """
    folder = find_weights(name)
    tokenizer = load_tokenizer(folder, config, ends=False)
    try:
        model, about = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=pick_dtype(config.dtype, frozen=True),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise dozens of kinds, which all mean that it cannot be loaded
        raise ModelError(
            f"{name}: cannot be loaded as a text classification model: {type(error).__name__}: {error}"
        ) from error
    refuse_missing(folder, about)
    to_device(model.eval(), pick_device())
    model.config.pad_token_id = tokenizer.pad_token_id
    places = getattr(model.config, "max_position_embeddings", LONGEST + RESERVED)
    longest = min(tokenizer.model_max_length, places - RESERVED)
    size = config.per_device_eval_batch_size
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    found = np.zeros((len(texts), model.config.num_labels), np.float32)
    counts = []

    def classified(some: Sequence[str]) -> list[np.ndarray]:
        batch = tokenizer(list(some), truncation=True, max_length=longest, padding=True, return_tensors="pt")
        logits = model(**batch.to(model.device)).logits.float().cpu().numpy()
        counts.append(int(batch["attention_mask"].sum()))
        return list(logits)

    with progress(f"{folder.name}: classifying", len(texts), "rows") as bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            found[rows] = in_halves(classified, [texts[row] for row in rows])
            bar.update(len(rows))
    labels = [str(model.config.id2label[label]) for label in range(model.config.num_labels)]
    independent = model.config.problem_type == "multi_label_classification"
    return Classified(found, labels, independent, sum(counts) * model.num_parameters() / 1e6)


def guard_kind(name: str, config: ForgetFilterConfig, kind: str = "auto") -> str:
    """The kind of a guard model, by its architecture and its chat template (filters/guard.py), or the one named.

    Raises:
        ConfigError: If it is none of those known, or its architecture is not that of the kind named.
        ModelError: If there is no such model.
    """
    folder = find_weights(name)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no model of its own, its config.json cannot be read: {error}") from error
    architectures = described.get("architectures") or []
    classifies = any("SequenceClassification" in architecture for architecture in architectures)
    if kind != "auto" and (kind == "classifier") != classifies:
        raise ConfigError(f"parameters.guard.kind is {kind}, but {name} is a {', '.join(architectures)}.")
    if kind != "auto" or classifies:
        return "classifier" if classifies else kind
    template = str(load_tokenizer(folder, config).chat_template or "")
    if "Controversial" in template:
        return "qwen3guard"
    if "unsafe" in template:
        return "llama_guard"
    if "wildguard" in name.lower():
        return "wildguard"
    raise ConfigError(
        f"{name}: no guard whose answers are known. If it answers as one of these does, name the kind: "
        "`parameters: {guard: {kind: qwen3guard}}`, llama_guard or wildguard."
    )
