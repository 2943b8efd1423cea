"""Hidden states of M0, as input for a probe. Only the lower half of the blocks runs, without the output layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PreTrainedModel

from forgetfilter.data.lazy import AT_ONCE, mapped
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.errors import ModelError, TrainingError
from forgetfilter.model.learner import Learner, text_model
from forgetfilter.model.reading import in_batches
from forgetfilter.model.sharding import gathered

AFTER_BLOCKS = ("norm", "ln_f", "final_layernorm", "project_out")
"""What models call the norm after their last block, and what turns their states into others of another size."""
POOLED = 2
"""Vectors a row: the mean over its trained tokens, and the last of them."""


@torch.no_grad()
def hidden_states(learner: Learner, examples: Sequence[Example], what: str, bar: Any = None) -> np.ndarray:
    """The hidden states of each row's trained tokens at half depth, pooled in two ways.

    Args:
        learner: The model.
        examples: The rows.
        what: Name for the progress bar.
        bar: A bar of the caller's that counts the rows instead.

    Returns:
        (rows, 2, hidden size) float16: the mean over the trained tokens, and the last token's; NaN for rows without.
    """
    size = learner.model.config.get_text_config().hidden_size
    found = np.full((len(examples), POOLED, size), np.nan, np.float16)
    with gathered(learner.model), _lower_half(learner.model) as lower:
        for batch, pooled in in_batches(learner, examples, partial(_pooled, learner, lower), what, bar):
            if np.isnan(pooled).any():
                raise TrainingError(f"{what}: the model gives no numbers. Try --dtype float32.")
            found[batch] = pooled
    return found


def stored_states(path: Path) -> np.ndarray:
    """What `Workshop.states` stored, (rows, 2, hidden size) float16; copied to where it need not be in memory."""
    with pq.ParquetFile(path) as file:
        size = file.schema_arrow.field("states").type.list_size
        found, first = mapped((file.metadata.num_rows, size), np.float16, path.parent), 0
        for batch in file.iter_batches(AT_ONCE):
            found[first : first + len(batch)] = batch.column(0).flatten().to_numpy().reshape(-1, size)
            first += len(batch)
    return found.reshape(len(found), POOLED, -1)


def _pooled(learner: Learner, lower: Any, rows: Sequence[Example]) -> list[np.ndarray]:
    """One pass over some rows; (2, hidden size) for each."""
    inputs = learner.collate([row.input_ids for row in rows], [row.labels for row in rows])
    trained = inputs.pop("labels") != IGNORED
    with learner.mixed:
        states = lower(**inputs, use_cache=False).last_hidden_state[trained].float()
    counts = [row.trained_tokens for row in rows]
    pooled = [torch.stack([own.mean(0), own[-1]]) for own in states.cpu().split(counts)]
    limit = torch.finfo(torch.float16).max
    return [own.clamp(-limit, limit).half().numpy() for own in pooled]


@contextmanager
def _lower_half(model: Any) -> Iterator[Any]:
    """The innermost model without its upper blocks and all that comes after them, for as long as the context lasts.

    Raises:
        ModelError: If the model has no list of blocks.
    """
    text = text_model(model)
    owner, name = _blocks(text, {*(model._no_split_modules or ())})
    blocks = getattr(owner, name)
    models = [one for one in text.modules() if isinstance(one, PreTrainedModel)]
    lower = {name: blocks[: (len(blocks) + 1) // 2]}
    lower |= {own: nn.Identity() for own, _ in owner.named_children() if own in AFTER_BLOCKS}
    whole = {own: getattr(owner, own) for own in lower}
    try:
        _replace(owner, lower)
        yield next(one for one in reversed(models) if owner in one.modules())
    finally:
        _replace(owner, whole)


def _blocks(text: nn.Module, kinds: set[str]) -> tuple[nn.Module, str]:
    """The module that has the list of blocks, and the list's name: the first of these kinds, else the first of any."""
    lists = [
        (owner, name, {kind.__name__ for kind in type(blocks[0]).__mro__})
        for owner in text.modules()
        for name, blocks in owner.named_children()
        if isinstance(blocks, nn.ModuleList) and len(blocks)
    ]
    for owner, name, _ in sorted(lists, key=lambda found: found[2].isdisjoint(kinds)):
        return owner, name
    raise ModelError(f"{type(text).__name__}: has no list of blocks, so its hidden states cannot be read.")


def _replace(owner: nn.Module, children: Mapping[str, nn.Module]) -> None:
    for name, module in children.items():
        setattr(owner, name, module)
