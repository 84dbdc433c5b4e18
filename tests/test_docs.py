"""The documentation: its code runs, and its site builds without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Code that runs is marked ``python``; ``py`` looks the same to a reader and needs what a test has not.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    found = sorted(DOCS.rglob("*.md"))
    return [str(page.relative_to(DOCS)) for page in found if BLOCK.search(page.read_text("utf-8"))]


def test_there_are_tutorials() -> None:
    assert {page for page in pages() if page.startswith("tutorials/")} >= {
        f"tutorials/{name}.md" for name in ("first", "plans", "layers", "export")
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "tutorials/export.md":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    text = (DOCS / page).read_text("utf-8")
    for block in BLOCK.finditer(text):
        # As many empty lines as come before the block: a traceback then names the line of the page.
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), names)


def resolve(name: str) -> object:
    """The object of a dotted name, modules first: ``dwattn.export`` is also a function of that name."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


def documented() -> list[object]:
    """What the pages of the API show: objects by name, and members of modules, listed or all of them."""
    found = []
    for page in (DOCS / "api").glob("*.md"):
        for entry in re.split(r"^::: ", page.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            shown = resolve(entry.split()[0])
            listed = re.search(r"members: \[([^\]]*)\]", entry)
            if isinstance(shown, ModuleType) and "members: false" not in entry:
                members = listed[1].split(", ") if listed else dir(shown)
                found += [getattr(shown, member) for member in members]
            found.append(shown)
    return found


@pytest.mark.parametrize(
    "package", ["dwattn", "dwattn.finetune", "dwattn.deploy", "dwattn.adapters"]
)
def test_every_public_name_is_on_a_page_of_the_api(package: str) -> None:
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    shown = documented()
    missing = [
        name
        for name, value in public.items()
        if not isinstance(value, ModuleType) and not any(value is other for other in shown)
    ]
    assert not missing


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))]
)
def test_names_on_a_page_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for name in set(re.findall(r"\bdwattn(?:\.[A-Za-z_]\w*)+", text)):
        resolve(name)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="mkdocs is not installed; make docs builds the site.",
)
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "layers" / "index.html").read_text("utf-8")
    assert 'href="#dwattn.functional.dw_aggregate"><code>dw_aggregate</code>' in page
    assert not re.search(r":(func|class|meth|mod|data):", page)
