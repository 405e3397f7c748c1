"""Hints: what a server that gives them gets its clients to do, and that all the others do not notice the question."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdshard.coordinator.journal import Journal
from support import images
from support.command import copy, nbdshard, started
from support.doubles import CMD_WRITE, OPT_LIST_META_CONTEXT, Double, Request, Talk
from support.served import serving
from support.servers import Server, nbd_server, nbdkit, qemu_nbd

SIZE = 4 * images.MIB
UUID = "6f1c0b1e-0d5e-4d55-9f0e-3a2c2c9d7e11"
HINTS = f"x-nbdshard:hints;v=1;request_ms=30000;loss_ms=120000;backoff_ms=200-5000;instance={UUID}"


class Asked(Double):
    """Notes how often each option is asked."""

    def option(self, talk: Talk, option: int, data: bytes) -> bool | None:
        with self.lock:
            self.options = [*getattr(self, "options", []), option]
        return super().option(talk, option, data)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


def verbose_nbdkit(image: Path) -> contextlib.AbstractContextManager[Server]:
    return nbdkit("file", str(image), flags=["-r", "-v"])


@pytest.mark.parametrize(
    ("serve", "asked"),
    [
        (verbose_nbdkit, "NBD_OPT_LIST_META_CONTEXT: client requested export"),
        (lambda image: qemu_nbd(image, "-r"), ""),
        (lambda image: nbd_server(image, "readonly = true"), ""),
    ],
    ids=["nbdkit", "qemu-nbd", "nbd-server"],
)
def test_servers_that_know_no_hints_are_copied_as_ever(
    tmp_path: Path, image: Path, serve: Callable[[Path], contextlib.AbstractContextManager[Server]], asked: str
) -> None:
    with serve(image) as server:
        copy(server.uri, tmp_path / "copy").succeeded()
        told = json.loads(nbdshard("info", "--json", server.uri).succeeded().out)
        assert asked in server.stderr()
    images.assert_identical(image, tmp_path / "copy")
    assert told["hints"] == {}


def test_info_shows_the_hints() -> None:
    with serving("memory:4M?hint-request=30s&hint-loss=2m&hint-backoff=200ms-5s") as served:
        shown = nbdshard("info", served.uri()).succeeded().out
        told = json.loads(nbdshard("info", "--json", served.uri()).succeeded().out)
    instance = told["hints"].pop("instance")
    assert f"hints: request 30 s, loss 120 s, backoff 0.2 to 5 s, instance {uuid.UUID(instance)}\n" in shown
    assert told["hints"] == {
        "request_seconds": 30.0,
        "loss_seconds": 120.0,
        "backoff_seconds_min": 0.2,
        "backoff_seconds_max": 5.0,
    }
    assert told["contexts"] == ["base:allocation"]


def test_each_connection_asks_once() -> None:
    double = Asked(bytearray(images.random_bytes(SIZE)), hints=HINTS)
    with double.running() as listening:
        copy("-C", "1", listening.uri, "null:").succeeded()
    assert double.options.count(OPT_LIST_META_CONTEXT) == double.talks == 1


@pytest.mark.parametrize(
    ("options", "seconds"),
    [((), "1.0625 s"), (("--request-timeout", "0.5"), "0.5625 s")],
)
def test_a_request_may_become_as_old_as_the_server_hints_unless_the_user_says_something_else(
    options: tuple[str, ...], seconds: str
) -> None:
    with serving("delay:memory:64K?delay-read=20s&hint-request=1s") as served:
        outcome = copy("--loss-timeout", "0", *options, served.uri(), "null:")
        served.run.process.kill()  # it would wait for its own answer
    outcome.failed(1, saying=["source", "timed out while reading", f"no answer within {seconds}"])


@pytest.mark.parametrize("options", [(), ("--loss-timeout", "2")])
def test_a_server_is_waited_for_as_long_as_it_hints_unless_the_user_says_something_else(
    options: tuple[str, ...], image: Path
) -> None:
    with (
        serving(f"file:{image}?hint-loss=1s&hint-backoff=50ms-100ms", "-v") as served,
        started("copy", "-v", *options, "--rate", "256K", served.uri(), "null:") as run,
    ):
        run.until("the copy to be under way", lambda: "serves 'disk'" in served.run.err())
        served.run.process.kill()
        outcome = run.wait()
    outcome.failed(75, saying=["source", f"it was waited for {'2' if options else '1'} s"])


class Restless(Double):
    """Hangs up in the middle of the sixth write, once. `restarts`: another life of it begins then."""

    restarts = False

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        if self.count(CMD_WRITE) == 6 and talk.number == 1:
            if self.restarts:
                self.hints = HINTS.replace("6f1c", "7777")
            talk.hang_up()
        super().write(talk, request, data)

    def writes_at(self, offset: int) -> int:
        with self.lock:
            return sum(each.command == CMD_WRITE and each.offset == offset for each in self.requests)


class Restarting(Restless):
    """What it acknowledged and had not flushed is lost."""

    restarts = True

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        try:
            super().write(talk, request, data)
        except EOFError:
            self.content[:] = bytes(len(self.content))
            raise


@pytest.mark.parametrize(
    ("double", "hints", "times"),
    [(Restless, HINTS, 1), (Restless, "", 2), (Restarting, HINTS, 2)],
    ids=["same life", "no life named", "another life"],
)
def test_what_a_server_acknowledged_in_the_same_life_is_not_written_again(
    tmp_path: Path, ring: str, double: type[Restless], hints: str, times: int
) -> None:
    image = images.random_image(tmp_path / "source", 12 * images.MIB)
    journal = tmp_path / "journal"
    destination = double(bytearray(12 * images.MIB), hints=hints)
    words = ("-C", "1", "-T", "1", "--range-size", "1M", "--checkpoint", "10m", "--ring", ring)
    with destination.running() as listening:
        copy(*words, "--journal", journal, "--keep-journal", image, listening.uri).succeeded()
    assert bytes(destination.content) == image.read_bytes()
    assert destination.writes_at(0) == times
    with Journal.open(str(journal)) as kept:
        assert kept.facts.destinations[0].description.hints.instance == (UUID if hints else "")


def test_a_destination_that_is_another_one_on_the_second_connection_was_started_again(tmp_path: Path) -> None:
    class Restarted(Double):
        """Its first connection was to an earlier life."""

        def negotiate(self, talk: Talk) -> bool:
            self.hints = HINTS if talk.number == 1 else HINTS.replace("6f1c", "7777")
            return super().negotiate(talk)

    image = images.random_image(tmp_path / "source", 16 * images.MIB)
    destination = Restarted(bytearray(16 * images.MIB))
    with destination.running() as listening:
        outcome = copy("-v", "-C", "2", "-T", "1", image, listening.uri).succeeded()
    assert bytes(destination.content) == image.read_bytes()
    assert "the server was started again meanwhile" in outcome.err
