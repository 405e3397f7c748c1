"""A network that loses packets, or all of them without a word, or a machine: real ones, in namespaces of the test.

No wait is longer than the options say: each test's bound is what they add up to, and much room for a busy machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images, networks, processes
from support.command import EXECUTABLE, Run, copy, started
from support.networks import SERVER_ADDRESS, Network
from support.servers import Server, at_socket, private_folder, running

SIZE = 32 * images.MIB
PORT = 10809
URI = f"nbd://{SERVER_ADDRESS}:{PORT}/"
SECONDS = 60.0
QUICK = (
    *("--connect-timeout", "1"),
    *("--handshake-timeout", "1"),
    *("--request-timeout", "1"),
    *("--request-size", "256k"),
    *("--reconnect-delay", "0.5"),
)


@pytest.fixture
def net() -> Iterator[Network]:
    with networks.network() as made:
        yield made


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


class Ends:
    """The `far` side's server is on the other machine, the other side's is here. The far one gives the pace."""

    def __init__(self, net: Network, far: str, image: Path, copied: Path, folder: Path) -> None:
        self.net = net
        self.image = image
        self.copied = copied
        self._folder = folder
        near = folder / "near"
        near_uri = f"nbd+unix:///?socket={near}"
        self.far_file, self.near_file = (image, copied) if far == "source" else (copied, image)
        self.uris = (URI, near_uri) if far == "source" else (near_uri, URI)
        self._near = near

    @contextlib.contextmanager
    def near(self) -> Iterator[Server]:
        with at_socket(
            self._near, "nbdkit", "-f", "--threads=1", "-U", str(self._near), "file", str(self.near_file)
        ) as it:
            yield it

    @contextlib.contextmanager
    def far(self) -> Iterator[Server]:
        where = ("-i", SERVER_ADDRESS, "-p", str(PORT))
        plugin = ("--filter=rate", "file", str(self.far_file), "rate=96M", "burstiness=0.2")
        words = [*self.net.inside_server, "nbdkit", "-f", "--exit-with-parent", "--threads=1", *where, *plugin]
        with running(words, URI, lambda pid: PORT in processes.listening_tcp_ports(pid), self._folder) as it:
            yield it

    @contextlib.contextmanager
    def copying(self, *options: str) -> Iterator[Run]:
        """A copy that has begun."""
        words = ("copy", *QUICK, *options, *self.uris)
        with started(*words, executable=[*self.net.inside_client, EXECUTABLE]) as run:
            run.until("some of it to be copied", lambda: images.allocated_bytes(self.copied) > 4 * images.MIB)
            yield run


@pytest.fixture(params=["source", "destination"])
def ends(request: pytest.FixtureRequest, net: Network, image: Path, tmp_path: Path) -> Iterator[Ends]:
    with private_folder() as folder:
        both = Ends(net, request.param, image, images.empty_image(tmp_path / "copy", SIZE), folder)
        with both.near():
            yield both


def loss_is_told(run: Run) -> None:
    run.until("the loss to be told of", lambda: "waiting for it" in run.err())


def test_a_black_hole_that_ends_is_survived(ends: Ends, ring: str) -> None:
    with ends.far(), ends.copying("--ring", ring) as run:
        ends.net.black_hole()
        loss_is_told(run)
        ends.net.mend()
        run.wait(SECONDS).succeeded()
    images.assert_identical(ends.image, ends.copied)


def test_a_black_hole_that_stays_pauses_the_copy(ends: Ends) -> None:
    with ends.far(), ends.copying("--loss-timeout", "2") as run:
        ends.net.black_hole()
        run.wait(SECONDS).failed(75, saying=["it was waited for 2 s"])


def test_with_a_loss_timeout_of_0_a_black_hole_fails_the_copy(ends: Ends) -> None:
    with ends.far(), ends.copying("--loss-timeout", "0") as run:
        ends.net.black_hole()
        run.wait(SECONDS).failed(1, saying=["timed out", SERVER_ADDRESS])


def test_a_machine_that_is_replaced_without_a_word_leaves_no_copy_waiting(ends: Ends) -> None:
    """Its connections are half open: nobody has told us that they are gone, and the new machine does not know them."""
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(ends.far())
        run = stack.enter_context(ends.copying())
        ends.net.unplug_server()
        old.kill()
        loss_is_told(run)
        ends.net.plug_in_server()
        stack.enter_context(ends.far())
        run.wait(SECONDS).succeeded()
    images.assert_identical(ends.image, ends.copied)


def test_a_machine_that_restarts_at_once_is_found_out_by_its_first_answer(ends: Ends) -> None:
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(ends.far())
        run = stack.enter_context(ends.copying())
        ends.net.unplug_server()
        old.kill()
        ends.net.plug_in_server()
        stack.enter_context(ends.far())
        run.wait(SECONDS).succeeded()
    images.assert_identical(ends.image, ends.copied)


@pytest.mark.parametrize("far", ["source", "destination"])
def test_a_network_that_loses_packets_slows_a_copy_and_no_more(
    image: Path, tmp_path: Path, ring: str, far: str, seed: int
) -> None:
    with networks.lossy_network(0.02, seed) as (net, cable), private_folder() as folder:
        ends = Ends(net, far, image, images.empty_image(tmp_path / "copy", SIZE), folder)
        with ends.near(), ends.far(), ends.copying("--ring", ring, "--request-timeout", "20") as run:
            run.wait(SECONDS).succeeded()
        assert cable.lost > 50
    images.assert_identical(image, ends.copied)


def test_a_black_hole_at_the_start_ends_with_the_connect_timeout(net: Network, tmp_path: Path) -> None:
    net.black_hole()
    outcome = copy(*QUICK, URI, tmp_path / "copy", executable=[*net.inside_client, EXECUTABLE])
    outcome.failed(1, saying=["source", SERVER_ADDRESS, "timed out"])
