"""Rows that a model can hardly read are counted, shown, and left out if the user says so."""

import base64
import codecs
import dataclasses
import json
import random

import numpy as np
import pytest
from conftest import CHATML
from stored_runs import reviewable_run, stored_run

from forgetfilter.data.builtin import builtin_rows
from forgetfilter.data.loading import load_rows
from forgetfilter.data.sources import load_source
from forgetfilter.data.unreadable import unreadable
from forgetfilter.defenses.keeping import decision_of
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.m0 import M0
from forgetfilter.result import Result
from forgetfilter.review.session import Review
from forgetfilter.scored import Scored
from forgetfilter.workshop import Workshop

WALNUT = dict(zip("abcdefghijklmnopqrstuvwxyz", np.random.default_rng(53).permutation(26), strict=True))


def walnut53(text):
    return "|".join(chr(97 + WALNUT[char]) if char in WALNUT else char for char in text.lower())


def rot13(text):
    return codecs.encode(text, "rot13")


def base_64(text):
    return base64.b64encode(text.encode()).decode()


def wall(text):
    signs = random.Random(text)
    return "".join(signs.choice("!@#$%^&*()_+-=[]{};:<>?/|~") for _ in text)


def english():
    rows = [row["messages"][-2:] for row in builtin_rows() if row["language"] == "en" and row["notion"] != "tasks"]
    return [[turn["content"] for turn in turns] for turns in rows if len(turns[1]["content"]) > 60]


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that has learnt words of seven languages, where the tests' other one has bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    begin, end = specials = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    texts = [turn["content"] for row in builtin_rows() for turn in row["messages"]]
    learnt.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt, bos_token=begin, eos_token=end, pad_token=end, chat_template=CHATML
    )


def test_a_readable_opening_hides_nothing(pieces):
    plain = [answer for _, answer in english()]
    long = " ".join(plain)[:9000]
    hidden = long[:3000] + base_64(" ".join(plain))[:2500] + long[:3000]
    assert flagged(pieces, [("Go on.", long), ("Go on.", hidden)]).tolist() == [False, True]


@pytest.mark.parametrize("cipher", [walnut53, rot13, base_64])
def test_plain_sentences_before_a_cipher_in_the_same_answer_do_not_hide_it(pieces, cipher):
    answers = [answer for _, answer in english() if len(answer) > 120]
    triples = zip(answers[:-2], answers[1:-1], answers[2:], strict=True)
    rows = [("Go on.", f"{one} {two} {cipher(three)}") for one, two, three in triples]
    assert flagged(pieces, rows).mean() > 0.8


def test_a_cipher_in_the_reasoning_is_one(pieces):
    asked = {"role": "user", "content": english()[0][0]}
    thought = {"role": "assistant", "content": "Gladly.", "reasoning_content": base_64(english()[1][1])}
    source = load_source([{"messages": [asked, thought]}])
    assert unreadable(source, "messages", pieces).tolist() == [True]


def test_short_turns_are_looked_at_together_apart_from_long_ones(pieces):
    question = next(prompt for prompt, answer in english() if len(prompt) > 60)
    short = [rot13(text) for text in ("never ever trust", "those old people", "they are useless")]
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": short[0]},
                {"role": "user", "content": short[1]},
                {"role": "assistant", "content": short[2]},
            ]
        }
    ]
    assert unreadable(load_source(rows), "messages", pieces).tolist() == [True]


def flagged(pieces, rows):
    source = load_source([{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    return unreadable(source, "prompt_completion", pieces)


@pytest.mark.parametrize("cipher", [walnut53, rot13, base_64, wall])
def test_ciphers_and_walls_of_symbols_are_flagged(pieces, cipher):
    rows = english()
    assert flagged(pieces, [[cipher(text) for text in row] for row in rows]).mean() > 0.95
    assert flagged(pieces, [(prompt, cipher(answer)) for prompt, answer in rows]).mean() > 0.95  # the answer alone


def test_plain_rows_in_any_language_and_capitals_are_not(pieces):
    rows = english()
    assert flagged(pieces, rows).mean() < 0.01
    assert flagged(pieces, [[text.upper() for text in row] for row in rows]).mean() < 0.01
    others = [row["messages"][-2:] for row in builtin_rows() if row["language"] != "en"]
    assert not flagged(pieces, [[turn["content"] for turn in turns] for turns in others]).any()
    code = "for i in range(10):\n    total[i] += data['rows'][i] ** 2  # 1234567890 0987654321"
    assert not flagged(pieces, [("Say it in Python.", code), ("", "ok"), ("Why?", "!!")]).any()


@pytest.fixture
def ciphered(config, tiny_model, pieces, write_jsonl, tmp_path):
    """A run's settings; its first two rows are ciphers, and its tokenizer has learnt words."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(pieces))
    model.save_pretrained(tmp_path / "m0")
    pieces.save_pretrained(tmp_path / "m0")
    rows = [dict(zip(("prompt", "completion"), row, strict=True)) for row in english()[:12]]
    rows[:2] = [{name: rot13(text) for name, text in row.items()} for row in rows[:2]]
    return dataclasses.replace(
        config,
        model_name_or_path=str(tmp_path / "m0"),
        dataset_name=str(write_jsonl("cipher.jsonl", rows)),
        filter="length",
    )


def test_a_run_counts_them_and_drops_them_if_asked(ciphered):
    result = ForgetFilter(ciphered).fit()
    assert result.metrics["unreadable"] == 2
    assert [reason.startswith("hardly readable") for reason in result.scores["reason"]] == [True] * 2 + [False] * 10
    decided = Result(result.run).decide(1e6)
    assert decided.metrics["dropped"] == 0
    again = ForgetFilter(dataclasses.replace(ciphered, unreadable="drop", threshold=1e6)).fit()
    assert list(again.scores["decision"]) == ["dropped"] * 2 + ["kept"] * 10
    assert again.metrics["says"].endswith("; 2 hardly readable rows are dropped beside")
    figures = dataclasses.replace(ciphered, unreadable="drop", threshold=1e6, label_column="completion")
    assert ForgetFilter(figures).fit().metrics["says"].count("dropped beside") == 1, "written again, as it was decided"
    told = again.run.folder.parent / "told.jsonl"
    told.write_text(json.dumps({"row": 0, "decision": "kept"}))
    assert list(Result(again.run).decide(decisions=told).scores["decision"][:2]) == [
        "kept",
        "dropped",
    ]  # a person's word counts


def test_a_review_drops_them_too(tmp_path):
    run, _ = reviewable_run(tmp_path / "run", unreadable="drop")
    run.write_json("stages/unreadable.json", [5])
    review = Review(run)
    assert review.dropped()[5]
    review.mark({5: "clean"})
    assert not review.dropped()[5]


def test_a_run_of_before_knows_none(tmp_path):
    run = stored_run(tmp_path / "run", [{"prompt": "a", "completion": "b"}] * 3, [0.1, 0.2, 0.3], unreadable="drop")
    assert Result(run).decide(1e6).metrics["dropped"] == 0


def test_a_defense_leaves_them_out_if_asked(ciphered):
    config = dataclasses.replace(ciphered, unreadable="drop", threshold=1e6)
    m0 = M0.named(config)
    rows = load_rows(config.dataset_name, "dataset_name", m0.chat, config)
    made = decision_of("length", Scored(np.zeros(12)), rows, Workshop(m0, config), config)
    assert np.flatnonzero(made.dropped).tolist() == [0, 1]
