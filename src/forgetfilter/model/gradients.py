"""Each row's own gradient, row after row."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.model.batches import label_logits
from forgetfilter.model.learner import Learner
from forgetfilter.model.memory import RELEASE_EVERY, in_halves, release_freed_memory
from forgetfilter.progress import progress


def gradients(
    learner: Learner, examples: Sequence[Example], what: str, tokens: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The gradient of each row's mean loss over its trained tokens, with respect to the weights that are trained.

    With LoRA these are the adapter's. An untrained adapter is 0 in one of its two factors. The gradient of that factor
    is then a random projection of the whole weights' gradient, and the other factor's is 0. It is scaled so that its
    squared norm is that of the whole weights' gradient, in expectation over the projections.

    Args:
        learner: The model.
        examples: The rows.
        what: Name for the progress bar.
        tokens: Take the first so many trained tokens of each row's last answer; None for all tokens of all answers.

    Yields:
        For each row that can be scored, its number and its gradient: (weights,) float32.
    """
    learner.model.eval()
    trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    scales = _scales(learner.model)
    scorable = [i for i, example in enumerate(examples) if example.scorable]
    with progress(what, len(scorable), "rows") as bar:
        for number, row in enumerate(scorable):
            if number % RELEASE_EVERY == 0:
                release_freed_memory()
            in_halves(partial(_backward, learner, tokens), [examples[row]])
            yield row, torch.cat([_flat(parameter) * scales.get(parameter, 1.0) for parameter in trained])
            bar.update()
    learner.model.zero_grad()


def _backward(learner: Learner, tokens: int | None, rows: Sequence[Example]) -> list[None]:
    """Leave the gradient of the only row's mean loss in the model's weights."""
    (row,) = rows
    learner.model.zero_grad()
    batch = learner.collate([row.input_ids], [row.labels if tokens is None else _first(row, tokens)])
    with learner.mixed:
        logits, targets = label_logits(learner.model, batch)
        loss = cross_entropy(logits.float(), targets)
    loss.backward()
    return [None]


def _scales(model: torch.nn.Module) -> dict[torch.nn.Parameter, float]:
    """By what to multiply the gradient of each B: it is that of the whole weight, times A^T and PEFT's scaling."""
    found: dict[torch.nn.Parameter, float] = {}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:  # none for embeddings
                down: Any = layer.lora_A[name]
                up: Any = layer.lora_B[name]
                found[up.weight] = down.in_features**0.5 / (layer.scaling[name] * float(down.weight.detach().norm()))
    return found


def _first(row: Example, tokens: int) -> list[int]:
    """The labels of the first so many trained tokens of the last answer; the others are left out."""
    trained = [place for place, label in enumerate(row.labels) if label != IGNORED]
    kept = {*([place for place in trained if place >= row.prompt_length] or trained)[:tokens]}
    return [label if place in kept else IGNORED for place, label in enumerate(row.labels)]


def _flat(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().float().flatten()
