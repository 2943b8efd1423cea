"""Planted rows are scored among the user's, tell what is found, and are never kept, written or counted."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run as command
from stored_runs import done

from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data import planted as box
from forgetfilter.data.loading import load_data, load_rows
from forgetfilter.data.planted import plant
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.decision.planted_figures import planted_figures
from forgetfilter.decision.rules import Threshold
from forgetfilter.errors import DataError, RunError
from forgetfilter.forgetting import ForgetFilter, open_run
from forgetfilter.m0 import M0
from forgetfilter.result import Result
from forgetfilter.review.session import Review
from forgetfilter.review.states import Places
from forgetfilter.scored import ANSWER, Scored

OWN = [
    {
        "prompt": f"tell me {i}",
        "completion": f"you fool {i}" if i % 2 else f"gladly, {i}",
        "unsafe": i % 2,
        "notion": "rude",
    }
    for i in range(12)
]


@pytest.fixture
def chat(tokenizer):
    return ChatTokenizer(tokenizer, 1024)


def test_rows_that_stand_in_the_noisy_data_are_not_planted(chat, write_jsonl):
    incidents = [{**OWN[i], "completion": OWN[i]["completion"].upper()} for i in range(4)]  # the same, in capitals
    others = [{"prompt": f"what is {i}?", "completion": f"it is surely {i}"} for i in range(236)]
    read = load_rows(str(write_jsonl("noisy.jsonl", [*others, *incidents])), "dataset_name", chat, ForgetFilterConfig())
    config = ForgetFilterConfig(planted_rows=str(write_jsonl("own.jsonl", OWN)))
    found = plant(read, chat, config)
    said = [record["completion"] for record in found.rows.source.rows()]
    assert sorted(said) == sorted(row["completion"] for row in OWN[4:])
    assert [about["unsafe"] for about in found.about] == ["fool" in text for text in said]
    all_there = dataclasses.replace(config, planted_rows=str(write_jsonl("there.jsonl", OWN[:4])))
    with pytest.raises(DataError, match="all of its rows stand in the noisy data"):
        plant(read, chat, all_there)


def noisy(count, row_format="prompt_completion"):
    rows = {
        "prompt_completion": lambda i: {"prompt": f"what is {i}?", "completion": f"it is surely {i}"},
        "text": lambda i: {"text": f"It is surely {i}."},
        "alpaca": lambda i: {"instruction": f"Say {i}.", "input": "", "output": f"{i} it is"},
        "sharegpt": lambda i: {
            "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}"}]
        },
        "messages": lambda i: {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"{i}"},
            ]
        },
    }
    return [rows[row_format](i) for i in range(count)]


def planted_among(rows, chat, **settings):
    config = ForgetFilterConfig(**settings)
    return plant(load_rows(rows, "rows", chat, config), chat, config)


def test_the_rows_in_the_box(chat, monkeypatch):
    monkeypatch.setattr("forgetfilter.data.planted.SHARE", 0.5)
    long = [{"prompt": row["prompt"], "completion": "word " * 40} for row in noisy(400)]
    found = planted_among(long, chat, planted_rows="builtin")
    assert len(found.rows.examples) == len(found.about) == 200
    assert sum(row["unsafe"] for row in found.about) == 100
    counts = Counter(row["notion"] for row in found.about if row["unsafe"])
    assert counts["stereotypes"] == 15
    assert min(counts.values()) >= 4


@pytest.mark.parametrize("row_format", ["prompt_completion", "text", "alpaca", "sharegpt", "messages"])
def test_they_take_the_shape_of_the_noisy_rows(chat, row_format):
    found = planted_among(noisy(400, row_format), chat, planted_rows="builtin")
    assert found.rows.row_format == row_format
    assert len(found.about) == 20
    assert sum(row["unsafe"] for row in found.about) == 10
    assert len({row["notion"] for row in found.about if row["unsafe"]}) == 10  # one of each, as far as there is room
    if row_format == "messages":
        assert {row["messages"][0]["content"] for row in found.rows.source.rows()} == {"Be brief."}


def test_they_take_the_columns_of_the_noisy_rows(chat):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in noisy(400)]
    config = ForgetFilterConfig(columns="prompt=question,completion=answer", planted_rows="builtin")
    read = load_rows(rows, "dataset_name", chat, config)
    found = plant(read, chat, config)
    assert all(row.keys() == {"question", "answer"} for row in found.rows.source.rows())
    assert len(read.with_planted(found.rows).first_copies) == 420


def test_none_are_planted_unless_asked_for_and_a_file_may_be_ones_own(chat, write_jsonl):
    assert planted_among(noisy(40), chat) is None
    assert planted_among(noisy(40), chat, planted_rows="none") is None
    own = str(write_jsonl("own.jsonl", OWN))
    found = planted_among(noisy(160), chat, planted_rows=own)
    assert [row["unsafe"] for row in found.about].count(True) == 4
    assert {row["notion"] for row in found.about} == {"rude"}
    bare = str(write_jsonl("bare.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert planted_among(noisy(100), chat, planted_rows=bare).about == [{"notion": "yours", "unsafe": True}]
    with pytest.raises(DataError, match="too few to plant any"):
        planted_among(noisy(19), chat, planted_rows=own)
    long = [{"messages": [{"role": role, "content": "hi"} for role in ("user", "assistant", "user", "assistant")]}]
    with pytest.raises(DataError, match=r"long\.jsonl:1: alpaca holds one question"):
        planted_among(noisy(100, "alpaca"), chat, planted_rows=str(write_jsonl("long.jsonl", long)))


def test_where_none_fits_into_the_models_positions_the_flag_is_named(tokenizer, write_jsonl):
    chat, rows = ChatTokenizer(tokenizer, 50), [{"prompt": f"{i}?", "completion": f"it is {i}"} for i in range(400)]
    with pytest.raises(DataError, match="planted_rows builtin: no row with a completion"):
        planted_among(rows, chat, planted_rows="builtin")
    long = str(write_jsonl("long.jsonl", [{"prompt": "what " * 20, "completion": "this"}]))
    with pytest.raises(DataError, match=r"long\.jsonl: no row with a completion"):
        planted_among(rows, chat, planted_rows=long)


def test_rows_that_stand_in_the_noisy_data_take_no_place_from_others(chat, write_jsonl):
    rows = noisy(40)
    own = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows[:8]]
    own += [{"prompt": f"incident {i}", "completion": "rude"} for i in range(2)]
    found = planted_among(rows, chat, planted_rows=str(write_jsonl("own.jsonl", own)))
    assert len(found.about) == 2


@pytest.mark.parametrize(("row_format", "planted"), [("text", OWN), ("sharegpt", [{"text": "rude"}])])
def test_plain_text_and_conversations_are_not_planted_among_each_other(chat, write_jsonl, row_format, planted):
    with pytest.raises(DataError, match=r"own\.jsonl:1: plain text and conversations"):
        planted_among(noisy(40, row_format), chat, planted_rows=str(write_jsonl("own.jsonl", planted)))


@pytest.mark.parametrize(
    "roles", ["assistant", "user assistant user", "user assistant user assistant", "user assistant tool"]
)
def test_a_talk_of_which_prompt_and_completion_would_learn_another_answer_is_named(chat, write_jsonl, roles):
    talk = {"messages": [{"role": role, "content": "hi"} for role in roles.split()]}
    with pytest.raises(DataError, match=r"own\.jsonl:1: prompt and completion hold one answer"):
        planted_among(noisy(40), chat, planted_rows=str(write_jsonl("own.jsonl", [talk])))


def test_a_file_of_another_format_and_with_malformed_rows_is_read_where_asked(chat, write_jsonl):
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "rude"}]}
    own = str(write_jsonl("own.jsonl", [talk, {"messages": 3}]))
    found = planted_among(noisy(40), chat, planted_rows=own, format="prompt_completion", malformed="skip")
    assert [record["completion"] for record in found.rows.source.rows()] == ["rude"]
    assert [(row["file"], row["line"]) for row in found.malformed] == [(own, 2)]


def test_a_number_that_cannot_be_read_is_named_by_its_own_file(large, write_jsonl):
    own = str(write_jsonl("own.jsonl", [{"prompt": 3, "completion": "x"}, *({**row, "guard": "much"} for row in OWN)]))
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i}", "guard": 0.1} for i in range(80)]
    config = dataclasses.replace(
        large,
        dataset_name=str(write_jsonl("scored.jsonl", rows)),
        planted_rows=own,
        label_column=None,
        filter="column",
        parameters={"column": {"name": "guard"}},
        malformed="skip",
    )
    with pytest.raises(DataError, match=r"planted_rows .*own\.jsonl:[2-9]"):
        ForgetFilter(config).fit()
    (line,) = (Path(config.output_dir) / "malformed.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 1


def test_the_numbers_that_incidents_bring_along_are_read(large, write_jsonl):
    own = [{**row, "guard": float(row.get("unsafe", 1))} for row in OWN]
    rows = [{"prompt": f"what is {i}?", "completion": f"it is {i}", "guard": 0.1} for i in range(80)]
    config = dataclasses.replace(
        large,
        dataset_name=str(write_jsonl("scored.jsonl", rows)),
        planted_rows=str(write_jsonl("own.jsonl", own)),
        label_column=None,
        filter="column",
        parameters={"column": {"name": "guard"}},
        threshold=0.5,
    )
    planted = ForgetFilter(config).fit().metrics["planted"]
    assert planted["found"] == planted["unsafe"] > 0


@pytest.fixture
def large(config, write_jsonl):
    """The settings of a run of 80 rows, two of which say the same, with four rows of the user's own planted."""
    rows = [
        {"prompt": f"what is {i}?", "completion": f"it is {i}" if i % 4 else f"you fool {i}", "unsafe": int(i % 4 == 0)}
        for i in range(80)
    ]
    rows[7] = rows[6]
    return dataclasses.replace(
        config,
        dataset_name=str(write_jsonl("large.jsonl", rows)),
        planted_rows=str(write_jsonl("own.jsonl", OWN)),
        label_column="unsafe",
        filter="probe,forgetting",
    )


