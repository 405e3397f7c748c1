"""What gets installed: one import namespace, every package of it, typed; and no top-level `common`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_PACKAGED = {"tests", "benchmarks", "docs", "deploy", "build", "dist"}


def packages_on_disk() -> set[str]:
    """Dotted names of the folders with an `__init__.py`, below the namespace."""
    found = set()
    for file in ROOT.glob("**/__init__.py"):
        parts = file.parent.relative_to(ROOT).parts
        if parts[0] not in NOT_PACKAGED and not parts[0].startswith("."):
            found.add(".".join(("nbdshard", *parts)))
    return found


def test_the_packages_named_in_pyproject_are_the_folders_that_hold_modules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk())


def test_every_package_says_that_it_is_typed() -> None:
    untyped = [name for name in packages_on_disk() if not (ROOT / Path(*name.split(".")[1:]) / "py.typed").exists()]
    assert untyped == []


def test_no_folder_of_ours_is_importable_at_the_top_level() -> None:
    tops = sorted({name.split(".")[1] for name in packages_on_disk()})
    program = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    ended = subprocess.run(
        [sys.executable, "-c", program, *tops], cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_every_package_imports_from_outside_the_checkout() -> None:
    program = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]"
    ended = subprocess.run(
        [sys.executable, "-c", program, *sorted(packages_on_disk())],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
