"""Readings and answers: equal to what the model says, whatever the batch."""

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import MambaConfig, MambaForCausalLM

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, load_rows
from forgetfilter.data.tokenization import IGNORED, ChatTokenizer
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError
from forgetfilter.filters.forgetting_rouge1 import forgetting_rouge1, rouge1, words
from forgetfilter.m0 import M0
from forgetfilter.model.batches import PACKED
from forgetfilter.model.generation import MARGIN, complete
from forgetfilter.model.reading import read
from forgetfilter.runs import Run
from forgetfilter.workshop import Workshop

TEXTS = [("hi", "there"), ("a much longer question", "x"), ("q", "an answer of some length"), ("q", "")]


@pytest.fixture(scope="module")
def examples(learner):
    chat = ChatTokenizer(learner.tokenizer, 200)
    return [chat.encode([Turn("user", q, trained=False), Turn("assistant", a, trained=True)]) for q, a in TEXTS]


@torch.no_grad()
def logits_alone(learner, ids):
    ids = torch.tensor([ids])
    return learner.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def by_hand(learner, example):
    log_probs = torch.log_softmax(logits_alone(learner, example.input_ids), -1)
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
            ids = [*ids, int(logits_alone(learner, ids)[-1].argmax())]
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
    folder = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    config = ForgetFilterConfig(
        model_name_or_path=str(folder),
        output_dir=str(tmp_path / "out"),
        dtype="float32",
        lora_target_modules="in_proj",
    )
    mamba = Workshop(M0.named(config), config, Run.start(config, {}))
    assert not mamba.learner.packs
    chat = ChatTokenizer(mamba.m0.tokenizer, 200)
    rows = [chat.encode([Turn("user", "q", trained=False), Turn("assistant", "a" * n, trained=True)]) for n in (1, 20)]
    readings = mamba.read(rows)
    assert not np.isnan(readings.log_likelihood).any()
    assert readings.token_log_probs.null_count == 0
    assert None not in mamba.answer(rows)


def test_a_row_that_cannot_be_scored_has_neither_reading_nor_answer(workshop, examples):
    readings, answers = workshop.read(examples), workshop.answer(examples)
    assert np.isnan(readings.log_likelihood).tolist() == [False, False, False, True]
    assert readings.token_log_probs[3].as_py() is None
    assert answers[3] is None
    for row, example in enumerate(examples[:3]):
        log_probs = readings.token_log_probs[row].as_py()
        np.testing.assert_allclose(log_probs, by_hand(workshop.learner, example), atol=1e-5)
        assert readings.log_likelihood[row] == pytest.approx(np.mean(log_probs))
        assert answers[row] == complete(workshop.learner, [example], "test")[0]


def test_forgetting_rouge1_holds_answers_against_completions(workshop, config):
    noisy = [{"prompt": prompt, "completion": completion} for prompt, completion in TEXTS]
    rows = [load_rows(data, "rows", workshop.m0.chat, config) for data in (noisy, [{"prompt": "a", "completion": "b"}])]
    found = forgetting_rouge1(workshop, Data(*rows), config)
    for moment, answers in (("before", "noisy"), ("after", "review")):
        completions = found.columns[f"completion_{moment}"]
        assert completions.tolist() == workshop.answer(rows[0].examples, workshop.run.model(answers))
        expected = [rouge1(text, row["completion"]) for text, row in zip(completions[:3], noisy, strict=False)]
        assert found.columns[f"rouge1_{moment}"][:3].tolist() == expected
        assert np.isnan(found.columns[f"rouge1_{moment}"][3])
    texts = load_rows([{"text": "no prompt"}], "rows", workshop.m0.chat, config)
    with pytest.raises(ConfigError, match="needs prompts"):
        forgetting_rouge1(workshop, Data(texts, rows[1]), config)


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
