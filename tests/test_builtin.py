"""The safe rows in the box: what they are, in whose shape they come, and a run that names no other."""

import dataclasses
import itertools
import json
import re
from collections import Counter

import pytest
from conftest import run

from forgetfilter.cli import main
from forgetfilter.config import BUILTIN, ForgetFilterConfig
from forgetfilter.data.builtin import LEAST, builtin_rows, like, mostly_builtin
from forgetfilter.data.formats import read_row
from forgetfilter.data.loading import find_format, load_data, load_rows
from forgetfilter.data.sources import load_source
from forgetfilter.data.tokenization import ChatTokenizer
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError
from forgetfilter.forgetting import ForgetFilter

ROWS = builtin_rows()


def shaped(records):
    row_format = "text" if "text" in records[0] else "messages" if "messages" in records[0] else "prompt_completion"
    return like(ROWS, [read_row(record, row_format) for record in records])


def trigrams(text):
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def test_there_are_enough_rows_of_every_notion_style_and_language():
    assert len(ROWS) >= 600
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    notions = Counter(row["notion"] for row in ROWS)
    assert notions.keys() == {
        *("stereotypes", "insults", "hate", "harmful_requests", "jailbreaks", "self_harm", "medical_advice"),
        *("legal_advice", "financial_advice", "privacy", "insecure_code", "sexual_content", "needless_refusals"),
        "tasks",
    }
    assert min(notions.values()) >= 25
    answered = [row["answered"] for row in ROWS if row["notion"] == "stereotypes"]
    assert answered.count(True) == answered.count(False)
    assert Counter(row["style"] for row in ROWS).keys() == {"short", "medium", "long", "system", "turns"}
    languages = Counter(row["language"] for row in ROWS)
    assert languages.keys() == {"en", "de", "es", "fr", "zh", "hi", "ar"}
    assert min(languages.values()) >= 10
    for row in ROWS:
        turns = read_row(row, "messages")
        assert turns[-1].trained
        assert all(turn.content == turn.content.strip() != "" for turn in turns), row["id"]


def test_no_row_repeats_another():
    for part in (0, -1):  # the prompts, the answers
        texts = [[m["content"] for m in row["messages"] if m["role"] != "system"][part] for row in ROWS]
        assert len(set(texts)) == len(texts)
        grams = [trigrams(text) for text in texts]
        for one, other in itertools.combinations([own for own in grams if own], 2):
            assert len(one & other) <= 0.3 * len(one | other)
        openings = Counter(" ".join(text.split()[:3]) for text in texts)
        assert openings.most_common(1)[0][1] <= 3


def test_rows_come_by_notion_and_unknown_ones_are_named():
    found = builtin_rows("builtin:privacy, hate")
    assert {row["notion"] for row in found} == {"privacy", "hate"}
    for name in ("builtin:jokes", "builtin:"):
        with pytest.raises(ConfigError, match=r"there are stereotypes, .* as in builtin:stereotypes,"):
            builtin_rows(name)


def test_rows_take_the_system_message_that_most_noisy_rows_share():
    system = {"role": "system", "content": "You sell lamps."}
    say = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a word " * 60}]
    with_it, without = {"messages": [system, *say]}, {"messages": say}
    for row in shaped([with_it, with_it, without]):
        assert row["messages"][0]["role"] == "system"
    assert {row["messages"][0]["content"] for row in shaped([with_it, with_it, without])} > {"You sell lamps."}
    plain = shaped([with_it, without, without])
    assert len(plain) == len(ROWS)
    assert [row["messages"] for row in plain] == [row["messages"] for row in ROWS]


def test_answers_are_about_as_long_as_those_of_the_noisy_rows():
    short = shaped([{"prompt": "a", "completion": "one two three"}] * 20)
    assert len(ROWS) > len(short) >= LEAST
    assert max(len(row["messages"][-1]["content"].split()) for row in short) <= 15
    some = shaped([{"prompt": "a", "completion": "word " * 20}] * 20)
    assert len(short) < len(some) < len(ROWS)
    for text in ("是的我们今天开门欢迎您来", "はいきょうはあいていますよ", "ร้านเปิดทุกวันค่ะ"):  # no spaces between words
        assert len(shaped([{"prompt": "a", "completion": text * 20}] * 20)) > len(some)


def test_plain_text_gets_plain_text():
    found = shaped([{"text": "word " * 40}] * 3)
    assert all(row["text"] for row in found)
    assert not any("messages" in row for row in found)


def test_a_run_needs_nothing_but_the_noisy_file(config, write_jsonl, tmp_path, monkeypatch):
    few = sorted(ROWS, key=lambda row: len(str(row)))[:6]
    monkeypatch.setattr("forgetfilter.data.loading.builtin_rows", lambda name: few)
    alone = dataclasses.replace(config, safe_dataset_name=ForgetFilterConfig().safe_dataset_name, max_length=512)
    result = ForgetFilter(alone).fit()
    assert result.run.manifest["safe"]["rows"] == 6
    assert result.metrics["dropped"] == 0
    assert "so they only rank your rows. Mark some" in result.metrics["says"]
    assert len(set(result.scores["forgetting"])) > 10  # they rank all the same
    assert result.decide(drop_share=0.25).metrics["dropped"] == 4
    again = ForgetFilter(alone).fit()
    assert again.run.manifest["safe"] == result.run.manifest["safe"]
    own = [{"prompt": f"q{i}", "completion": f"gladly, {i}"} for i in range(4)]
    given = ForgetFilter(dataclasses.replace(alone, output_dir=f"{alone.output_dir}-2")).fit(safe=own)
    assert "those of the package" not in given.metrics["says"]  # though the setting still names them
    assert "safe_dataset_name" not in (result.run.folder / "config.yaml").read_text()


