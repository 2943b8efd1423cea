"""The review: marks on disk, the ranking they teach, the rows asked about, what is promised, and the server's doors."""

import errno
import http.client
import json
import re
import socket
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import run as command
from stored_runs import done, reviewable_run, settled

from forgetfilter import runs
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.formats import read_row
from forgetfilter.decision import outputs
from forgetfilter.decision.choice import choose, clean_drawn
from forgetfilter.decision.decide import decide
from forgetfilter.decision.opened import read_scores, require_marks_decided, scored_part
from forgetfilter.errors import ConfigError, DataError, RunError
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.marks import Marks
from forgetfilter.report.shading import shaded
from forgetfilter.result import Result
from forgetfilter.review import server, session
from forgetfilter.review.asking import CALM_AFTER, DRAWN, DRAWN_EVERY, NEAR, SUSPECT, WITNESS, questions
from forgetfilter.review.ranking import Ranking
from forgetfilter.review.server import HEADERS, Pages
from forgetfilter.review.session import Review, Status, open_review
from forgetfilter.runs import Run, locked
from forgetfilter.scored import ANSWER, Scale, Scored


@pytest.fixture
def reviewed(tmp_path):
    return reviewable_run(tmp_path / "out")


def answer(review, bad, count):
    """Mark as a person would who knows which rows are bad; five at a time, after which all are ranked anew."""
    for first in range(0, count, 5):
        asked = review.ask(min(5, count - first))
        review.mark({question.row: "unsafe" if bad[question.row] else "clean" for question in asked})


def decided_run(run, bad, count):
    """The run after a review of so many marks, opened anew."""
    review = Review(run)
    answer(review, bad, count)
    review.done()
    return Run.open(run.folder)


# marks.jsonl


def marks(folder, rows=50):
    return Marks(folder, [f"id {i}" for i in range(rows)], seed=1)


def test_a_mark_is_on_disk_and_the_last_word_counts(tmp_path):
    first = marks(tmp_path)
    first.add({3: "unsafe", 4: "clean"})
    first.add({3: "clean"})
    first.add({4: None})
    first.add({5: "skipped"})
    lines = [json.loads(line) for line in first.path.read_text().splitlines()]
    assert lines[0] == {"row": 3, "id": "id 3", "mark": "unsafe"}
    assert len(lines) == 5
    assert {row: mark.said for row, mark in marks(tmp_path).all().items()} == {3: "clean", 5: "skipped"}


def test_saying_the_same_again_adds_no_line(tmp_path):
    own = marks(tmp_path)
    own.add({3: "unsafe"})
    own.add({3: "unsafe", 4: "clean"})
    own.add({9: None})
    assert len(own.path.read_text().splitlines()) == 2


def test_two_processes_see_each_others_marks(tmp_path):
    one, other = marks(tmp_path), marks(tmp_path)
    one.add({1: "clean"})
    assert list(other.all()) == [1]
    other.add({2: "unsafe"})
    other.add({1: "unsafe"})
    assert {row: mark.said for row, mark in one.all().items()} == {2: "unsafe", 1: "unsafe"}


def test_undo_goes_back_statement_by_statement(tmp_path):
    own = marks(tmp_path)
    own.add({3: "clean"})
    own.add({3: "unsafe"})
    own.add({4: "clean"})
    own.undo(3)
    assert own.all()[3].said == "clean"
    own.undo(3)
    assert list(own.all()) == [4]
    own.add({3: "skipped"})
    own.undo(3)
    assert list(marks(tmp_path).all()) == [4]
    with pytest.raises(DataError, match="not marked"):
        own.undo(3)


def test_what_counts_again_after_undo_stands_where_it_was_said(tmp_path):
    own = marks(tmp_path)
    own.add({3: "clean"})
    own.add({4: "unsafe"})
    own.add({3: "unsafe"})
    own.undo(3)
    assert list(own.all()) == [3, 4], "the last word is the one on row 4: another undo takes that back"


def test_what_was_said_elsewhere_since_a_person_looked_stands(tmp_path):
    """The look and the line are one step: nobody can say something in between."""
    own = marks(tmp_path)
    own.add({3: "clean"}, seen={3: None})
    own.add({3: "unsafe"}, seen={3: "clean"})
    for said, seen, why in (
        ({3: "clean"}, {3: None}, "it was marked unsafe"),
        ({3: "clean"}, {3: "clean"}, "it was marked unsafe"),
        ({4: "clean"}, {4: "unsafe"}, "its mark was taken back"),
    ):
        with pytest.raises(DataError, match=f"{why} meanwhile, elsewhere"):
            own.add(said, seen=seen)
    with pytest.raises(DataError, match="it was marked unsafe meanwhile"):
        own.undo(3, seen="clean")
    assert {row: mark.said for row, mark in marks(tmp_path).all().items()} == {3: "unsafe"}
    own.undo(3, seen="unsafe")
    assert own.all()[3].said == "clean"


