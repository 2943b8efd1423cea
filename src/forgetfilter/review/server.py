"""The review's page, served to this machine alone.

The address holds a secret, so that no other page and no other user of the machine can read rows or set marks. It is
printed in the terminal, and reaches the browser by a file that only the user can read. Requests with another Host (DNS
rebinding) or another Origin (a foreign page) are refused. What a request names is a row's number or a mark, never a
path.
"""

import json
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
import webbrowser
from collections.abc import Awaitable, Callable, Collection
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from forgetfilter.data.formats import read_row
from forgetfilter.data.turns import text_of
from forgetfilter.errors import ConfigError, DataError, ForgetFilterError
from forgetfilter.files import disk_trouble
from forgetfilter.marks import SAID
from forgetfilter.report.page import page_text
from forgetfilter.report.shading import costs_of, load_chat, shaded
from forgetfilter.result import Result
from forgetfilter.review.asking import Question
from forgetfilter.review.session import Review
from forgetfilter.scored import ANSWER

HTTP = 80
"""The port that browsers leave out of an address."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_REQUEST = 10_000
"""Most bytes of a request's body."""
STOPS_IN = 3
"""Seconds that the server has to answer what it is answering when it is stopped."""
AHEAD, BEHIND = 6, 30
"""Rows to come, and rows marked last, that the page lists."""
LOOKED_THROUGH = 200
"""Rows to come that `next` leads through before it begins again."""
LONGEST = 200_000
"""Characters shown of a message: a person who marks a row must be able to read all of it."""
START = 90
"""Characters of a row's text in a list."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
ANOTHER_HOST = (
    "--host {host} lets other machines read the rows and mark them if they learn the address: the connection is not "
    "encrypted, and the secret in the address is all that keeps strangers out. A tunnel is safer: "
    "ssh -L {port}:127.0.0.1:{port} THIS_MACHINE. If you want it all the same, add --allow_other_machines."
)


def serve(
    review: Review,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    allow_other_machines: bool = False,
    open_browser: bool = True,
) -> None:
    """Serve a review until the process is stopped.

    Args:
        review: The review.
        port: Port to listen on; 0 for a free one.
        host: Address to listen on.
        allow_other_machines: Allow an address that other machines reach.
        open_browser: Open the page in the user's browser.

    Raises:
        ConfigError: If the address cannot be used, or other machines would reach it without leave.
    """
    if host not in LOOPBACK and not allow_other_machines:
        raise ConfigError(ANOTHER_HOST.format(host=host, port=port or "PORT"))
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: a port lies between 0 and 65535.")
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on: {error}. Give others.") from error
    with closing(listening):
        key, port = secrets.token_urlsafe(24), listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}/{key}/"
        names = (shown, "localhost")
        hosts = {*(f"{name}:{port}" for name in names), *(names if port == HTTP else ())} if host in LOOPBACK else None
        app = application(review, key, hosts)
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="warning", lifespan="off", server_header=False)
        )
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        print(review.status().line(), flush=True)  # ranks the rows: what is wrong with the run shows before the page
        thread.start()
        print(f"review: {address}\nCtrl-C ends it; what was marked stays in {review.marks.path}", flush=True)
        page = _way_in(address, review.run.folder) if open_browser and _has_screen() else None
        try:
            while thread.is_alive():
                thread.join(0.5)
        finally:
            if page is not None:
                page.unlink(missing_ok=True)
            server.should_exit = True
            ends = time.monotonic() + STOPS_IN
            while thread.is_alive() and time.monotonic() < ends:
                with suppress(KeyboardInterrupt):  # the command's own, again and again
                    thread.join(STOPS_IN)


def _has_screen() -> bool:
    """Whether there is a screen to open a browser on; without one, a browser in text mode might take the terminal."""
    return not sys.platform.startswith("linux") or bool(os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"})


def _way_in(address: str, folder: Path) -> Path:
    """Open the address in the browser by a file that nobody else can read: others can read a command's arguments.

    The file lies in a folder of the user's: a browser in a sandbox, as Ubuntu's are, sees another /tmp.
    """
    place = folder.absolute() if os.access(folder, os.W_OK) else None
    with tempfile.NamedTemporaryFile("w", dir=place, prefix="review-", suffix=".html", delete=False) as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}"><title>ForgetFilter</title>')
    page = Path(file.name)
    webbrowser.open(page.as_uri())
    return page


def application(review: Review, key: str, hosts: Collection[str] | None) -> Starlette:
    """The server's application.

    Args:
        review: The review.
        key: The secret that every address begins with.
        hosts: What requests may name as Host; None for anything.
    """
    pages = Pages(review)
    routes = [
        Route("/", pages.page),
        Route("/state", pages.answer(pages.state)),
        Route("/mark", pages.answer(pages.mark), methods=["POST"]),
        Route("/undo", pages.answer(pages.undo), methods=["POST"]),
        Route("/done", pages.answer(pages.done), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, key=key, hosts=hosts)],
        exception_handlers={Exception: _failed},
    )


class Guard:
    """Lets through what knows the secret and comes from our own page, and takes the secret off the path."""

    def __init__(self, app: ASGIApp, key: str, hosts: Collection[str] | None) -> None:
        """Keep what is checked."""
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request."""
        if scope["type"] != "http":
            return
        request = Request(scope)
        refused = self._refused(request)
        if refused is not None:
            await _read(Request(scope, receive))  # a connection closed on an unread body may lose the answer
            await JSONResponse({"error": refused[1]}, refused[0], HEADERS)(scope, receive, send)
            return
        path = scope["path"].removeprefix(f"/{self.key}")
        if not path:
            await RedirectResponse(f"/{self.key}/", headers=HEADERS)(scope, receive, send)
            return
        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    def _refused(self, request: Request) -> tuple[int, str] | None:
        """Status and words for a request that is refused; None for one of ours."""
        host = request.headers.get("host", "")
        if self.hosts is not None and host not in self.hosts:
            return 421, f"this page is served at http://{min(self.hosts)}/ alone, with the secret from the terminal"
        given, _, _ = request.url.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(given.encode(), self.key.encode()):
            return 404, "no such page: the address in the terminal is the right one"
        if request.method == "POST":
            if request.headers.get("origin") != f"http://{host}":
                return 403, "a request from another page"
            if request.headers.get("content-type") != "application/json":
                return 415, "not JSON"
        return None


