"""The documentation: its code runs, its names and its map of the code are true, and its site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
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


PACKAGE = ROOT / "python" / "dwattn"


def rows_of_the_map() -> list[list[str]]:
    """The modules in each row of the table in CONTRIBUTING.md, from the bottom of the package up."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.split("The package, `python/dwattn`", 1)[1].split("## Rules", 1)[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    return [re.findall(r"`([\w/]+)`", cell) for cell in cells]


def test_the_map_of_the_code_names_every_module() -> None:
    there = {path.stem for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    named = [name for row in rows_of_the_map() for name in row]
    assert sorted(named) == sorted([*there, "packaging/deploy"])


def imported(path: Path) -> Iterator[str]:
    """Modules and packages at the top of ``dwattn`` that a file imports when it runs, anywhere in it."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            package, _, rest = node.module.partition(".")
            if package == "dwattn":
                yield from [rest.partition(".")[0]] if rest else [x.name for x in node.names]


def test_imports_go_one_way() -> None:
    level = {
        name.rstrip("/"): number for number, row in enumerate(rows_of_the_map()) for name in row
    }
    upside_down = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if name in level
        and level[name] > level.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 99)
    ]
    assert upside_down == ["triton_ops/ahead.py imports deploy"]


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
