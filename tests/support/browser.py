"""Pages as a person sees them: Debian's Chromium, driven by Playwright, without a network."""

import contextlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

LOCAL = ("file:", "data:", "blob:", "about:")


class Tab(NamedTuple):
    """An open page and what went wrong on it."""

    page: "playwright.sync_api.Page"  # noqa: F821
    errors: list[str]  # console errors and exceptions that nothing caught
    requests: list[str]  # addresses that were asked for and are neither a file nor within the page


@contextlib.contextmanager
def opened_browser():
    """A function that opens a file: `visit(path, width=1280, height=900, dark=False, **context) -> Tab`.

    `context` goes to `Browser.new_context`. Tabs have storage of their own, and are closed with the browser. Skips the
    test where Playwright or Chromium is missing. While the browser is open, the thread has a running event loop.
    """
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no browser: there is no chromium on the PATH (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])

        def visit(path, width=1280, height=900, dark=False, **context):
            scheme = "dark" if dark else "light"
            viewport = {"width": width, "height": height}
            page = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True, **context).new_page()
            tab = Tab(page, [], [])
            page.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: tab.errors.append(str(error)))
            page.on("request", lambda asked: None if asked.url.startswith(LOCAL) else tab.requests.append(asked.url))
            page.goto(Path(path).resolve().as_uri())
            return tab

        try:
            yield visit
        finally:
            browser.close()
