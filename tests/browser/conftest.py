"""The browser that the pages are looked at with."""

import shutil

import pytest

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "no chromium: `make test-browser` installs it"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=[*QUIET, "--disable-sync", "--no-first-run"])
