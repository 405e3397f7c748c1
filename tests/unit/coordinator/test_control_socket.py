"""The socket of a running job: who is heard, who is not, and that nobody is waited for."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import ANSWER_BYTES_MAX, MIB, ORDER_BYTES_MAX, ORDER_CLIENTS_MAX, ORDER_SECONDS
from nbdshard.common.messages import Counters
from nbdshard.coordinator.control_paths import reachable, socket_name, sockets, usable_places
from nbdshard.coordinator.control_socket import ControlSocket
from nbdshard.coordinator.job import Pace, Status
from nbdshard.coordinator.orders import decode_answer
from support.waiting import WAIT_SECONDS

UUID = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
STATUS = Status(size=MIB, counters=Counters(copied=1000), workers=2, source_connections=4, destination_connections=4,
                phase="copying")  # fmt: skip


class Job:
    """A job that does what it is told; its clock stands."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        found = ControlSocket.listen(UUID, 100.0, [str(folder)])
        assert found is not None
        self.control = found
        self.folder = folder
        self.now = 100.0
        self.status = STATUS
        self.paces: list[Pace] = []

    @property
    def path(self) -> Path:
        return self.folder / socket_name(UUID)

    def obey(self, pace: Pace) -> Status:
        self.paces.append(pace)
        self.status = Status(**{**{n: getattr(STATUS, n) for n in STATUS.__struct_fields__}, "pace": pace})
        return self.status

    def turn(self) -> None:
        self.control.hear(self.status, self.obey, self.now)

    def turns(self) -> None:
        for _ in range(10):
            self.turn()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    one = Job(tmp_path)
    with contextlib.closing(one.control):
        yield one


@contextlib.contextmanager
def client(job: Job, *packets: bytes) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(WAIT_SECONDS)
        with reachable(str(job.path)) as name:
            end.connect(name)
        for packet in packets:
            end.send(packet)
        yield end


def ask(job: Job, packet: bytes) -> dict[str, object]:
    with client(job, packet) as end:
        job.turns()
        found = json.loads(end.recv(1 << 16))
        assert end.recv(1) == b""  # it was let go
    assert isinstance(found, dict)
    return found


def order(word: str, **more: object) -> bytes:
    return json.dumps({"version": 1, "order": word, **more}).encode()


def test_only_its_own_user_can_reach_it(job: Job) -> None:
    assert stat.S_IMODE(job.path.stat().st_mode) == 0o600
    assert os.listdir(job.folder) == [job.path.name]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_where_others_may_write_is_not_used(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    assert ControlSocket.listen(UUID, 0.0, [str(tmp_path), str(tmp_path / "missing")]) is None
    assert sockets({"XDG_RUNTIME_DIR": str(tmp_path)}) == {}


def test_an_order_is_obeyed_and_answered_with_how_the_job_stands(job: Job) -> None:
    answer = ask(job, order("rate", bytes_per_second=MIB))
    assert job.paces == [Pace(MIB)]
    status = answer["status"]
    assert isinstance(status, dict)
    assert (answer["version"], answer["error"]) == (1, "")
    assert status["job"] == UUID
    assert status["rate_limit_bytes_per_second"] == MIB
    assert (status["phase"], status["bytes_done"], status["workers"]) == ("copying", 1000, 2)


def test_an_order_that_cannot_be_carried_out_is_answered_with_one_line(job: Job) -> None:
    def obey(_: Pace) -> Status:
        raise UserError("the job is ending")

    job.obey = obey  # type: ignore[method-assign]
    assert ask(job, order("pause")) == {"version": 1, "error": "the job is ending", "status": None}
    assert ask(job, order("status"))["error"] == ""


def test_each_order_goes_on_from_the_one_before_it_even_in_one_turn(job: Job) -> None:
    with client(job, order("pause")), client(job, order("rate", bytes_per_second=MIB)):
        job.turns()
    assert job.paces == [Pace(None, is_paused=True), Pace(MIB, is_paused=True)]


def test_who_only_asks_changes_nothing(job: Job) -> None:
    assert ask(job, order("status"))["status"]
    assert ask(job, order("continue"))["status"]
    assert job.paces == []


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (b"rubbish", "not an order: JSON is malformed"),
        (b"\xff\xfe", "not an order"),
        (b"[" * ORDER_BYTES_MAX, "not an order"),
        (b"{}", "missing required field `version`"),
        (b'{"version": 2, "order": "explode"}', "understands orders of version 1, not 2"),
        (order("jump"), "Invalid enum value 'jump'"),
        (order("rate", bytes_per_second=0), ">= 65536"),
        (order("rate", bytes_per_second=1 << 70), "not an order"),
        (order("rate", bytes_per_second="1M"), "Expected `int | null`"),
        (order("pause", more=1), "unknown field `more`"),
        (b" " * (ORDER_BYTES_MAX + 1), f"at most {ORDER_BYTES_MAX} bytes"),
        (b" " * 100_000, f"at most {ORDER_BYTES_MAX} bytes"),
    ],
)
def test_what_is_no_order_is_answered_with_why(job: Job, packet: bytes, says: str) -> None:
    answer = ask(job, packet)
    assert says in str(answer["error"])
    assert answer["status"] is None
    assert job.paces == []


