"""Who may take part, and what two workers must agree about."""

from __future__ import annotations

import pytest

from nbdshard.common.messages import PROTOCOL_VERSION, EndpointAddress
from nbdshard.coordinator.admission import disagreement, refusal
from support.schedules import DESTINATION, SOURCE, hello, job, server


def test_a_worker_of_another_version_is_refused_and_both_are_named() -> None:
    assert refusal(job(), hello("w", version=99)) == (
        f"the worker speaks version 99 of the control protocol, the coordinator version {PROTOCOL_VERSION}"
    )


def test_a_worker_on_this_machine_takes_any_address() -> None:
    here = EndpointAddress("file", "/tmp/disk")
    assert refusal(job(source=here, destinations=(EndpointAddress("stream", "1"),)), hello("w")) is None


def test_a_worker_elsewhere_takes_servers_at_tcp_addresses() -> None:
    assert refusal(job(), hello("w", machine="there")) is None


def test_a_worker_elsewhere_takes_null() -> None:
    assert refusal(job(destinations=(EndpointAddress("null", "null:"),)), hello("w", machine="there")) is None


@pytest.mark.parametrize(
    "address",
    [
        EndpointAddress("file", "/tmp/disk"),
        EndpointAddress("stream", "0"),
        EndpointAddress("nbd", "nbd+unix:///?socket=/run/x"),
        EndpointAddress("nbd", "nbd://localhost/disk"),
        EndpointAddress("nbd", "nbd://127.0.0.2/disk"),
        EndpointAddress("nbd", "nbd://[::1]/disk"),
        EndpointAddress("nbd", "nbd://bad host/"),
    ],
    ids=lambda address: address.address,
)
def test_a_worker_elsewhere_is_refused_what_means_another_disk_there(address: EndpointAddress) -> None:
    ending = "is not an NBD server at a TCP address other than loopback"
    assert refusal(job(source=address, destinations=(DESTINATION,)), hello("w", machine="there")) == (
        f"a worker on another machine cannot take part: the source {address.address} {ending}"
    )
    assert refusal(job(source=SOURCE, destinations=(address,)), hello("w", machine="there")) == (
        f"a worker on another machine cannot take part: the destination {address.address} {ending}"
    )


def test_ends_that_differ_in_name_only_agree() -> None:
    found = server(10, peer="nbd://192.0.2.1", rotational=True)
    assert disagreement(server(10), found, "source", size_matters=True) is None


def test_another_size_is_told() -> None:
    assert disagreement(server(10), server(20), "source", size_matters=True) == (
        "another source was found: size 20 instead of 10"
    )
    assert disagreement(server(10), server(None), "source", size_matters=True) == (
        "another source was found: size unknown instead of 10"
    )


def test_the_size_of_a_growing_file_may_differ() -> None:
    assert disagreement(server(0), server(20), "destination", size_matters=False) is None


@pytest.mark.parametrize("what", ["read_only", "can_multi_conn", "can_flush", "can_fua", "can_zero", "can_extents"])
def test_another_flag_is_told(what: str) -> None:
    ours, theirs = server(10, **{what: False}), server(10, **{what: True})
    assert disagreement(ours, theirs, "destination", size_matters=True) == (
        f"another destination was found: {what.removeprefix('can_').replace('_', '-')} yes instead of no"
    )


@pytest.mark.parametrize("what", ["block_minimum", "block_preferred", "block_maximum"])
def test_another_block_size_is_told(what: str) -> None:
    ours, theirs = server(10, **{what: 512}), server(10, **{what: 4096})
    assert disagreement(ours, theirs, "source", size_matters=True) == (
        f"another source was found: {what.replace('_', '-')} 4096 instead of 512"
    )