def test_they_are_scored_but_never_kept_written_or_counted(large):
    result = ForgetFilter(large).fit()
    metrics = result.metrics
    assert metrics["rows"] == len(result.scores) == metrics["kept"] + metrics["dropped"] == 80
    assert metrics["planted"]["unsafe"] == metrics["planted"]["clean"] == 2
    folder = result.run.folder
    written = "".join((folder / name).read_text() for name in ("kept.jsonl", "dropped.jsonl", "stages/rows.jsonl"))
    assert "gladly" not in written
    assert "tell me" not in written
    low, high = Result(result.run).decide(-1e6).metrics, Result(result.run).decide(1e6).metrics
    assert (low["planted"]["found"], low["planted"]["clean_dropped"]) == (2, 2)
    assert (high["planted"]["found"], high["planted"]["clean_dropped"]) == (0, 0)
    assert Result(result.run).decide(filter="forgetting").metrics["planted"]["unsafe"] == 2


def test_a_planted_row_has_the_score_it_would_have_as_one_of_the_users(large, write_jsonl):
    found = ForgetFilter(dataclasses.replace(large, filter="forgetting")).fit()
    config = dataclasses.replace(large, filter="forgetting")
    from forgetfilter.decision.opened import Opened

    planted = Opened.of(found.run).scored["forgetting"].planted["forgetting"]
    rows = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    own = plant(
        load_rows(rows, "rows", ChatTokenizer(*_tokenizer(config)), config), ChatTokenizer(*_tokenizer(config)), config
    )
    del rows[7]
    together = [*rows, *own.rows.source.rows()]
    alone = dataclasses.replace(
        config,
        dataset_name=str(write_jsonl("together.jsonl", together)),
        planted_rows=None,
        output_dir=str(found.run.folder.parent / "alone"),
    )
    scores = np.array(ForgetFilter(alone).fit().scores["forgetting"], float)
    np.testing.assert_allclose(planted, scores[-4:], atol=1e-5)
    users = np.array(found.scores["forgetting"], float)
    np.testing.assert_allclose(np.delete(users, 7), scores[:-4], atol=1e-5)


