"""Pictures of a run's pages, after make test-browser.

python benchmarks/screenshot.py report RUN docs/report.png     its report
python benchmarks/screenshot.py review RUN docs/review.png     its review, a few rows marked; RUN itself stays as it is
"""

import shutil
import sys
import tempfile
from pathlib import Path
from threading import Thread

import uvicorn
from playwright.sync_api import Page, sync_playwright

from forgetfilter.data.loading import stored_labels
from forgetfilter.marks import Marks
from forgetfilter.review.server import application
from forgetfilter.review.session import open_review

PORT, KEY = 8765, "secret"
MARKS = 9
"""Rows that are marked before the picture is taken, by their labels."""


def report(run: Path, page: Page) -> None:
    """Open the report, and its most forgotten row."""
    page.goto((run / "report.html").absolute().as_uri())
    page.locator("#rows .text button").first.click()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


def review(run: Path, page: Page) -> None:
    """Open the review, and mark some rows."""
    opened = open_review(run)
    opened.marks = Marks(Path(tempfile.mkdtemp()), opened.marks.ids, opened.config.seed)
    app = application(opened, KEY, {f"127.0.0.1:{PORT}"})
    server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning", lifespan="off"))
    Thread(target=server.run, daemon=True).start()
    while not server.started:
        page.wait_for_timeout(50)
    page.set_viewport_size({"width": 1060, "height": 720})
    page.goto(f"http://127.0.0.1:{PORT}/{KEY}/")
    page.locator("#status").filter(has_text="marked").wait_for()
    unsafe = stored_labels(opened.opened.source, opened.config)
    for _ in range(MARKS):
        page.wait_for_timeout(200)  # keys pressed at once would be left out
        row = int(page.locator("#why").inner_text().split()[1])
        with page.expect_response("**/mark"):
            page.keyboard.press("d" if unsafe[row] else "k")
        page.locator("body:not([aria-busy])").wait_for()


def main() -> None:
    """Take the picture that is asked for."""
    pages = {"report": report, "review": review}
    show, run, picture = pages[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1060, "height": 1280})
        show(run, page)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
