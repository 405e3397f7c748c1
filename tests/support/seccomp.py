"""Run a command under a seccomp profile in the format of container runtimes, by libseccomp: no container needed.

`python -m support.seccomp PROFILE [--without NAME]... -- COMMAND ...` loads the profile and becomes the command.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROFILE = Path(__file__).parents[2] / "deploy/container/seccomp.json"
_ACT_ALLOW = 0x7FFF0000
_ACT_ERRNO = 0x00050000
_NR_UNKNOWN = -1


def load(profile: dict[str, object], without: frozenset[str] = frozenset()) -> None:
    """Restrict this process, and what it becomes, to the profile's calls; `without` are taken out of it."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    refusal = profile["defaultErrnoRet"]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert isinstance(refusal, int)
    context = library.seccomp_init(_ACT_ERRNO | refusal)
    rules = profile["syscalls"]
    assert isinstance(rules, list)
    for rule in rules:
        assert rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if name in without or number == _NR_UNKNOWN:
                continue
            if library.seccomp_rule_add_array(context, _ACT_ALLOW, number, 0, None) < 0:
                raise RuntimeError(f"seccomp: {name} cannot be allowed")
    if library.seccomp_load(context) < 0:
        raise RuntimeError("seccomp: the profile cannot be loaded")


def without(program_text: str, *arguments: str, refused: Sequence[str]) -> str:
    """What a Python program prints that is refused (EPERM) these system calls, besides what containers refuse."""
    options = [word for name in refused for word in ("--without", name)]
    command = [sys.executable, "-m", "support.seccomp", str(PROFILE), *options, "--"]
    ended = subprocess.run(
        [*command, sys.executable, "-c", program_text, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def main() -> None:
    split = sys.argv.index("--")
    options, command = sys.argv[1:split], sys.argv[split + 1 :]
    without = frozenset(options[at + 1] for at, word in enumerate(options) if word == "--without")
    load(json.loads(Path(options[0]).read_text()), without)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