def test_who_says_nothing_is_let_go_after_a_while(job: Job) -> None:
    with client(job) as silent:
        job.turns()
        assert job.control.deadline() == job.now + ORDER_SECONDS
        job.now += ORDER_SECONDS
        job.turn()
        assert silent.recv(1) == b""
    assert job.control.deadline() == float("inf")


def test_one_client_too_many_has_the_oldest_dropped(job: Job) -> None:
    with contextlib.ExitStack() as stack:
        crowd = []
        for _ in range(ORDER_CLIENTS_MAX + 1):
            crowd.append(stack.enter_context(client(job)))
            job.turn()
        assert crowd[0].recv(1) == b""
        crowd[-1].send(order("pause"))
        job.turns()
        assert json.loads(crowd[-1].recv(1 << 16))["status"]["paused"]


def test_who_goes_before_it_is_answered_does_no_harm(job: Job) -> None:
    with client(job, order("pause")):
        pass
    with client(job):
        pass
    job.turns()
    assert job.paces == [Pace(is_paused=True)]


def test_what_a_job_left_behind_that_was_killed_is_replaced(job: Job, tmp_path: Path) -> None:
    with contextlib.closing(Job(tmp_path).control):
        job.control.close()  # it is not its own any more
        assert job.path.exists()
    assert not job.path.exists()


def test_a_folder_whose_path_is_too_long_for_a_socket_will_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    one = Job(deep)
    with contextlib.closing(one.control):
        assert ask(one, order("status"))["status"]
        assert sockets({"XDG_RUNTIME_DIR": str(deep)}) == {UUID: str(one.path)}
    assert list(deep.iterdir()) == []


def test_the_folder_of_journals_is_made_and_used_and_not_what_goes_away_at_a_logout(tmp_path: Path) -> None:
    states, runtime = tmp_path / "new" / "state", tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(states)}
    assert usable_places(environment) == [str(states / "nbdshard"), str(runtime)]
    assert stat.S_IMODE((states / "nbdshard").stat().st_mode) == 0o700


def test_where_journals_cannot_be_the_runtime_directory_will_do(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    (tmp_path / "file").touch()
    environment = {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(tmp_path / "file")}
    assert usable_places(environment) == [str(runtime)]


def test_a_socket_beside_a_journal_is_found_and_none_of_another_machine_on_the_same_home(job: Job) -> None:
    nowhere = {"XDG_STATE_HOME": "/no/such/folder"}
    assert sockets(nowhere) == {}
    assert sockets(nowhere, [str(job.folder)]) == {UUID: str(job.path)}
    job.path.rename(job.folder / f"nbdshard-{UUID}.00000000.ctl")
    assert sockets(nowhere, [str(job.folder)]) == {}


def test_root_finds_the_jobs_of_a_service_of_another_user(job: Job) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may look")
    os.chown(job.folder, 65534, 65534)
    assert usable_places({"STATE_DIRECTORY": str(job.folder)}) == []  # a job of root's own would not listen there
    assert sockets({"STATE_DIRECTORY": str(job.folder)}) == {UUID: str(job.path)}


def test_it_tells_where_the_journal_is_or_will_be(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    name = "/journals/" + "\x01" * 4096 + os.fsdecode(b"\xff")  # the worst there may be
    found = ControlSocket.listen(UUID, 0.0, [str(tmp_path)], journal=name)
    assert found is not None
    with contextlib.closing(found), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        with reachable(str(tmp_path / socket_name(UUID))) as path:
            end.connect(path)
        end.send(order("status"))
        for _ in range(3):
            found.hear(STATUS, lambda _: STATUS, 0.0)
        answer = decode_answer(end.recv(ANSWER_BYTES_MAX + 1))
    assert answer.status is not None
    assert answer.status.journal == name[:4096]


def test_where_no_folder_can_be_had_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert usable_places({"XDG_STATE_HOME": str(tmp_path / "file")}) == []


def test_another_user_cannot_connect(job: Job) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    job.folder.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(job.folder)  # folders above it may be closed to others
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                end.connect(job.path.name)
        except PermissionError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
