"""The report as a file: what is in it, what is left out, and that nothing from the data is markup."""

import dataclasses
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run as run_command
from stored_runs import stored_run

from forgetfilter.cli import main
from forgetfilter.errors import DataError
from forgetfilter.experiments.defenses import table
from forgetfilter.report import run_page
from forgetfilter.report.compare_page import write_compare_page
from forgetfilter.report.run_page import write_report
from forgetfilter.result import Result
from forgetfilter.runs import Run
from forgetfilter.scored import Scored

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>${1}\u2028"


def content(path):
    text = path.read_text(encoding="utf-8")
    (packed,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(packed)


@pytest.fixture
def run(tmp_path, tiny_model):
    records = [
        {"prompt": f"q{i}", "completion": f"ab{i}", "source": "ab"[i % 2], "unsafe": int(i >= 6)} for i in range(8)
    ]
    lost = [0.0, 0.01, 0.02, np.nan, 0.03, 0.5, 2.0, 1.0]
    settings = {"threshold": 0.2, "label_column": "unsafe"}
    return stored_run(tmp_path / "out", records, lost, tokenizer=tiny_model, tokens=[4] * 8, **settings)


def test_rows_stand_from_most_to_least_suspect_with_all_that_is_known(run):
    data = content(write_report(run))
    assert data["rows"]["row"] == [6, 7, 5, 4, 2, 1, 0, 3]
    assert data["rows"]["score"] == [2.0, 1.0, 0.5, 0.03, 0.02, 0.01, 0.0, None]
    assert data["rows"]["dropped"] == "11100000"
    assert data["rows"]["unsafe"] == "11000000"
    assert data["groups"] == ["a", "b"]
    assert data["rows"]["group"] == [0, 1, 1, 0, 0, 1, 0, 1]
    assert sorted(data["textOf"]) == list(range(8))
    assert data["leftOut"] == 0
    first = data["texts"][data["textOf"].index(0)]
    # two nats a token are level 4; the end of the turn is no text of the row's
    assert first["turns"] == [["user", "q6", 0], ["assistant", "", 1, ["a", "b", "6"], "444"]]
    assert first["scores"]["log likelihood after"] == -3.0
    assert "above threshold" in first["reason"]
    assert [chart["name"] for chart in data["losses"]] == ["noisy stage", "review stage", "firm stage"]
    (curves,) = data["curves"]
    assert curves["at"] == ["M0", "noisy data", "review", "firm review"]
    assert curves["lines"]["a"] == [-2.0, -1.0, pytest.approx(-1.5125, abs=1e-4), pytest.approx(-1.5125, abs=1e-4)]
    assert data["groupName"] == "source"
    assert data["flags"] == "--threshold 0.2"
    assert ["label_column", '"unsafe"'] in data["facts"]


def test_the_page_lets_nothing_in_from_the_data_or_the_network(tmp_path):
    records = [{"prompt": HOSTILE, "completion": HOSTILE, "source": HOSTILE}] * 3
    text = write_report(stored_run(tmp_path / "out", records, [0.1, 0.2, 0.3])).read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert "<img" not in text
    assert "\u2028" not in text
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none';")
    assert "unsafe-inline" not in policy
    assert "http" not in policy
    assert content(tmp_path / "out" / "report.html")["texts"][0]["turns"][0][1] == HOSTILE


def test_texts_far_from_the_threshold_are_left_out_where_room_is_short(run, monkeypatch):
    monkeypatch.setattr(run_page, "TEXT_BYTES", 1500)
    monkeypatch.setattr(run_page, "TOP", 1)
    data = content(write_report(run))
    assert 2 < len(data["texts"]) < 8
    assert data["leftOut"] == 8 - len(data["texts"])
    assert data["textOf"] == [0, 2, 3, 1, 4, 5][: len(data["texts"])]  # the top one, then both sides of the threshold


def test_without_the_tokenizer_the_report_shades_nothing(tmp_path):
    run = stored_run(tmp_path / "out", [{"prompt": "q", "completion": "a"}], [0.1])
    assert content(write_report(run))["texts"][0]["turns"] == [["user", "q", 0], ["assistant", "a", 1]]


def test_a_row_that_was_cut_is_shaded_as_far_as_it_was_scored(tmp_path, tiny_model, tokenizer):
    from forgetfilter.data.tokenization import ChatTokenizer
    from forgetfilter.data.turns import Turn

    record = {"prompt": "q", "completion": "abcdefghij" * 10}
    turns = [Turn("user", record["prompt"], trained=False), Turn("assistant", record["completion"], trained=True)]
    most = ChatTokenizer(tokenizer, 4096).encode(turns).prompt_length + 5
    run = stored_run(tmp_path / "out", [record], [1.0], tokenizer=tiny_model, tokens=[5], max_length=most)
    (text,) = content(write_report(run))["texts"]
    assert text["turns"][1] == ["assistant", "", 1, [*"abcde", "… fghij" + "abcdefghij" * 9], "222220"]


def test_a_plain_text_keeps_its_first_token_which_is_not_scored(tmp_path, tiny_model):
    run = stored_run(tmp_path / "out", [{"text": "hello"}], [1.0], tokenizer=tiny_model, tokens=[5])
    (text,) = content(write_report(run))["texts"]
    assert text["turns"] == [["text", "", 1, list("hello"), "02222"]]


def test_answers_of_rouge1_stand_in_the_report(tmp_path):
    rows, settings = [{"prompt": "q", "completion": "a"}], {"filter": "forgetting_rouge1", "threshold": 0.1}
    run = stored_run(tmp_path / "out", rows, [0.5], **settings)
    (text,) = content(write_report(run))["texts"]
    assert text["answers"] == {"completion before": "noisy says", "completion after": "review says"}
    assert text["scores"] == {"rouge1 before": -1.0, "rouge1 after": -1.5}


@pytest.fixture
def by_two(tmp_path):
    """A run that two filters scored, and in opposite orders; the last row neither could score."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "unsafe": int(i >= 2)} for i in range(5)]
    settings = {"filter": "forgetting,forgetting_rouge1", "label_column": "unsafe", "threshold": 0.25}
    run = stored_run(tmp_path / "out", rows, [0.1, 0.2, 0.3, 0.4, np.nan], **settings)
    part = run.manifest["filters"]["forgetting_rouge1"]
    path = run.folder / f"{part}.parquet"
    scored = Scored.load(path)
    scored.suspicion = 1 - scored.suspicion
    scored.columns["completion_after"][4] = None
    scored.save(path)
    run.finish(part, [path])
    Result(run).decide()
    return run


def test_a_run_that_two_filters_scored_shows_both(by_two):
    data = content(write_report(by_two))
    assert data["rule"]["filter"] == "forgetting"
    assert data["flags"] == "--threshold 0.25"
    assert data["by"] == ""
    assert data["rows"]["row"] == [3, 2, 1, 0, 4]
    assert data["rows"]["dropped"] == "11000"
    texts = {row: data["texts"][data["textOf"].index(place)] for place, row in enumerate(data["rows"]["row"])}
    assert texts[3]["scores"] == pytest.approx(
        {
            "forgetting": 0.4,
            "log likelihood before": -1.0,
            "log likelihood after": -1.4,
            "log likelihood after firm": -1.4,
            "forgetting rouge1": 0.6,
            "rouge1 before": -1.0,
            "rouge1 after": -1.4,
        }
    )
    assert texts[3]["answers"] == {"completion before": "noisy says", "completion after": "review says"}
    assert texts[4]["scores"] == dict.fromkeys(texts[3]["scores"])
    assert texts[4]["answers"] == {"completion before": "noisy says", "completion after": ""}
    assert texts[4]["reason"].startswith("unscored")
    assert data["curves"][0]["name"] == "forgetting"


def test_the_filter_that_decided_is_the_one_the_page_names_and_goes_by(by_two):
    by_two = Result(by_two).decide(0.65, filter="forgetting_rouge1").run
    data = content(write_report(by_two))
    assert data["rule"]["name"] == "fixed"
    assert data["rule"]["filter"] == "forgetting_rouge1"
    assert data["threshold"] == 0.65
    assert data["flags"] == "--filter forgetting_rouge1 --threshold 0.65"
    assert data["by"] == "--filter forgetting_rouge1 "
    assert data["rows"]["row"] == [0, 1, 2, 3, 4]
    assert data["rows"]["score"] == pytest.approx([0.9, 0.8, 0.7, 0.6, None])
    assert data["rows"]["dropped"] == "11100"
    (curves,) = data["curves"]
    assert curves["name"] == "forgetting rouge1"
    assert curves["at"] == ["M0", "noisy data", "review"]
    reasons = {row: data["texts"][data["textOf"].index(row)]["reason"] for row in range(4)}
    assert reasons[0] == "forgetting_rouge1 0.9000 above threshold 0.6500"
    assert reasons[3] == "forgetting_rouge1 0.6000 within threshold 0.6500"
    assert set(data["texts"][0]["scores"]) > {"forgetting", "forgetting rouge1"}


def test_scores_and_metrics_know_every_filter_and_the_one_that_decided(by_two):
    folder = by_two.folder
    for name, threshold, auroc, dropped in (
        ("forgetting", 0.25, 1.0, [2, 3]),
        ("forgetting_rouge1", 0.65, 0.0, [0, 1, 2]),
    ):
        Result(by_two).decide(threshold, filter=name)
        table = pq.read_table(folder / "scores.parquet")
        assert table["forgetting"].to_pylist() == pytest.approx([0.1, 0.2, 0.3, 0.4, None])
        assert table["forgetting_rouge1"].to_pylist() == pytest.approx([0.9, 0.8, 0.7, 0.6, None])
        assert table["completion_after"].to_pylist() == ["review says"] * 4 + [None]
        assert [row for row, made in enumerate(table["decision"].to_pylist()) if made == "dropped"] == dropped
        assert table["by_hand"].to_pylist() == [False] * 5
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["filter"], metrics["threshold"], metrics["auroc"]) == (name, threshold, auroc)
        assert {own: figures["auroc"] for own, figures in metrics["filters"].items()} == {
            "forgetting": 1.0,
            "forgetting_rouge1": 0.0,
        }
        assert name in (folder / "README.md").read_text()


def test_without_labels_no_figures_of_filters_are_given(tmp_path):
    rows, filters = [{"prompt": "q", "completion": "a"}] * 2, "forgetting_rouge1,forgetting"
    run = stored_run(tmp_path / "out", rows, [0.1, 0.4], filter=filters, threshold=0.2)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["filter"] == "forgetting_rouge1"  # the first named decides
    assert "filters" not in metrics
    assert "auroc" not in metrics


def test_a_filter_is_chosen_from_the_command_line_and_nonsense_is_one_clear_error(by_two, capsys):
    folder = by_two.folder
    code, says = run_command(capsys, "decide", folder, "--filter", "forgetting_rouge1", "--threshold", "0.65")
    assert code == 0, says
    assert "rule: fixed on forgetting_rouge1, threshold 0.650" in says
    assert content(folder / "report.html")["flags"] == "--filter forgetting_rouge1 --threshold 0.65"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, says = run_command(capsys, "decide", folder, "--filter", "nonsense")
    assert code == 2
    assert says.count("error: ") == 1
    assert "no scores by 'nonsense', but by forgetting, forgetting_rouge1" in says
    assert "Traceback" not in says
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert Run.open(folder).manifest["decision"]["filter"] == "forgetting_rouge1"


def test_a_decision_that_drops_everything_has_a_page_and_the_column_asked_for_stays(run):
    Result(run).decide(drop_share=1.0)
    data = content(write_report(run, "prompt"))
    assert data["rows"]["dropped"] == "11111110"
    assert data["threshold"] < 0
    assert data["flags"] == "--drop_share 1.0"
    assert len(data["groups"]) == 8
    assert content(write_report(run))["groupName"] == "prompt"


def test_a_group_of_which_the_sampled_witness_saw_no_row_has_no_curve(run):
    part = run.folder / "scored/probe-0.parquet"
    scored = Scored.load(part)
    unseen = np.arange(8) % 2 == 1
    scored.moments = {name: np.where(unseen, np.nan, values) for name, values in scored.moments.items()}
    scored.save(part)
    run.finish("scored/probe-0", [part], filter="probe")
    (curves,) = content(write_report(Result(run).decide().run))["curves"]
    assert list(curves["lines"]) == ["a"]


def test_rows_whose_decision_follows_from_no_threshold_are_told(run):
    run.write_json("stages/unreadable.json", [2])
    run.finish("unreadable", [run.stage("unreadable.json")])
    assert content(write_report(Result(run).decide().run))["rows"]["fixed"] == "0" * 8
    flags = run.folder / "config.yaml"
    flags.write_text(flags.read_text() + "unreadable: drop\n")
    data = content(write_report(Result(Run.open(run.folder)).decide().run))
    assert data["rows"]["fixed"] == "00001000"
    assert data["rows"]["dropped"] == "11101000"


def test_groups_beyond_a_dozen_are_one(tmp_path):
    records = [{"prompt": "q", "completion": "a", "source": f"s{i}" if i > 5 else "s"} for i in range(40)]
    data = content(write_report(stored_run(tmp_path / "out", records, [i / 40 for i in range(40)])))
    assert data["groups"][0] == "s"
    assert data["groups"][-1] == run_page.OTHERS
    assert len(data["groups"]) == run_page.GROUPS


def test_deciding_again_removes_the_page_of_the_decision_before(run):
    path = write_report(run)
    Result(run).decide(0.9)
    assert not path.exists()


def test_a_run_that_drops_nothing_and_a_group_column_that_is_not_there(run):
    Result(run).decide(9.0)
    assert content(write_report(run))["rows"]["dropped"] == "0" * 8
    with pytest.raises(DataError, match="group_column"):
        write_report(run, "colour")
    assert content(write_report(run, "unsafe"))["groups"] == ["0", "1"]


def test_rows_decided_by_hand_are_marked(run, tmp_path):
    by_hand = tmp_path / "hand.jsonl"
    by_hand.write_text('{"row": 6, "decision": "kept"}\n')
    main(["decide", str(run.folder), "--decisions", str(by_hand)])
    data = content(run.folder / "report.html")
    assert data["rows"]["dropped"] == "01100000"
    assert data["rows"]["hand"] == "10000000"


def test_a_sample_gets_a_page(tmp_path, noisy_file):
    main(["sample", str(noisy_file), "--rows", "5", "--output", str(tmp_path / "s.jsonl")])
    data = content(tmp_path / "s.html")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert data["rows"]["id"] == [line["id"] for line in lines]
    assert data["file"] == "s-marked.jsonl"
    assert data["texts"][0]["turns"][0][1] == lines[0]["text"]


def test_an_experiments_page_shows_its_table_and_pictures(tmp_path):
    picture = tmp_path / "p.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    means = {"none": {"qa": {"f1": {"mean": 0.5, "spread": 0.1, "seeds": 2}}}}
    figures = dataclasses.replace(table(means), notes=["One <guard>: not run."])
    text = write_compare_page(tmp_path, "A <b> title", "about & more", figures, [picture]).read_text()
    assert "A &lt;b&gt; title" in text
    assert "about &amp; more" in text
    assert "<th scope='row'>none</th><td class='number'>0.500 ± 0.100</td>" in text
    assert text.count("<th scope='row'>") == 1
    assert "<p>One &lt;guard&gt;: not run.</p>" in text
    assert "data:image/svg+xml;base64," in text


def test_report_from_the_command_line(run, capsys):
    main(["report", str(run.folder), "--group_column", "source"])
    assert capsys.readouterr().out.strip() == str(run.folder / "report.html")