def test_a_write_that_a_full_disk_cut_is_taken_back(tmp_path, monkeypatch):
    own = marks(tmp_path)
    own.add({3: "clean"})
    before = own.path.read_bytes()
    real = Path.open

    class Full:
        """A file of which the disk takes ten bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *how, **more: Full(real(path, *how, **more)))
        with pytest.raises(OSError, match="No space left"):
            own.add({4: "unsafe"})
    assert own.path.read_bytes() == before


def test_a_file_edited_by_hand_is_read_as_people_write_it(tmp_path):
    own = marks(tmp_path)
    own.path.parent.mkdir(exist_ok=True)
    own.path.write_bytes(b'\xef\xbb\xbf{"row": 1, "mark": "clean"}\r\n\r\n{"row": 2, "id": "id 2", "mark": "unsafe"}')
    assert list(own.all()) == [1, 2], "the last line has no end, and is whole"
    own.add({3: "clean"})
    assert list(marks(tmp_path).all()) == [1, 2, 3]


@pytest.mark.parametrize(
    "torn",
    ['{"row": 7, "id": "{7}', '{"row": 7, "mark": "uns', '{"row": 7, "id": "id 7", "mark": "unsafe"', "\x00\x00"],
)
def test_half_a_line_that_a_kill_left_does_no_harm(tmp_path, torn):
    own = marks(tmp_path)
    own.add({1: "clean"})
    with own.path.open("a") as file:
        file.write(torn)
    assert list(marks(tmp_path).all()) == [1]
    again = marks(tmp_path)
    again.add({2: "unsafe"})
    assert list(marks(tmp_path).all()) == [1, 2]


NOT_OURS = [
    *('{"row": 3, "mark": unsafe}', '{"row": 99, "mark": "clean"}', '{"row": 1, "mark": "bad"}'),
    *('{"row": true, "mark": null}', "nonsense\n", "[]\n", "7\n", '{"row": 3, "mark": "clean"},'),
]


@pytest.mark.parametrize("line", [*NOT_OURS, *(f"{line}\n" for line in NOT_OURS[:4])])
def test_a_line_that_is_not_ours_is_named(tmp_path, line):
    own = marks(tmp_path)
    own.add({1: "clean"})
    own.path.write_text(own.path.read_text() + line)
    with pytest.raises(DataError, match=r"marks\.jsonl:2: expected"):
        marks(tmp_path).all()


def test_the_file_of_another_run_is_not_taken_for_this_ones(tmp_path):
    own = marks(tmp_path)
    own.add({1: "clean"})
    own.path.write_text(own.path.read_text() + '{"row": 2, "id": "id 9", "mark": "unsafe"}\n')
    with pytest.raises(DataError, match=r"marks\.jsonl:2: row 2 of this run is not 'id 9'.*--marks FILE"):
        own.all()


@pytest.mark.parametrize("said", [{50: "clean"}, {-1: "clean"}, {1: "bad"}, {True: "clean"}])
def test_marks_that_make_no_sense_are_refused_whole(tmp_path, said):
    own = marks(tmp_path)
    with pytest.raises(DataError):
        own.add({2: "clean", **said})
    assert not own.path.exists()


def test_drawn_are_the_rows_whose_turn_it_was_in_the_random_order(tmp_path):
    own = marks(tmp_path)
    order = own.order.tolist()
    own.add({order[0]: "clean", order[2]: "unsafe"})
    assert {row for row, mark in own.all().items() if mark.drawn} == {order[0]}
    own.add({order[1]: "skipped", order[3]: "clean"})
    found = {row for row, mark in own.all().items() if mark.drawn}
    assert found == {order[0], order[1], order[3]}, "not the third: its score had found it before its turn"
    own.add({40: "clean"}, drawn=True)
    assert own.all()[40].drawn
    own.add({40: "unsafe"})
    assert own.all()[40].drawn, "a row that was drawn once stays a drawn one"


# the ranking

NONE = np.zeros(200, bool)


def states(rng, rows, bad=None):
    found = rng.normal(0, 1, (rows, 2, 8))
    if bad is not None:
        found[bad, :, 0] += 3
    return found


def test_a_few_marks_find_what_the_filter_could_not():
    rng = np.random.default_rng(0)
    bad = np.arange(200) < 20
    ranking = Ranking(Scored(rng.random(200)), NONE, states(rng, 200, bad), states(rng, 60), seed=0)
    before = ranking({})
    assert before.scale.nothing
    found = ranking({0: True, 1: True, 2: True, 100: False, 101: False})
    unmarked = np.arange(200) > 2
    assert (found.suspicion[bad & unmarked].mean() - found.suspicion[~bad].mean()) > 1
    assert found.linear.shape == (17,)


def test_a_clean_row_drawn_at_random_changes_nobodys_score():
    rng = np.random.default_rng(1)
    bad = np.arange(200) < 20
    drawn = frozenset({50, 60, 170})
    for verdicts in ({}, {"verdict": bad.astype(float)}):
        own = Scored(rng.random(200), columns=verdicts)
        noisy, safe = states(rng, 200, bad), states(rng, 60)
        taught = {0: True, 1: True, 100: False}
        dropped = bad if verdicts else NONE
        one = Ranking(own, dropped, noisy, safe, seed=0)(taught)
        other = Ranking(own, dropped, noisy, safe, seed=0)(taught | dict.fromkeys(drawn, False), drawn)
        np.testing.assert_array_equal(one.suspicion, other.suspicion)


def test_marks_correct_the_verdicts_of_a_filter_that_found_something():
    """The filter took another notion for unsafe: the rows 20 to 39."""
    rng = np.random.default_rng(2)
    rows = np.arange(200)
    noisy = states(rng, 200, rows < 20)
    noisy[20:40, :, 1] += 3
    verdict = ((rows >= 20) & (rows < 40)).astype(float)
    ranking = Ranking(Scored(verdict), verdict == 1, noisy, states(rng, 60), seed=0)
    before = ranking({}).suspicion
    assert before[20:40].mean() > before[:20].mean()
    said = dict.fromkeys(range(8), True) | dict.fromkeys(range(20, 30), False)
    after = ranking(said).suspicion
    assert after[8:20].mean() > after[30:40].mean()


def test_a_few_marks_also_set_the_threshold():
    """Half of the rows are unsafe, and no verdict says so: the probe takes a half of them for clean."""
    bad = np.arange(200) < 100
    said = {row: bool(bad[row]) for row in (*range(8), *range(100, 108))}
    dropped, before = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        ranking = Ranking(Scored(rng.random(200)), NONE, states(rng, 200, bad), states(rng, 60), seed=0)
        few = ranking({row: said[row] for row in (0, 1, 100, 101, 102)})
        found = ranking(said)
        assert few.scale.threshold == pytest.approx(np.log(1.5))
        assert found.scale.threshold < np.log(1.5)
        dropped.append(found.suspicion > found.scale.threshold)
        before.append(found.suspicion > np.log(1.5))
    assert np.mean(dropped, axis=0)[bad].mean() > np.mean(before, axis=0)[bad].mean() + 0.2
    assert np.mean(dropped, axis=0)[~bad].mean() < 0.1


def test_a_mark_on_a_repeated_row_is_not_outvoted_by_its_copies():
    rng = np.random.default_rng(5)
    rows = np.arange(200)
    noisy = states(rng, 200, rows < 20)
    noisy[20:61, :, 1] += 6
    noisy[20:60] = noisy[20]  # a false alarm, forty times, and a row like it
    noisy[60] = noisy[20] + 0.01
    verdict = (rows < 60).astype(float)
    ranking = Ranking(Scored(verdict), verdict == 1, noisy, states(rng, 60), seed=0)
    assert ranking({}).suspicion[60] > np.log(1.5)
    for marked in (20, 45):
        found = ranking({marked: False}).suspicion
        assert found[60] < np.log(1.5)
        assert found[60] < found[:20].min()


def test_verdicts_that_the_marks_speak_against_teach_nothing_any_more():
    """The filter found the rows 20 to 69; the person, who means the rows 0 to 19, found four of them clean."""
    rng = np.random.default_rng(4)
    rows = np.arange(200)
    noisy = states(rng, 200, rows < 20)
    noisy[20:70, :, 1] += 3
    verdict = ((rows >= 20) & (rows < 70)).astype(float)
    ranking = Ranking(Scored(verdict), verdict == 1, noisy, states(rng, 60), seed=0)
    said = dict.fromkeys(range(20, 23), False)
    assert (ranking(said).suspicion > np.log(1.5))[23:70].mean() > 0.5
    said[23] = False
    assert ranking(said).scale.nothing  # and no row is known to be unsafe yet
    found = ranking(said | {0: True}).suspicion
    assert not (found > np.log(1.5))[24:70].any()
    assert found[1:20].mean() > found[24:70].mean()


def test_rows_without_hidden_states_have_no_score():
    rng = np.random.default_rng(3)
    noisy = states(rng, 60, np.arange(60) < 10)
    noisy[5] = np.nan
    own = Scored(rng.random(60))
    own.suspicion[5] = np.nan
    found = Ranking(own, NONE[:60], noisy, states(rng, 30), seed=0)({0: True, 5: True, 40: False})
    assert np.isnan(found.suspicion[5])
    assert np.isfinite(np.delete(found.suspicion, 5)).all()


def test_a_row_drawn_at_random_is_judged_as_if_nobody_had_marked_it():
    """An unsafe row that lies alone among clean ones: its own mark must not raise its score, or it would seem found."""
    rng = np.random.default_rng(4)
    noisy, safe = states(rng, 200, np.arange(200) < 20), states(rng, 60)
    taught = dict.fromkeys(range(5), True) | {100: True}
    one = Ranking(Scored(rng.random(200)), NONE, noisy, safe, seed=0)
    marked = one(taught).suspicion[100]
    drawn = one(taught, frozenset({100})).suspicion[100]
    del taught[100]
    unmarked = one(taught).suspicion[100]
    assert marked > unmarked + 0.5
    assert abs(drawn - unmarked) < 0.2


# which rows are asked about


def test_the_only_unsafe_row_teaches_also_where_it_was_drawn_at_random():
    rng = np.random.default_rng(3)
    bad = np.arange(200) < 20
    own = Scored(rng.random(200))
    ranking = Ranking(own, NONE, states(rng, 200, bad), states(rng, 60), seed=0)
    said = {0: True, 100: False, 120: False}
    found = ranking(said, frozenset({0}))
    assert not found.scale.nothing
    assert found.suspicion[1:20].mean() > found.suspicion[20:].mean() + 1
    others = np.delete(np.arange(200), 0)
    place = (own.suspicion[others] < own.suspicion[0]).mean()
    assert (found.suspicion[others] < found.suspicion[0]).mean() == pytest.approx(place, abs=0.01)


def test_the_turns_of_a_review():
    rng = np.random.default_rng(0)
    suspicion, witness, order = rng.random(100), rng.random(100), rng.permutation(100)
    asked = list(questions(suspicion, 0.5, witness, order, []))
    assert sorted(question.row for question in asked) == list(range(100)), "every row once"
    assert [question.why for question in asked[:8]] == [*(SUSPECT, NEAR, WITNESS) * 2, SUSPECT, DRAWN]
    assert asked[0].row == suspicion.argmax()
    assert asked[1].row == np.abs(suspicion - 0.5).argmin()
    assert asked[2].row == next(row for row in np.argsort(-witness) if row not in (asked[0].row, asked[1].row))
    drawn = [question.row for question in asked[:50] if question.why == DRAWN]
    places = [order.tolist().index(row) for row in drawn]
    assert places == sorted(places), "drawn in the random order"


def test_where_nothing_unsafe_turns_up_every_second_row_is_drawn():
    suspicion, order = np.linspace(1, 0, 100), np.arange(100)[::-1]
    said = [(row, False) for row in range(CALM_AFTER)]
    asked = islice(questions(suspicion, None, suspicion, order, said), 10)
    assert [question.why == DRAWN for question in asked] == [False, True] * 5
    said[-1] = (said[-1][0], True)
    asked = list(islice(questions(suspicion, None, suspicion, order, said), 10))
    assert sum(question.why == DRAWN for question in asked) <= 10 // DRAWN_EVERY + 1


def test_of_copies_one_is_asked_about_unless_another_is_drawn():
    suspicion = np.repeat([3.0, 2.0, 1.0], 20)
    asked = list(questions(suspicion, 1.5, suspicion, np.arange(60), [], copies=np.repeat([0, 1, 2], 20)))
    assert sorted(question.row for question in asked) == list(range(60)), "in the end every row"
    assert len({question.row // 20 for question in asked[:3]}) == 3
    assert all(question.why == DRAWN for question in asked[3:])


# a review of a run


def test_marks_find_the_rest_and_done_takes_the_decision(reviewed):
    run, bad = reviewed
    review = Review(run)
    assert "0 marked" in review.status().line()
    answer(review, bad, 40)
    status = review.status()
    assert (status.marks, status.unsafe) == (40, bad[list(review.marks.all())].sum())
    result = done(review)
    table = read_scores(result.run).to_pydict()
    dropped = np.array(table["decision"]) == "dropped"
    assert status.dropped == dropped.sum()
    assert (dropped & bad).sum() >= 19
    assert (dropped & ~bad).sum() <= 3
    for row, mark in review.marks.all().items():
        assert dropped[row] == mark.unsafe
        assert table["by_hand"][row]
    assert result.metrics["filter"] == "review"
    assert (result.run.folder / "kept.jsonl").read_text().count("\n") == (~dropped).sum()


def test_a_review_goes_on_where_it_was(reviewed):
    run, bad = reviewed
    first = Review(run)
    answer(first, bad, 15)
    again = open_review(run.folder)
    assert again.ask(5) == first.ask(5)
    np.testing.assert_allclose(again.scored().suspicion, first.scored().suspicion, atol=0.02)  # warm and cold starts
    assert again.status().line() == first.status().line()


def test_what_was_said_holds_in_every_later_decision(reviewed):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 20)
    review.done()
    said = review.marks.all()
    for options in ({}, {"filter": "forgetting", "threshold": 0.9}, {"drop_share": 0.5}):
        words = read_scores(Result(Run.open(run.folder)).decide(**options).run)["decision"].to_pylist()
        assert all((words[row] == "dropped") == mark.unsafe for row, mark in said.items()), options


def test_without_flags_decide_goes_by_the_review_and_filter_leaves_its_decision(reviewed):
    from forgetfilter.decision.opened import is_decided

    run, bad = reviewed
    run = decided_run(run, bad, 20)
    assert is_decided(run, run.config())
    assert Result(run).decide().metrics["filter"] == "review"
    assert Result(run).decide(filter="forgetting").metrics["filter"] == "forgetting"


def test_no_model_is_made_of_a_decision_that_marks_have_overtaken(reviewed, capsys):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 3)
    for name in ("finetune", "export"):
        code, said = command(capsys, name, run.folder)
        assert code == 2
        assert "rows were marked after the last decision" in said
    code, said = command(capsys, "score", run.folder, "--dataset_name", run.folder / "kept.jsonl")
    assert (code, "rows were marked after the last decision" in said) == (2, True)
    review.done()
    assert command(capsys, "export", run.folder)[0] == 0


def test_a_decision_that_fails_leaves_the_scores_of_the_last_one(reviewed, write_jsonl):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 5)
    review.done()
    review.mark({row: "unsafe" if bad[row] else "clean" for row in range(10)})
    before = (run.folder / "scored" / "review.parquet").read_bytes()
    few = write_jsonl("few.jsonl", [{"row": 1, "clean": True}])
    marks = review.marks.path.read_bytes()
    for path, by in ((few, None), (few, "forgetting"), (few.with_name("typo.jsonl"), None)):
        with pytest.raises(DataError):
            Result(run).decide(trusted_rows=path, filter=by)
    assert (run.folder / "scored" / "review.parquet").read_bytes() == before
    assert review.marks.path.read_bytes() == marks


def test_the_notebook_does_the_same(reviewed):
    run, bad = reviewed
    result = Result(run)
    for _ in range(4):
        said = result.mark({row: "unsafe" if bad[row] else "clean" for row in result.ask(8)})
    assert said.startswith("32 marked")
    assert result.decide().metrics["filter"] == "review"
    with pytest.raises(DataError, match="no row 500"):
        result.mark({500: "clean"})
    with pytest.raises(DataError, match="marked 'bad'"):
        result.mark({1: "bad"})


def test_decisions_of_the_report_and_marks_of_a_sample_flow_into_the_same_file(reviewed, write_jsonl, capsys):
    run, _ = reviewed
    hand = write_jsonl("hand.jsonl", [{"row": 1, "decision": "dropped"}, {"row": 2, "decision": "kept"}])
    Result(run).decide(decisions=hand)
    own = Review(Run.open(run.folder)).marks
    assert {row: (mark.said, mark.drawn) for row, mark in own.all().items()} == {
        1: ("unsafe", False),
        2: ("clean", False),
    }
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": True} for row in range(3, 60)])
    Result(Run.open(run.folder)).decide(trusted_rows=sample, filter="forgetting")
    assert sum(mark.drawn for mark in own.all().values()) == 57
    lines = [{"id": own.ids[70], "mark": "clean"}, {"row": 71, "mark": None}, {"row": 3, "clean": False}]
    other = write_jsonl("marks.jsonl", [*lines, {"row": 70, "mark": "unsafe"}, {"row": 72, "mark": "skipped"}])
    assert open_review(run.folder).add_file(other) == 3
    assert own.all()[70].unsafe
    assert own.all()[3].unsafe
    own.add({70: "clean"})
    own.add({72: None})
    assert open_review(run.folder).add_file(other) == 0, "what a person has said since counts"
    assert own.all()[70].clean
    assert "2 lines say what was said of their rows before" in capsys.readouterr().out
    own.add({90: "unsafe"})
    own.add({90: "clean"})
    open_review(run.folder).add_file(write_jsonl("drawn.jsonl", [{"row": 90, "clean": False}]))
    assert (own.all()[90].clean, own.all()[90].drawn) == (True, True)
    broken = write_jsonl("broken.jsonl", [{"row": 1, "mark": "good"}])
    code, said = command(capsys, "review", run.folder, "--marks", broken)
    assert code == 2
    assert "broken.jsonl:1" in said


def test_a_row_once_drawn_stays_drawn_in_another_run(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    lines = [{"row": 5, "mark": "unsafe", "drawn": True}, {"row": 6, "mark": "clean"}, {"row": 5, "mark": "clean"}]
    review = Review(run)
    review.add_file(write_jsonl("theirs.jsonl", lines))
    found = {row: (mark.said, mark.drawn) for row, mark in review.marks.all().items()}
    assert found == {5: ("clean", True), 6: ("clean", False)}


def test_trusted_rows_of_the_run_count_as_drawn(tmp_path, write_jsonl):
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row % 6 != 0} for row in range(70)])
    run, bad = reviewable_run(tmp_path / "out", trusted_rows=str(sample))
    review = Review(run)
    assert sum(mark.drawn for mark in review.marks.all().values()) == 70
    assert "at most 2% of the clean rows are dropped, on average" in review.status().line()
    answer(review, bad, 10)
    assert "in expectation, by " in done(review).metrics["says"]


def reviewed_rows(folder, seed, rows=1000):
    """Simulated rows after a review: hidden states, which rows are bad, what was said, and the ranking."""
    rng = np.random.default_rng(seed)
    bad = rng.random(rows) < 0.05
    noisy = rng.normal(0, 1, (rows, 2, 6))
    noisy[bad, :, 0] += 1.5
    scores = noisy[:, 0, 0] + rng.normal(0, 2, rows)
    ranking = Ranking(Scored(scores), np.zeros(rows, bool), noisy, rng.normal(0, 1, (100, 2, 6)), seed=0)
    (folder / str(seed)).mkdir()
    own = Marks(folder / str(seed), [str(row) for row in range(rows)], seed)
    for _ in range(5):
        said = own.all()
        scores = ranking(*told(said)).suspicion
        asked = list(islice(questions(scores, 0.4, scores, own.order, [(r, m.unsafe) for r, m in said.items()]), 30))
        more = [row for row in own.order.tolist() if row not in said][:10]
        own.add({row: "unsafe" if bad[row] else "clean" for row in [*(one.row for one in asked), *more]})
    return bad, own.all(), ranking


def told(said):
    marks = {row: mark.unsafe for row, mark in said.items()}
    return marks, frozenset(row for row, mark in said.items() if mark.drawn)


def test_the_promise_holds_though_most_marks_are_not_random(tmp_path):
    """The threshold follows from the promise alone here, since the automatic one is set below every score."""
    lost, naive = [], []
    for seed in range(8):
        bad, said, ranking = reviewed_rows(tmp_path, seed)
        marks, drawn = told(said)
        assert len(drawn) < 0.5 * len(marks)
        for kept, scored in ((lost, ranking(marks, drawn)), (naive, ranking(marks))):
            scored = replace(scored, scale=Scale(-1e9, says="everything"))
            threshold = choose(scored, ForgetFilterConfig(max_clean_loss=0.05), {}, drawn=clean_drawn(said))
            dropped = threshold.drops(scored.suspicion)
            dropped[list(marks)] = list(marks.values())
            kept.append((dropped & ~bad).sum() / (~bad).sum())
    assert 0 < np.mean(lost) <= 0.05
    assert np.mean(naive) > np.mean(lost), "clean rows drawn at random must not teach"


def test_a_later_word_counts_more_than_the_runs_trusted_rows(tmp_path, write_jsonl):
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row != 0} for row in range(70)])
    run, _ = reviewable_run(tmp_path / "out", trusted_rows=str(sample))
    review = Review(run)
    review.mark({0: "clean", 1: "unsafe"})
    for options in ({}, {"filter": "forgetting"}):
        words = read_scores(Result(Run.open(run.folder)).decide(**options).run)["decision"].to_pylist()
        assert words[:2] == ["kept", "dropped"], options
    review.undo(0)
    assert review.marks.all()[0].unsafe
    review.mark({5: None})
    assert 5 not in Review(Run.open(run.folder)).marks.all(), "what was taken back does not come back"


def test_marks_that_no_scores_know_yet_are_learnt_before_a_decision(reviewed):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 10)
    review.done()
    answer(review, bad, 20)
    dropped = review.dropped()
    words = read_scores(Result(Run.open(run.folder)).decide().run)["decision"].to_pylist()
    np.testing.assert_array_equal(np.array(words) == "dropped", dropped)


def test_rows_marked_at_random_promise_whichever_way_they_came(reviewed, write_jsonl):
    """Clean rows that taught the probe can promise nothing: as trusted rows they must teach no longer."""
    run, bad = reviewed
    review = Review(run)
    chosen = [row for row in range(120) if row not in review.marks.order[:3]]
    review.mark({row: "unsafe" if bad[row] else "clean" for row in chosen[:60]})
    review.done()
    before = review.scored().suspicion
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": not bad[row]} for row in chosen[:60]])
    Result(Run.open(run.folder)).decide(trusted_rows=sample)
    after = Review(Run.open(run.folder)).scored().suspicion
    clean = [row for row in chosen[:60] if not bad[row]]
    assert after[clean].mean() > before[clean].mean() + 0.1, "they are judged like clean rows that nobody marked"


def test_without_marks_the_filters_own_decision_stands(tmp_path):
    run, _ = reviewable_run(tmp_path / "out", threshold=0.08)
    before = read_scores(run)["decision"].to_pylist()
    result = Result(run)
    assert "0 marked" in result.review.status().line()
    assert done(result.review).metrics["filter"] == "forgetting"
    assert read_scores(result.run)["decision"].to_pylist() == before
    result.ask(3)
    assert result.decide().metrics["filter"] == "forgetting"


def test_a_skip_says_nothing_and_leaves_the_runs_rule(tmp_path):
    run, _ = reviewable_run(tmp_path / "out", threshold=0.08)
    review = Review(run)
    before = review.dropped()
    review.mark({int(np.flatnonzero(before)[0]): "skipped", int(np.flatnonzero(~before)[0]): "skipped"})
    np.testing.assert_array_equal(review.dropped(), before)
    assert done(review).metrics["filter"] == "forgetting"


def test_the_runs_own_decision_is_that_of_its_first_filter(tmp_path):
    """Its number was set for this one, whatever other filter the review goes on from."""
    run, _ = reviewable_run(tmp_path / "out", threshold=0.08)
    first = Scored.load(run.folder / f"{scored_part(run, 'forgetting')}.parquet")
    probe = replace(first, suspicion=10 * first.suspicion, columns={"verdict": (first.suspicion > 0.08) * 1.0})
    probe.save(run.folder / "scored/probe-0.parquet")
    run.finish("scored/probe-0", [run.folder / "scored/probe-0.parquet"], filter="probe")
    run.manifest["filters"]["probe"] = "scored/probe-0"
    run.save()
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text().replace("filter: forgetting", "filter: forgetting,probe"))
    review = Review(Run.open(run.folder))
    assert review.name == "probe"
    np.testing.assert_array_equal(review.dropped(), first.suspicion > 0.08)
    metrics = done(review).metrics
    assert (metrics["filter"], metrics["dropped"]) == ("forgetting", (first.suspicion > 0.08).sum())


def test_what_the_filter_dropped_stays_dropped_after_a_few_marks(tmp_path):
    run, bad = reviewable_run(tmp_path / "out", threshold=0.08)
    dropped = np.array(read_scores(run)["decision"]) == "dropped"
    review = Review(run)
    for _ in range(3):
        answer(review, bad, 1)
    assert (review.dropped() & dropped & bad).sum() >= 0.8 * (dropped & bad).sum()


def test_other_flags_for_filter_count_also_after_a_review(reviewed):

    run, bad = reviewed
    run = decided_run(run, bad, 10)
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text() + "threshold: 0.07\n")
    assert settled(run).metrics["threshold"] == 0.07
    assert settled(Run.open(run.folder)).metrics["filter"] == "forgetting"


def test_damaged_scores_of_a_review_are_made_again(reviewed):

    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 10)
    decisions = read_scores(done(review).run)["decision"].to_pylist()
    (run.folder / "scored" / "review.parquet").write_bytes(b"damaged")
    assert read_scores(Result(Run.open(run.folder)).decide().run)["decision"].to_pylist() == decisions
    run = Run.open(run.folder)
    run.forget("scored/review")
    run.forget("decision")
    assert read_scores(settled(run).run)["decision"].to_pylist() == decisions


def test_the_flags_of_a_decision_replay_it(reviewed):
    run, bad = reviewed
    review = Review(run)
    review.mark({row: "unsafe" if bad[row] else "clean" for row in review.marks.order[:60].tolist()})
    run = Result(done(review).run).decide(max_clean_loss=0.3).run
    assert run.manifest["decision"]["flags"] == "--threshold auto --max_clean_loss 0.3"
    with pytest.raises(ConfigError, match="max_clean_loss"):
        Result(run).decide(0.5, max_clean_loss=0.3)


def test_a_limit_holds_after_a_review_whatever_share_the_run_was_to_drop(tmp_path):
    run, bad = reviewable_run(tmp_path / "out", drop_share=0.1)
    review = Review(run)
    review.mark({row: "unsafe" if bad[row] else "clean" for row in review.marks.order[:60].tolist()})
    with pytest.raises(ConfigError, match=r"drop_share is 0\.1"):
        Result(run).decide(filter="forgetting", max_clean_loss=0.3)
    decided = Result(done(review).run).decide(max_clean_loss=0.3)
    assert decided.metrics["filter"] == "review"
    assert "at most 30%" in decided.metrics["says"]


def test_a_share_of_a_ranking_in_which_nothing_was_found_teaches_nothing(tmp_path):
    """Before any mark the page shows what the run drops; what is unsafe then comes from marks alone."""
    run, _ = reviewable_run(tmp_path / "out", drop_share=0.05)
    part = run.folder / f"{scored_part(run, 'forgetting')}.parquet"
    nothing = Scale(0, nothing="no separation: chance")
    replace(Scored.load(part), scale=nothing).save(part)
    run.finish(scored_part(run, "forgetting"), [part])
    review = Review(run)
    assert review.status().dropped == 6
    rest = [row for row in review.marks.order.tolist() if not review.dropped()[row]]
    review.marks.add(dict.fromkeys(rest[:60], "clean"), drawn=True)
    assert "no promise: the marks have changed nothing so far" in review.status().line()
    review.marks.add(dict.fromkeys(rest[:60]))
    assert not (review.ranking.verdicts == 1).any()
    review.mark({int(np.flatnonzero(review.dropped())[0]): "clean"})
    assert review.status().dropped == 5 == done(review).metrics["dropped"]


def test_few_verdicts_of_either_kind_are_learnt_however_many_rows_are_dropped(monkeypatch):
    monkeypatch.setattr("forgetfilter.review.ranking.MOST_VERDICTS", 30)
    rng = np.random.default_rng(0)
    bad = np.arange(400) < 100
    for columns in ({}, {"verdict": bad.astype(float)}):
        scored = Scored(bad + rng.random(400), dict(columns))
        ranking = Ranking(scored, bad, states(rng, 400, bad), states(rng, 60), seed=0)
        assert [(ranking.teaching == kind).sum() for kind in (0, 1)] == [30, 30]
        clean = {row: False for row in range(100) if np.isnan(ranking.teaching[row])}  # they speak against all of them
        assert not ranking({}).scale.nothing
        assert ranking(dict(islice(clean.items(), 4))).scale.nothing
        assert np.median(ranking({}).suspicion[bad]) > 0 > np.median(ranking({}).suspicion[~bad])


def test_what_is_marked_while_another_process_decides_is_not_counted_as_decided(reviewed, monkeypatch):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 10)
    row = next(row for row in range(120) if row not in review.marks.all())

    def late(*of, **named):
        review.marks.add({row: "unsafe"})
        return whole(*of, **named)

    whole = outputs.write
    monkeypatch.setattr(outputs, "write", late)
    decide(run)
    with pytest.raises(RunError, match="rows were marked after the last decision"):
        require_marks_decided(Run.open(run.folder))


def test_rows_may_be_numpys_numbers_but_no_truths(reviewed):
    run, _ = reviewed
    result = Result(run)
    result.mark({np.int64(17): "unsafe"})
    assert Marks(run.folder, run.rows().ids, 42).all()[17].unsafe
    with pytest.raises(DataError, match="no row True"):
        result.mark({True: "unsafe"})


def test_clean_rows_from_a_file_of_drawn_ones_do_not_hide_that_scores_find_unsafe_rows():
    drawn = range(100, 100 + CALM_AFTER)
    said = [(row, row % 2 == 0) for row in range(CALM_AFTER)] + [(row, False) for row in drawn]
    scores = np.arange(200.0)
    asked = list(islice(questions(scores, 0.4, scores, np.arange(200), said, drawn=drawn), 2 * DRAWN_EVERY))
    assert sum(question.why == DRAWN for question in asked) == 2


def test_marks_that_were_drawn_beforehand_make_no_review_calm():
    order, scores = np.arange(200)[::-1].copy(), np.linspace(1, 0, 200)
    said = [(row, False) for row in range(100, 100 + 2 * CALM_AFTER)]
    whys = [
        [one.why for one in islice(questions(scores, 0.5, scores, order, said, drawn=drawn), 16)]
        for drawn in ((), {row for row, _ in said})
    ]
    assert whys[0].count(DRAWN) == 8
    assert whys[1].count(DRAWN) == 2


def test_the_range_of_what_is_left_covers_the_truth_at_any_share(tmp_path):
    """Scores that say nothing, many shares: nine ranges of ten at least hold the truth."""
    covered = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        run, _ = reviewable_run(tmp_path / str(seed), rows=200, unsafe=20, seed=seed, threshold=0.06)
        bad = rng.random(200) < rng.uniform(0.05, 0.7)
        review = Review(run)
        review.mark({row: "unsafe" if bad[row] else "clean" for row in review.marks.order[:60].tolist()})
        status, dropped = review.status(), review.dropped()
        _, low, high = status.left
        covered.append(low <= (bad & ~dropped).sum() <= high)
    assert np.mean(covered) >= 0.9


def test_the_range_of_what_is_left_counts_rows_that_repeat_each_other(tmp_path):
    """Nine rows of ten say one clean thing; of the others half are unsafe, and scores say nothing."""
    covered = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        same = rng.random(300) < 0.9
        records = [{"prompt": "q", "completion": "the same" if same[i] else f"answer {i}"} for i in range(300)]
        run, _ = reviewable_run(tmp_path / str(seed), rows=300, unsafe=20, seed=seed, records=records, threshold=9.0)
        bad = ~same & (rng.random(300) < 0.5)
        review = Review(run)
        review.mark({row: "unsafe" if bad[row] else "clean" for row in review.marks.order[:60].tolist()})
        _, low, high = review.status().left
        left = int((bad & ~review.dropped()).sum())
        covered.append(low <= left <= high)
        assert high <= (~same).sum()
    assert np.mean(covered) >= 0.9


def test_settled_only_where_the_rows_drawn_tell(reviewed):
    run, _ = reviewed
    review = Review(run)
    for _ in range(14):
        (question,) = review.ask(1)
        review.mark({question.row: "clean"})
    assert "change little" not in review.status().line()
    drawn = [row for row in review.marks.order.tolist() if row not in review.marks.all()][:40]
    for first in range(0, 40, 2):
        review.mark(dict.fromkeys(drawn[first : first + 2], "clean"))
        review.status()
    assert "more marks would change little" in review.status().line()


def test_rows_that_nobody_could_tell_do_not_settle_a_review(reviewed):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 20)
    before = review.status()
    for question in review.ask(12):
        review.mark({question.row: "skipped"})
        review.status()
    assert not before.settled
    assert not review.status().settled


def test_what_is_left_comes_with_a_range(reviewed):
    run, bad = reviewed
    review = Review(run)
    assert review.status().left == (0, 0, review.status().kept)
    review.mark({row: "unsafe" if bad[row] else "clean" for row in review.marks.order[:60].tolist()})
    about, low, high = review.status().left
    assert low <= about <= high <= 60
    left = bad.sum() - bad[review.marks.order[:60]].sum()
    assert low <= left <= high


def test_about_how_many_were_found_is_said_of_all_marks(tmp_path):
    """The estimate is near the truth, needs marks of either kind, and is part of the line and of the run's scores."""
    off = []
    for seed in range(4):
        run, bad = reviewable_run(tmp_path / str(seed), rows=160, unsafe=40, seed=seed)
        review = Review(run)
        assert review.status().found is None
        answer(review, bad, 30)
        status, dropped = review.status(), review.dropped()
        assert f"of 10 unsafe rows found, {status.left[0]} left" in status.line()
        off.append(abs(status.found - dropped[bad].mean()))
    assert np.mean(off) < 0.15
    review.done()
    probability = read_scores(run)["probability_unsafe"].to_numpy()
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (np.diff(probability[np.argsort(review.scored().suspicion)]) >= -1e-6).all()