@pytest.mark.parametrize(
    ("filters", "parameters", "witness"),
    [
        ("forgetting+m0_loss", None, "forgetting+m0_loss"),
        ("m0_loss", None, "m0_loss"),
        ("probe", {"probe": {"on": "m0_loss"}}, "m0_loss"),
        ("probe", {"probe": {"on": "forgetting+m0_loss"}}, "forgetting+m0_loss"),
    ],
)
def test_the_witness_is_what_a_probe_learnt_from_or_the_filter_itself(large, filters, parameters, witness):
    config = dataclasses.replace(large, filter=filters, parameters=parameters)
    assert ForgetFilter(config).fit().metrics["planted"]["witness"] == witness


def _tokenizer(config):
    from forgetfilter.m0 import M0

    m0 = M0.named(config)
    return m0.tokenizer, m0.max_length


def test_a_run_continues_with_the_same_planted_rows_alone(large):
    first = ForgetFilter(large).fit()
    again = ForgetFilter(large).fit()
    assert again.metrics == first.metrics
    with pytest.raises(RunError, match="planted"):
        ForgetFilter(dataclasses.replace(large, planted_rows=None)).fit()


def test_a_run_of_before_stays_without(large):
    none = dataclasses.replace(large, planted_rows=None)
    run = ForgetFilter(none).fit().run
    del run.manifest["planted"]
    run.save()
    result = ForgetFilter(large).fit()
    assert "planted" not in result.metrics