class Answer(JSONResponse):
    """JSON in ASCII: data may hold half a character, which UTF-8 cannot say."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False).encode()


class Pages:
    """What the server answers.

    Args:
        review: The review.
    """

    def __init__(self, review: Review) -> None:
        """Read what the rows are shown with."""
        self.review, run = review, review.run
        self._deciding = Lock()
        self.records = review.opened.source.rows()
        self.format = run.row_format
        self.chat = load_chat(run.stage("tokenizer"), review.config)
        script = (files(__package__) / "review.js").read_text(encoding="utf-8")
        body = (files(__package__) / "review.html").read_text(encoding="utf-8")
        about = {"folder": str(run.folder), "rows": len(self.records)}
        self._page = page_text("ForgetFilter: review", body, about, script, connects=True)

    async def page(self, request: Request) -> Response:
        """The page."""
        return HTMLResponse(self._page.encode("utf-8", "replace"), headers=HEADERS)

    def answer(self, work: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Answer by what a method makes of the request's JSON; the method works outside the thread of events."""

        async def answer(request: Request) -> Response:
            try:
                asked = await _body(request) if request.method == "POST" else dict(request.query_params)
                return Answer(await run_in_threadpool(work, asked), headers=HEADERS)
            except ForgetFilterError as error:
                return Answer({"error": str(error)}, 400, HEADERS)
            except OSError as error:
                said = disk_trouble(error)
                if said is None:
                    raise
                lost = "Every mark is on disk" if work == self.done else "Nothing was marked"
                return JSONResponse({"error": f"{said} {lost}: make room, then do it again."}, 507, HEADERS)

        return answer

    def state(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All that the page shows: a row, that asked for or the next one, the lists beside it, and what marks tell."""
        review = self.review
        said, queue = review.marks.all(), review.ask(LOOKED_THROUGH)
        rows = [one.row for one in queue]
        wanted = self._row(asked["row"]) if "row" in asked else next(iter(rows), None)
        place = rows.index(wanted) if wanted in rows else -1
        question = queue[place] if place >= 0 else None
        if question is None and wanted is not None:
            question = Question(wanted, "you chose it")
        ahead = [*rows[place + 1 :], *rows[: max(place, 0)]][:AHEAD]
        last = list(said.items())[: -BEHIND - 1 : -1]
        return {
            "status": review.status().line(),
            "question": None if question is None else self._shown(question, review.scored().suspicion),
            "ahead": [{"row": row, "start": self._start(row)} for row in ahead],
            "marked": [{"row": row, "said": mark.said, "start": self._start(row)} for row, mark in last],
            "more": len(said) - len(last),
        }

    def mark(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Write a mark to disk, rank anew, and show what comes next.

        Raises:
            DataError: If the row was marked elsewhere since the page showed it.
        """
        row = self._row(asked.get("row"))
        if asked.get("said") not in SAID:
            raise DataError(f"said is {asked.get('said')!r}: it must be one of {', '.join(SAID)}.")
        self.review.mark({row: asked["said"]}, seen={row: asked.get("seen")})
        return self.state({})

    def undo(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take back the last mark of a row, and show it; what was said of it before counts again."""
        row = self._row(asked.get("row"))
        self.review.undo(row, seen=asked.get("seen"))
        return self.state({"row": row})

    def done(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Take the decision, and write everything that follows from it."""
        with self._deciding:  # two tabs: the second decides once the first has written its report
            self.review.done()
            result = Result(self.review.run)
            report, metrics, where = result.report(), result.metrics, shlex.quote(str(result.run.folder))
        print(f"decided: {metrics['kept']} kept, {metrics['dropped']} dropped ({report})", flush=True)
        return {**{name: metrics[name] for name in ("rows", "kept", "dropped", "says")}, "folder": where}

    def _row(self, value: Any) -> int:
        """A row's number, as the page names it.

        Raises:
            DataError: If there is no such row.
        """
        try:
            row = int(str(value))
        except ValueError:
            row = -1
        if not 0 <= row < len(self.records):
            raise DataError(f"no row {value!r}.")
        return row

    def _start(self, row: int) -> str:
        """The beginning of a row's answer."""
        turns = read_row(self.records[row], self.format)
        return next((text_of(turn) for turn in reversed(turns) if turn.trained), "")[:START]

    def _shown(self, question: Question, suspicion: np.ndarray) -> dict[str, Any]:
        """A row in full."""
        row, mark = question.row, self.review.marks.all().get(question.row)
        score, answers = suspicion[row], self.review.base.columns.get(ANSWER)
        answer = np.nan if answers is None else answers[row]
        turns = read_row(self.records[row], self.format)
        rank = None if np.isnan(score) else int((suspicion > score).sum()) + 1
        return {
            "row": row,
            "id": self.review.marks.ids[row],
            "why": question.why + ("" if np.isnan(answer) else f"; answer {answer:.0f} was the most suspect"),
            "rank": rank,
            "said": None if mark is None else mark.said,
            "turns": shaded(turns, costs_of(self.review.base, row), self.chat, LONGEST),
        }


async def _failed(request: Request, error: Exception) -> Response:
    """What the page is told of an error that nobody foresaw; the terminal has its traceback."""
    return JSONResponse({"error": "something went wrong; the terminal says what. Every mark is on disk."}, 500, HEADERS)


async def _read(request: Request) -> bytes:
    """A request's body, as much as came of it; of one that is too large, little more than the allowed bytes."""
    body = b""
    with suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_REQUEST:
                break
    return body


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        DataError: If it is none, or too large.
    """
    body = await _read(request)
    if len(body) > LARGEST_REQUEST:
        raise DataError("the request is too large.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError("the request is no JSON.") from error
    if not isinstance(found, dict):
        raise DataError("the request is no JSON object.")
    return found
