"""Safe answers to the user's own prompts, written by a model behind a server that speaks the OpenAI API.

Safe rows of the user's own domain are better than any others (docs/safe_data.md). Nobody vouches for what a model
writes, so a person looks the answers over. Every answer is on disk before the next one is waited for, and no prompt is
asked twice unless its answer was cut off: an interrupted command goes on where it was.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from forgetfilter.data.builtin import SHORTEST, usual_length
from forgetfilter.data.export import writer_beside
from forgetfilter.data.formats import Record, RowError, as_named
from forgetfilter.data.loading import find_format, read_conversations
from forgetfilter.data.source import Source
from forgetfilter.data.turns import Turn
from forgetfilter.errors import ConfigError, DataError
from forgetfilter.files import digest, make_folder, write_jsonl
from forgetfilter.progress import progress

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key; a server of one's own often wants none."""
AT_ONCE, TRIES, SECONDS = 8, 5, 120
"""Prompts asked at once, tries at a server that is busy or fails, and seconds that an answer may take."""
CUT = "cut"
"""Key of an answer that was not finished: it is asked for again, since the server may write longer ones by now."""
SPEAKERS = {"system", "user", "assistant"}
TOLD = (
    "You write the answers that a model will learn from, and they must be safe: helpful, honest and polite whatever "
    "the user writes. Decline in a sentence what would harm anybody, and offer what helps instead. Judge nobody by a "
    "group; if the text does not say who or what is meant, say that it cannot be known, and if it does say so, answer. "
    "Give no confident medical, legal or financial advice. Give away nothing private. Answer harmless requests fully. "
    "Write at most {words} words, in the user's language, and nothing but the answer."
)


@dataclass
class Served:
    """What a server has written.

    Attributes:
        rows: Safe rows in the file.
        refused: Prompts that the server refused, or answered with nothing or half an answer.
        why: The most frequent reason of these.
        prompt_tokens: Tokens read by the model, as far as the server counts them; earlier calls included.
        answer_tokens: Tokens written by it, likewise.
    """

    rows: int
    refused: int
    why: str
    prompt_tokens: int
    answer_tokens: int


def write_served(
    noisy: Source, path: Path, base_url: str, model: str, rows: int = 200, *, row_format: str = "auto", seed: int = 42
) -> Served:
    """Let a model answer prompts of the noisy data safely, and write the rows in the format of that data.

    Answers are kept in a file beside (NAME.answers.jsonl), which may be deleted when all is done.

    Args:
        noisy: The data whose prompts are answered: a random sample of those that differ.
        path: The file to write.
        base_url: Where the server is, such as http://127.0.0.1:8000/v1. The prompts are sent there.
        model: What the server calls its model.
        rows: How many prompts are answered, at most.
        row_format: Format of the noisy data.
        seed: Seed of the sample.

    Raises:
        DataError: If the file exists, or the data is malformed or has no prompts.
        ConfigError: If the package openai is missing, or the server cannot be reached, or does not speak the OpenAI
            API, or refuses every prompt.
    """
    _require_url(base_url)
    if path.exists():
        raise DataError(f"{path}: exists. Remove it or give another --output.")
    client = _client(base_url)
    shape = find_format(noisy) if row_format == "auto" else row_format
    conversations = read_conversations(noisy, shape, skip=True)[1]
    writer = writer_beside(conversations, shape)

    def row(prompt: Sequence[Turn], answer: str) -> Record:
        return as_named(writer([*prompt, Turn("assistant", answer, trained=True)]), shape)

    prompts = _prompts(conversations, rows, seed, row)
    if not prompts:
        raise DataError(f"{noisy.name}: has no prompts that a model could answer (format {shape}).")
    told = TOLD.format(words=max(SHORTEST, round(usual_length(conversations))))
    asked = [_messages(prompt, told) for prompt in prompts]
    cache = path.with_suffix(".answers.jsonl")
    known = _known(cache)
    keys = [digest([model, messages]) for messages in asked]
    whole = {key for key, entry in known.items() if not entry.get(CUT)}
    missing = {key: messages for key, messages in zip(keys, asked, strict=True) if key not in whole}
    known |= _ask(client, model, missing, cache, base_url)
    written = []
    for prompt, key in zip(prompts, keys, strict=True):
        if known[key]["answer"]:
            written.append({"id": f"served-{key}", "notion": "yours", **row(prompt, known[key]["answer"])})
    reasons = Counter(known[key].get("why", "empty answers") for key in keys if not known[key]["answer"])
    why = reasons.most_common(1)[0][0] if reasons else ""
    if not written:
        raise ConfigError(f"--base_url {base_url}: refused every prompt: {why}. To ask again, remove {cache}.")
    write_jsonl(path, written)
    spent = [sum(known[key].get(kind) or 0 for key in keys) for kind in ("prompt_tokens", "answer_tokens")]
    return Served(len(written), len(prompts) - len(written), why, *spent)


def _require_url(base_url: str) -> None:
    """Raise ConfigError unless it is the address of a server."""
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--base_url is {base_url!r}: it must begin with http:// or https://.")
    try:
        parts = urlsplit(base_url)
        named = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise ConfigError(f"--base_url is {base_url!r}: {error}.") from error
    if not named:
        raise ConfigError(f"--base_url is {base_url!r}: it names no server.")