def test_rows_in_the_box_are_known_in_a_file_too(tmp_path, write_jsonl):
    """`safe_data` writes them out, in any shape; while they are half of the safe rows they drop nothing."""
    for name, rows in (
        ("chats", [{"prompt": "a", "completion": "one two three"}]),
        ("texts", [{"text": "word " * 40}]),
    ):
        safe = tmp_path / f"{name}.jsonl"
        main(["safe_data", "--like", str(write_jsonl("noisy.jsonl", rows * 20)), "--output", str(safe)])
        source = load_source(safe)
        said = list(source.turns(find_format(source)))
        own = [[Turn("user", f"q{i}", False), Turn("assistant", f"gladly, {i}", True)] for i in range(len(said) + 1)]
        assert mostly_builtin(said)
        assert mostly_builtin([*said, *own[:-1]])
        assert not mostly_builtin([*said, *own])
    assert not mostly_builtin([])


@pytest.mark.parametrize("system", [False, True])
def test_written_rows_have_prompts_of_one_type(tmp_path, write_jsonl, system):
    """Readers of JSON lines such as `datasets` refuse a column of texts and lists."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    row = {"prompt": asked if system else "q", "completion": "word " * 60}
    row["completion"] = [{"role": "assistant", "content": row["completion"]}] if system else row["completion"]
    main(["safe_data", "--like", str(write_jsonl("noisy.jsonl", [row] * 9)), "--output", str(tmp_path / "safe.jsonl")])
    written = [json.loads(line) for line in (tmp_path / "safe.jsonl").read_text().splitlines()]
    assert len(written) > 400
    kind = list if system else str
    assert all(isinstance(row["prompt"], kind) and isinstance(row["completion"], kind) for row in written)


def test_no_filter_drops_rows_by_what_the_safe_rows_in_the_box_speak_of(config, monkeypatch):
    monkeypatch.setattr("forgetfilter.data.loading.builtin_rows", lambda name: ROWS[:6])
    given = {"safe_dataset_name": ForgetFilterConfig().safe_dataset_name, "max_length": 512}
    result = ForgetFilter(dataclasses.replace(config, filter="seal", **given)).fit()
    assert result.metrics["dropped"] == 0
    assert "so they only rank your rows. Mark some" in result.metrics["says"]


def test_text_rows_are_reviewed_with_text_rows(tokenizer, write_jsonl):
    noisy = write_jsonl("noisy.jsonl", [{"text": f"word {i} " * 30} for i in range(4)])
    chat = ChatTokenizer(tokenizer, 512)
    data = load_data(ForgetFilterConfig(dataset_name=str(noisy)), chat)
    assert data.safe.row_format == "text"
    assert len(data.safe.trainable()) == len(data.safe.examples)
    assert data.safe.source.name == BUILTIN


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt", "completion"}),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"messages"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"instruction", "output"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"conversations"}),
        ({"text": "a b c"}, {"text"}),
    ],
)
def test_the_rows_are_written_in_the_shape_of_a_file(record, columns, write_jsonl, tmp_path, capsys, tokenizer):
    path, output = write_jsonl("mine.jsonl", [record] * 3), tmp_path / "safe.jsonl"
    code, said = run(capsys, "safe_data", "--output", output, "--like", path, "--notions", "privacy,insults")
    assert code == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert f"{len(rows)} safe rows" in said
    assert len(rows) > 40
    assert all(columns <= row.keys() and row["notion"] in ("privacy", "insults") for row in rows)
    assert load_rows(str(output), "safe", ChatTokenizer(tokenizer, 512), ForgetFilterConfig()).malformed == []
    code, said = run(capsys, "safe_data", "--output", output)
    assert code == 2
    assert "exists" in said


def test_the_rows_have_the_columns_of_a_file_where_these_are_called_otherwise(write_jsonl, tmp_path, capsys, tokenizer):
    path, output = write_jsonl("mine.jsonl", [{"q": "a", "a": "b"}] * 3), tmp_path / "safe.jsonl"
    columns = "prompt=q,completion=a"
    assert run(capsys, "safe_data", "--output", output, "--like", path, "--columns", columns)[0] == 0
    assert all({"q", "a"} <= json.loads(line).keys() for line in output.read_text(encoding="utf-8").splitlines())
    config = ForgetFilterConfig(columns=columns)
    assert load_rows(str(output), "safe", ChatTokenizer(tokenizer, 512), config).malformed == []


def test_without_a_file_to_be_like_all_rows_are_written_as_they_are(tmp_path, capsys):
    output = tmp_path / "safe.jsonl"
    assert run(capsys, "safe_data", "--output", output)[0] == 0
    assert load_source(output).rows() == ROWS
    code, said = run(capsys, "safe_data", "--output", tmp_path / "other.jsonl", "--notions", "jokes")
    assert code == 2
    assert "no notion jokes" in said
    code, said = run(capsys, "safe_data", "--output", tmp_path / "other.jsonl", "--format", "alpaca")
    assert (code, "--format needs --like" in said) == (2, True)
    assert not (tmp_path / "other.jsonl").exists()
