"""Run nbdshard as a user without privileges, although the checkout may lie where only root can read.

The packages and what they depend on are copied to a folder that everybody can read, and run by an interpreter that
everybody can run. A single function needs no such folder (`as_lonely_user`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

NOBODY = 65534
SYSTEM_PYTHON = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
TRY_SECONDS = 60.0
ROOT = Path(__file__).parents[2]


def interpreter_for_nobody() -> str | None:
    """An interpreter of this version that an ordinary user can run; None when there is none."""
    for candidate in (str(Path(sys.executable).resolve()), SYSTEM_PYTHON):
        try:
            subprocess.run(
                [candidate, "-c", "import ctypes, ssl, sqlite3"],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                cwd="/",
                timeout=TRY_SECONDS,
                check=True,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return None


def install_for_everybody(folder: Path) -> None:
    """Copy nbdshard and what it needs at run time into `folder`, to be its PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["packages"]:
        parts = name.split(".")
        target = folder.joinpath(*parts)
        target.mkdir(parents=True, exist_ok=True)
        for file in ROOT.joinpath(*parts[1:]).iterdir():
            if file.is_file():
                shutil.copy(file, target)
    wanted = [_name(line) for line in project["project"]["dependencies"]]
    copied: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in copied:
            continue
        copied.add(name)
        wanted += _copy_distribution(name, folder)


def lonely_user() -> int:
    """A user without any process, and without privileges: what the kernel grants each user is all there."""
    return 20_000 + os.getpid() % 40_000


@contextlib.contextmanager
def as_lonely_user(function: Callable[[], Value]) -> Iterator[Value]:
    """What `function` returns in a child process of the lonely user, which keeps what it opened until the block ends.

    AssertionError with what it raised there. The child opens no file of the checkout: all it needs was imported before.
    Where we are not root, it is a child of our own user.
    """
    user, answers, is_over = lonely_user(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(is_over[1])
        _answer(function, user, answers[1])
        os.read(is_over[0], 1)
        os._exit(0)  # nothing of the parent's is ended, flushed or removed twice
    os.close(answers[1])
    os.close(is_over[0])
    try:
        with open(answers[0], "rb") as stream:
            succeeded, value = pickle.load(stream)
        assert succeeded, f"in the child process:\n{value}"
        yield value
    finally:
        os.close(is_over[1])
        os.waitpid(child, 0)


def _answer(function: Callable[[], object], user: int, writing: int) -> None:
    try:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        answer: tuple[bool, object] = (True, function())
    except BaseException:
        answer = (False, traceback.format_exc())
    with open(writing, "wb") as stream:
        pickle.dump(answer, stream)


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found[0]


def _copy_distribution(name: str, folder: Path) -> list[str]:
    """Copy the files of one installed distribution; give the names of those it needs itself."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # not wanted on this platform
        return []
    for file in distribution.files or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(str(distribution.locate_file(file))), target)
    return [_name(line) for line in distribution.requires or [] if "extra ==" not in line]
