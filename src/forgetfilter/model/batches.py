"""Batches without padding: rows are joined to one long sequence, and each row attends only to itself.

All layers except attention treat each token by itself. So rows of any length can be joined, and an opening that all
rows share (a chat template's system prompt) is computed only once. The attention function moves the tokens to a padded
layout, (rows, longest), and its result back. Models with other kinds of attention (a sliding window, a recurrent state)
get ordinary padded batches. Whether a model can be packed is tried when it is loaded
(selfcheck.py).
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from forgetfilter.data.tokenization import IGNORED
from forgetfilter.errors import ModelError

PACKED = "forgetfilter_packed"
SHORT, FEW = 512, 8192
"""Longest row, and rows * longest, up to which the CPU computes attention by plain matrix products. Their gradients are
faster than those of the fused kernel, but their memory grows with the square of the longest row."""

ROUND = 16
"""Batches are filled up to a multiple of so many tokens: oneDNN builds and keeps a kernel for each number it meets."""


OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Arguments of attention functions that ask for something else than plain causal attention over the whole row."""


def packs(model: Any) -> bool:
    """Whether the model takes packed rows: in a composite model its text model decides."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == PACKED)


def collate(input_ids: Sequence[list[int]], labels: Sequence[list[int]], model: Any, padding: int) -> dict[str, Any]:
    """A batch for label_logits, on the model's device.

    Args:
        input_ids: Each row's token ids.
        labels: The same ids where a token is trained or scored, -100 elsewhere. A row's first token is never predicted.
        model: The model that the batch is for.
        padding: The padding token.

    Returns:
        For a model that takes packed rows:
            input_ids, labels, position_ids: (1, tokens), the rows end to end, filled up to a multiple of ROUND tokens.
                The opening that all rows share is only in the first row.
            row_tokens: (rows, longest), for each place in each row the index of its token in input_ids; -1 past the end
                of a row, and in the opening of all rows but the first.
            token_places: (tokens,), for each token its index in the flattened row_tokens; -1 for fillers.
            opening: Length of the shared opening, in tokens.
        For another model: input_ids, labels and attention_mask, each (rows, longest), padded on the right.
    """
    lengths = [len(row) for row in input_ids]
    longest = max(lengths)
    labels = [[IGNORED, *row[1:]] for row in labels]

    def padded(rows: Iterable[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=model.device)

    if not packs(model):
        return {
            "input_ids": padded(input_ids, padding),
            "labels": padded(labels, IGNORED),
            "attention_mask": padded([[1] * length for length in lengths], 0),
        }
    opening = _opening(input_ids, labels)
    skipped = [0] + [opening] * (len(lengths) - 1)
    starts = [0, *accumulate(length - skip for length, skip in zip(lengths, skipped, strict=True))]

    def packed(rows: Iterable[Sequence[int]], filler: int) -> Tensor:
        values = [value for row, skip in zip(rows, skipped, strict=True) for value in row[skip:]]
        return torch.tensor([*values, *[filler] * (-len(values) % ROUND)], device=model.device)

    tokens = [[-1] * skip + [*range(*span)] for skip, span in zip(skipped, pairwise(starts), strict=True)]
    return {
        "input_ids": packed(input_ids, input_ids[0][0])[None],
        "labels": packed(labels, IGNORED)[None],
        "position_ids": packed(map(range, lengths), 0)[None],
        "row_tokens": padded(tokens, -1),
        "token_places": packed((range(i * longest, i * longest + n) for i, n in enumerate(lengths)), -1),
        "opening": opening,
    }


def _opening(input_ids: Sequence[list[int]], labels: Sequence[list[int]]) -> int:
    """Number of tokens that all rows begin with and that predict nothing: they are computed once for all rows."""

    def before_labels(row: Sequence[int]) -> int:
        return next((i for i, label in enumerate(row) if label != IGNORED), len(row))

    unlabelled = min(before_labels(row) for row in labels)
    first, last = min(input_ids), max(input_ids)  # an opening of both is one of every row that sorts between them
    shared = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return max(0, min(shared, unlabelled - 1))


def label_logits(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits and targets of the labelled tokens only; the output layer is not computed where no row has a label.

    Args:
        model: A causal language model.
        batch: What collate made.

    Returns:
        (tokens, vocabulary) logits and (tokens,) target ids, row after row.
    """
    return labelled(model, batch)[1:]


def labelled(model: Any, batch: dict[str, Any]) -> tuple[Any, Tensor, Tensor]:
    """All that a model gives, before logits and targets; see `label_logits`."""
    targets = batch["labels"][:, 1:]
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
    logits = outputs.logits
    if logits.shape[1] > len(columns):  # this model always computes all of them
        logits = logits[:, columns]
    targets = targets[:, columns]
    return outputs, logits[targets != IGNORED], targets[targets != IGNORED]


class _Move(torch.autograd.Function):
    """Copy tokens to other places, each to one place at most: so gradients are copied back and never summed.

    Takes x (tokens, ...), there (places,) and back (tokens,). there[i] is the token that place i takes, -1 for zeros;
    back[j] is the place that takes token j, -1 for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return _take(x, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _take(grads[0], ctx.saved_tensors[1]), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x[index.clamp(min=0)] * (index >= 0)[:, None, None]


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_tokens: Tensor | None = None,
    token_places: Tensor | None = None,
    opening: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; query (1, heads, tokens, size), key and value with as many heads or fewer."""
    if row_tokens is None or token_places is None:
        if attention_mask is None:
            raise ModelError("a batch without padding came to attention without the table of its rows.")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if any(kwargs.get(name) is not None for name in OTHER_ATTENTION):
        raise ModelError("a layer asks for another kind of attention than rows without padding get.")
    rows, longest = row_tokens.shape
    there, back = row_tokens.flatten(), token_places
    # (1, heads, tokens, size) -> (rows, heads, longest, size)
    query, key, value = (
        _Move.apply(x[0].transpose(0, 1), there, back).unflatten(0, (rows, longest)).transpose(1, 2)
        for x in (query, key, value)
    )
    # The opening is in the first row only: give its keys and values to all rows.
    key, value = (torch.cat([x[:1, :, :opening].expand(rows, -1, -1, -1), x[:, :, opening:]], 2) for x in (key, value))
    if query.device.type == "cpu" and longest <= SHORT and rows * longest <= FEW and dropout == 0.0:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        later = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
        weights = scores.float().masked_fill(later, float("-inf")).softmax(-1).to(value.dtype)
        answer = weights @ value
    else:
        answer = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
        )
    return _Move.apply(answer.transpose(1, 2).flatten(0, 1), back, there)[None], None


def _packed_mask(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """None for packed rows, whose attention needs no mask; an ordinary batch's mask otherwise.

    An ordinary batch says which of its tokens are padding, or goes on from a cache. Its mask is made even if it hides
    nothing: so a batch has a mask or a table of its rows when it comes to attention.
    """
    if attention_mask is not None or q_length != kv_length:
        lengths: dict[str, Any] = {"q_length": q_length, "kv_length": kv_length, "local_size": local_size}
        return sdpa_mask(attention_mask=attention_mask, **{**kwargs, **lengths, "allow_is_causal_skip": False})
    if local_size is not None:
        raise ModelError("a layer attends to a part of the row only, which rows without padding do not allow.")
    return None


AttentionInterface.register(PACKED, _packed_attention)
AttentionMaskInterface.register(PACKED, _packed_mask)
