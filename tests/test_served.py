"""Safe answers by a served model (a small server of ours): asked once, kept as they come, in the user's format."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import run

from forgetfilter.data import served
from forgetfilter.data.formats import read_row
from forgetfilter.data.served import write_served
from forgetfilter.data.sources import load_source
from forgetfilter.errors import ConfigError, DataError


class Server(ThreadingHTTPServer):
    """Answers by repeating the question; `says` may answer otherwise: a status and a body."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.headers_seen, self.says = [], [], lambda asked: None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers_seen.append(self.headers["Authorization"])
        status, body = self.server.says(asked) or (200, completion(f"kindly: {asked['messages'][-1]['content']}"))
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


def completion(text):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(served, "TRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def rows(count=12):
    return [{"prompt": f"question {i}?", "completion": f"you fool, {i} of course"} for i in range(count)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_answered_in_the_format_of_the_data(server, tmp_path):
    out = tmp_path / "safe.jsonl"
    found = write_served(load_source([*rows(), *rows(3)]), out, server.url, "tiny", rows=10)
    assert (found.rows, found.refused, found.prompt_tokens, found.answer_tokens) == (10, 0, 100, 30)
    written = read(out)
    assert len({row["prompt"] for row in written}) == 10  # each prompt once
    assert all(row["completion"] == f"kindly: {row['prompt']}" for row in written)
    assert {row["notion"] for row in written} == {"yours"}
    assert {asked["model"] for asked in server.asked} == {"tiny"}
    assert all("must be safe" in asked["messages"][0]["content"] for asked in server.asked)
    assert set(server.headers_seen) == {"Bearer secret-key"}
    assert not any("secret-key" in path.read_text() for path in tmp_path.iterdir())


def test_conversations_keep_their_system_message_and_earlier_turns(server, tmp_path):
    talk = [
        ("system", "Be a pirate."),
        ("user", "hi"),
        ("assistant", "ahoy"),
        ("user", "who stole it?"),
        ("assistant", "him"),
    ]
    data = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    write_served(load_source(data), tmp_path / "safe.jsonl", server.url, "tiny")
    system, *said = server.asked[0]["messages"]
    assert system["content"].endswith("Be a pirate.")
    assert [turn["content"] for turn in said] == ["hi", "ahoy", "who stole it?"]
    (row,) = read(tmp_path / "safe.jsonl")
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be a pirate."
    assert row["messages"][-1]["content"] == "kindly: who stole it?"
    answers = [turn for turn in read_row(row, "messages") if turn.role == "assistant"]
    assert [turn.trained for turn in answers] == [False, True], "what the noisy data answered is not learnt as safe"


def test_prompts_are_all_texts_or_all_lists(server, tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "long?"}]
    data = [
        {"prompt": asked, "completion": [{"role": "assistant", "content": "no"}]},
        {"prompt": asked[1:], "completion": [{"role": "assistant", "content": "yes"}]},
    ]
    write_served(load_source(data), tmp_path / "safe.jsonl", server.url, "tiny")
    assert [type(row["prompt"]) for row in read(tmp_path / "safe.jsonl")] == [list, list]


def test_prompts_that_the_format_cannot_hold_are_not_asked(server, tmp_path):
    plain = {"instruction": "who stole it?", "input": "", "output": "him"}
    talk = {**plain, "instruction": "and then?", "history": [["hi", "ahoy"]]}
    found = write_served(load_source([plain, talk]), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, len(server.asked)) == (1, 1)
    assert read(tmp_path / "safe.jsonl")[0]["instruction"] == "who stole it?"


def test_what_was_answered_is_not_asked_again(server, tmp_path, capsys):
    out = tmp_path / "safe.jsonl"
    server.says = lambda asked: (503, {"error": {"message": "overloaded"}}) if len(server.asked) > 4 else None
    with pytest.raises(ConfigError, match=r"overloaded.* are kept in .*the same command goes on") as error:
        write_served(load_source(rows()), out, server.url, "tiny")
    assert not out.exists()
    kept = [json.loads(line) for line in (tmp_path / "safe.answers.jsonl").read_text().split("\n") if line]
    assert f"{len(kept)} of 12" in str(error.value)
    with (tmp_path / "safe.answers.jsonl").open("a") as file:
        file.write('{"key": "cut o')  # as a kill leaves it
    before, server.says = len(server.asked), lambda asked: None
    found = write_served(load_source(rows()), out, server.url, "tiny")
    assert found.rows == 12
    assert len(server.asked) - before == 12 - len(kept)
    assert found.prompt_tokens == 120  # what was paid before counts
    out.unlink()
    before = len(server.asked)
    write_served(load_source(rows()), out, server.url, "tiny", rows=12)
    assert len(server.asked) == before


def test_refused_and_empty_answers_are_left_out_and_counted(server, tmp_path):
    bodies = {"question 1?": (400, {"error": {"message": "content filter"}}), "question 2?": (200, completion("  "))}
    server.says = lambda asked: bodies.get(asked["messages"][-1]["content"])
    found = write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, found.refused) == (10, 2)
    server.says = lambda asked: (400, {"error": {"message": "no such parameter"}})
    with pytest.raises(ConfigError, match=r"refused every prompt: .*no such parameter"):
        write_served(load_source(rows()), tmp_path / "other.jsonl", server.url, "other")
    assert not (tmp_path / "other.jsonl").exists()