def test_unsafe_rows_found_after_the_draw_do_not_raise_the_low_end_of_the_range():
    """12 of 240 rows are unsafe: one is among the five drawn, the others were found by their score."""
    assert session.unsafe_left([True, *[False] * 4], 205, 1, 200)[1] > 0
    assert session.unsafe_left([True, *[False] * 4], 205, 1, 200, unsafe_elsewhere=11)[1] == 0


def test_clean_rows_found_after_the_draw_do_not_lower_the_high_end_of_the_range():
    """Of 100 rows 50 were drawn, all clean, and 27 others called clean. With 5 unsafe rows its probability is .028."""
    assert session.unsafe_left([False] * 50, 73, 0, 23, clean_elsewhere=27) == (0, 0, 5)


def test_sixty_drawn_rows_without_an_unsafe_one_leave_few_among_two_hundred():
    """With 11 of 200 unsafe, none of 60 drawn rows is with probability .018: less than half of 5 %."""
    about, low, high = session.unsafe_left([False] * 60, 200, 0, 140)
    assert (about, low) == (0, 0)
    assert 8 <= high <= 12


def test_all_of_them_are_not_said_to_be_found_while_some_may_be_left():
    status = Status(40, 30, 60, 180, (0, 0, 90), 0.99, 5, "", settled=False)
    assert "about 9 of 10 unsafe rows found, 0 left (0 to 90)" in status.line()
    assert "about 10 of 10" in replace(status, left=(0, 0, 0)).line()


