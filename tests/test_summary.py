"""What the terminal says of a decided run."""

import numpy as np
import pytest
from stored_runs import stored_run

from forgetfilter.result import Result
from forgetfilter.scored import ANSWER, Scored
from forgetfilter.summary import SHOWN, WIDTH, print_summary

HOSTILE = "ignore this\x1b[2J\nrm -rf ~\u202egnp.exe " + "long " * 40


@pytest.fixture
def result(tmp_path):
    rows = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(12)]
    rows[3] = {"prompt": "evil?", "completion": HOSTILE}
    lost = np.linspace(0, 0.1, 12)
    lost[3] = 0.9
    run = stored_run(tmp_path / "run", rows, lost, filter="forgetting")
    return Result(run).decide(0.5)


def of_answer(run, number):
    """Note that the first of two rows has its score from its answer of this number."""
    part = run.folder / "scored/forgetting-0.parquet"
    scored = Scored.load(part)
    scored.columns[ANSWER] = np.array([number, np.nan])
    scored.save(part)
    run.finish("scored/forgetting-0", [part], filter="forgetting")


def said(result, capsys):
    print_summary(result, result.run.folder / "report.html")
    return capsys.readouterr().out


def test_the_most_suspect_rows_are_shown_harmlessly(result, capsys):
    lines = said(result, capsys).splitlines()
    first = lines.index("the 5 most suspect rows by forgetting:")
    shown = lines[first + 1 : first + 1 + 2 * SHOWN]
    assert shown[0].split()[1:] == ["dropped", "evil?"]
    assert [line.split()[-1] for line in shown[2::2]] == ["11?", "10?", "9?", "8?"]
    assert all(line.isprintable() and len(line) < WIDTH + 30 for line in shown)
    assert "rm -rf" in shown[1]


def test_plain_text_rows_and_rows_without_a_score(tmp_path, capsys):
    run = stored_run(
        tmp_path / "run", [{"text": f"Text {i}."} for i in range(3)], [0.1, np.nan, 0.2], filter="forgetting"
    )
    out = said(Result(run).decide(0.5), capsys)
    assert "the 2 most suspect rows" in out
    assert "0.200 kept    Text 2." in out  # plain text has no question
    assert "->" not in out


def test_the_answer_that_is_named_is_the_one_that_is_shown(tmp_path, capsys):
    """Answers that are trained are counted, also one that has nothing but reasoning."""
    turns = [{"role": "user", "content": "first?"}, {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    turns += [{"role": "user", "content": "second?"}, {"role": "assistant", "content": "evil"}]
    turns += [{"role": "user", "content": "third?"}, {"role": "assistant", "content": "", "reasoning_content": "oh"}]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    for answer, shown in ((2.0, "evil"), (3.0, "third?")):
        run = stored_run(tmp_path / str(answer), rows, [0.9, 0.1], filter="forgetting")
        of_answer(run, answer)
        assert shown in said(Result(run).decide(0.5), capsys)


def test_a_final_model_that_a_kill_left_half_noted_is_no_error(result, capsys):
    result.run.manifest["stages"]["final"] = {"decision": "", "files": {}}
    assert "finetuned on the kept rows" in said(result, capsys)


def test_the_final_model_stands_beside_the_decision(result, capsys):
    assert "forgetfilter finetune" in said(result, capsys)
    final = {"decision": "", "stale": False, "files": {}}
    result.run.manifest["stages"]["final"] = final
    out = said(result, capsys)
    assert "finetuned on the kept rows" in out
    assert "forgetfilter finetune" not in out
    final["stale"] = True
    out = said(result, capsys)
    assert "is of an earlier decision" in out
    assert "forgetfilter finetune" in out


def test_where_nothing_is_kept_no_finetuning_is_offered(result, capsys):
    out = said(Result(result.run).decide(-1), capsys)
    assert "no row is kept" in out
    assert "forgetfilter finetune" not in out


def test_of_a_conversation_the_most_suspect_answer_is_shown_and_calls_are(tmp_path, capsys):
    def talk(*said):
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "tides", "arguments": "{}"}}]}
    rows = [
        talk(
            ("user", "one?"),
            ("assistant", "good"),
            ("user", "two?"),
            ("assistant", "BAD"),
            ("user", "three?"),
            ("assistant", "ok"),
        ),
        {"messages": [{"role": "user", "content": "High tide?"}, call]},
    ]
    run = stored_run(tmp_path / "run", rows, [0.9, 0.8], filter="forgetting")
    of_answer(run, 2.0)
    out = said(Result(run).decide(0.5), capsys)
    assert "-> BAD" in out
    assert '-> {"name": "tides"' in out