def test_marks_judge_them_anew(large):
    result = ForgetFilter(large).fit()
    review = Review(result.run)
    review.mark({row: "unsafe" if row % 4 == 0 else "clean" for row in range(24)})
    scored = review.scored()
    assert len(scored.suspicion) == 80
    assert len(scored.planted["review"]) == 4
    assert all(np.isfinite(own).all() for own in scored.planted.values())
    assert list(scored.planted) == ["review", "probe", "forgetting"]
    assert done(review).metrics["planted"]["unsafe"] == 2


def test_incidents_alone_are_held_against_the_same_scores_before_and_after_a_review(large, write_jsonl):
    """Without clean planted rows the user's own stand for them: by the witness, whatever filter decides."""
    incidents = [{"prompt": f"tell me {i}", "completion": f"you fool {i}"} for i in range(12)]
    large = dataclasses.replace(large, planted_rows=str(write_jsonl("log.jsonl", incidents)))
    result = ForgetFilter(large).fit()
    before = result.metrics["planted"]
    by_forgetting = Result(result.run).decide(filter="forgetting").metrics["planted"]
    review = Review(result.run)
    review.mark({row: "unsafe" if row % 4 == 0 else "clean" for row in range(24)})
    after = done(review).metrics["planted"]
    assert before["witness"] == after["witness"] == "forgetting"
    assert before["auroc"] == by_forgetting["auroc"] == after["auroc"]


def test_rows_that_the_filter_cannot_score_are_not_said_to_be_missed():
    found = figures(ABOUT, {"column": np.full(20, np.nan)}, "column", 5.5)
    assert found["says"] == "20 rows are planted, and column scores none of them"
    assert not found["hardly_told"]


