"""The report in a real browser: headless Chromium, on copies of the page that tell what they find."""

import json
import re
import shutil
import subprocess

import pytest

from moe_study.data import ROOT
from moe_study.report.page import render

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
PAGES = {  # the committed report; the stored notebook, rendered afresh
    "core": ROOT / "results" / "core" / "report.html",
    "stored": ROOT / "notebooks" / "90_report.ipynb",
}
PAPER = 703  # px: A4 less its margins
WIDTHS = {"phone": 390, "desktop": 1280, "paper": PAPER}
# In the copy: everything that a reader could stumble over, told to the page around it.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const all = name => [...document.querySelectorAll(name)];
  const links = [...document.links].map(link => link.getAttribute("href"));
  const ids = all("[id]").map(one => one.id);
  const style = one => getComputedStyle(one);
  parent.postMessage({
    name: "NAME",
    errors,
    width: innerWidth,
    reach: document.documentElement.scrollWidth,
    images: all("img").map(one => one.complete && one.naturalWidth * one.getBoundingClientRect().width),
    lost: links.filter(to => to.startsWith("#") && !ids.includes(decodeURIComponent(to.slice(1)))),
    files: links.filter(to => !/^(#|https?:|mailto:)/.test(to)),
    twice: ids.filter((id, at) => ids.indexOf(id) < at),
    requests: performance.getEntriesByType("resource").map(one => one.name)
      .filter(from => !from.startsWith("data:")),
    smallest: Math.min(...all("p, td, th, li, figcaption").map(one => parseFloat(style(one).fontSize))),
    contents: all("nav a").filter(one => one.getBoundingClientRect().width > 0).length,
  }, "*");
});
</script>"""
FRAME = """<!DOCTYPE html><title>frames</title><body><script>
const found = {};
addEventListener("message", event => {
  found[event.data.name] = event.data;
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]


def browse(*arguments: str) -> subprocess.CompletedProcess:
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    quiet = ("--disable-background-networking", "--disable-component-update")
    log = ("--enable-logging=stderr", "--v=0")
    command = [BROWSER, *options, *quiet, *log, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    source = PAGES[request.param]
    if not source.exists():
        pytest.skip(f"{source.relative_to(ROOT)} is not there: `make render PROFILE=core` makes it")
    if source.suffix == ".ipynb":
        target = tmp_path_factory.mktemp("page") / "report.html"
        render(source, target)
        return target
    if "<nav" not in source.read_text():
        pytest.skip("rendered by an earlier version: `make render PROFILE=core`")
    return source


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    """What each copy found, and the console. A frame can be as narrow as a phone, a window cannot."""
    folder = tmp_path_factory.mktemp("frames")
    text, outer = page.read_text(), FRAME
    for name, width in WIDTHS.items():
        copy = text.replace("<head>", "<head>" + PROBE.replace("NAME", name), 1)
        if name == "paper":
            copy = copy.replace("@media screen and", "@media speech and").replace(
                "@media print", "@media all"
            )
        (folder / f"{name}.html").write_text(copy)
        outer += f'<iframe src="{name}.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    (folder / "outer.html").write_text(outer)
    # Virtual time: the page is dumped when nothing is left to load.
    process = browse("--virtual-time-budget=20000", "--dump-dom", (folder / "outer.html").as_uri())
    found = re.search('data-found="([^"]+)"', process.stdout)[1].replace("&quot;", '"').replace("&amp;", "&")
    return json.loads(found), process.stderr


def test_page_in_a_browser(page, seen):
    found, console = seen
    assert page.stat().st_size < 8_000_000
    assert "CONSOLE" not in console
    assert set(found) == set(WIDTHS)
    for name, width in WIDTHS.items():
        one = found[name]
        assert one["width"] == width
        assert one["reach"] <= width, name  # wide tables and pictures scroll in a box of their own
        assert one["errors"] == one["lost"] == one["twice"] == one["requests"] == []
        assert len(one["images"]) > 5
        assert all(one["images"])
        assert [file for file in one["files"] if not (PAGES["core"].parent / file).exists()] == []
        assert one["contents"] == 0 if name == "paper" else one["contents"] > 8
        assert one["smallest"] >= (8 if name == "paper" else 11)  # px


def test_page_on_paper(page, tmp_path):
    target = tmp_path / "report.pdf"
    browse("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    boxes = set(re.findall(rb"/MediaBox \[([^\]]+)\]", content))
    assert len(boxes) == 1
    left, low, right, high = map(float, boxes.pop().split())
    assert (right - left, high - low) == pytest.approx((595, 842), abs=1)  # A4, in points