def test_where_hidden_states_cannot_be_had_an_error_says_why(tmp_path, capsys):
    run, _ = reviewable_run(tmp_path / "out")
    del run.manifest["states"]
    run.save()
    code, said = command(capsys, "review", run.folder, "--no-browser")
    assert code == 2
    assert "its weights are not those" in said


# the server


@pytest.fixture
def served(reviewed):
    import socket

    import uvicorn

    from forgetfilter.review.server import application

    run, _ = reviewed
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = application(Review(run), "secret", {f"127.0.0.1:{port}", f"localhost:{port}"})
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield run, port
    server.should_exit = True
    thread.join(10)
    listening.close()


def ask(port, method, path, body=None, **headers):
    """Status, headers and JSON of an answer; headers None are left out, others replace those of our own page."""
    own = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    own |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    for name, value in (own | {"Content-Length": str(len(payload))}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(payload)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), json.loads(text) if text[:1] == b"{" else text


def test_the_server_shows_a_row_and_takes_marks(served):
    run, port = served
    status, headers, page = ask(port, "GET", "/secret/")
    assert status == 200
    assert b"Which rows should a model learn?" in page
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert {name: headers[name.lower()] for name in HEADERS} == HEADERS
    assert "frame-ancestors 'none'" in HEADERS["Content-Security-Policy"]
    _, _, state = ask(port, "GET", "/secret/state")
    row = state["question"]["row"]
    _, _, after = ask(port, "POST", "/secret/mark", {"row": row, "said": "unsafe"})
    assert after["question"]["row"] != row
    assert after["marked"][0]["row"] == row
    assert json.loads((run.folder / "marks.jsonl").read_text())["row"] == row
    status, _, said = ask(port, "POST", "/secret/mark", {"row": row, "said": "clean"})
    assert status == 400
    assert "was marked unsafe meanwhile" in said["error"]
    status, _, said = ask(port, "POST", "/secret/undo", {"row": row, "seen": "clean"})
    assert status == 400
    assert "was marked unsafe meanwhile" in said["error"]
    _, _, back = ask(port, "POST", "/secret/undo", {"row": row, "seen": "unsafe"})
    assert back["question"]["row"] == row
    assert back["marked"] == []
    ask(port, "POST", "/secret/mark", {"row": 3, "said": "clean"})
    status, _, made = ask(port, "POST", "/secret/done", {})
    assert status == 200
    assert made["kept"] + made["dropped"] == 120
    assert (run.folder / "report.html").exists()


