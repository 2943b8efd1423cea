"""Each row's own gradient, row after row."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy

from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.model.batches import label_logits
from forgetfilter.model.learner import Learner
from forgetfilter.model.memory import RELEASE_EVERY, one_memory_error, release_freed_memory
from forgetfilter.progress import progress


def gradients(
    learner: Learner, examples: Sequence[Example], what: str, tokens: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The gradient of each row's mean loss over its trained tokens, with respect to the weights that are trained.

    With LoRA these are the adapter's. An untrained adapter is 0 in one of its two factors. The gradient of that factor
    is then a random projection of the whole weights' gradient, and the other factor's is 0.

    Args:
        learner: The model.
        examples: The rows.
        what: Name for the progress bar.
        tokens: Take the first so many trained tokens of each row; None for all.

    Yields:
        For each row that can be scored, its number and its gradient: (weights,) float32.
    """
    learner.model.eval()
    trained = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    scorable = [i for i, example in enumerate(examples) if example.scorable]
    with progress(what, len(scorable), "rows") as bar:
        for number, row in enumerate(scorable):
            if number % RELEASE_EVERY == 0:
                release_freed_memory()
            learner.model.zero_grad()
            batch = learner.collate([examples[row].input_ids], [_first(examples[row].labels, tokens)])
            with one_memory_error():
                with learner.mixed:
                    logits, targets = label_logits(learner.model, batch)
                    loss = cross_entropy(logits.float(), targets)
                loss.backward()
            yield row, torch.cat([_flat(parameter) for parameter in trained])
            bar.update()
    learner.model.zero_grad()


def _first(labels: Sequence[int], tokens: int | None) -> list[int]:
    """The labels, those after the first so many trained ones left out."""
    if tokens is None:
        return list(labels)
    trained = [place for place, label in enumerate(labels) if label != IGNORED]
    kept = set(trained[:tokens])
    return [label if place in kept else IGNORED for place, label in enumerate(labels)]


def _flat(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().float().flatten()