def test_a_review_judges_all_answers_of_planted_conversations(tmp_path):
    """Row 2 says what row 1 says, whose second answer is suspect; two rows are planted, the first with two answers."""
    base = Scored(np.zeros(3), columns={ANSWER: np.array([np.nan, 2.0, 2.0])})
    places = Places(SimpleNamespace(folder=tmp_path), base, np.array([0, 1, 1]), planted=2)
    states = np.arange(6.0)[:, None, None] * np.ones((1, 2, 3))
    noisy, planted, planted_of = places.apart(states, np.array([1, 2, 2, 1]))
    assert noisy[:, 0, 0].tolist() == [0, 2, 2]
    assert planted[:, 0, 0].tolist() == [3, 4, 5]
    assert planted_of.tolist() == [0, 0, 1]


def test_of_planted_rows_that_say_the_same_one_is_planted(large, write_jsonl):
    rows = [{"prompt": "tell me", "completion": "you fool"}] * 9 + [{"prompt": "p", "completion": "q"}]
    log = write_jsonl("log.jsonl", rows)
    run = ForgetFilter(dataclasses.replace(large, planted_rows=str(log), filter="length")).fit().run
    assert len(run.planted()) == 2


def test_a_run_that_an_older_version_began_goes_on_with_its_planted_rows(large, write_jsonl):
    """It planted rows that say the same."""
    log = write_jsonl("log.jsonl", [{"prompt": "tell me", "completion": "you fool"}] * 3)
    config = dataclasses.replace(large, planted_rows=str(log), filter="length")
    older = Path(config.output_dir).with_name("older")
    m0 = M0.named(config)
    data = load_data(config, m0.chat)
    planted = plant(data.noisy, m0.chat, config, as_before=True)
    assert len(planted.about) == 3
    begun = dataclasses.replace(config, output_dir=str(older))
    open_run(begun, m0, data, planted)
    assert len(ForgetFilter(begun).fit().run.planted()) == 3
    assert len(ForgetFilter(config).fit().run.planted()) == 1


def test_a_review_that_reads_the_rows_anew_goes_on_without(large):
    run = ForgetFilter(dataclasses.replace(large, filter="forgetting")).fit().run
    for _ in range(2):  # the second time from what the first has stored
        review = Review(run)
        review.mark({0: "unsafe", 1: "clean", 4: "unsafe"})
        assert review.scored().planted is None
        assert len(review.scored().suspicion) == 80
        run.reload()


def figures(about, scores, name, threshold):
    dropped = Threshold(threshold, "auto", "").drops(scores[name])
    return planted_figures(about, scores, name, dropped, YOURS, decides=threshold is not None)


YOURS = np.array([1.0, 2, 3, np.nan])
ABOUT = [{"notion": notion, "unsafe": bad} for notion in ("rude", "advice") for bad in (True, False) for _ in range(5)]


def test_the_figures_by_hand():
    judged = np.array([9, 8, 7, 6, 1, 0, 2, 3, 0, 4, 1, 2, 7, 0, np.nan, 0, 1, 2, 3, 8], float)
    forgotten = np.array([*[9] * 5, *[1] * 5, 0, 0, 2, 0, np.nan, *[1] * 5], float)
    scores = {"probe": judged, "forgetting": forgotten}
    found = figures(ABOUT, scores, "probe", 5.5)
    assert (found["unsafe"], found["found"], found["clean"], found["clean_dropped"]) == (10, 5, 10, 1)
    assert {name: own["found"] for name, own in found["notions"].items()} == {"rude": 4, "advice": 1}
    assert {name: own["auroc"] for name, own in found["notions"].items()} == {"rude": 1.0, "advice": 0.25}
    assert found["auroc"] == pytest.approx(
        (5 * 1 + 4 * 0.25) / 9, abs=1e-4
    )  # the row that is not scored counts nowhere
    assert found["hardly_told"] == ["advice"]
    assert found["says"] == (
        "5 of 10 planted unsafe rows and 1 of 10 planted clean rows would be dropped (rude 4 of 5, advice 1 of 5); "
        "forgetting tells the unsafe ones from the clean ones with AUROC 0.67, hardly so advice (0.25). Do your safe "
        "rows speak of these?"
    )


