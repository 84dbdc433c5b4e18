"""The HTML report: complete, self-contained, and free of errors in a browser."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from dwattn import report
from dwattn.errors import DataError
from dwattn.report import Results
from support.demo_results import make_results

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results.json, pictures and the report."""
    folder = tmp_path_factory.mktemp("demo")
    make_results(folder).save(folder / "results.json")
    report.write(folder / "results.json", folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


class _Checker(html.parser.HTMLParser):
    """Collects references and ids, and notices tags that are not closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.images_without_alt = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [values[name] or "" for name in ("src", "href") if name in values]
        self.references += [values["xlink:href"] or ""] if "xlink:href" in values else []
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag == "img" and not values.get("alt"):
            self.images_without_alt += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def _check(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_page_is_well_formed_and_ids_are_unique(page: str) -> None:
    checker = _check(page)
    assert checker.open == []
    assert checker.images_without_alt == 0
    assert len(checker.ids) == len(set(checker.ids))


def test_page_needs_nothing_from_outside(page: str) -> None:
    for reference in _check(page).references:
        assert reference.startswith(("data:", "#")), reference
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


def test_page_states_the_numbers_the_photos_and_the_model(page: str) -> None:
    for text in (
        "0.942",
        "120 unlabelled photos",
        "60 other photos",
        "fine-tune of DINOv2-S",
        "scikit-image (80)",
    ):
        assert text in page, text
    assert "photo-0.jpg &lt;&amp;&gt;" in page  # names are escaped
    assert "A note about this run." in page


def test_page_has_every_figure_and_a_text_for_each(page: str) -> None:
    figures = re.findall(r'<svg [^>]*aria-label="([^"]+)"', page)
    assert len(figures) == 7  # scores, heads, kernels, two curves, two latencies
    assert any("0.958" in text for text in figures)
    assert page.count("<img ") == 15


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    assert "#010203" not in page
    assert "#040506" not in page
    assert "currentColor" in page


def test_writing_twice_gives_the_same_file(folder: Path, page: str, tmp_path: Path) -> None:
    again = report.write(folder / "results.json", tmp_path / "again.html")
    assert again.read_text("utf-8") == page


def test_results_round_trip(folder: Path) -> None:
    results = make_results(folder)
    assert Results.load(folder / "results.json") == results
    assert json.dumps(results.to_dict())


def test_parts_that_a_run_left_out_are_left_out(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results.conversions, results.latency, results.pictures, results.layers = [], [], [], []
    results.export, results.original_mask_iou = None, None
    page = report.write(results, tmp_path / "r.html").read_text("utf-8")
    assert _check(page).open == []
    for heading in ("Fidelity", "Saliency side by side", "Latency", "Export", "What was replaced"):
        assert f"<h2>{heading}" not in page
    assert "<h2>Which layers" in page


def test_an_iou_that_is_undefined_survives(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results.conversions[0].fidelity.iou = float("nan")
    results.save(tmp_path / "results.json")
    assert report.write(tmp_path / "results.json", tmp_path / "r.html").is_file()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "Cannot read"),
        ("", "not a results file"),
        ("[]", "not a results file"),
        ('{"kind": "dwattn-plan"}', "kind"),
        ('{"kind": "dwattn-demo-results", "schema_version": 2}', "schema_version"),
    ],
)
def test_malformed_results_are_refused_with_the_reason(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=reason):
        report.write(path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_missing_picture_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0-0\.png"):
        report.write(folder / "results.json", tmp_path / "r.html", pictures=tmp_path)


# A browser ---------------------------------------------------------------------------------------


def _screenshot(page: Path, target: Path, size: tuple[int, int]) -> str:
    """Open ``page`` in headless Chromium, write a PNG, return what the browser logged."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0",
                f"--window-size={size[0]},{size[1]}", f"--screenshot={target}", page.resolve().as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def _png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1200, 4200), (500, 6500)], ids=["desktop", "phone"])
def test_opens_in_a_browser_without_errors(
    folder: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Set DWATTN_SCREENSHOTS to a folder to keep the pictures and look at them."""
    kept = os.environ.get("DWATTN_SCREENSHOTS")
    target = Path(kept or tmp_path) / f"report-{size[0]}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    log = _screenshot(folder / "report.html", target, size)
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    assert _png_size(target) == size
    from PIL import Image

    with Image.open(target) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is None or len(colours) > 100  # something was drawn


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(folder: Path, tmp_path: Path, width: int) -> None:
    """The page measures itself and writes what it finds into the document that Chromium dumps."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    probe = (
        "<script>document.documentElement.setAttribute('data-wide',"
        "document.documentElement.scrollWidth + '/' + window.innerWidth)</script>"
    )
    page = (folder / "report.html").read_text("utf-8").replace("</body>", probe + "</body>")
    path = tmp_path / "probe.html"
    path.write_text(page, "utf-8")
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom", path.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    found = re.search(r'data-wide="(\d+)/(\d+)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert int(found[1]) <= int(found[2])
