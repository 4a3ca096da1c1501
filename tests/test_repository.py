"""Facts about the repository that nothing else would notice going wrong."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import pq_compile
from pq_compile.options import Options

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 20_000_000
LOCAL = ("wo" + "rk", "tm" + "p", "ro" + "ot", "ho" + "me", "Us" + "ers")
FORBIDDEN = (
    rf"(?<![\w.\])}}*~-])/(?:{'|'.join(LOCAL)})/",  # a folder of one machine
    "pypi" + r"\.org|files\.pythonhosted|registry\.npm" + r"js|download\.pytorch",  # index hosts
    r"\bTO" + r"DO\b|\bFIX" + r"ME\b|\bX" + r"XX\b",
)


def tracked() -> list[Path]:
    """The files of the repository; those of the folder, where it is no git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that ``file`` imports, at any depth of its code."""
    package = file.parent.name
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def runs_at_import(file: Path) -> ast.Module:
    """The module without what stands under ``if TYPE_CHECKING`` or inside functions."""
    tree = ast.parse(file.read_text())
    body = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(body, [])


def test_only_the_backend_imports_passes() -> None:
    users = {
        file.name
        for file in (ROOT / "pq_compile").glob("*.py")
        if any(name.split(".")[0] == "passes" for name in imports(file))
    }
    assert users == {"backend.py"}


def test_the_package_itself_imports_nothing_of_ours() -> None:
    loaded = {
        name
        for node in ast.walk(runs_at_import(ROOT / "pq_compile" / "__init__.py"))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert loaded <= {"importlib", "typing", "__future__"}


def test_passes_do_not_import_the_backend() -> None:
    for file in (ROOT / "passes").glob("*.py"):
        ours = {name for name in imports(file) if name.split(".")[0] == "pq_compile"}
        machinery = {"backend", "session", "unit", "runtime", "report", "explaining", "cli", "demo"}
        assert not {name.split(".")[1] for name in ours if "." in name} & machinery, file.name


def test_the_public_names_are_there() -> None:
    for name in ("freeze", "calibration", "refresh", "report", "explain", "Report", "Refused"):
        assert callable(getattr(pq_compile, name))
        assert name in pq_compile.__all__
    with pytest.raises(AttributeError, match="has no attribute 'freze'"):
        _ = pq_compile.freze


def test_every_option_is_in_the_readme() -> None:
    table = (ROOT / "README.md").read_text().split("## Options")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert documented == set(Options.__dataclass_fields__) - {"plan"}  # not supported yet


def test_every_target_of_the_makefile_is_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert phony == set(re.findall(r"^([a-z]+):.* ## ", text, re.MULTILINE))
    assert {"help", "install", "check", "test", "gpu", "demo"} <= phony
    assert text.startswith(".DEFAULT_GOAL := help\n")


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([\w.-]+\.md)\)", index))


def test_links_between_pages_lead_somewhere() -> None:
    for page in [path for path in tracked() if path.suffix == ".md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_file_is_too_large() -> None:
    assert [path.name for path in tracked() if path.stat().st_size > MOST_BYTES] == []


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=["paths", "hosts", "notes"])
def test_no_file_speaks_of_one_machine_or_of_later(pattern: str) -> None:
    found = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png"):
            continue
        hits = re.findall(rf".*(?:{pattern}).*", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}: {hit.strip()[:80]}" for hit in hits]
    assert found == []


def test_examples_compile() -> None:
    for file in (ROOT / "examples").rglob("*.py"):
        compile(file.read_text(), str(file), "exec")


def test_the_version_is_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pq_compile.__version__
    assert f"## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) >= 201
