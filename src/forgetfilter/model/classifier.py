"""Models that judge texts: toxicity classifiers, guards with a classification head; and what kind of guard one is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.turns import shorter
from forgetfilter.errors import ConfigError, ModelError
from forgetfilter.model.folders import find_weights
from forgetfilter.model.memory import in_halves, to_device
from forgetfilter.model.tokenizer import load_tokenizer
from forgetfilter.model.weights import pick_device, pick_dtype, refuse_missing

LONGEST, RESERVED = 512, 2
"""Longest text in tokens where a model does not say; positions that models of RoBERTa's kind count but do not use."""


@dataclass
class Classified:
    """What a text classification model says.

    Attributes:
        logits: (texts, labels) float32.
        labels: Their names.
        independent: Whether each label is a question of its own (several may hold), and not one of them an alternative.
    """

    logits: np.ndarray
    labels: list[str]
    independent: bool


class Classifier:
    """A text classification model in memory.

    Args:
        name: Hub id or folder of the model; only safetensors are loaded.
        config: Batch size and dtype.

    Attributes:
        about: Its labels, and whether they are independent; see Classified.

    Raises:
        ModelError: If there is no such model, or it has no classification head.
    """

    def __init__(self, name: str, config: ForgetFilterConfig) -> None:
        """Load the model."""
        folder = find_weights(name)
        self.tokenizer = load_tokenizer(folder, config, ends=False)
        try:
            self.model, about = AutoModelForSequenceClassification.from_pretrained(
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
        to_device(self.model.eval(), pick_device())
        known = self.model.config
        known.pad_token_id = self.tokenizer.pad_token_id
        places = getattr(known, "max_position_embeddings", LONGEST + RESERVED)
        self.longest = min(self.tokenizer.model_max_length, places - RESERVED)
        labels, independent = _labels(known)
        self.about = {"labels": labels, "independent": independent}
        self.size = config.per_device_eval_batch_size

    def logits(self, exchanges: Sequence[tuple[str, str]], bar: Any) -> tuple[np.ndarray, float]:
        """What the model says of prompts and answers. Where both are too long for it, each loses a part.

        Args:
            exchanges: Prompt, "" for none, and answer.
            bar: Counts them.

        Returns:
            (texts, labels) float32, and what that cost, in the unit of Cost.passes.
        """
        texts = [self._fitting(prompt, answer) for prompt, answer in exchanges]
        order, self._tokens = sorted(range(len(texts)), key=lambda row: -len(texts[row])), 0
        found = np.zeros((len(texts), self.model.config.num_labels), np.float32)
        for start in range(0, len(order), self.size):
            rows = order[start : start + self.size]
            found[rows] = in_halves(self._of_batch, [texts[row] for row in rows])
            bar.update(len(rows))
        return found, self._tokens * self.model.num_parameters() / 1e6

    def _fitting(self, prompt: str, answer: str) -> str:
        """Prompt and answer as one text that the model can read whole; an answer alone loses its end later."""
        while prompt:
            text = f"{prompt}\n\n{answer}"
            if len(self.tokenizer(text)["input_ids"]) <= self.longest:
                return text
            prompt, answer = shorter(prompt, answer)
        return answer

    @torch.no_grad()
    def _of_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self.tokenizer(list(texts), truncation=True, max_length=self.longest, padding=True, return_tensors="pt")
        logits = self.model(**batch.to(self.model.device)).logits.float().cpu().numpy()
        self._tokens += int(batch["attention_mask"].sum())
        return list(logits)


def labels_of(name: str, config: ForgetFilterConfig) -> tuple[list[str], bool]:
    """The labels of a text classification model, and whether each is a question of its own; reads no weights."""
    try:
        known = AutoConfig.from_pretrained(find_weights(name), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: its config.json cannot be read: {error}") from error
    return _labels(known)


def _labels(known: Any) -> tuple[list[str], bool]:
    """The labels that a model's config names, and whether each is a question of its own."""
    labels = [str(known.id2label[label]) for label in range(known.num_labels)]
    return labels, len(labels) == 1 or known.problem_type == "multi_label_classification"


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
