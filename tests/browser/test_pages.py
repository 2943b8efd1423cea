"""The pages in a real Chromium: slider, search, decisions by hand and back, hostile rows, a hundred thousand rows."""

import json
import random
import re
import shlex

import pytest
from stored_runs import stored_run

from forgetfilter.cli import main
from forgetfilter.decision.opened import read_scores
from forgetfilter.report.run_page import write_report
from forgetfilter.runs import Run

pytestmark = pytest.mark.browser
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


@pytest.fixture
def visit(browser):
    """Open a page; afterwards it has printed nothing to the console and asked nothing of the network."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    complaints, requests = [], []

    def visit(path, **options):
        page = context.new_page()
        page.emulate_media(**options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{path}")
        return page

    yield visit
    context.close()
    assert complaints == []
    assert all(url.startswith(("file://", "blob:file://", "data:image/svg+xml")) for url in requests), requests


@pytest.fixture
def run(tmp_path):
    rows = [
        {
            "prompt": f"question {i}",
            "completion": f"answer {i}" + ("" if i % 3 else " wicked"),
            "source": "forum" if i % 2 else HOSTILE,
            "unsafe": int(i % 3 == 0),
        }
        for i in range(120)
    ]
    lost = [(1.0 if i % 3 == 0 else 0.0) + i / 1000 for i in range(120)]
    run = stored_run(tmp_path / "out", rows, lost, threshold=0.5, label_column="unsafe")
    write_report(run)
    return run


def tile(page, name):
    return page.locator(f'.tile[data-name="{name}"] b').inner_text()


def test_the_slider_moves_counts_histogram_and_figures_at_once(run, visit):
    page = visit(run.folder / "report.html")
    assert [tile(page, name) for name in ("rows", "kept", "dropped", "precision", "recall")] == [
        *("120", "80", "40"),
        *("1.000", "1.000"),
    ]
    assert "As decided" in page.locator("#promise").inner_text()
    before = page.locator("#limit").get_attribute("x1")
    page.locator("#threshold").fill("1.08")
    assert tile(page, "dropped") == "13"
    assert tile(page, "recall") == "0.325"
    assert page.locator("#limit").get_attribute("x1") != before
    assert "carries no promise" in page.locator("#promise").inner_text()
    assert "--threshold 1.08" in page.locator("#commands").inner_text()
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    assert tile(page, "dropped") == "120"  # all above 0
    page.locator("#reset").click()
    assert tile(page, "dropped") == "40"
    page.locator("#by").select_option("group")
    assert page.locator("#legend span.swatch").count() == 2
    assert page.locator("#histogram rect").count() > 2
    assert page.locator("#by-group tr").last.inner_text().split()[-4:] == ["60", "40", "20", "0"]
    assert page.locator("#charts figure > svg, #losses figure > svg").count() == 4
    page.locator("#threshold").fill("9")
    assert page.locator("#by-group tr").last.inner_text().split()[-4:] == ["60", "60", "0", "0"]


def test_search_filters_paging_and_a_row_opened_from_the_keyboard(run, visit):
    page = visit(run.folder / "report.html")
    assert page.locator("#rows tr").count() == 50
    assert page.locator("#page").inner_text() == "page 1 of 3"
    page.locator("#on").click()
    assert page.locator("#page").inner_text() == "page 2 of 3"
    page.locator("body").press("/")
    page.keyboard.type("WICKED")
    assert page.locator("#found").inner_text().startswith("40 of 120 rows")
    page.locator("#filter").select_option("kept")
    assert page.locator("#found").inner_text().startswith("0 of 120 rows")
    page.locator("#filter").select_option("")
    page.locator("#search").fill("question 119")
    toggle = page.locator("#rows .text button")
    toggle.focus()
    page.keyboard.press("Enter")
    assert toggle.get_attribute("aria-expanded") == "true"
    assert "answer 119" in page.locator("tr.open").inner_text()
    assert "within threshold" in page.locator("tr.open").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("tr.open").count() == 0
    page.locator("#search").fill("")
    page.locator("#group").select_option(label="forum")
    assert page.locator("#found").inner_text().startswith("60 of 120 rows")


def test_decisions_by_hand_go_out_and_come_back(run, visit, tmp_path):
    page = visit(run.folder / "report.html")
    page.get_by_label("row 117: kept", exact=True).click()
    page.locator("#search").fill("question 118")
    page.get_by_label("row 118: dropped", exact=True).click()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "row 118: dropped"
    assert tile(page, "dropped") == "40"
    assert tile(page, "by hand, here") == "2"
    page.locator("#search").fill("")
    page.locator("#filter").select_option("by hand")
    assert page.locator("#found").inner_text().startswith("2 of 120 rows")
    page.locator("#filter").select_option("")
    page.locator("#search").fill("question 118")
    assert "--decisions decisions.jsonl   # export first" in page.locator("#commands").inner_text()
    assert page.locator("#rows tr").first.inner_text().split("\t")[2] == "dropped (by hand, here)"
    with page.expect_download() as download:
        page.locator("#export").click()
    name = download.value.suggested_filename
    assert re.fullmatch(r"decisions-\d{8}T\d{6}\.jsonl", name)
    assert f"--decisions {name}\n" in page.locator("#commands").inner_text()
    saved = tmp_path / "decisions.jsonl"
    download.value.save_as(saved)
    ids = read_scores(run)["id"].to_pylist()
    assert [json.loads(line) for line in saved.read_text().splitlines()] == [
        {"id": ids[117], "decision": "kept"},
        {"id": ids[118], "decision": "dropped"},
    ]
    main(["decide", str(run.folder), "--decisions", str(saved)])
    made = read_scores(Run.open(run.folder))["decision"].to_pylist()
    assert (made[117], made[118]) == ("kept", "dropped")
    again = visit(run.folder / "report.html")
    again.locator("#threshold").fill("9")
    assert tile(again, "dropped") == "1"  # decided by hand, and stays so
    assert "--threshold 9\n" in again.locator("#commands").inner_text()  # the run remembers what was decided by hand
    again.locator("#search").fill("question 119")
    again.get_by_label("row 119: dropped", exact=True).click()
    assert "--threshold 9 --decisions decisions.jsonl" in again.locator("#commands").inner_text()
    with again.expect_download() as download:
        again.locator("#export").click()
    assert json.loads(download.value.path().read_text()) == {"id": ids[119], "decision": "dropped"}


def test_the_page_goes_by_the_filter_that_decided_and_shows_what_the_others_said(visit, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(5)]
    filters = {"filter": "forgetting,forgetting_rouge1", "threshold": 0.05}
    run = stored_run(tmp_path / "two", rows, [i / 10 for i in range(5)], **filters)
    main(["decide", str(run.folder), "--filter", "forgetting_rouge1", "--threshold", "0.15"])
    page = visit(run.folder / "report.html")
    assert page.locator("#rule").inner_text().startswith("Rule fixed on forgetting_rouge1, threshold 0.150")
    assert "--filter forgetting_rouge1 --threshold 0.15\n" in page.locator("#commands").inner_text()
    page.locator("#rows .text button").first.click()
    opened = page.locator("tr.open").inner_text()
    for said in (
        "forgetting 0.400",
        "forgetting rouge1 0.400",
        "rouge1 after -1.400",
        "completion before",
        "noisy says",
    ):
        assert said in opened
    page.locator("#threshold").fill("0.25")
    assert tile(page, "dropped") == "2"
    command = page.locator("#commands").inner_text().splitlines()[0]
    assert command.endswith("--filter forgetting_rouge1 --threshold 0.25")
    main(shlex.split(command)[1:])
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert (metrics["filter"], metrics["threshold"], metrics["dropped"]) == ("forgetting_rouge1", 0.25, 2)


def test_hostile_rows_stay_text(run, visit, tmp_path):
    hostile = stored_run(
        tmp_path / "hostile", [{"prompt": HOSTILE, "completion": HOSTILE, "source": HOSTILE}], [0.5], threshold=0.1
    )
    page = visit(write_report(hostile))
    page.locator("#rows .text button").click()
    assert HOSTILE in page.locator("tr.open").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 0
    page.locator("#by").select_option("group")
    assert HOSTILE[:60] in page.locator("#legend").inner_text()


def test_a_sample_is_marked_and_goes_back_as_trusted_rows(visit, write_jsonl, tmp_path, run):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(60)]
    main(["sample", str(write_jsonl("noisy.jsonl", rows)), "--rows", "52", "--output", str(tmp_path / "s.jsonl")])
    page = visit(tmp_path / "s.html")
    assert page.locator("#scores").is_hidden()
    first = page.locator('tr[data-place="0"] .text').inner_text()
    assert re.fullmatch(r"user: q\d+\s+assistant: a", first), "what is to be judged shows at once"
    for place in range(52):
        if place == 50:
            page.locator("#on").click()
        page.locator(f'tr[data-place="{place}"] .hand button').nth(int(place < 2)).click()
    assert [tile(page, name) for name in ("clean", "unsafe", "to mark")] == ["50", "2", "0"]
    with page.expect_download() as download:
        page.locator("#export").click()
    assert re.fullmatch(r"s-marked-\d{8}T\d{6}\.jsonl", download.value.suggested_filename)
    assert download.value.suggested_filename in page.locator("#commands").inner_text()
    download.value.save_as(tmp_path / "s-marked.jsonl")
    marked = stored_run(tmp_path / "marked", rows, [i / 100 for i in range(60)])
    main(["decide", str(marked.folder), "--trusted_rows", str(tmp_path / "s-marked.jsonl"), "--max_clean_loss", "0.05"])
    metrics = json.loads((marked.folder / "metrics.json").read_text())
    assert metrics["rule"] == "conformal"
    assert metrics["dropped"] >= 2


def test_a_hundred_thousand_rows_stay_light_and_quick(visit, tmp_path):
    words = [f"word{i}" for i in range(3000)]
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choices(words, k=12)), "completion": " ".join(rng.choices(words, k=40))}
        for _ in range(100_000)
    ]
    lost = [rng.gauss(0.0, 0.05) + (rng.random() < 0.05) for _ in rows]
    path = write_report(stored_run(tmp_path / "big", rows, lost, threshold=0.3))
    assert path.stat().st_size < 10e6
    page = visit(path)
    assert "left out" in page.locator("#left-out").inner_text()
    took = page.evaluate(
        """() => {
            const time = (act) => { const start = performance.now(); act(); document.body.offsetHeight; return performance.now() - start; };
            const type = (id, value) => { const at = document.getElementById(id); at.value = value; at.dispatchEvent(new Event("input")); };
            // The fastest run is what the page costs: other processes on the machine only add to it.
            const runs = (act) => Math.min(...[...Array(9)].map((_, i) => time(() => act(i))));
            return {
                slider: runs((i) => type("threshold", 0.1 + i / 10)),
                search: runs((i) => type("search", "word" + (100 + i))),
                page: runs(() => document.getElementById("on").click()),
            };
        }"""
    )
    print({"megabytes": round(path.stat().st_size / 1e6, 1), **{name: round(value) for name, value in took.items()}})
    assert max(took.values()) < 100, took
    page.evaluate("document.getElementById('search').value = ''")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_narrow_windows_and_print(run, visit, scheme):
    page = visit(run.folder / "report.html", color_scheme=scheme)
    ratio = page.evaluate(
        """() => {
            const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            return [".quiet", "td.dropped", "h1"].map((what) => {
                const ink = light(getComputedStyle(document.querySelector(what)).color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            });
        }"""
    )
    assert min(ratio) > 4.5, ratio
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.emulate_media(media="print")
    assert page.locator("#search").is_hidden()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((at) =>
            !(at.getAttribute("aria-label") || at.textContent.trim() || (at.labels && at.labels.length))).map((at) => at.id)"""
    )
    assert unnamed == []