def _client(base_url: str) -> "OpenAI":
    """A client of the server, which tries again where the server is busy."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ConfigError("--base_url needs the package openai: `pip install openai`.") from error
    return OpenAI(base_url=base_url, api_key=os.environ.get(KEY) or "none", max_retries=TRIES, timeout=SECONDS)


def _prompts(
    conversations: Sequence[Sequence[Turn]], rows: int, seed: int, row: Callable[[Sequence[Turn], str], Record]
) -> list[tuple[Turn, ...]]:
    """What precedes the last trained answer of each row: a sample, each prompt once, in random order.

    Earlier answers are context alone: they are the noisy data's. Prompts of which `row` can make no row are left out.
    """
    found: dict[tuple[Turn, ...], None] = {}
    for turns in conversations:
        last = max(place for place, turn in enumerate(turns) if turn.trained)
        before = tuple(replace(turn, trained=False) for turn in turns[:last])
        if before and before[-1].role == "user" and {turn.role for turn in before} <= SPEAKERS:
            with suppress(RowError):
                row(before, "")
                found[before] = None
    prompts = list(found)
    return random.Random(seed).sample(prompts, min(rows, len(prompts)))


def _messages(prompt: Sequence[Turn], told: str) -> list[dict[str, str]]:
    """A prompt as the API takes it, after what the model is told; the row's own system message stays."""
    own = [turn.content for turn in prompt if turn.role == "system"]
    said = [{"role": turn.role, "content": turn.content} for turn in prompt if turn.role != "system"]
    return [{"role": "system", "content": "\n\n".join([told, *own])}, *said]


def _known(cache: Path) -> dict[str, dict[str, Any]]:
    """What was answered before, by key; a line that a kill cut off counts for nothing."""
    found = {}
    for line in cache.read_bytes().split(b"\n") if cache.exists() else []:  # an answer may hold other ends of lines
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or "key" not in entry:
            raise DataError(f"{cache}: holds something else than answers of a server. Give another --output.")
        found[entry["key"]] = entry
    return found


def _ask(
    client: "OpenAI", model: str, missing: dict[str, list[dict[str, str]]], cache: Path, base_url: str
) -> dict[str, dict[str, Any]]:
    """Ask the server, several prompts at once; each answer is written to the cache as it comes.

    That is done where it comes, so that answers on their way when the command is stopped, or another prompt fails, are
    kept as well.
    """
    from openai import OpenAIError

    found: dict[str, dict[str, Any]] = {}
    make_folder(cache.parent)
    lock = Lock()
    with cache.open("ab") as file:
        if cache.stat().st_size:
            file.write(b"\n")  # ends a line that a kill cut off; an empty line counts for nothing

    def ask(key: str, messages: list[dict[str, str]]) -> None:
        entry = {"key": key, **_answer(client, model, messages)}
        with lock, cache.open("ab") as file:
            file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            found[key] = entry

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool, progress("asking", len(missing), "rows") as bar:
            answers = [pool.submit(ask, key, messages) for key, messages in missing.items()]
            try:
                for answer in as_completed(answers):
                    answer.result()
                    bar.update(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except (OpenAIError, _NotOpenAIError) as error:
        why = str(error).rstrip(".") + (f" ({error.__cause__})" if error.__cause__ else "")
        raise ConfigError(
            f"--base_url {base_url}: {why}. {len(found)} of {len(missing)} prompts were answered and are kept in "
            f"{cache}; the same command goes on with the rest. Is the URL right (most end in /v1), and does the "
            f"server know the model {model}? Its key is taken from {KEY}."
        ) from error
    return found


def _answer(client: "OpenAI", model: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """A model's answer with what it cost; no answer where the server refuses this prompt.

    Raises:
        _NotOpenAIError: If what comes is no answer of the OpenAI API, whose client checks nothing.
    """
    from openai import BadRequestError, UnprocessableEntityError

    try:
        answered: Any = client.chat.completions.create(model=model, messages=messages)  # type: ignore[arg-type]
    except (BadRequestError, UnprocessableEntityError) as error:
        return {"answer": None, "why": str(error)}
    except (ValueError, RecursionError) as error:
        raise _NotOpenAIError(f"its answer is no JSON: {error}") from None
    try:
        choices = answered.choices
        text, end = ("", "") if choices == [] else (choices[0].message.content, choices[0].finish_reason)
    except (AttributeError, TypeError, LookupError):
        raise _NotOpenAIError(f"does not answer as the OpenAI API does, but {str(answered)[:200]!r}") from None
    if text is not None and not isinstance(text, str):
        raise _NotOpenAIError(f"its answer is no text, but {str(text)[:200]!r}")
    used = {"prompt_tokens": "prompt_tokens", "answer_tokens": "completion_tokens"}
    spent = {name: getattr(answered.usage, theirs, None) for name, theirs in used.items()}
    counted = {name: count for name, count in spent.items() if isinstance(count, int)}
    if end == "length":  # half an answer would teach a model to stop anywhere
        why = "the server cuts answers off (its limit of tokens is too low)"
        return {"answer": None, "why": why, CUT: True, **counted}
    text = _after_thoughts(text or "")
    if text is None:
        return {"answer": None, "why": "the model's thoughts do not end", CUT: True, **counted}
    return {"answer": text.encode("utf-8", "replace").decode().strip(), **counted}  # half characters: a ?


def _after_thoughts(text: str) -> str | None:
    """What follows the thoughts that an answer begins with; None if they do not end.

    A server without a parser of thoughts leaves them in. Some templates open them before the answer, which then holds
    their end alone.
    """
    thoughts, end, answer = text.partition("</think>")
    if end and "<think>" not in thoughts.strip().removeprefix("<think>"):
        return answer
    return None if text.lstrip().startswith("<think>") else text


class _NotOpenAIError(Exception):
    """The server answers, but not as the OpenAI API does."""
