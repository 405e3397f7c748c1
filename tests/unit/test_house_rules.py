"""House rules that a machine can hold. A rule that had to be broken is changed here, with its reason."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN_PACKAGES = {"common", "coordinator", "worker", "server", "cli"}
MODULE_LINES_MAX = 500  # a second look is due at 400
MAY_SLEEP = {Path("tests/support/waiting.py")}  # the one poll loop all tests share
SLOWNESS = "# the fault itself"  # ends a line that sleeps because it plays something slow


def sources() -> list[Path]:
    """Python files of the project, those not yet committed included."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [ROOT / name for name in sorted(set(listing.stdout.split("\0"))) if name and (ROOT / name).exists()]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


SOURCES = sources()
PRODUCT = [path for path in SOURCES if not is_test(path)]
TESTS = [path for path in SOURCES if is_test(path)]


def imported_roots(tree: ast.AST) -> set[str]:
    """First names of the modules that are imported absolutely."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def sleeps(source: str) -> list[int]:
    """Lines that sleep, or import what sleeps, other than to play something slow."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="time"), attr="sleep"):
                found.append(node.lineno)
            case ast.ImportFrom(module="time") if any(alias.name == "sleep" for alias in node.names):
                found.append(node.lineno)
    lines = source.splitlines()
    return [number for number in found if SLOWNESS not in lines[number - 1]]


def test_there_are_sources_to_look_at() -> None:
    assert len(PRODUCT) > 20
    assert len(TESTS) > 10


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_imports_a_package_of_ours_without_its_namespace(path: Path) -> None:
    assert not imported_roots(ast.parse(path.read_bytes())) & OWN_PACKAGES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    assert docstring, "no module docstring"


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_no_test_sleeps(path: Path) -> None:
    if path.relative_to(ROOT) not in MAY_SLEEP:
        assert sleeps(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_module_is_too_long_to_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MODULE_LINES_MAX, f"{lines} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_no_debugging_print_is_left_in_a_module_that_is_no_command(path: Path) -> None:
    if path.is_relative_to(ROOT / "cli") or path.is_relative_to(ROOT / "benchmarks"):
        return
    named = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not named & {"print", "breakpoint"}
