"""The page in a real headless Chromium without a network: it loads, fits, is seen, is printed, is read aloud."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from sparsify.bench.records import read
from sparsify.report import page
from sparsify.report.summary import summarise
from tests.bench_records import write_example

BROWSERS = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "google-chrome", "chromium-browser")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on PATH")
# 3 figures for each runtime, one of linears, sizes on disk, memory of each runtime.
FIGURES = 3 * 2 + 1 + 1 + 2
Browse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_example(tmp_path_factory.mktemp("page") / "a.jsonl", runtimes=("torch", "onnxruntime"))
    # A label without a place to break, and one that would be markup.
    text = path.read_text().replace('"2of4"', json.dumps("x" * 150)).replace('"half"', json.dumps("<b>half"))
    path.write_text(text)
    records = read([path])
    return page.render(records, summarise(records))


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    def run(document: str, *arguments: str, width: int = 1280, height: int = 2400) -> subprocess.CompletedProcess[str]:
        assert BROWSER is not None
        path = tmp_path / "page.html"
        path.write_text(document, encoding="utf-8")
        return subprocess.run(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}", *arguments, path.as_uri(),
            ],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


# Only a copy of the page runs a script: the page itself forbids them.
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height] };
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify({
  width: innerWidth, content: document.documentElement.scrollWidth,
  figures: [...document.querySelectorAll("figure svg")].map(box),
  past: [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide") && !e.closest("svg")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className),
  alternatives: [...document.querySelectorAll("svg")].map(e => e.getAttribute("aria-labelledby").split(" ")
    .map(id => document.getElementById(id).textContent.length)),
  cut: [...document.querySelectorAll("section > .wide")].filter(e => e.scrollWidth > e.clientWidth)
    .map(e => [e.getAttribute("aria-labelledby"), e.scrollWidth, e.clientWidth]),
  bad: getComputedStyle(document.querySelector("td .bad")).color,
});
document.body.append(out);
</script>"""


def probed(html: str) -> str:
    policy = '<meta http-equiv="Content-Security-Policy"'
    assert policy in html
    return html.replace(policy, '<meta name="policy"').replace("</body>", f"{PROBE}</body>")


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_and_shows_every_figure(browse: Browse, html: str, width: int) -> None:
    shown = browse(probed(html), "--dump-dom", width=width).stdout
    match = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    assert found["width"] == width
    assert found["content"] <= width
    assert found["past"] == []
    assert len(found["figures"]) == FIGURES
    assert all(w > min(300, width - 60) and h > 100 for w, h in found["figures"])
    assert all(len(each) == 2 and min(each) > 10 for each in found["alternatives"])
    # On a screen nothing has to be scrolled for, the lines that rows are from included.
    assert width < 1280 or found["cut"] == []
    assert found["bad"] == "rgb(176, 0, 32)"


@needs_browser
def test_page_needs_no_network_and_reports_no_errors(browse: Browse, html: str) -> None:
    quiet = browse(html, "--dump-dom")
    assert "CONSOLE" not in quiet.stderr
    assert quiet.stdout.count("<figure>") == FIGURES
    # The page's policy holds, and what it stops would be seen here.
    loud = browse(html.replace("</body>", "<script>alert(1)</script></body>"), "--dump-dom")
    assert "CONSOLE" in loud.stderr
    assert "Content Security Policy" in loud.stderr


@needs_browser
def test_page_is_seen_and_printed(browse: Browse, html: str, tmp_path: Path) -> None:
    browse(html, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1280, 2400)
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    counts = {colour: n for n, colour in colours}
    white = counts[(255, 255, 255)] / (1280 * 2400)
    assert 0.5 < white < 0.97
    # The red of what ran dense, and the blue of the first candidate.
    assert counts[(176, 0, 32)] > 100
    assert counts[(0, 114, 178)] > 100
    browse(html, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 3 <= pages <= 12


class Reader(HTMLParser):
    """What of the page matters to who does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.landmarks: Counter[str] = Counter()
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()
        self.scopes: Counter[str | None] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            elif name == "aria-labelledby":
                self.references += (value or "").split()
                self.landmarks[value or ""] += tag in ("section", "div")
            elif name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.loads.append(value or "")
        if tag == "th":
            self.scopes[dict(attrs).get("scope")] += 1


def test_page_can_be_read_aloud(html: str) -> None:
    reader = Reader()
    reader.feed(html)
    assert '<html lang="en">' in html
    assert reader.ids.most_common(1)[0][1] == 1
    assert reader.references
    assert reader.landmarks.most_common(1)[0][1] == 1
    assert set(reader.references) <= set(reader.ids)
    # Links within the page, shapes within a drawing, and the empty icon: nothing is loaded.
    assert all(value.removeprefix("#") in reader.ids or value == "data:," for value in reader.loads)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert reader.tags["script"] == 0
    assert reader.tags["svg"] == reader.tags["details"] == reader.tags["figcaption"] == FIGURES
    assert reader.tags["table"] == reader.tags["caption"] > FIGURES
    assert reader.scopes.keys() == {"col", "row"}
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        drawing = ElementTree.fromstring(svg)
        assert drawing.get("role") == "img"
        assert [child.tag.rpartition("}")[2] for child in drawing[:2]] == ["title", "desc"]


def test_text_stands_out_from_white() -> None:
    style = resources.files("sparsify.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", style))
    assert {"text", "quiet", "good", "bad", "link"} <= colours.keys()
    for name in ("text", "quiet", "good", "bad", "link"):
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        # WCAG 2: at least 4.5 for text.
        assert 1.05 / (luminance + 0.05) >= 4.5, name
