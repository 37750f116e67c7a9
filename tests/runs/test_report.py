"""The report: what stands in the page, and what a browser makes of it (headless Chromium, where there is one)."""

import importlib.util
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from written import curve, grid, write

from onetorch import cli
from onetorch.runs import algorithm, report
from onetorch.runs.errors import RunError
from onetorch.runs.run import Run

idea = algorithm.read(Path(__file__).with_name("idea.py")).load()

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: pages are not opened")
with_bokeh = pytest.mark.skipif(importlib.util.find_spec("bokeh") is None, reason="bokeh (extra media) is not installed")

EVIL = "<img src=x onerror=\"document.title='hit'\">'\"><script>document.title='hit'</script>${document.title='hit'}$$\\alert$$</pre></script>"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run(tmp_path / "a <b>", idea.Config(steps=5), recipe="idea & co", quiet=True) as run:
        idea.train(run.config, run)
        run.finish()
        run.result(error=0.25)
        (run.media / "samples.txt").write_text("<script>alert(1)</script>", encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def links_of(page: str) -> Links:
    links = Links()
    links.feed(page)
    return links


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page.partition("<h1>")[2].partition("<script")[0])


def evil(home: Path) -> Path:
    """Two runs with hostile text wherever text can stand."""
    for i, word in enumerate((EVIL, EVIL + "2")):
        rows = curve([1.0, 2.0, 3.0], name=EVIL)
        path = write(home / f"r{i}", {"seed": 0, "env": word, EVIL: word}, rows, {EVIL: 1.0 + i, "note": EVIL}, recipe=EVIL, command=EVIL, plan={EVIL: EVIL})
        (path / "media").mkdir()
        (path / "media" / "samples.txt").write_text(EVIL, encoding="utf-8")
        (path / "media" / "'onerror='document.title=1.png").write_bytes(b"\x89PNG")
        (path / "git.diff").write_text(EVIL, encoding="utf-8")
    return home


# -- the page as text --------------------------------------------------------------------------------------------------------------------------


