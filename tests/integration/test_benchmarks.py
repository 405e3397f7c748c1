"""The benchmarks with the real tools and sizes that take no time: they measure, prove, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.commands import map_command
from benchmarks.ends import SHARED_MEMORY, Place, without_extents
from benchmarks.measure import CommandFailed, output, timed, watched
from benchmarks.results import AFTER_ONE, IDENTICAL, Results, Row, load
from benchmarks.row_run import data_bytes
from benchmarks.rows import ROWS
from support import processes
from support.servers import nbdkit
from support.waiting import wait_for

TOP = Path(__file__).parents[2]
MIB = 1 << 20
SIZE = 4 * MIB
RUN_SECONDS = 110.0
# One row for each kind of end; the others differ only in numbers. The parts that are no rows take a while.
NAMES = (
    "first",
    "first-tcp",
    "memory",
    "memory-zeroes",
    "qemu-nbd",
    "from-file",
    "to-file-zeroes",
    "sparse",
    "fragments",
)
TASKS = [row for row in ROWS if row.name in NAMES]
PARTS = ("serving", "scaling", "checkpoints", "leases")

BURN = "import time\nwhile time.process_time() < {seconds}: pass"


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def bench(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`make bench ARGS=WORDS`, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.main", *words],
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": "tests", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def small(*words: str, rows: Sequence[str]) -> list[str]:
    return ["--quick", "--rounds", "1", "--size-max", str(SIZE), "--rows", ",".join(rows), *words]


@dataclass(frozen=True)
class Ran:
    """A run that ended: what it said, what it found, and where its page is."""

    said: str
    results: Results
    folder: Path

    def row(self, name: str) -> Row:
        return next(row for row in self.results.rows if row.name == name)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """NAMES and PARTS once, tiny."""
    folder = tmp_path_factory.mktemp("bench")
    raw = folder / "raw.json"
    process = bench(*small("--output", str(folder), "--results", str(raw), rows=(*NAMES, *PARTS)))
    said, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, said
    return Ran(said, load(raw), folder)


def test_every_row_is_run_with_every_tool(ran: Ran) -> None:
    assert [row.name for row in ran.results.rows] == [row.name for row in TASKS]
    for row in ran.results.rows:
        assert not row.skipped and not row.notes, ran.said
        assert {"nbdshard", "nbdcopy", "qemu-img"} <= {series.name for series in row.series}
        for series in row.series:
            assert len(series.samples) >= 1 and not series.failed, ran.said
            assert all(sample.wall > 0 and sample.cpu > 0 for sample in series.samples)


def test_every_copy_that_can_be_read_back_is_proven(ran: Ran) -> None:
    for task in TASKS:
        proofs = ran.row(task.name).proofs  # what the rounds left behind is compared if there is time
        assert (AFTER_ONE in proofs) == task.destination.keeps_data
        assert set(proofs.values()) <= {IDENTICAL}, task.name


def test_a_place_without_extents_holds_the_same_and_tells_of_no_hole() -> None:
    with nbdkit("memory", size="1M") as server, without_extents(Place(server.uri, lambda: None)) as place:
        output(["qemu-io", "-f", "raw", "-c", "write -P 7 64k 64k", server.uri])
        output(["qemu-io", "-f", "raw", "-r", "-c", "read -v -P 7 64k 64k", place.address])
        assert data_bytes(output(map_command(server.uri))) == 64 * 1024
        assert data_bytes(output(map_command(place.address))) == MIB


def test_what_is_left_as_data_is_counted_where_zeroes_are_looked_for(ran: Ran) -> None:
    assert ran.row("fragments").data_bytes == dict.fromkeys(("nbdshard", "nbdcopy"), SIZE // 2)
    assert ran.row("memory-zeroes").data_bytes["nbdshard"] == SIZE
    assert ran.row("memory").data_bytes == {}


def test_memory_is_told_of_the_coordinator_and_of_each_worker(ran: Ran) -> None:
    (ours,) = (memory for memory in ran.row("first").memory if memory.name == "nbdshard")
    assert ours.main > 5 * MIB
    assert ours.workers and all(peak > MIB for peak in ours.workers)


def test_the_cpu_of_the_servers_is_told_of_too() -> None:
    with nbdkit("pattern", size="256M") as server:
        assert timed(["nbdcopy", server.uri, "null:"], [server.pid]).servers > 0.0
        assert timed(["true"], [server.pid]).servers == 0.0


def test_the_other_ring_is_measured_on_the_first_row(ran: Ran) -> None:
    assert "nbdshard --ring epoll" in [series.name for series in ran.row("first").series]


def test_scaling_and_the_control_plane_are_measured(ran: Ran) -> None:
    found = ran.results
    assert all(point.series.samples for point in found.scaling), ran.said
    coordinators = [(rate.transport, rate.workers) for rate in found.leases]
    assert coordinators == [("ipc", 10), ("ipc", 100), ("tcp", 10), ("tcp", 100)]
    assert all(rate.cpu > 0 and rate.leases > 0 for rate in found.leases)


def test_every_server_is_measured_beside_nbdkit(ran: Ran) -> None:
    assert [work.name for work in ran.results.serving] == ["read", "write", "random"]
    assert all(series.samples for work in ran.results.serving for series in work.series), ran.said


def test_checkpoints_are_measured_beside_a_copy_without(ran: Ran) -> None:
    (cost,) = ran.results.checkpoints
    assert cost.often.samples and cost.never.samples, ran.said


def test_the_page_and_its_charts_are_written(ran: Ran) -> None:
    text = (ran.folder / "benchmarks.md").read_text()
    assert text.startswith("# Benchmarks")
    for name in ("benchmarks-rows.svg", "benchmarks-scaling.svg"):
        assert f"]({name})" in text
        assert (ran.folder / name).read_text().startswith("<svg")
    assert str(TOP) not in text and str(SHARED_MEMORY / "nbdshard") not in text


def test_the_page_can_be_written_again_without_measuring(ran: Ran, tmp_path: Path) -> None:
    process = bench("--render", "--results", str(ran.folder / "raw.json"), "--output", str(tmp_path))
    said, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, said
    assert (tmp_path / "benchmarks.md").read_text() == (ran.folder / "benchmarks.md").read_text()


def test_without_results_there_is_nothing_to_write_again(tmp_path: Path) -> None:
    process = bench("--render", "--results", str(tmp_path / "none.json"), "--output", str(tmp_path))
    said, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1
    assert said.endswith("none.json: cannot be read: No such file or directory; run make bench first\n")
    assert said.count("\n") == 1


def test_a_missing_tool_is_told_in_one_line(tmp_path: Path) -> None:
    process = bench("--quick", environment={"PATH": str(tmp_path)})
    said, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 1
    assert said == "benchmarks: nbdcopy is missing; it is in the package libnbd-bin\n"


def test_an_interrupted_run_leaves_no_server_and_no_file(tmp_path: Path) -> None:
    mark = f"NBDSHARD_TEST_RUN={os.urandom(8).hex()}"
    variables = dict([mark.split("=")])
    words = [*small("--output", str(tmp_path), rows=["qemu-nbd"]), "--rounds", "100000", "--seconds", "1000"]
    process = bench(*words, environment=variables)
    wait_for("a copy to run", lambda: any("nbdshard copy" in one for one in command_lines(mark)), RUN_SECONDS)
    folders = list(SHARED_MEMORY.glob(f"nbdshard-bench-{process.pid}-*"))
    assert len(folders) == 1
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 130, said
    assert said.endswith("benchmarks: interrupted: nothing is written\n")
    wait_for("everything that was started to end", lambda: not processes.with_environment(mark))
    assert not folders[0].exists()
    assert not list(tmp_path.iterdir())


def command_lines(mark: str) -> list[str]:
    return [processes.command_line(pid) for pid in processes.with_environment(mark)]


# -- how one command is measured ---------------------------------------------------------------------------------------


def test_the_cpu_of_a_child_that_was_waited_for_counts() -> None:
    child = BURN.format(seconds=0.3)
    sample = timed(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"))
    assert sample.cpu >= 0.3
    assert sample.wall >= 0.3


def test_the_cpu_of_threads_counts() -> None:
    thread = BURN.format(seconds=0.3)
    assert (
        timed(python(f"import threading\nt = threading.Thread(target=exec, args=({thread!r},))\nt.start()")).cpu >= 0.3
    )


def test_cpu_that_nobody_waited_for_is_remarked_upon() -> None:
    child = BURN.format(seconds=0.5)
    orphan = (
        f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {child!r} + '\\nprint(flush=True)"
    )
    orphan += "\\nimport signal; signal.pause()'], stdout=subprocess.PIPE)\nchild.stdout.readline()\n"
    orphan += "import os; os.kill(child.pid, 9); os._exit(0)"
    _, remark = watched("a tool", python(orphan))
    assert remark.startswith("a tool: its processes used 0.") and "wait4(2) tells of" in remark


def test_the_workers_of_a_copy_are_all_accounted_for() -> None:
    with nbdkit("pattern", size="256M") as source, nbdkit("null", size="256M") as destination:
        command = [str(Path(sys.executable).with_name("nbdshard")), "copy", source.uri, destination.uri]
        memory, remark = watched("nbdshard", command)
    assert remark == ""
    assert memory.workers


def test_a_command_that_fails_tells_its_last_line() -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3: no such disk$"):
        timed(["sh", "-c", "echo something >&2; echo no such disk >&2; exit 3"])
    with pytest.raises(CommandFailed, match=r"ended with 1: it said nothing$"):
        output(["false"])


def test_a_command_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.COMMAND_SECONDS_MAX", 0.2)
    with pytest.raises(CommandFailed, match=r"`sleep` did not end within 0.2 s"):
        timed(["sleep", "100"])
    with pytest.raises(CommandFailed, match=r"`sleep` did not end within 0.2 s"):
        output(["sleep", "100"])
