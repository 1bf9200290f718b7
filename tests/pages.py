"""A page of HTML as a reader of its tables sees it, and as a browser does."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Cell:
    """One cell of a table."""

    tag: str
    attributes: dict[str, str]
    words: str = ""
    values: list[str] = field(default_factory=list)  # of its <data> elements


class Page(HTMLParser):
    """Tables by their id, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.words = {}, [], []
        self._rows = self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "table":
            self._rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = Cell(tag, attributes)
            self._rows[-1].append(self._cell)
        elif tag == "data" and self._cell:
            self._cell.values.append(attributes["value"])

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, text):
        self.words.append(text)
        if self._cell:
            self._cell.words += text

    def lines(self, table):
        """A table without its head."""
        return self.tables[table][1:]

    def values(self, table):
        """Of each line, the words that its file has for the numbers that are shown."""
        return [[value for cell in line for value in cell.values] for line in self.lines(table)]


def browse(page, folder, *flags):
    """What the browser's console said, and the page after its script has run; the test is skipped without a browser."""
    if CHROMIUM is None:
        pytest.skip("Debian's package chromium is not installed")
    call = [
        CHROMIUM,
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    call += ["--no-sandbox"] * (os.getuid() == 0) + ["--enable-logging=stderr", "--virtual-time-budget=3000", *flags]
    answer = subprocess.run(
        [*call, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    return re.findall(r":CONSOLE.*?\] (.*)", answer.stderr), answer.stdout
