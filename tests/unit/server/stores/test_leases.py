"""One writer for a volume in an object store: who gets it, who is refused, and what a server does that has lost it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest

from nbdshard.common.errors import UserError
from nbdshard.server.stores import leases
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.leases import Lease, Note
from support.s3 import content, keys, new_prefix
from support.s3_proxy import Answer, Asked, Proxied
from support.waiting import wait_for

KEY = "disk.volume"


@pytest.fixture
def bucket(store: Proxied) -> Iterator[Bucket]:
    found = store.s3.bucket(new_prefix())
    yield found
    found.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals come soon, and what is slow in a store takes no time."""
    monkeypatch.setattr(leases, "VOLUME_LEASE_RENEWAL_SECONDS", 0.02)
    monkeypatch.setattr(leases, "VOLUME_LEASE_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(leases, "VOLUME_LEASE_SETTLE_SECONDS", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is silent for as much as the store's clock shows is given up."""
    monkeypatch.setattr(leases, "VOLUME_LEASE_SECONDS", 0.0)


def forget(lease: Lease) -> None:
    """As if its server was killed."""
    lease._is_over.set()
    lease._renewer.join()


def note(bucket: Bucket, number: int) -> Note:
    return msgspec.json.decode(content(bucket, f"{KEY}.lock.{number}"), type=Note)


def test_a_second_writer_is_refused_and_told_who_the_first_is(bucket: Bucket) -> None:
    first = Lease(bucket, KEY)
    with pytest.raises(
        UserError, match=r"disk\.volume: \S+ \(process \d+\) writes it, and was heard \d s ago; .*steal=yes"
    ):
        Lease(bucket, KEY)
    first.check()
    first.release()


def test_a_volume_that_was_given_back_is_free_at_once(bucket: Bucket) -> None:
    for number in range(1, 5):
        lease = Lease(bucket, KEY)
        lease.check()
        lease.release()
        assert note(bucket, number).free
    assert keys(bucket) == [f"{KEY}.lock.3", f"{KEY}.lock.4"]  # what is older is removed, and so are the probes


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_silent_for_too_long_loses_its_volume(
    bucket: Bucket, capfd: pytest.CaptureFixture[str]
) -> None:
    forget(Lease(bucket, KEY))
    second = Lease(bucket, KEY)
    assert "takes it over from" in capfd.readouterr().err
    second.release()


@pytest.mark.usefixtures("quick")
def test_a_server_that_was_robbed_writes_nothing_any_more(bucket: Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    first = Lease(bucket, KEY)
    assert first.losses == 0
    second = Lease(bucket, KEY, steal=True)
    wait_for("the first to see it", lambda: first.losses == 1)
    with pytest.raises(
        OSError, match=r"disk\.volume must not be written any more: \S+ \(process \d+\) has taken it over"
    ):
        first.check()
    second.check()
    first.release()  # which waits for the thread that tells it
    assert "nothing is written any more" in capfd.readouterr().err
    assert not note(bucket, 2).free
    second.release()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_somebody_removed_is_lost(bucket: Bucket) -> None:
    lease = Lease(bucket, KEY)
    bucket.delete(f"{KEY}.lock.1")
    wait_for("that to be seen", lambda: lease.losses == 1)
    with pytest.raises(OSError, match="its lock was removed"):
        lease.check()
    lease.release()


@pytest.mark.usefixtures("quick")
def test_a_lock_is_renewed_and_outlives_a_store_that_fails_for_a_while(bucket: Bucket, store: Proxied) -> None:
    lease = Lease(bucket, KEY)
    wait_for("a renewal", lambda: note(bucket, 1).beat > 0)
    store.rule = lambda asked: Answer(503) if asked.method == "PUT" else None
    wait_for("renewals that fail", lambda: store.count("PUT", ".lock.1") > 10)
    store.rule = lambda _: None
    beat = note(bucket, 1).beat
    wait_for("a renewal", lambda: note(bucket, 1).beat > beat)
    lease.check()
    lease.release()


@pytest.mark.usefixtures("quick")
def test_who_could_not_renew_in_time_writes_nothing_until_it_can(
    bucket: Bucket, store: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(bucket, KEY)
    store.rule = lambda _: Answer(503)
    monkeypatch.setattr(lease, "_valid_until", 0.0)
    with pytest.raises(OSError, match="its lock could not be renewed in time"):
        lease.check()
    assert lease.losses == 0  # nobody else has it
    store.rule = lambda _: None

    def is_well() -> bool:
        try:
            lease.check()
        except OSError:
            return False
        return True

    wait_for("it to be its own again", is_well)
    lease.release()


@pytest.mark.usefixtures("impatient")
def test_one_that_comes_back_while_it_is_taken_over_keeps_its_volume(bucket: Bucket, store: Proxied) -> None:
    """It was silent when it was looked at, and renews before the other one has looked again."""
    first = Lease(bucket, KEY)

    def renew_in_between(asked: Asked) -> Answer | None:
        if asked.method == "PUT" and asked.key.endswith(".lock.2"):
            store.rule = lambda _: None
            first._look()
        return None

    store.rule = renew_in_between
    with pytest.raises(UserError, match="another server is writing it"):
        Lease(bucket, KEY)
    assert note(bucket, 2).free
    first.release()


def all_at_once(bucket: Bucket, count: int) -> tuple[list[Lease], list[UserError]]:
    """Those that got it, and what the others were told."""
    together = threading.Barrier(count)
    got: list[Lease] = []
    refused: list[UserError] = []

    def begin() -> None:
        together.wait(30)
        try:
            got.append(Lease(bucket, KEY))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, refused


def test_of_many_that_begin_at_once_one_gets_it(bucket: Bucket) -> None:
    got, refused = all_at_once(bucket, 6)
    assert (len(got), len(refused)) == (1, 5)
    got[0].release()


def test_an_answer_to_its_creation_that_is_lost_does_not_lock_a_server_out(bucket: Bucket, store: Proxied) -> None:
    """obstore asks again, and is told that it is there."""

    def lose_once(asked: Asked) -> Answer | None:
        if asked.method == "PUT" and asked.key.endswith(".lock.1"):
            store.rule = lambda _: None
            return Answer(drop=True, after=True)
        return None

    store.rule = lose_once
    lease = Lease(bucket, KEY)
    assert store.count("PUT", ".lock.1") == 2
    lease.release()


# -- a store that knows no conditional put


@pytest.mark.usefixtures("quick")
def test_a_store_that_overwrites_is_noticed_and_a_second_writer_refused(
    bucket: Bucket, store: Proxied, capfd: pytest.CaptureFixture[str]
) -> None:
    store.hides_conditions = True
    first = Lease(bucket, KEY)
    assert "this store does not refuse to create what is there" in capfd.readouterr().err
    with pytest.raises(UserError, match="writes it, and was heard"):
        Lease(bucket, KEY)
    first.check()
    first.release()


@pytest.mark.usefixtures("quick")
def test_of_two_that_begin_at_once_on_such_a_store_at_most_one_gets_it(bucket: Bucket, store: Proxied) -> None:
    store.hides_conditions = True
    together = threading.Barrier(2)

    def meet(asked: Asked) -> Answer | None:
        """Both put before either looks again."""
        if asked.key.endswith(".lock.1"):
            if asked.method == "PUT" and store.count("PUT", ".lock.1") <= 2:  # and no renewal
                together.wait(30)
            elif store.count("PUT", ".lock.1") == 2:
                wait_for(
                    "both to have put",
                    lambda: sum(each.method == "PUT" and ".lock.1" in each.key for each in store.done) == 2,
                )
        return None

    store.rule = meet
    got, refused = all_at_once(bucket, 2)
    store.rule = lambda _: None
    assert (len(got), len(refused)) == (1, 1)
    got[0].release()


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b"[]"])
def test_a_lock_nobody_can_read_is_still_one(bucket: Bucket, text: bytes) -> None:
    bucket.put(f"{KEY}.lock.7", text)
    with pytest.raises(UserError, match="a server of another kind"):
        Lease(bucket, KEY)
