"""The review in a real Chromium: by keys alone, through a kill, in two tabs, on a phone, in the dark, with hostile rows."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from browser.test_pages import HOSTILE
from stored_runs import reviewable_run

from forgetfilter.marks import Marks

pytestmark = pytest.mark.browser


class Server:
    """`forgetfilter review` in a process of its own."""

    def __init__(self, folder, *flags):
        command = [sys.executable, "-m", "forgetfilter", "review", str(folder), "--no-browser", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        for line in self.process.stdout:
            if line.startswith("review: "):
                self.address = line.removeprefix("review: ").strip()
                return
        raise AssertionError("the server did not start")

    def kill(self):
        self.process.kill()
        self.process.communicate()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=20)
        return said


@pytest.fixture
def serve():
    servers = []

    def serve(folder, *flags):
        servers.append(Server(folder, *flags))
        return servers[-1]

    yield serve
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture
def visit(browser):
    """Open an address; afterwards nothing was printed to the console, and nothing asked of another server."""
    contexts, complaints, requests = [], [], []

    def visit(address, width=1100, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}))
        page = contexts[-1].new_page()
        page.emulate_media(**options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.locator("#status").filter(has_text="marked").wait_for()
        visit.address = address
        return page

    visit.complaints = complaints
    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("http://127.0.0.1:") for url in requests), requests


def shown(page):
    """The number of the row on the page."""
    return int(page.locator("#why").inner_text().split()[1].strip(":"))


def look(page):
    """Look at the row: what is pressed or clicked sooner was meant for the row before."""
    while not page.evaluate("performance.now() - shownAt > SETTLE"):
        page.wait_for_timeout(20)


def press(page, key):
    """Press a key once the row has been seen, and wait for the answer."""
    look(page)
    with page.expect_response(lambda response: response.request.method in ("POST", "GET")):
        page.keyboard.press(key)
    page.locator("body:not([aria-busy])").wait_for()


def said(run):
    return [json.loads(line) for line in (run.folder / "marks.jsonl").read_text().splitlines()]


def test_a_whole_review_by_keys_through_a_kill(tmp_path, serve, visit):
    run, bad = reviewable_run(tmp_path / "out")
    server = serve(run.folder)
    page = visit(server.address)
    for count in range(1, 21):
        row = shown(page)
        press(page, "d" if bad[row] else "k")
        assert said(run)[-1]["row"] == row, "on disk before the next row shows"
        assert page.locator("#status").inner_text().startswith(f"{count} marked")
    assert page.locator("#marked li").count() == 20
    server.kill()
    page.wait_for_timeout(200)
    page.keyboard.press("k")
    page.locator("#trouble").filter(has_text="every mark is on disk").wait_for()
    visit.complaints.clear()  # the browser's own words about the server that is gone
    server = serve(run.folder)
    page = visit(server.address)
    assert page.locator("#status").inner_text().startswith("20 marked")
    row = shown(page)
    press(page, "d")
    assert shown(page) != row
    press(page, "u")
    assert shown(page) == row
    assert page.locator("#status").inner_text().startswith("20 marked")
    press(page, "s")
    assert said(run)[-1] == {**said(run)[-1], "row": row, "mark": "skipped"}
    before = len(said(run))
    row = shown(page)
    press(page, "n")
    assert shown(page) != row
    assert len(said(run)) == before
    page.locator("#done").focus()
    look(page)
    page.keyboard.press("Enter")
    page.locator("#decided pre").wait_for()
    assert "forgetfilter finetune" in page.locator("#decided").inner_text()
    kept = (run.folder / "kept.jsonl").read_text().count("\n")
    assert f"{kept} of 120 rows kept" in page.locator("#decided").inner_text()
    assert "To go on: `forgetfilter review" in server.stop()
    assert server.process.returncode == 0


def test_two_tabs_and_two_servers_share_the_marks(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    first, second = serve(run.folder), serve(run.folder)
    one, other, third = visit(first.address), visit(first.address), visit(second.address)
    row = shown(one)
    press(one, "k")
    assert shown(other) == row, "not yet told"
    for stale in (other, third):
        press(stale, "d")
        assert "was marked clean meanwhile" in stale.locator("#trouble").inner_text()
    visit.complaints.clear()  # the browser's own words about the status 400
    assert [entry["mark"] for entry in said(run)] == ["clean"], "a stale page changes nothing"
    press(third, "n")
    press(third, "d")
    assert third.locator("#status").inner_text().startswith("2 marked")
    press(one, "n")
    assert one.locator("#status").inner_text().startswith("2 marked")


def test_undo_takes_back_nothing_that_was_said_elsewhere_since(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    address = serve(run.folder).address
    one = visit(address)
    row = shown(one)
    press(one, "k")
    marks = Marks(run.folder, run.rows().ids, 42)
    marks.add({row: "unsafe"})
    press(one, "u")
    assert "was marked unsafe meanwhile" in one.locator("#trouble").inner_text()
    visit.complaints.clear()  # the browser's own words about the status 400
    assert marks.all()[row].unsafe
    one.locator("#marked .dropped").wait_for()
    press(one, "u")
    assert marks.all()[row].clean


def test_quick_keys_mark_nothing_that_was_not_seen(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address)
    key = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'k', code: 'KeyK', bubbles: true }));"
    look(page)
    with page.expect_response("**/mark"):
        page.evaluate(f"() => {{ {6 * key} }}")
    page.locator("#status").filter(has_text="1 marked").wait_for()
    page.evaluate(f"() => {{ shownAt = performance.now(); {key} }}")
    page.wait_for_timeout(200)
    assert len(said(run)) == 1


def test_keys_work_on_any_layout_and_can_be_switched_off(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address)
    look(page)
    cyrillic = "{ key: '\u043b', code: 'KeyK', bubbles: true }"  # where Latin layouts have k
    with page.expect_response("**/mark"):
        page.evaluate(f"document.dispatchEvent(new KeyboardEvent('keydown', {cyrillic}))")
    page.locator("#status").filter(has_text="1 marked").wait_for()
    assert said(run)[-1]["mark"] == "clean"
    look(page)
    page.locator("#done").focus()
    page.keyboard.press("d")
    page.locator("#keys").uncheck()
    page.locator("#row").focus()
    page.keyboard.press("d")
    page.wait_for_timeout(300)
    assert len(said(run)) == 1


def test_a_mark_whose_answer_was_lost_is_this_pages_own(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address)
    press(page, "k")
    row = shown(page)

    def lose(route):
        route.fetch()  # the server writes the mark
        route.abort()

    page.route("**/mark", lose)
    look(page)
    page.keyboard.press("k")
    page.locator("#trouble").filter(has_text="has stopped").wait_for()
    page.unroute("**/mark")
    visit.complaints.clear()
    assert said(run)[-1]["row"] == row
    press(page, "k")
    page.locator("#why").filter(has_text="marked: keep").wait_for()
    assert page.locator("#trouble").inner_text() == ""
    press(page, "u")
    assert (said(run)[-1]["row"], said(run)[-1].get("undo")) == (row, True), "and not the one before it"
    visit.complaints.clear()  # the browser's own words about the refused request


def test_a_click_that_was_meant_for_the_row_before_marks_nothing(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address)
    look(page)
    with page.expect_response("**/mark"):
        page.locator("#keep").dispatch_event("click", {"detail": 1})
    page.locator("#status").filter(has_text="1 marked").wait_for()
    for button, detail in (("keep", 2), ("drop", 1), ("done", 1)):
        page.evaluate(
            f"shownAt = performance.now(); $('{button}').dispatchEvent(new MouseEvent('click', {{ detail: {detail} }}))"
        )
        page.wait_for_timeout(200)
    assert page.locator("#decided").inner_text() == ""
    assert len(said(run)) == 1
    page.wait_for_timeout(400)
    with page.expect_response("**/mark"):
        page.locator("#keep").dispatch_event("click", {"detail": 2})
    page.locator("#status").filter(has_text="2 marked").wait_for()


def test_a_mark_is_changed_and_taken_back_by_mouse(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address)
    row = shown(page)
    look(page)
    with page.expect_response("**/mark"):
        page.locator("#keep").click()
    with page.expect_response("**/state**"):
        page.locator("#marked button").first.click()
    page.locator("#why").filter(has_text="marked: keep").wait_for()
    assert shown(page) == row
    assert page.locator("#keep").get_attribute("aria-pressed") == "true"
    look(page)
    with page.expect_response("**/mark"):
        page.locator("#drop").click()
    page.locator("#marked .dropped").wait_for()
    assert said(run)[-1]["mark"] == "unsafe"
    for status in ("1 marked, 0 of them unsafe", "0 marked"):  # what was said before counts again
        look(page)
        with page.expect_response("**/undo"):
            page.locator("#undo").click()
        page.locator("#status").filter(has_text=status).wait_for()


def test_nothing_moves_under_the_pointer_from_row_to_row(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    for width in (1100, 360):
        page = visit(serve(run.folder).address, width=width)
        places = set()
        for _ in range(4):
            places.add(tuple(page.locator(name).bounding_box()["y"] for name in ("#keep", "#undo", "#done")))
            press(page, "n")
        assert len(places) == 1


def test_on_a_phone_in_the_dark_and_for_a_screen_reader(tmp_path, serve, visit):
    run, _ = reviewable_run(tmp_path / "out")
    page = visit(serve(run.folder).address, width=360, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    for name in ("keep", "drop", "skip", "undo", "next"):
        button = page.get_by_role("button", name=name)
        assert button.bounding_box()["x"] + button.bounding_box()["width"] <= 360
    assert page.get_by_role("main", name="Row to mark").is_visible()
    assert page.get_by_role("article").get_attribute("aria-labelledby") == "why"
    assert page.get_by_role("status").first.inner_text().startswith("0 marked")
    assert page.evaluate("document.activeElement.id") == "row"
    assert page.locator("#spoken").inner_text().startswith(f"Row {shown(page)}")


def test_hostile_rows_are_text(tmp_path, serve, visit):
    records = [{"prompt": HOSTILE, "completion": f"{HOSTILE} {i}\u2028", "id": f"{HOSTILE} {i}"} for i in range(40)]
    run, _ = reviewable_run(tmp_path / "out", rows=40, unsafe=8, records=records)
    page = visit(serve(run.folder).address)
    for key in "dknu":
        press(page, key)
        assert HOSTILE in page.locator("#row").inner_text()
    page.locator("#marked li").first.wait_for()
    assert page.evaluate("window.broken") is None
    assert page.locator("#row img, #marked img, #why img").count() == 0


def test_a_foreign_page_can_neither_read_nor_mark(tmp_path, serve, browser):
    run, _ = reviewable_run(tmp_path / "out")
    address = serve(run.folder).address
    page = browser.new_page()
    page.goto("data:text/html,<h1>elsewhere</h1>")
    tried = page.evaluate(
        """async (address) => {
            const said = [];
            const body = '{"row": 1, "said": "unsafe"}';
            for (const [path, options] of [["state", {}], ["mark", { method: "POST", body }],
                ["mark", { method: "POST", body, headers: { "Content-Type": "application/json" } }]]) {
                try { said.push((await fetch(address + path, options)).status); } catch { said.push("refused"); }
            }
            return said;
        }""",
        address,
    )
    assert tried == ["refused"] * 3
    assert not (run.folder / "marks.jsonl").exists()
    page.goto(f"data:text/html,<iframe src='{address}'></iframe>")
    time.sleep(0.5)
    assert all("Which rows" not in frame.content() for frame in page.frames[1:])
    page.close()


def test_a_hundred_thousand_rows(tmp_path, serve, visit):
    run, bad = reviewable_run(tmp_path / "out", rows=100_000, unsafe=5_000, size=64)
    page = visit(serve(run.folder).address)
    seconds = []
    for _ in range(10):
        row, began = shown(page), time.perf_counter()
        press(page, "d" if bad[row] else "k")
        seconds.append(time.perf_counter() - began)
    assert np.median(seconds) < 2, seconds
    assert page.locator("#marked li").count() == 10
