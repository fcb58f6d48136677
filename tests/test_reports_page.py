"""The page in a browser: what it shows at desktop and phone width, and what a click does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_results import MT10, make_results
from PIL import Image

from reports import build

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    algorithms = ("mega", "mega@softmax", "d2r", "soft_module", "mt_sac")
    results = make_results(algorithms, tasks=MT10, states={("mt_sac", 4): "failed"})
    return build(results, tmp_path_factory.mktemp("report"))


def browse(page: Path, tmp_path: Path, *options: str) -> str:
    """What Chromium prints about the page; it may reach no network."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", "--proxy-server=127.0.0.1:9",
         f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout


def probed(page: Path, tmp_path: Path, width: int, script: str) -> str:
    """The text that ``script`` leaves in ``out``, run in a copy of the page of that width.

    It runs once the page has loaded: figures are decoded beside the parser, so that a script at
    the page's end may come before the last of them.
    """
    text = page.read_text()
    probe = "<pre id='probe'></pre><script>addEventListener('load', () => {let out; " + script
    probe += "; document.querySelector('#probe').textContent = 'PROBE ' + out + ' END';})</script>"
    copy = tmp_path / "probe.html"
    copy.write_text(text.replace("</body>", probe + "</body>"))
    found = re.search(
        "PROBE (.*?) END", browse(copy, tmp_path, f"--window-size={width},900", "--dump-dom"), re.S
    )
    assert found is not None, "the page's scripts failed"
    return found[1]


@pytest.mark.parametrize("width", [1300, 500])  # headless windows are no narrower than 500
def test_nothing_is_wider_than_the_window(page: Path, tmp_path: Path, width: int) -> None:
    script = "out = document.documentElement.scrollWidth + ' ' + window.innerWidth"
    content, window = map(int, probed(page, tmp_path, width, script).split())
    assert content <= window


def test_every_figure_is_drawn(page: Path, tmp_path: Path) -> None:
    script = (
        "const all = [...document.querySelectorAll('.paper img')];"
        "out = all.length + ' ' + all.filter((i) => i.complete && i.naturalWidth > 300).length"
    )
    every, drawn = map(int, probed(page, tmp_path, 1300, script).split())
    assert every == drawn > 15


def test_a_heading_sorts_by_number_and_back(page: Path, tmp_path: Path) -> None:
    script = (
        "const table = document.querySelector('table'), heading = table.tHead.rows[0].cells[1];"
        "const cells = () => [...table.tBodies[0].rows].map((r) => r.cells[1].textContent);"
        "heading.querySelector('button').click(); const up = cells();"
        "heading.querySelector('button').click();"
        "out = JSON.stringify([up, cells(), heading.getAttribute('aria-sort')])"
    )
    up, down, state = json.loads(probed(page, tmp_path, 1300, script))
    assert [float(cell.split()[0]) for cell in up] == sorted(float(cell.split()[0]) for cell in up)
    assert down == up[::-1]
    assert state == "descending"


def test_a_figure_opens_and_closes(page: Path, tmp_path: Path) -> None:
    script = (
        "const dialog = document.querySelector('dialog'); const before = dialog.open;"
        "document.querySelector('.paper button').click(); const during = dialog.open;"
        "dialog.querySelector('button').click();"
        "out = [before, during, dialog.open].join(' ')"
    )
    assert probed(page, tmp_path, 1300, script) == "false true false"


def test_downloads_have_names_and_content(page: Path, tmp_path: Path) -> None:
    script = (
        "const all = [...document.querySelectorAll('a[download]')];"
        "const fine = (a) => a.href.startsWith('data:') && /[.](csv|gz|svg|png)$/.test(a.download);"
        "out = all.every(fine) + ' ' + all.length"
    )
    fine, count = probed(page, tmp_path, 1300, script).split()
    assert fine == "true"
    assert int(count) > 40


def test_contents_are_folded_on_a_phone_only(page: Path, tmp_path: Path) -> None:
    script = "out = document.querySelector('nav details').open"
    assert probed(page, tmp_path, 1300, script) == "true"
    assert probed(page, tmp_path, 500, script) == "false"


def test_it_is_a_picture_of_something_and_prints(page: Path, tmp_path: Path) -> None:
    shot, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    browse(page, tmp_path, "--window-size=1300,2000", f"--screenshot={shot}")
    picture = np.asarray(Image.open(shot).convert("L"))
    assert picture.shape == (2000, 1300)
    # Words, tables and figures all over, not a blank or a broken page.
    assert all(band.std() > 8 for band in np.array_split(picture[:, 320:], 8))
    browse(page, tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 8 <= pages <= 80