def test_each_start_has_a_secret_and_hosts_of_its_own_and_leaves_no_address_behind(reviewed, monkeypatch, capsys):
    run, _ = reviewed
    given, shown, real = [], [], server.application
    monkeypatch.setattr(server, "application", lambda *args: given.append(args[1:]) or real(*args))
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_, **__: None)
    monkeypatch.setattr(server, "_has_screen", lambda: True)
    monkeypatch.setattr(server.webbrowser, "open", shown.append)
    for _ in range(2):
        server.serve(Review(run))
    ports = re.findall(r"127\.0\.0\.1:(\d+)/", capsys.readouterr().out)
    (one, hosts), (other, _) = given
    assert one != other
    assert len(one) >= 32
    assert hosts == {f"127.0.0.1:{ports[0]}", f"localhost:{ports[0]}"}
    assert len(shown) == 2
    assert not list(run.folder.glob("review-*.html"))


def test_of_a_conversation_the_page_names_the_answer_that_was_suspect(tmp_path):
    run, _ = reviewable_run(tmp_path / "out")
    part = run.folder / f"{scored_part(run, 'forgetting')}.parquet"
    scored = Scored.load(part)
    scored.columns[ANSWER] = np.where(np.arange(120) == 7, 3.0, np.nan)
    scored.save(part)
    run.finish(scored_part(run, "forgetting"), [part])
    pages = Pages(Review(run))
    assert pages.state({"row": 7})["question"]["why"].endswith("; answer 3 was the most suspect")
    assert "most suspect" not in pages.state({"row": 8})["question"]["why"].partition(";")[2]


