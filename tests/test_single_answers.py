"""A conversation is judged by its most suspect answer: one bad turn among good ones does not hide."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_runs import done

from forgetfilter.data.loading import load_rows
from forgetfilter.data.single_answers import single_answers
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decision.opened import read_scores
from forgetfilter.filters import FILTERS
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.new_rows import score
from forgetfilter.review.session import Review
from forgetfilter.scored import ANSWER, Scored


def talk(*answers, number=0, **more):
    said = []
    for place, answer in enumerate(answers):
        said += [("user", f"question {place} of {number}?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in said], **more}


@pytest.fixture
def chat(tokenizer):
    return ChatTokenizer(tokenizer, 1024)


def load(rows, chat, config):
    return load_rows(rows, "rows", chat, config)


def test_each_answer_is_learnt_alone_after_all_that_precedes_it(chat, config):
    rows = load([talk("one", "two", "three"), talk("only", number=1)], chat, config)
    single, row_of = single_answers(rows, chat)
    assert row_of.tolist() == [0, 0, 0, 1]
    decode = chat.tokenizer.decode
    learnt = [decode([label for label in example.labels if label >= 0]) for example in single.examples]
    assert learnt == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>", "only<|im_end|>"]
    whole = rows.examples[0]
    assert single.examples[1].input_ids == whole.input_ids[: len(single.examples[1].input_ids)]
    assert single.examples[3] == rows.examples[1]
    assert single.trainable() == rows.examples  # trainings see whole conversations
    assert single.select([1, 2]).trainable() == [rows.examples[0]]  # of a sample of the answers as well
    again = load(list(single.source.rows()), chat, config)  # filters that read texts see the same
    assert [example.labels for example in again.examples] == [example.labels for example in single.examples]


def test_where_all_answers_score_the_same_none_is_the_most_suspect():
    scored = Scored(np.array([2.0, 2.0, 1.0, 3.0, 5.0]))
    found = scored.most_suspect(np.array([0, 0, 1, 1, 2]))
    assert found.suspicion.tolist() == [2, 3, 5]
    np.testing.assert_array_equal(found.columns[ANSWER], [np.nan, 2, np.nan])


def test_rows_of_one_answer_and_plain_text_stay_as_they_are(chat, config):
    assert single_answers(load([talk("one")] * 2, chat, config), chat) is None
    assert single_answers(load([{"text": "Plain."}], chat, config), chat) is None
    context = talk("first", "second")
    context["messages"][1]["train"] = False  # context alone, not learnt
    assert single_answers(load([context], chat, config), chat) is None


def test_answers_behind_the_cut_are_not_encoded(tokenizer, config, monkeypatch):
    short = ChatTokenizer(tokenizer, 100)
    rows = load([talk(*["a long answer"] * 50)], short, config)
    encode, asked = short.encode, []
    monkeypatch.setattr(short, "encode", lambda turns: asked.append(len(turns)) or encode(turns))
    single, belongs = single_answers(rows, short)
    scorable = [example.scorable for example in single.examples]
    assert scorable == [True] * (len(scorable) - 1) + [False]
    assert len(asked) == len(belongs) < 10


def test_the_most_suspect_answer_counts():
    nan = np.nan
    scored = Scored(
        np.array([0.1, 0.9, nan, 0.3, nan, nan]),
        {"loss": np.array([1.0, 2, 3, 4, 5, 6])},
        {"M0": np.array([-1.0, -2, -3, -4, -5, -6])},
        pa.array([[0.5], [0.7, 0.8], None, [0.2], None, None], pa.list_(pa.float32())),
    )
    found = scored.most_suspect(np.array([0, 0, 0, 1, 2, 2]))
    np.testing.assert_array_equal(found.suspicion, [0.9, 0.3, nan])
    np.testing.assert_array_equal(found.columns[ANSWER], [2, nan, nan])
    np.testing.assert_array_equal(found.columns["loss"], [2, 4, 5])
    np.testing.assert_array_equal(found.moments["M0"], [-2, -4, -5])
    costs = found.token_costs.to_pylist()
    assert [None if one is None else np.round(one, 3).tolist() for one in costs] == [[0.5, 0.7, 0.8], [0.2], None]


@pytest.fixture
def talks(config, write_jsonl):
    """Settings of a run of conversations: rows 0, 4, 8, ... have a bad second answer of four."""
    rows = [
        talk(f"it is {i}", f"you fool {i}" if i % 4 == 0 else f"surely {i}", f"yes {i}", f"bye {i}", number=i, tag=i)
        for i in range(24)
    ]
    rows += [talk(f"it is {i}", number=i, tag=i) for i in range(24, 32)]
    rows += [dict(rows[1])]
    return dataclasses.replace(config, dataset_name=str(write_jsonl("talks.jsonl", rows)), filter="probe,forgetting")


def test_a_run_of_conversations_from_end_to_end(talks):
    result = ForgetFilter(talks).fit()
    scores = result.scores
    assert len(scores) == 33
    answers = np.array(scores[ANSWER], float)
    assert np.isnan(answers[24:32]).all()
    assert set(answers[:24]) <= {1, 2, 3, 4}
    assert f"answer {answers[0]:.0f} is the most suspect" in scores["reason"][0]
    assert "answer" not in scores["reason"][24]
    assert (scores["probe"][1], answers[1]) == (scores["probe"][32], answers[32])  # a copy shares it
    kept = (result.run.folder / "kept.jsonl").read_text() + (result.run.folder / "dropped.jsonl").read_text()
    assert sorted(kept.splitlines()) == sorted((result.run.folder / "stages/rows.jsonl").read_text().splitlines())
    stages = result.run.manifest["stages"]
    (noisy,) = (entry for part, entry in stages.items() if part.startswith("noisy-"))
    assert noisy["steps"] == 6
    assert ForgetFilter(talks).fit().metrics == result.metrics


def test_its_score_is_that_of_the_answer_alone(talks, write_jsonl):
    """Row by row as if each answer had been given by itself; the trainings are the same."""
    config = dataclasses.replace(talks, filter="m0_loss")
    found = ForgetFilter(config).fit()
    rows = [json.loads(line) for line in Path(talks.dataset_name).read_text().splitlines()][:2]
    alone = []
    for row in rows:
        for place in range(1, 8, 2):
            said = [dict(turn) for turn in row["messages"][: place + 1]]
            for turn in said[1:-1:2]:
                turn["train"] = False
            alone.append({"messages": said})
    apart = dataclasses.replace(
        config, dataset_name=str(write_jsonl("alone.jsonl", alone)), output_dir=str(found.run.folder.parent / "alone")
    )
    single = np.array(ForgetFilter(apart).fit().scores["m0_loss"], float).reshape(2, 4)
    np.testing.assert_allclose(np.array(found.scores["m0_loss"][:2], float), single.max(1), atol=1e-5)
    np.testing.assert_array_equal(np.array(found.scores[ANSWER][:2], float), single.argmax(1) + 1)


def test_a_review_of_conversations(talks):
    result = ForgetFilter(talks).fit()
    review = Review(result.run)
    review.mark({row: "unsafe" if row % 4 == 0 else "clean" for row in range(12)})
    assert len(review.scored().suspicion) == 33
    assert np.isfinite(review.scored().suspicion).all()
    words = read_scores(done(review).run)["decision"].to_pylist()
    assert len(words) == 33
    assert [word == "dropped" for word in words[:12]] == [row % 4 == 0 for row in range(12)]


def said_of(review):
    review.mark({row: "unsafe" if row % 4 == 0 else "clean" for row in range(12)})
    return review.scored().suspicion


def test_a_review_ranks_by_the_same_answers_whatever_filters_looked_and_whether_states_are_there(talks):
    """Row 32 says what row 1 says: the filter column sees it, others see one of the two."""
    rows = [json.loads(line) for line in Path(talks.dataset_name).read_text().splitlines()]
    Path(talks.dataset_name).write_text("".join(json.dumps({**row, "risk": i}) + "\n" for i, row in enumerate(rows)))
    expected = said_of(Review(ForgetFilter(talks).fit().run))
    both = {"filter": "probe,column", "parameters": {"column": {"name": "risk"}}}
    beside = dataclasses.replace(talks, output_dir=f"{talks.output_dir}-both", **both)
    np.testing.assert_allclose(said_of(Review(ForgetFilter(beside).fit().run)), expected, atol=1e-3)
    alone = dataclasses.replace(talks, output_dir=f"{talks.output_dir}-alone", filter="forgetting")
    run = ForgetFilter(alone).fit().run
    assert np.isfinite(said_of(Review(run))).all()
    stored = pq.read_metadata(run.folder / f"{run.manifest['states']['noisy']}.parquet")
    assert stored.num_rows == run.answers().sum() > 33


def test_new_conversations_are_judged_by_their_most_suspect_answer(talks, write_jsonl):
    result = ForgetFilter(talks).fit()
    result.mark({row: "unsafe" if row % 4 == 0 else "clean" for row in range(24)})
    run = done(result.review).run
    long = talk("it is 1", "you fool 3", "yes", number=1)
    parts = [{"messages": [dict(turn) for turn in long["messages"][: place + 1]]} for place in (1, 3, 5)]
    for part in parts:
        for turn in part["messages"][1:-1:2]:
            turn["train"] = False
    folder = score(run, str(write_jsonl("new.jsonl", [long, *parts])))
    found = pq.read_table(folder / "scores.parquet")["probe"].to_numpy()
    assert found[0] == pytest.approx(found[1:].max(), abs=1e-2)


def test_filters_of_every_kind_judge_conversations(talks):
    names = ["words", "m0_loss", "self_judge", "seal", "second_split", "length", "safe_only"]
    assert set(names) <= FILTERS.keys()
    given = {"filter": ",".join(names), "parameters": {"seal": {"epochs": 1}}}
    found = ForgetFilter(dataclasses.replace(talks, **given)).fit().scores
    for name in names:
        scores = np.array(found[name], float)
        assert len(scores) == 33
        assert np.isfinite(scores).all(), name