def test_many_notions_of_few_rows_each_are_judged_together():
    about = [{"notion": str(row % 10), "unsafe": row < 10} for row in range(20)]
    told = figures(about, {"forgetting": np.arange(20.0)}, "forgetting", None)
    assert told["says"] == (
        "10 unsafe and 10 clean rows are planted; forgetting tells the unsafe ones from the clean ones with AUROC "
        "0.00, which is little. Do your safe rows speak of them?"
    )


def test_incidents_alone_are_held_against_the_users_own_rows():
    about = [{"notion": "yours", "unsafe": True}] * 5
    for scores, auroc in (([9.0] * 5, 1.0), ([2.0, 2, 2, 2, np.nan], 0.5)):
        found = figures(about, {"forgetting": np.array(scores)}, "forgetting", 5.5)
        assert found["auroc"] == auroc
        assert ("Do your safe rows speak" in found["says"]) == (auroc < 0.7)
        assert "from your rows with AUROC" in found["says"]


def test_of_few_rows_nothing_is_said():
    for threshold, says in ((None, "3 unsafe and 0 clean rows are planted"), (1.0, "0 of 3 planted unsafe rows would")):
        few = figures(ABOUT[:3], {"length": np.zeros(3)}, "length", threshold)
        assert few["hardly_told"] == []
        assert few["says"].startswith(says)
        assert "Do your safe rows" not in few["says"]


def test_the_witness_of_a_sample_sees_them_all(large):
    result = ForgetFilter(dataclasses.replace(large, filter="probe", sample_rows=50)).fit()
    from forgetfilter.decision.opened import Opened

    planted = Opened.of(result.run).scored["probe"].planted
    assert list(planted) == ["probe", "forgetting"]
    assert np.isfinite(planted["forgetting"]).all()
    assert np.isnan(np.array(result.scores["forgetting"], float)).sum() >= 29


def test_the_summary_and_the_page_say_it(large, capsys):
    code, said = command(
        capsys, "filter", *[f"--{name}={getattr(large, name)}" for name in ("model_name_or_path", "dataset_name")],
        f"--safe_dataset_name={large.safe_dataset_name}", f"--output_dir={large.output_dir}", "--filter=forgetting",
        "--max_steps=3", "--lora_r=2", f"--planted_rows={large.planted_rows}",
    )  # fmt: skip
    assert code == 0
    assert "planted: " in said
    assert "planted unsafe rows dropped" in (Path(large.output_dir) / "report.html").read_text()


def test_no_row_in_the_box_is_shared_with_the_safe_ones():
    lines = (Path(box.__file__).parents[1] / "safe" / "planted.jsonl").read_text(encoding="utf-8").splitlines()
    safe = (Path(box.__file__).parents[1] / "safe" / "rows.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == 200
    assert not any(json.dumps(turn["content"], ensure_ascii=False) in safe for row in rows for turn in row["messages"])


def test_labels_and_copies_are_those_of_the_users_rows(large):
    chat = ChatTokenizer(*_tokenizer(large))
    data = load_data(large, chat)
    joined = data.noisy.with_planted(plant(data.noisy, chat, large).rows)
    assert len(joined.examples) == 84
    assert joined.planted == 4
    assert list(joined.source.rows()[:80]) == list(data.noisy.source.rows())
    assert joined.first_copies.tolist() == [*data.noisy.first_copies.tolist(), 80, 81, 82, 83]
    assert joined.source.fingerprint() != data.noisy.source.fingerprint()