def test_a_long_row_is_shown_in_full(tmp_path):
    records = [{"prompt": f"question {i} " + "word " * 3000, "completion": "so " * 3000 + "at last"} for i in range(40)]
    run, _ = reviewable_run(tmp_path / "out", rows=40, unsafe=8, records=records)
    question = Pages(Review(run)).state({})["question"]
    assert [turn[1] for turn in question["turns"]] == [
        records[question["row"]][key] for key in ("prompt", "completion")
    ]
    short = shaded(read_row(records[0], "prompt_completion"), None, None)
    assert short[1][1].endswith("so s… (5,007 more characters)")


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/", "/wrong/state", "/secre/state"])
def test_nothing_is_read_without_the_secret(served, path):
    status, _, said = ask(served[1], "GET", path)
    assert status == 404
    assert b"question" not in json.dumps(said if isinstance(said, dict) else said.decode()).encode()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/mark", {}, 404),
        ("/wrong/mark", {}, 404),
        ("/", {}, 404),
        ("/state", {}, 404),
        ("/wrong/state", {}, 404),
        ("/secre/state", {}, 404),
        ("/secret/../secret/mark", {}, 404),
        ("/secret/mark", {"Host": "evil.example"}, 421),
        ("/secret/mark", {"Host": "127.0.0.1"}, 421),
        ("/secret/mark", {"Origin": "http://evil.example"}, 403),
        ("/secret/mark", {"Origin": "null"}, 403),
        ("/secret/mark", {"Origin": "http://["}, 403),
        ("/secret/mark", {"Origin": None}, 403),
        ("/secret/mark", {"Content_Type": "text/plain"}, 415),
        ("/secret/mark", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_forged_requests_are_refused_and_mark_nothing(served, path, headers, status):
    run, port = served
    found, _, said = ask(port, "POST", path, {"row": 1, "said": "unsafe"}, **headers)
    assert found == status
    assert b"question" not in json.dumps(said if isinstance(said, dict) else "").encode()
    assert not (run.folder / "marks.jsonl").exists()


def test_a_request_without_host_is_refused_and_marks_nothing(served):
    run, port = served
    body = b'{"row": 1, "said": "unsafe"}'
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head = f"POST /secret/mark HTTP/1.0\r\nOrigin: http://\r\n{kind}\r\n"  # which HTTP/1.0 allows
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode() + body)  # in one piece: the server closes at the head already
        answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 421")
    assert not (run.folder / "marks.jsonl").exists()


@pytest.mark.parametrize(
    "body",
    [
        {"row": 1},
        {"row": 1, "said": "bad"},
        {"row": 999, "said": "clean"},
        {"row": -1, "said": "clean"},
        {"row": "../../etc/passwd", "said": "clean"},
        {"said": "clean"},
        {"row": [1], "said": ["clean"]},
        [],
        b"not json",
        b"[" * 5000,
        {"row": 1, "said": "clean", "more": "x" * 20_000},
    ],
)
def test_requests_that_make_no_sense_get_one_clear_answer(served, body):
    run, port = served
    status, _, said = ask(port, "POST", "/secret/mark", body)
    assert status == 400
    assert said["error"]
    assert not (run.folder / "marks.jsonl").exists()
    assert ask(port, "GET", "/secret/state?row=x")[0] == 400
    assert ask(port, "GET", "/secret/state")[0] == 200, "it goes on"


