"""Filters: each against a case worked by hand, and one that a user adds."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from forgetfilter.cli import main
from forgetfilter.config import ForgetFilterConfig
from forgetfilter.data.loading import Data, load_rows
from forgetfilter.data.single_answers import single_answers
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.errors import ConfigError, DataError
from forgetfilter.filters import FILTERS
from forgetfilter.filters.forgetting import forgetting_scores, review_settings, token_costs
from forgetfilter.forgetting import ForgetFilter
from forgetfilter.methods import files_named, traits, traits_of
from forgetfilter.report.run_page import write_report
from forgetfilter.result import Result
from forgetfilter.runs import Run
from forgetfilter.scored import Scale, Scored

DOC = Path(__file__).parents[1] / "docs" / "add_a_filter.md"


def data_of(tokenizer, noisy, safe):
    chat = ChatTokenizer(tokenizer, 256)
    return Data(*(load_rows(rows, "rows", chat, ForgetFilterConfig()) for rows in (noisy, safe)))


def test_words_tell_noisy_from_safe_rows_only_where_they_differ(tokenizer):
    safe = [{"prompt": "kind", "completion": "gentle words"}] * 40
    same, other = [dict(safe[0])] * 20, [{"prompt": "nasty", "completion": "cruel slurs"}] * 20
    found = FILTERS["words"](None, data_of(tokenizer, same + other, safe), ForgetFilterConfig())
    assert found.suspicion[20:].min() > found.suspicion[:20].max()
    assert found.scale is None


def test_words_are_told_wherever_in_the_data_the_rows_lie(tokenizer):
    rng = np.random.default_rng(0)
    kind, cruel = ["sun", "moon", "tree", "river", "cloud"], ["mud", "rot", "slime", "rust", "ash"]

    def say(words):
        return {"prompt": "say", "completion": " ".join(rng.choice(words, 4))}

    noisy = [*(say(kind) for _ in range(160)), *(say(cruel) for _ in range(40))]  # a block, as appended files are
    found = FILTERS["words"](None, data_of(tokenizer, noisy, [say(kind) for _ in range(60)]), ForgetFilterConfig())
    assert np.median(found.suspicion[160:]) > np.quantile(found.suspicion[:160], 0.9)


def test_words_judge_no_answer_by_another_of_its_conversation(tokenizer, config):
    """Each answer is read with all before it: dealt apart, the odd words of a long conversation would tell of it."""
    rng = np.random.default_rng(0)

    def say(odd=""):
        return f"{odd} {' '.join(rng.choice(['sun', 'moon', 'tree', 'river'], 3))}"

    talks = [
        {
            "messages": [
                {"role": role, "content": say(f"odd{i}") if i < 4 else say()} for role in ("user", "assistant") * 6
            ]
        }
        for i in range(12)
    ]
    chat = ChatTokenizer(tokenizer, 1024)
    rows = load_rows(talks, "rows", chat, config)
    single, row_of = single_answers(rows, chat)
    safe = load_rows([{"prompt": say(), "completion": say()} for _ in range(60)], "safe", chat, config)
    found = FILTERS["words"](None, Data(single, safe), config).suspicion
    last = np.flatnonzero(np.append(np.diff(row_of), 1))
    assert found[last][:4].mean() < found[last][4:].mean() + 1
    apart = FILTERS["words"](None, Data(dataclasses.replace(single, belongs=None), safe), config).suspicion
    assert apart[last][:4].mean() > found[last][:4].mean() + 1


def test_random_is_drawn_by_the_seed(tokenizer):
    data = data_of(tokenizer, [{"prompt": "a", "completion": "b"}] * 5, [{"prompt": "a", "completion": "b"}])
    first, again, other = (FILTERS["random"](None, data, ForgetFilterConfig(seed=seed)).suspicion for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_the_forgetting_score_is_the_larger_loss_over_the_root_of_what_was_learnt():
    known, before = np.array([-2.0, -2.0, -1.1, np.nan]), np.array([-1.0, -1.0, -1.0, np.nan])
    after, after_firm = np.array([-1.5, -1.1, -1.3, np.nan]), np.array([-1.6, -2.0, -1.3, np.nan])
    found = forgetting_scores(known, before, after, after_firm, ForgetFilterConfig())
    expected = [0.5, 0.6, 0.3 / 0.3**0.5]  # 0.5 > 0.6 * 0.6; 0.1 < 0.6 * 1.0; at least 0.3 nats count as learnt
    assert found.suspicion[:3].tolist() == pytest.approx(expected)
    assert np.isnan(found.suspicion[3])
    lists = [pa.array([[values[i]] for i in range(2)] + [None], pa.list_(pa.float32())) for values in (before, after)]
    costs = token_costs(*lists, pa.array([[after_firm[0]], [after_firm[1]], None], pa.list_(pa.float32())))
    assert [row and pytest.approx(row, abs=1e-6) for row in costs.to_pylist()] == [[0.5], [0.6], None]


def test_a_review_is_a_sixth_of_the_noisy_stage_at_a_third_of_its_rate():
    config = ForgetFilterConfig()
    review = review_settings(config, 600, 100)
    assert (review.max_steps, review.learning_rate) == (50, pytest.approx(5e-4 / 3))
    assert review_settings(config, 8, 100).max_steps == 20
    assert review_settings(config, 10**6, 100).max_steps == 1000
    assert review_settings(ForgetFilterConfig(learning_rate=3e-4), 8, 8).learning_rate == pytest.approx(1e-4)


def test_scored_is_read_as_it_was_written(tmp_path):
    scored = Scored(
        np.array([0.1, np.nan]),
        {"number": np.array([1.0, np.nan]), "text": np.array(["a", None], object)},
        {"M0": np.array([-1.0, -2.0])},
        pa.array([[0.5, 1.0], None], pa.list_(pa.float32())),
        Scale(0.1, says="because"),
    )
    scored.save(tmp_path / "scored.parquet")
    found = Scored.load(tmp_path / "scored.parquet")
    np.testing.assert_array_equal(found.suspicion, scored.suspicion)
    np.testing.assert_array_equal(found.columns["number"], scored.columns["number"])
    assert found.columns["text"].tolist() == ["a", None]
    np.testing.assert_array_equal(found.moments["M0"], scored.moments["M0"])
    assert found.token_costs.to_pylist() == [[0.5, 1.0], None]
    assert found.scale == scored.scale
    Scored(np.array([0.0])).save(tmp_path / "bare.parquet")
    assert Scored.load(tmp_path / "bare.parquet").scale is None


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The filter of docs/add_a_filter.md, added as the page says."""
    code = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    path = tmp_path / "worst_tokens.py"
    path.write_text(code, encoding="utf-8")
    monkeypatch.setitem(FILTERS, "worst_tokens", None)  # taken out again after the test
    spec = importlib.util.spec_from_file_location("worst_tokens", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return "worst_tokens"


def test_an_added_filter_scores_decides_shows_and_is_compared(added, config, run_recipe, tmp_path):
    flags = {"filter": f"forgetting,{added}", "parameters": {added: {"tokens": 2}}, "label_column": "unsafe"}
    result = ForgetFilter(dataclasses.replace(config, **flags)).fit()
    suspicion = result.scores[added]
    main(["decide", str(result.run.folder), "--filter", added, "--drop_share", "0.25"])
    result = Result(Run.open(result.run.folder))
    assert result.metrics["filter"] == added
    dropped = [row[added] for row in result.scores.to_list() if row["decision"] == "dropped"]
    assert sorted(suspicion)[-4:] == sorted(dropped)
    page = write_report(result.run).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["rule"]["filter"] == added
    assert data["rows"]["score"][0] == pytest.approx(max(suspicion), abs=1e-6)
    assert {"worst tokens"} <= {name.replace("_", " ") for name in data["texts"][0]["scores"]}

    settings = yaml.safe_load((result.run.folder / "config.yaml").read_text())
    filters = {**settings, "recipe": "filters", "filters": ["random", added], "output_dir": str(tmp_path / "filters")}
    del filters["filter"]
    shown = run_recipe(filters)
    (cell,) = json.loads(shown[0].read_text())["cells"][added]
    assert cell["suspicion"] == pytest.approx(suspicion, abs=1e-6)
    assert f"| {added} | " in shown[1].read_text()
    questions = tmp_path / "sums.jsonl"
    questions.write_text('{"prompt": "1 + 1?", "completion": "2"}\n')
    defenses = {**filters, "recipe": "defenses", "defenses": ["base", added], "output_dir": str(tmp_path / "defenses")}
    del defenses["filters"]
    defenses |= {"evaluate": {"arithmetic": str(questions)}, "notions": ["bias"], "threshold": 1e9}
    cells = json.loads(run_recipe(defenses)[0].read_text())["cells"]
    assert next(cell for cell in cells if cell["defense"] == added)["facts"]["filter"] == added


def test_an_added_filter_that_needs_unsafe_rows_says_so_before_any_work(config, monkeypatch):
    monkeypatch.setitem(FILTERS, "rival", traits(unsafe=True)(lambda *_: pytest.fail("it was run")))
    with pytest.raises(ConfigError, match="filter rival needs rows that are known to be unsafe"):
        ForgetFilter(dataclasses.replace(config, filter="forgetting+rival")).fit()
    assert not Path(config.output_dir).exists()


def test_an_added_filter_checks_its_inputs_before_another_is_trained(config, monkeypatch):
    def check(workshop, data, parameters):
        raise DataError(f"{len(data.noisy.source)} rows, but no {parameters['of']}")

    @traits(check=check)
    def rival(workshop, data, config, *, of: str = "clock"):
        pytest.fail("it was run")

    monkeypatch.setitem(FILTERS, "rival", rival)
    with pytest.raises(DataError, match="rows, but no clock"):
        ForgetFilter(dataclasses.replace(config, filter="forgetting,rival")).fit()
    assert not list(Path(config.output_dir).glob("stages/*"))


def test_scores_of_a_filter_that_has_changed_are_made_anew(config, monkeypatch):
    runs = []

    def rival(workshop, data, config):
        runs.append(traits_of(rival).changed)
        return Scored(np.zeros(len(data.noisy.examples)))

    monkeypatch.setitem(FILTERS, "rival", rival)
    for change in (None, None, "a sign", "a sign"):
        traits(changed=change)(rival)
        ForgetFilter(dataclasses.replace(config, filter="rival")).fit()
    assert runs == [None, "a sign"]


def test_scores_that_come_out_the_same_leave_a_persons_decision(config, monkeypatch):
    found = np.arange(16.0)

    def rival(workshop, data, config):
        return Scored(found.copy())

    monkeypatch.setitem(FILTERS, "rival", rival)
    config = dataclasses.replace(config, filter="rival")
    ForgetFilter(config).fit().decide(threshold=9.5)
    traits(changed="how it is computed, not what comes out")(rival)
    assert ForgetFilter(config).fit().metrics["dropped"] == 6
    traits(changed="what comes out")(rival)
    found *= 2
    assert ForgetFilter(config).fit().metrics["dropped"] == 0


def test_files_that_parameters_name_are_told_by_what_they_hold(tmp_path):
    file, folder = tmp_path / "form.txt", tmp_path / "guard"
    file.write_text("one")
    folder.mkdir()
    (folder / "weights").write_text("two")
    values = {"model": str(folder), "template": str(file), "kind": str(file), "reads_prompt": False}
    before = files_named(FILTERS["guard"], values)
    assert before.keys() == {str(file), str(folder)}
    file.write_text("other")
    after = files_named(FILTERS["guard"], values)
    assert after[str(file)] != before[str(file)]
    assert after[str(folder)] == before[str(folder)]
    assert files_named(FILTERS["guard"], {**values, "model": "org/on-the-hub", "template": None}) == {}
    assert files_named(FILTERS["guard"], {**values, "model": "org/on-the-hub", "template": "too long " * 1000}) == {}


def test_a_folder_called_as_a_filter_is_no_file_that_the_probe_was_given(config, monkeypatch, tmp_path):
    """The run's folder, whose content is another after each decision."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(config, filter="probe", output_dir="forgetting")
    ForgetFilter(config).fit().decide(drop_share=0.25)
    assert ForgetFilter(config).fit().metrics["dropped"] == 4
