"""Packed rows: what the model says of each row alone, and the common opening computed once."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch.nn.functional import cross_entropy

from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ModelError
from forgetfilter.model.batches import PACKED, ROUND, collate, label_logits
from forgetfilter.model.reading import read


def chats(learner, prompts):
    chat = ChatTokenizer(learner.tokenizer, 200)
    turns = (
        [Turn("user", prompt, trained=False), Turn("assistant", f"a {i}", trained=True)]
        for i, prompt in enumerate(prompts)
    )
    return [chat.encode(row) for row in turns]


@pytest.fixture
def examples(learner):
    return chats(learner, ["Well, " + f"q {i}" * (i % 5) for i in range(1, 30)])


def gradients(learner, rows, attention):
    learner.model.set_attn_implementation(attention)
    batch = collate([e.input_ids for e in rows], [e.labels for e in rows], learner.model, 1)
    cross_entropy(*label_logits(learner.model, batch)).backward()
    found = [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]
    learner.model.zero_grad()
    learner.model.set_attn_implementation(PACKED)
    return found


def test_packed_and_padded_rows_score_alike(learner, examples):
    packed = read(learner, examples, "test")
    assert learner.packs
    learner.model.set_attn_implementation("sdpa")
    padded = read(learner, examples, "test")
    learner.model.set_attn_implementation(PACKED)
    for ours, theirs in zip(packed, padded, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)
        assert ours.favourites == theirs.favourites


def test_packed_and_padded_rows_train_alike(learner, examples):
    padded, packed = (gradients(learner, examples[:7], attention) for attention in ("sdpa", PACKED))
    assert any(gradient.abs().max() > 0 for gradient in packed)
    for ours, theirs in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_common_opening_stands_in_the_batch_once(learner, examples):
    rows = examples[:7]
    ids, labels = [e.input_ids for e in rows], [e.labels for e in rows]
    batch = collate(ids, labels, learner.model, 1)
    opening = len(learner.tokenizer("Well, ")["input_ids"])
    assert batch["opening"] >= opening > 1
    tokens = sum(map(len, ids)) - 6 * batch["opening"]
    assert batch["input_ids"].numel() == tokens + -tokens % ROUND


def test_an_opening_ends_before_what_is_predicted_first(learner):
    def opening(ids, labels):
        return collate(ids, labels, learner.model, 1)["opening"]

    _ = IGNORED
    assert opening([[5, 6, 7, 8], [5, 6, 7, 9]], [[_, _, _, 8], [_, _, _, 9]]) == 2  # token 7 predicts
    assert opening([[5, 6, 7, 8], [5, 6, 7, 9]], [[_, 6, 7, 8], [_, 6, 7, 9]]) == 0
    assert opening([[5, 6, 7], [6, 5, 7]], [[_, _, 7], [_, _, 7]]) == 0
    assert opening([[5, 6], [5, 6]], [[_, _], [_, _]]) == 1  # a row is never empty


@pytest.mark.parametrize(
    ("kind", "asks", "says"),
    [
        ("nemotron", {}, "without the table of its rows"),
        ("mistral", {}, "a part of the row only"),
        ("gemma3", {}, "a part of the row only"),
        ("llama", {"softcap": 5.0}, "another kind of attention"),
        ("llama", {"s_aux": torch.zeros(4)}, "another kind of attention"),
    ],
)
def test_packed_rows_are_an_error_where_layers_would_read_them_otherwise(kind, asks, says):
    model = tiny_model(tiny_config(kind))
    model.set_attn_implementation(PACKED)
    rows = [[5, 6, 7, 8], [5, 9, 10]]
    with pytest.raises(ModelError, match=says):
        label_logits(model, {**collate(rows, rows, model, 1), **asks})