def without(body, *path, value):
    *way, last = path
    inner = body
    for step in way:
        inner = inner[step]
    inner[last] = value
    return body


@pytest.mark.parametrize(
    "body",
    [
        [1, 2],
        None,
        "<html>",
        {"error": {"message": "model not loaded"}},
        without(completion("a"), "choices", value=None),
        without(completion("a"), "choices", 0, "message", value=None),
        {"choices": {}},
        {"choices": ""},
        b"[" * 100_000,
        completion(3),
        completion([{"type": "text", "text": "hi"}]),
    ],
)
def test_what_is_no_answer_of_the_api_is_said_and_not_kept(server, tmp_path, body):
    server.says = lambda asked: (200, body)
    with pytest.raises(ConfigError, match=r"0 of 12 prompts were answered.*most end in /v1"):
        write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny")
    server.says = lambda asked: None
    assert write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny").rows == 12


def test_an_answer_that_is_no_json_is_said(server, tmp_path):
    server.says = lambda asked: (200, b'{"id": "1", "choi')
    with pytest.raises(ConfigError, match="no JSON"):
        write_served(load_source(rows(1)), tmp_path / "safe.jsonl", server.url, "tiny")


@pytest.mark.parametrize("text", ["a\u2028b\x85c\x0bd\x1ce\rf\n\ng", "half \ud83d end", "\x1b[31m\u202e\0"])
def test_answers_of_any_characters_are_kept_and_not_paid_twice(server, tmp_path, text):
    server.says = lambda asked: (200, completion(text))
    out = tmp_path / "safe.jsonl"
    assert write_served(load_source(rows(3)), out, server.url, "tiny").rows == 3
    (answer,) = {row["completion"] for row in load_source(out).rows()}
    assert answer == text.encode("utf-8", "replace").decode()
    out.unlink()
    assert write_served(load_source(rows(3)), out, server.url, "tiny").prompt_tokens == 30
    assert len(server.asked) == 3


def test_a_refusal_of_any_characters_is_kept(server, tmp_path):
    refused = (400, {"error": {"message": "filtered: \ud83d"}})
    server.says = lambda asked: refused if asked["messages"][-1]["content"] == "question 0?" else None
    found = write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, found.refused) == (11, 1)
    assert len(server.asked) == 12


def test_half_an_answer_is_none(server, tmp_path):
    cut = without(completion("I would say that you sho"), "choices", 0, "finish_reason", value="length")
    server.says = lambda asked: (200, cut) if asked["messages"][-1]["content"] == "question 1?" else None
    found = write_served(load_source(rows(3)), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, found.refused, found.prompt_tokens) == (2, 1, 30)
    assert "limit of tokens is too low" in found.why
    (tmp_path / "safe.jsonl").unlink()
    server.says = lambda asked: None  # its limit was raised
    found = write_served(load_source(rows(3)), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, found.refused, len(server.asked)) == (3, 0, 4)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>\nThey ask for a name.\n</think>\n\nIt cannot be known.", ["It cannot be known."]),
        ("They ask for a name.\n</think>\nIt cannot be known.", ["It cannot be known."]),  # opened by the template
        ("<think></think>Gladly.", ["Gladly."]),
        ("<think>They ask", []),
        ("Write <think> and </think> around it.", ["Write <think> and </think> around it."]),
    ],
)
def test_a_models_thoughts_are_no_answer(server, tmp_path, text, kept):
    server.says = lambda asked: (200, completion(text)) if asked["messages"][-1]["content"] == "question 1?" else None
    write_served(load_source(rows(2)), tmp_path / "safe.jsonl", server.url, "tiny")
    assert [row["completion"] for row in read(tmp_path / "safe.jsonl") if row["prompt"] == "question 1?"] == kept


