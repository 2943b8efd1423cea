"""Signals: equal to what the model says, whatever the batch."""

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import MambaConfig, MambaForCausalLM

from forgetfilter.batches import PACKED
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import Turn
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.generation import MARGIN, complete
from forgetfilter.models import load_learner, load_tokenizer
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


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_answers_are_the_models_own_for_any_batch_size(learner, examples, batch, begun, attention):
    learner.config.per_device_eval_batch_size = batch
    learner.model.set_attn_implementation(attention)
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
    learner.model.set_attn_implementation(PACKED)


def test_a_row_whose_last_answer_was_cut_off_is_answered(learner):
    chat = ChatTokenizer(learner.tokenizer, 60)
    turns = [
        Turn("user", "q", trained=False),
        Turn("assistant", "a", trained=True),
        Turn("user", "q" * 40, trained=False),
    ]
    example = chat.encode([*turns, Turn("assistant", "b", trained=True)])
    assert example.scorable
    (reading,) = read(learner, [example], "test")
    assert len(complete(learner, [example], "test", [reading.favourites])) == 1


def test_a_model_with_a_state_is_scored_and_answers(tokenizer, tmp_path):
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    config = ForgetFilterConfig(dtype="float32", lora_target_modules="in_proj")
    mamba = load_learner(tmp_path, load_tokenizer(tmp_path, config), config)
    assert not mamba.packs
    chat = ChatTokenizer(mamba.tokenizer, 200)
    rows = [chat.encode([Turn("user", "q", trained=False), Turn("assistant", "a" * n, trained=True)]) for n in (1, 20)]
    table = measure(mamba, rows, ["rouge1"], "test")
    assert table["log_likelihood"].null_count == table["rouge1"].null_count == 0


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