def test_the_page_opens_offline_and_holds_the_run(run: Run) -> None:
    assert list(report.write(run.folder, run.record)) == []
    page = page_of(run.folder)
    assert all(link.startswith("data:") for link in links_of(page).found)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page
    assert "idea &amp; co" in page
    for words in ("0.25", "lr", run.record["versions"]["torch"], "One seed (0)", "nothing is known of the spread"):
        assert words in page
    assert (run.folder / "media" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_rows_has_a_page_too(tmp_path: Path) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        pass
    list(report.write(run.folder, run.record))
    assert "No run has logged a number twice" in page_of(run.folder)


def test_damaged_rows_are_named(run: Run) -> None:
    (run.folder / "metrics.jsonl").write_bytes(b"x\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1 is damaged"):
        list(report.write(run.folder, run.record))


def test_without_bokeh_there_is_a_picture_and_without_matplotlib_neither(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    said = list(report.write(run.folder, run.record))
    assert len(said) == 1
    assert "bokeh is missing (pip install 'onetorch[media]')" in said[0]
    assert any(link.startswith("data:image/png") for link in links_of(page_of(run.folder)).found)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = list(report.write(run.folder, run.record))
    assert any("matplotlib is missing" in line for line in said)
    assert "No curves: matplotlib is missing" in page_of(run.folder)


def test_a_sweeps_page_says_what_differed_what_mattered_and_by_how_much(tmp_path: Path) -> None:
    home = grid(tmp_path / "sweep")
    assert cli.main(["report", str(home)]) == 0
    text = text_of(page_of(home))
    assert "4 settings, 3 seeds each" in text
    assert "loss , of which less is better (by its name)" in text
    assert re.search(r"width\s+4 → 8\s+worse\s+\+4\s+\[3\.9\d*, 4\.0\d*\]\s+2", text)
    assert re.search(r"lr\s+0\.1 → 0\.2\s+worse\s+\+1\s", text)
    # The best setting first: 10 * 0.1 + 4, and seeds 0, 0.01, 0.02 above it.
    assert re.search(r"median seconds\s+lr=0\.1 width=4\s+3\s+5\.01\s+\[5(\.0\d*)?, 5\.02\]", text)
    assert "With 2, 3 or 4 seeds such an interval is too narrow" in text
    assert re.search(r"lr=0\.1 width=4\s+–\s+1\.00 \[1\.00, 1\.00\]", text)
    for words in ("abacus", "12 commands", "What differs: lr (2 values), width (2 values)", "pole"):
        assert words in text


def test_better_can_be_said_and_single_seeds_are_labelled(tmp_path: Path) -> None:
    home = grid(tmp_path / "sweep", seeds=1)
    assert cli.main(["report", str(home), "--better", "larger"]) == 0
    text = text_of(page_of(home))
    assert "more is better (as told)" in text
    assert re.search(r"median seconds\s+lr=0\.2 width=8\s+1\s+10\s+one seed: none", text)
    assert "Settings with a single seed" in text
    assert "no interval: more seeds would tell" in text
    assert cli.main(["report", str(home), "--better", "bigger"]) == 2


def test_half_a_run_is_in_no_statistic(tmp_path: Path) -> None:
    home = grid(tmp_path / "sweep")
    write(home / "half", {"seed": 9, "lr": 0.1, "width": 4, "env": "pole"}, curve([999.0, 999.0]), status="failed")
    assert cli.main(["report", str(home)]) == 0
    text = text_of(page_of(home))
    assert "in no statistics: 1 failed" in text
    assert re.search(r"lr=0\.1 width=4\s+3\s+5\.01", text)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    home = evil(tmp_path / "sweep")
    assert cli.main(["report", str(home)]) == 0
    links = links_of(page_of(home))
    assert links.handlers == []
    assert all(link.startswith("data:") for link in links.found)


def test_links_in_media_are_not_followed(run: Run, tmp_path: Path) -> None:
    word = secrets.token_hex()
    (tmp_path / "secret.txt").write_text(word, encoding="utf-8")
    (run.media / "innocent.txt").symlink_to(tmp_path / "secret.txt")
    (run.folder / "git.diff").unlink(missing_ok=True)
    (run.folder / "git.diff").symlink_to(tmp_path / "secret.txt")
    list(report.write(run.folder, run.record))
    assert word not in page_of(run.folder)
    shutil.move(run.media, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "plain.txt").write_text(word, encoding="utf-8")
    run.media.rmdir()
    (run.folder / "media").symlink_to(tmp_path / "elsewhere")
    list(report.write(run.folder, run.record))
    assert word not in page_of(run.folder)


def test_large_media_stay_outside(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "EMBED_LIMIT", 1000)
    (run.media / "film.mp4").write_bytes(bytes(2000))
    list(report.write(run.folder, run.record))
    assert "too large for this page" in page_of(run.folder)


@with_bokeh
def test_many_runs_keep_the_page_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(size=(150, 600))
    for i, row in enumerate(noise):
        write(tmp_path / "sweep" / f"r{i}", {"seed": i % 3, "lr": i // 3}, curve(row.tolist()), {"loss": float(row[-1])})
    assert cli.main(["report", str(tmp_path / "sweep")]) == 0
    assert len(page_of(tmp_path / "sweep").encode()) < report.SIZE_LIMIT
    # With a limit that the first try cannot keep, the points are thinned further.
    monkeypatch.setattr(report, "SIZE_LIMIT", 900_000)
    assert cli.main(["report", str(tmp_path / "sweep")]) == 0
    assert len(page_of(tmp_path / "sweep").encode()) < 900_000


# -- the page in a browser ---------------------------------------------------------------------------------------------------------------------


def drawn(browser: Browser, source: str) -> dict[str, list]:
    columns: dict[str, list] = browser.js(
        f"(() => {{ const d = Bokeh.documents.at(-1).get_model_by_name('{source}').data; return Object.fromEntries(Object.entries(d)) }})()"
    )
    return columns


def click(browser: Browser, selector: str) -> None:
    browser.js(f"document.querySelector({selector!r}).click()")


@in_chromium
@with_bokeh
def test_a_browser_draws_the_curves_and_switches_runs_and_clock(tmp_path: Path, browser: Browser) -> None:
    home = grid(tmp_path / "sweep")
    assert cli.main(["report", str(home)]) == 0
    browser.events.clear()
    browser.open(home / "report.html")
    assert browser.js("document.documentElement.dataset.failed") is None
    assert browser.problems() == []
    assert browser.requests() == []
    lines, means, bands = drawn(browser, "runs0"), drawn(browser, "means0"), drawn(browser, "bands0")
    assert (len(lines["xs"]), len(means["xs"]), len(bands["xs"])) == (12, 4, 4)
    # lr 0.1, width 4: seed 0 starts at 2 * 5, the mean of seeds 0, 0.01, 0.02 at 2 * 5.01.
    assert lines["ys"][0][0] == pytest.approx(10)
    assert means["ys"][0][0] == pytest.approx(10.02)
    assert lines["xs"][0] == list(range(1, 22))
    click(browser, "#runs tr.run input")
    assert len(drawn(browser, "runs0")["xs"]) == 11
    click(browser, "#runs tr.group input")  # was half on: the first click switches it off
    assert (len(drawn(browser, "runs0")["xs"]), len(drawn(browser, "means0")["xs"])) == (9, 3)
    browser.js("document.querySelectorAll('#controls button')[1].click()")
    assert drawn(browser, "runs0")["xs"] == []
    browser.js("document.querySelectorAll('#controls button')[0].click()")
    browser.js("document.querySelectorAll('#controls input[name=clock]')[1].click()")
    assert drawn(browser, "runs0")["xs"][0] == pytest.approx([i / 100 for i in range(1, 22)])
    click(browser, "#controls input[name=means]")
    assert (len(drawn(browser, "runs0")["xs"]), drawn(browser, "means0")["xs"]) == (12, [])


@in_chromium
@with_bokeh
def test_the_mouse_over_a_curve_shows_its_run_and_value(tmp_path: Path, browser: Browser) -> None:
    rows = curve([5.0] * 9, every=1000)
    path = write(tmp_path / "level <img src=x onerror=alert(1)>", {"seed": 3}, rows, {"loss": 5.0})
    assert cli.main(["report", str(path)]) == 0
    browser.events.clear()
    browser.open(path / "report.html")
    # A level curve runs through the middle of its frame.
    place = browser.js(
        """(() => {
            const find = (view) => view.frame ? view : (view.child_views ?? []).map(find).find(Boolean);
            const figure = find([...Bokeh.index][0]);
            const { x, y } = figure.el.getBoundingClientRect();
            return [x + figure.frame.bbox.hcenter, y + figure.frame.bbox.vcenter];
        })()"""
    )
    browser.move(place[0] - 40, place[1] - 1)
    browser.move(*place)
    said = browser.js(
        """new Promise((done) => {
            const collect = (node) => [...node.querySelectorAll("*")].map((n) => (n.shadowRoot ? collect(n.shadowRoot) : "")
                + (n.classList.contains("bk-tooltip-row-value") ? `${n.textContent} ` : "")).join("");
            let tries = 0;
            const look = () => { const text = collect(document); if (text.includes("level") || ++tries > 60) done(text); else setTimeout(look, 50); };
            look();
        })"""
    )
    assert "level <img src=x onerror=alert(1)>" in said  # as text
    assert "5000" in said
    assert browser.problems() == []


@in_chromium
def test_hostile_text_does_nothing_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    home = evil(tmp_path / "sweep")
    assert cli.main(["report", str(home)]) == 0
    browser.events.clear()
    browser.open(home / "report.html")
    title = browser.js("document.title")
    assert title.startswith("2 runs of <img src=x onerror=")
    assert browser.js("document.querySelectorAll('img:not([alt])').length") == 0
    ours = 4 if importlib.util.find_spec("bokeh") else 0  # the library twice, packed and unpacked, the data, report.js
    assert browser.js("document.scripts.length") == ours
    # The text is there, as text: in the table of runs, where a script writes it.
    if browser.js("!!document.getElementById('runs')"):
        assert "onerror" in browser.js("document.getElementById('runs').textContent")
    for box in range(2):
        browser.js(f"document.querySelectorAll('#runs input')[{box}]?.click()")
    assert browser.js("document.title") == title
    # The broken picture is all that may go wrong.
    assert [p for p in browser.problems() if "image" not in p.lower() and "png" not in p.lower()] == []
    assert browser.requests() == []


@in_chromium
def test_a_script_that_got_into_the_page_would_not_run(tmp_path: Path, browser: Browser) -> None:
    home = grid(tmp_path / "sweep", seeds=1)
    assert cli.main(["report", str(home)]) == 0
    page = page_of(home).replace("<h1>", "<script>document.title = 'hit'</script><img src='nowhere.png' onerror=\"document.title = 'hit'\"><h1>", 1)
    (home / "report.html").write_text(page, encoding="utf-8")
    browser.events.clear()
    browser.open(home / "report.html")
    assert browser.js("document.title") == "4 runs of made"
    assert len(browser.problems()) >= 2  # the policy says that it refused them


@in_chromium
@with_bokeh
def test_a_trained_runs_page_opens(run: Run, tmp_path: Path, browser: Browser) -> None:
    list(report.write(run.folder, run.record))
    moved = tmp_path / "elsewhere.html"
    shutil.copyfile(run.folder / "report.html", moved)
    browser.events.clear()
    browser.open(moved)
    assert browser.js("document.documentElement.dataset.failed") is None
    assert len(drawn(browser, "runs0")["xs"]) == 1
    assert browser.problems() == []
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
