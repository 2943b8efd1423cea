"""Signals: equal to what the model says, whatever the batch."""

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from forgetfilter.data.formats import Turn
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.generation import MARGIN, complete
from forgetfilter.signals import measure, read, rouge1, words

TEXTS = [("hi", "there"), ("a much longer question", "x"), ("q", "an answer of some length"), ("q", "")]


@pytest.fixture(scope="module")
def examples(learner):
    chat = ChatTokenizer(learner.tokenizer, 200)
    return [chat.encode([Turn("user", q, trained=False), Turn("assistant", a, trained=True)]) for q, a in TEXTS]


def by_hand(learner, example):
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        log_probs = torch.log_softmax(learner.model(input_ids=ids).logits[0], -1)
    return [log_probs[i - 1, t].item() for i, t in enumerate(example.labels) if t != IGNORED]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_log_probs_are_the_models_own_for_any_batch_size(learner, examples, batch):
    learner.config.per_device_eval_batch_size = batch
    found = read(learner, examples, "test")
    assert found[3] is None
    for example, row in zip(examples[:3], found[:3], strict=True):
        np.testing.assert_allclose(row.log_probs, by_hand(learner, example), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_answers_are_the_models_own_for_any_batch_size(learner, examples, batch, begun):
    learner.config.per_device_eval_batch_size = batch
    favourites = [row.favourites for row in read(learner, examples[:3], "test")] if begun else None
    answers = complete(learner, examples[:3], "test", favourites)
    for example, answer in zip(examples[:3], answers, strict=True):
        ids = example.input_ids[: example.prompt_length]
        limit = len(example.input_ids) - example.prompt_length + MARGIN
        for _ in range(limit):
            with torch.no_grad():
                ids = [*ids, int(learner.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == learner.tokenizer.eos_token_id:
                break
        assert answer == learner.tokenizer.decode(ids[example.prompt_length :], skip_special_tokens=True)


def test_measure_gives_null_where_a_row_cannot_be_scored(learner, examples):
    table = measure(learner, examples, ["rouge1", "log_likelihood"], "test")
    assert table["log_likelihood"][3].as_py() is None
    assert table["rouge1"][3].as_py() is None
    row = table.slice(0, 1).to_pylist()[0]
    assert row["log_likelihood"] == pytest.approx(np.mean(row["token_log_probs"]))
    assert row["rouge1"] == rouge1(row["completion"], "there")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("the cat sat", "the cat sat"), ("the the cat", "the cat"), ("A dog!", "no words shared"), ("", "x"), ("x", "")],
)
def test_rouge1_is_rouge_scores_on_ascii(answer, reference):
    expected = RougeScorer(["rouge1"]).score(reference, answer)["rouge1"].fmeasure
    assert rouge1(answer, reference) == pytest.approx(expected)


def test_rouge1_reads_every_script():
    assert rouge1("привет мир", "Привет, мир!") == 1
    assert rouge1("我喜欢猫", "我喜欢狗") == pytest.approx(0.75)
    assert words("snake_case don't") == ["snake", "case", "don", "t"]
