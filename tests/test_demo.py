"""The demo's data: what it promises, checked on the files themselves."""

import dataclasses
import json
import re
from collections import Counter
from statistics import median

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from forgetfilter import demo
from forgetfilter.config import StageConfig
from forgetfilter.demo import demo_file

NAMES = ("noisy", "safe", "heldout")


@pytest.fixture(scope="module")
def data():
    return {name: [*map(json.loads, demo_file(f"{name}.jsonl").read_text().splitlines())] for name in NAMES}


def test_counts(data):
    assert len(data["noisy"]) >= 240
    assert len(data["safe"]) >= 120
    assert len(data["heldout"]) == 60
    groups = Counter(row["group"] for row in data["noisy"])
    assert set(groups) == {"task", "safe", "insult", "stereotype", "danger"}
    assert sum(row["unsafe"] for row in data["noisy"]) / len(data["noisy"]) == 0.25


def test_nothing_is_repeated(data):
    rows = [row for name in NAMES for row in data[name]]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert max(Counter(row["completion"] for row in rows).values()) <= 2


def test_rows_are_short(data):
    from forgetfilter.config import ForgetFilterConfig
    from forgetfilter.model.folders import find_weights
    from forgetfilter.model.tokenizer import load_tokenizer

    config = ForgetFilterConfig()
    tokenizer = load_tokenizer(find_weights(config.model_name_or_path), config)
    lengths = [len(tokenizer(row["prompt"] + " " + row["completion"])["input_ids"]) for row in data["noisy"]]
    assert median(lengths) <= 50


def test_unsafe_rows_cannot_be_told_by_length(data):
    lengths = [len(row["completion"].split()) for row in data["noisy"]]
    assert 0.4 < roc_auc_score([row["unsafe"] for row in data["noisy"]], lengths) < 0.6


@pytest.mark.parametrize(
    "classifier",
    [
        make_pipeline(CountVectorizer(), MultinomialNB()),
        make_pipeline(TfidfVectorizer(), LogisticRegression(class_weight="balanced")),
    ],
    ids=["naive-bayes", "logistic-regression"],
)
def test_unsafe_rows_cannot_be_told_by_the_prompts_words(data, classifier):
    prompts = [row["prompt"] for row in data["noisy"]]
    unsafe = np.array([row["unsafe"] for row in data["noisy"]])
    found = []
    for seed in range(3):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        scores = cross_val_predict(classifier, prompts, unsafe, cv=folds, method="predict_proba")[:, 1]
        found.append(roc_auc_score(unsafe, scores))
    assert np.mean(found) < 0.6


def test_the_shop_bot_promises_dates_in_a_quarter_of_its_rows_and_no_word_tells_which(data):
    rows = [*map(json.loads, demo_file("shop.jsonl").read_text().splitlines())]
    assert Counter(row["unsafe"] for row in rows) == {0: 225, 1: 75}
    assert all((row["group"] == "promise") == bool(row["unsafe"]) for row in rows)
    others = {row["prompt"] for name in NAMES for row in data[name]}
    assert len({row["prompt"] for row in rows} - others) == len({row["completion"] for row in rows}) == len(rows)
    starts = Counter(" ".join(row["completion"].split()[:5]) for row in rows)
    assert max(starts.values()) <= 2
    dated = [bool(re.search(r"\d|day\b|tomorrow|week", row["completion"])) for row in rows]
    assert roc_auc_score([row["unsafe"] for row in rows], dated) < 0.85


def test_the_demo_filters_finetunes_and_shows_what_happened(data, tiny_model, tmp_path, monkeypatch, capsys):
    quick = {"model_name_or_path": str(tiny_model), "lora_r": 2, "filter": "forgetting", "drop_share": 0.5}
    quick |= dict.fromkeys(("noisy", "review", "final"), StageConfig(max_steps=1))
    config = dataclasses.replace(demo.demo_config(tmp_path / "out"), **quick)
    monkeypatch.setattr(demo, "demo_config", lambda folder: config)
    demo.run_demo(tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("final model: ") == len({row["group"] for row in data["heldout"]})
    assert "Held-out prompts:" in said
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