def test_marks_from_many_sides_at_once_are_all_kept(served):
    run, port = served
    threads = [
        threading.Thread(target=ask, args=(port, "POST", "/secret/mark", {"row": row, "said": "clean"}))
        for row in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {json.loads(line)["row"] for line in (run.folder / "marks.jsonl").read_text().splitlines()} == set(range(24))


def test_the_address_as_people_type_it(served):
    _, port = served
    assert ask(port, "GET", "/secret/", Host=f"localhost:{port}")[0] == 200
    status, headers, _ = ask(port, "GET", "/secret")
    assert (status, headers["location"]) == (307, "/secret/")
    status, _, said = ask(port, "GET", "/secret/", Host="127.0.0.2:1")
    assert status == 421
    assert f"http://127.0.0.1:{port}/" in said["error"]


def test_half_a_character_in_the_data_does_not_stop_a_review():
    """JSON in a text may hold one: the arguments of a function call."""
    from forgetfilter.review.server import Answer

    assert json.loads(Answer({"text": "\ud83d"}).body) == {"text": "\ud83d"}


def test_two_tabs_may_decide_at_once(served):
    _, port = served
    ask(port, "POST", "/secret/mark", {"row": 3, "said": "clean"})
    answers: list[int] = []

    def decide():
        answers.append(ask(port, "POST", "/secret/done", {})[0])

    tabs = [threading.Thread(target=decide) for _ in range(3)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join(60)
    assert answers == [200] * 3


def test_next_leads_through_the_rows(served):
    _, port = served
    state, seen = ask(port, "GET", "/secret/state")[2], []
    for _ in range(20):
        seen.append(state["question"]["row"])
        state = ask(port, "GET", f"/secret/state?row={state['ahead'][0]['row']}")[2]
    assert len(set(seen)) == 20


def test_next_begins_again_after_the_last_row(tmp_path):
    run, _ = reviewable_run(tmp_path / "out", rows=12, unsafe=3)
    pages, seen = Pages(Review(run)), []
    state = pages.state({})
    for _ in range(25):
        seen.append(state["question"]["row"])
        state = pages.state({"row": state["ahead"][0]["row"]})
    assert set(seen) == set(range(12))


def test_an_error_that_nobody_foresaw_is_said_on_the_page(served, monkeypatch):
    _, port = served
    monkeypatch.setattr(Review, "status", lambda self: 1 / 0)
    status, _, said = ask(port, "GET", "/secret/state")
    assert status == 500
    assert "the terminal says what" in said["error"]


def test_the_way_into_the_browser_shows_nobody_the_secret(monkeypatch, tmp_path):
    from forgetfilter.review import server

    opened = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    page = server._way_in("http://127.0.0.1:1/secret/", tmp_path)
    assert page.parent == tmp_path  # a browser in a sandbox sees another /tmp
    assert "secret" not in opened[0]
    assert page.stat().st_mode & 0o077 == 0
    page.unlink()


def test_a_full_disk_is_said_and_the_mark_can_be_made_again(served, monkeypatch):
    import errno
    import os

    run, port = served
    wait = os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, _, said = ask(port, "POST", "/secret/mark", {"row": 1, "said": "unsafe"})
    assert status == 507
    assert "No space left" in said["error"]
    monkeypatch.setattr(os, "fsync", wait)
    assert ask(port, "POST", "/secret/mark", {"row": 1, "said": "unsafe"})[0] == 200
    assert Review(run).marks.all()[1].unsafe


def test_other_machines_are_let_in_only_if_asked_twice(reviewed):
    from forgetfilter.review.server import serve

    with pytest.raises(ConfigError, match=r"not encrypted.*--allow_other_machines"):
        serve(Review(reviewed[0]), host="0.0.0.0", open_browser=False)
    with pytest.raises(ConfigError, match="--port 99999"):
        serve(Review(reviewed[0]), port=99999, open_browser=False)


def test_lost_hidden_states_do_not_lock_a_decision_out(reviewed):
    """They are read anew, or the error is about what is missing; never that another process holds the run."""
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 10)
    review.done()
    answer(review, bad, 3)
    run = Run.open(run.folder)
    run.forget("readings/M0-states-noisy")
    with locked(run.folder), pytest.raises(RunError) as caught:
        decide(run)
    assert "another process" not in str(caught.value)


def test_a_review_that_must_read_m0_first_can_be_done_at_once(reviewed, monkeypatch):
    run, _ = reviewed
    review = Review(run)
    review.marks.add({0: "unsafe", 1: "clean"})
    whether_locked = []

    def states_of(*given, holds_lock):
        with locked(run.folder):
            whether_locked.append(holds_lock)
        return kept(*given, holds_lock=holds_lock)

    kept = session.states_of
    monkeypatch.setattr(session, "states_of", states_of)
    review.done()
    assert whether_locked == [False]


def test_what_the_marks_speak_against_is_kept_when_done(tmp_path):
    run, _ = reviewable_run(tmp_path / "out", threshold=0.08)
    review = Review(run)
    found = np.flatnonzero(np.array(read_scores(run)["decision"]) == "dropped").tolist()
    assert len(found) > 8
    review.mark(dict.fromkeys(found[:8], "clean"))
    assert not review.dropped().any()
    result = done(review)
    assert result.metrics["dropped"] == 0
    assert Result(Run.open(run.folder)).decide().metrics["dropped"] == 0


def test_trusted_rows_given_to_filter_hold_in_every_later_decision(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row != 0} for row in range(70)])
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text() + f"trusted_rows: {sample}\n")
    settled(run)
    run = Run.open(run.folder)
    Review(run)  # looking at the rows says nothing new of them
    assert Marks(run.folder, run.rows().ids, 42).digest() == run.manifest["decision"]["marks"]
    for options in ({"threshold": -9.0}, {"drop_share": 0.9}):
        words = read_scores(Result(run).decide(**options).run)["decision"].to_pylist()
        assert words[:70] == ["dropped", *["kept"] * 69], options
    Marks(run.folder, run.rows().ids, 42).add({1: "unsafe"})
    settled(Run.open(run.folder))
    assert Marks(run.folder, run.rows().ids, 42).all()[1].unsafe, "the file has said nothing new"
    sample.write_text(sample.read_text() + '{"row": 80, "clean": false}\n')
    words = read_scores(settled(Run.open(run.folder)).run)["decision"].to_pylist()
    assert (words[80], words[1]) == ("dropped", "dropped"), "what the file has said before does not count again"


def test_a_file_of_trusted_rows_counts_where_it_says_something_new_whatever_a_review_has_decided(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    rows = [{"row": row, "clean": row != 0} for row in range(70)]
    sample = write_jsonl("sample.jsonl", rows)
    flags = run.folder / "config.yaml"
    without = flags.read_text()
    Marks(run.folder, run.rows().ids, 42).add({7: "unsafe", 1: "unsafe"})
    flags.write_text(without + f"trusted_rows: {sample}\n")
    words = read_scores(settled(Run.open(run.folder)).run)["decision"].to_pylist()
    assert (words[7], words[1]) == ("kept", "kept"), "the first file ever given is the last word"
    review = Review(Run.open(run.folder))
    review.mark({1: "unsafe", 2: "unsafe"})
    done(review)
    Result(Run.open(run.folder)).decide(filter="forgetting")
    rows[5]["clean"] = False
    write_jsonl("sample.jsonl", rows)
    words = read_scores(settled(Run.open(run.folder)).run)["decision"].to_pylist()
    assert (words[5], words[1], words[2]) == ("dropped", "dropped", "dropped")


def test_a_file_that_decide_was_given_says_nothing_new_as_a_flag_of_filter(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row != 0} for row in range(70)])
    Result(run).decide(trusted_rows=sample)
    review = Review(Run.open(run.folder))
    review.mark({1: "unsafe"})
    done(review)
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text() + f"trusted_rows: {sample}\n")
    assert read_scores(settled(Run.open(run.folder)).run)["decision"].to_pylist()[1] == "dropped"


def test_what_the_page_decided_by_hand_outlives_its_own_command(tmp_path, write_jsonl):
    """The page repeats the file of trusted rows with each command, and exports new choices alone."""
    run, _ = reviewable_run(tmp_path / "out")
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row != 0} for row in range(70)])
    Result(run).decide(trusted_rows=sample)
    for row in (5, 9):
        hand = write_jsonl("decisions.jsonl", [{"row": row, "decision": "dropped"}])
        Result(Run.open(run.folder)).decide(trusted_rows=sample, max_clean_loss=0.02, decisions=hand)
    words = read_scores(Run.open(run.folder))["decision"].to_pylist()
    assert (words[0], words[1], words[5], words[9]) == ("dropped", "kept", "dropped", "dropped")


