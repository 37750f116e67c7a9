from html.parser import HTMLParser
from pathlib import Path

import pytest

from onetorch.runs import algorithm, report
from onetorch.runs.errors import RunError
from onetorch.runs.run import Run

idea = algorithm.read(Path(__file__).with_name("idea.py")).load()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run(tmp_path / "a <b>", idea.Config(steps=5), recipe="idea & co", quiet=True) as run:
        idea.train(run.config, run)
        run.finish()
        run.result(error=0.25)
        (run.media / "samples.txt").write_text("<script>alert(1)</script>", encoding="utf-8")
    return run


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_opens_offline_and_holds_the_run(run: Run) -> None:
    said = list(report.write(run.folder, run.record))
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page
    assert "idea &amp; co" in page
    for words in ("0.25", "steps", run.record["versions"]["torch"]):
        assert words in page
    if (run.folder / "media" / "curves.png").exists():
        assert any(link.startswith("data:image/png") for link in links.found)
    else:
        assert "matplotlib is missing" in said[0]


def test_a_run_without_rows_has_a_page_too(tmp_path: Path) -> None:
    with Run(tmp_path / "r", idea.Config(), quiet=True) as run:
        pass
    list(report.write(run.folder, run.record))
    assert (run.folder / "report.html").exists()


def test_damaged_rows_are_named(run: Run) -> None:
    (run.folder / "metrics.jsonl").write_bytes(b"x\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1 is damaged"):
        list(report.write(run.folder, run.record))