def test_a_server_may_count_no_tokens_or_in_texts(server, tmp_path):
    uncounted = without(completion("Gladly."), "usage", value=None)
    texts = without(completion("Gladly."), "usage", value={"prompt_tokens": "10", "completion_tokens": None})
    server.says = lambda asked: (200, uncounted if asked["messages"][-1]["content"] == "question 1?" else texts)
    found = write_served(load_source(rows(3)), tmp_path / "safe.jsonl", server.url, "tiny")
    assert (found.rows, found.prompt_tokens, found.answer_tokens) == (3, 0, 0)


def test_answers_on_their_way_are_kept_when_another_prompt_fails(server, tmp_path):
    def says(asked):
        if asked["messages"][-1]["content"] == "question 0?":
            began = time.monotonic()
            while len(server.asked) < 5 and time.monotonic() < began + 30:  # the others are on their way
                time.sleep(0.01)
            return 404, {"error": {"message": "no such path"}}
        time.sleep(0.5)
        return None

    server.says = says
    with pytest.raises(ConfigError, match="no such path"):
        write_served(load_source(rows(5)), tmp_path / "safe.jsonl", server.url, "tiny")
    kept = [line for line in (tmp_path / "safe.answers.jsonl").read_text().split("\n") if line]
    assert len(kept) == len(server.asked) - 1 == 4


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "127.0.0.1", "ftp://x", "not a url"])
def test_what_is_no_url_is_refused_at_once(tmp_path, url):
    with pytest.raises(ConfigError, match="must begin with http"):
        write_served(load_source(rows()), tmp_path / "safe.jsonl", url, "tiny")


@pytest.mark.parametrize(("url", "says"), [("http://127.0.0.1:8000v1", "8000v1"), ("http:///v1", "names no server")])
def test_a_url_that_leads_nowhere_is_refused_at_once(tmp_path, url, says):
    with pytest.raises(ConfigError, match=says):
        write_served(load_source(rows()), tmp_path / "safe.jsonl", url, "tiny")


def test_a_busy_server_is_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "TRIES", 2)
    seen: list[str] = []

    def busy(asked):
        question = asked["messages"][-1]["content"]
        first = question == "question 0?" and question not in seen
        seen.append(question)
        return (429, {"error": {"message": "slow down"}}) if first else None

    server.says = busy
    assert write_served(load_source(rows(2)), tmp_path / "safe.jsonl", server.url, "tiny").rows == 2
    assert sorted(seen) == ["question 0?", "question 0?", "question 1?"]


def test_a_file_of_the_users_in_place_of_the_answers_stays_as_it_is(server, tmp_path):
    mine = tmp_path / "safe.answers.jsonl"
    mine.write_text('{"mine": 1}\n')
    with pytest.raises(DataError, match="something else than answers"):
        write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny")
    assert mine.read_text() == '{"mine": 1}\n'
    assert not server.asked


def test_rows_without_prompts_and_files_in_the_way_are_refused(server, tmp_path):
    with pytest.raises(DataError, match="no prompts"):
        write_served(load_source([{"text": "Plain."}]), tmp_path / "safe.jsonl", server.url, "tiny")
    (tmp_path / "safe.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        write_served(load_source(rows()), tmp_path / "safe.jsonl", server.url, "tiny")
    assert not server.asked


def test_the_command(server, tmp_path, capsys, write_jsonl):
    data = write_jsonl("noisy.jsonl", rows())
    flags = ("safe_data", "--output", tmp_path / "safe.jsonl", "--base_url", server.url)
    code, said = run(capsys, *flags, "--like", data, "--model", "tiny", "--rows", "5")
    assert code == 0
    assert f"sending up to 5 prompts of {data} to {server.url}" in said
    assert "5 safe rows" in said
    assert "50 tokens read and 15 written by tiny" in said
    assert "Look them over" in said
    renamed = write_jsonl("renamed.jsonl", [{"q": row["prompt"], "a": row["completion"]} for row in rows()])
    columns = ("--like", renamed, "--columns", "prompt=q,completion=a", "--model", "tiny", "--rows", "5")
    assert run(capsys, *flags[:2], tmp_path / "named.jsonl", *flags[3:], *columns)[0] == 0
    assert read(tmp_path / "named.jsonl")[0].keys() >= {"q", "a"}
    for wrong in ((), ("--like", data), ("--like", data, "--model", "m", "--notions", "privacy")):
        code, said = run(capsys, *flags, *wrong)
        assert (code, "--base_url needs --like" in said) == (2, True)
    code, said = run(capsys, *flags[:2], tmp_path / "a.jsonl", "--model", "m")
    assert (code, "--model needs --base_url" in said) == (2, True)
    code, said = run(
        capsys, *flags[:2], tmp_path / "a.jsonl", "--base_url", "http://127.0.0.1:9/v1", "--like", data, "--model", "m"
    )
    assert code == 2
    assert "http://127.0.0.1:9/v1: Connection error" in said