def test_too_few_trusted_rows_after_decisions_by_hand_write_nothing(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": True} for row in range(49)])
    hand = write_jsonl("decisions.jsonl", [{"row": 5, "decision": "dropped"}])
    with pytest.raises(DataError, match="48"):
        Result(run).decide(trusted_rows=sample, decisions=hand)
    assert not Marks(run.folder, run.rows().ids, 42).all()
    assert Result(run).decide(trusted_rows=sample).metrics["rule"] == "conformal"


def test_an_open_result_reads_what_another_process_decided(tmp_path):
    run, _ = reviewable_run(tmp_path / "out")
    result, other = Result(Run.open(run.folder)), Result(Run.open(run.folder))
    before = len(result.dropped)
    other.decide(drop_share=0.5)
    assert len(result.dropped) == len(other.dropped) > before
    assert result.scores["decision"] == other.scores["decision"]


def test_a_damaged_copy_of_the_rows_is_named_and_nothing_is_lost(tmp_path):
    run, _ = reviewable_run(tmp_path / "out")
    kept = (run.folder / "kept.jsonl").read_bytes()
    rows = run.folder / "stages" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-5])
    with pytest.raises(RunError, match="copy of the noisy data"):
        Result(Run.open(run.folder)).decide(0.5)
    assert (run.folder / "kept.jsonl").read_bytes() == kept


def test_what_was_decided_by_hand_outlives_a_damaged_record(tmp_path, write_jsonl):
    run, _ = reviewable_run(tmp_path / "out")
    Result(run).decide(decisions=write_jsonl("hand.jsonl", [{"row": 1, "decision": "dropped"}]))
    (record,) = sorted((run.folder / "decisions").iterdir())[-1:]
    record.write_bytes(record.read_bytes()[:20])
    run.reload()
    run.forget("decision")
    words = read_scores(settled(Run.open(run.folder)).run)["decision"].to_pylist()
    assert words[1] == "dropped"


def test_a_run_that_may_not_be_written_says_what_to_do(tmp_path, monkeypatch):
    run, _ = reviewable_run(tmp_path / "out")

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(runs, "lock", refuse)
    with pytest.raises(RunError, match="Copy the folder to a place of yours"):
        Result(run).decide()


def test_marks_are_refused_once_the_folder_is_gone(reviewed):
    run, _ = reviewed
    review = Review(run)
    review.mark({1: "unsafe"})
    run.folder.rename(run.folder.with_name("elsewhere"))
    with pytest.raises(DataError, match="is not there any more"):
        review.marks.add({2: "clean"})
    assert not run.folder.exists()


def test_a_mark_holds_for_all_rows_that_say_the_same(tmp_path):
    records = [{"prompt": f"question {i % 60}", "completion": f"answer {i % 60}"} for i in range(120)]
    run, _ = reviewable_run(tmp_path / "out", records=records)
    run.manifest["notes"] = {"repeated": 60}
    run.save()
    review = Review(run)
    review.mark({3: "unsafe", 64: "clean", 65: "unsafe", 5: "clean"})
    assert review.dropped()[[3, 63, 4, 64, 5, 65]].tolist() == [True, True, False, False, False, True]
    words = read_scores(Result(run).decide(filter="forgetting", drop_share=0.9).run).to_pydict()
    made = [words["decision"][row] for row in (3, 63, 4, 64, 5, 65)]
    assert made == ["dropped", "dropped", "kept", "kept", "kept", "dropped"]


def test_a_decision_that_fails_leaves_no_marks(reviewed, write_jsonl):
    run, _ = reviewed
    hand = write_jsonl("hand.jsonl", [{"row": 1, "decision": "dropped"}])
    with pytest.raises(ConfigError, match="no scores by 'gaurd'"):
        Result(run).decide(filter="gaurd", decisions=hand)
    assert not Marks(run.folder, run.rows().ids, 42).all()


def test_nothing_is_left_where_every_row_is_marked_or_cannot_be_scored(tmp_path):
    run, _ = reviewable_run(tmp_path / "out")
    review = Review(run)
    states = review._states.noisy
    states = np.where(np.arange(len(states))[:, None, None] < 30, np.nan, states)
    review._states = review._states._replace(noisy=states)
    review.mark({119: "unsafe"})
    assert review.status().left[2] == 120 - 30 - review.status().dropped
    review.mark(dict.fromkeys(range(30, 118), "clean"))
    assert review.status().left[2] <= 1
    review.mark({118: "unsafe"})
    assert review.status().left == (0, 0, 0)


def test_a_decision_by_the_command_line_knows_what_was_marked(tmp_path):
    run, bad = reviewable_run(tmp_path / "out")
    answer(Review(run), bad, 30)  # and then the server is stopped without Done
    dropped = Review(Run.open(run.folder)).dropped()
    result = Result(Run.open(run.folder)).decide()
    assert result.metrics["filter"] == "review"
    np.testing.assert_array_equal(np.array(read_scores(result.run)["decision"]) == "dropped", dropped)


def test_a_review_needs_no_file_of_trusted_rows_once_its_words_are_in_the_run(tmp_path, write_jsonl):
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row % 6 != 0} for row in range(70)])
    run, bad = reviewable_run(tmp_path / "out", trusted_rows=str(sample))
    Review(run)
    sample.unlink()
    review = Review(Run.open(run.folder))
    answer(review, bad, 10)
    assert "in expectation, by " in done(review).metrics["says"]


def test_scores_of_a_review_are_made_anew_where_those_of_the_filter_are_others(reviewed):
    run, bad = reviewed
    run = decided_run(run, bad, 10)
    part = run.manifest["filters"]["forgetting"]
    other = run.folder / "scored/forgetting-1.parquet"
    scored = Scored.load(run.folder / f"{part}.parquet")
    replace(scored, suspicion=-scored.suspicion).save(other)
    run.manifest["filters"]["forgetting"] = "scored/forgetting-1"
    run.finish("scored/forgetting-1", [other], filter="forgetting")
    before = Scored.load(run.folder / "scored/review.parquet").suspicion
    Result(Run.open(run.folder)).decide()
    assert (Scored.load(run.folder / "scored/review.parquet").suspicion != before).any()


def test_a_number_is_one_of_the_scores_that_were_shown(reviewed):
    run, bad = reviewed
    answer(Review(run), bad, 20)
    assert Result(Run.open(run.folder)).decide(0.08).metrics["filter"] == "forgetting"


def test_done_knows_that_the_scores_it_was_taught_by_are_others_by_now(reviewed):
    run, bad = reviewed
    review = Review(run)
    answer(review, bad, 10)
    part = run.manifest["filters"]["forgetting"]
    other = run.folder / "scored/forgetting-1.parquet"
    scored = Scored.load(run.folder / f"{part}.parquet")
    replace(scored, suspicion=-scored.suspicion).save(other)
    meanwhile = Run.open(run.folder)  # another process, by `filter`
    meanwhile.manifest["filters"]["forgetting"] = "scored/forgetting-1"
    meanwhile.finish("scored/forgetting-1", [other], filter="forgetting")
    review.done()
    fresh = Review(Run.open(run.folder))
    np.testing.assert_allclose(
        Scored.load(run.folder / "scored/review.parquet").suspicion, fresh.scored().suspicion, atol=0.02
    )


def test_marks_change_no_file_but_their_own(reviewed):
    run, bad = reviewed

    def files():
        found = (path for path in run.folder.rglob("*") if path.is_file() and "marks.jsonl" not in path.name)
        return {path: path.read_bytes() for path in found}

    before = files()
    answer(Review(run), bad, 10)
    assert files() == before


def test_a_port_that_is_taken_is_named(reviewed):
    run, _ = reviewed
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot be listened on"):
        server.serve(Review(run), port=taken.getsockname()[1], open_browser=False)


def test_a_review_that_reads_anew_refuses_other_safe_rows(config, safe_file):
    run = ForgetFilter(replace(config, filter="forgetting")).fit().run  # it holds no hidden states
    safe_file.write_text(safe_file.read_text() + '{"prompt": "new", "completion": "row"}\n')
    review = Review(run)
    review.marks.add({0: "unsafe"})
    with pytest.raises(RunError, match="holds other rows than the safe ones"):
        review.scored()


def test_trusted_rows_say_what_is_unsafe_where_nothing_was_found(tmp_path, write_jsonl):
    sample = write_jsonl("sample.jsonl", [{"row": row, "clean": row % 6 != 0} for row in range(70)])
    run, _ = reviewable_run(tmp_path / "out", trusted_rows=str(sample))
    name = scored_part(run, "forgetting")
    part = run.table_file(name)
    replace(Scored.load(part), scale=Scale(0, nothing="no separation: chance")).save(part)
    run.finish(name, [part])
    assert (Review(run).ranking.verdicts == 1).any()
