"""Launchers of several nodes: they start together, end together, and agree on why."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd.inference.host import free_port
from opd.processes import cluster
from opd.processes.cluster import OUTCOME, PROCESS, Cluster, End
from opd.settings import UserError

pytestmark = pytest.mark.processes

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEAR_ALL_S", 0.5)


@pytest.fixture
def nodes() -> Iterator[Callable[..., list[Cluster]]]:
    """Makes the launchers of a run, here all on one host."""
    made: list[Cluster] = []

    def make(count: int = 3, learners: tuple[int, ...] = (1, 2), lost_s: float = 20, **recipes: str) -> list[Cluster]:
        port = free_port()
        for n in range(count):
            made.append(Cluster([HOST] * count, port, n, list(learners), recipes.get(f"of{n}", "r"), lost_s))
        return made

    yield make
    for c in made:
        c.close()


def patience() -> Callable[[], None]:
    deadline = time.monotonic() + 20

    def check() -> None:
        assert time.monotonic() < deadline, "waited too long"

    return check


def join(some: list[Cluster]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda c: c.join(patience()), some))


def outcomes(some: list[Cluster]) -> list[End | None]:
    check = patience()
    while any(c.outcome() is None for c in some):
        check()
        time.sleep(0.02)
    return [c.outcome() for c in some]


def test_all_end_well_when_every_learner_is_done(nodes: Callable[..., list[Cluster]]) -> None:
    some = nodes()
    join(some)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(some[1].finished, patience())
        time.sleep(0.3)
        assert not first.done() and some[0].outcome() is None  # the other learner is still at work
        assert some[2].finished(patience()) == End(0)
        assert first.result(20) == End(0)
    assert outcomes(some) == [End(0)] * 3


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_message_nearest_to_the_cause_wins(nodes: Callable[..., list[Cluster]], order: tuple[int, int]) -> None:
    some = nodes()
    join(some)
    ends = {1: End(1, "the connection was closed", OUTCOME), 2: End(1, "rank 3 was killed", PROCESS)}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda n: some[n].ended(ends[n]), order))
    expected = End(1, f"node 2 ({HOST}): rank 3 was killed", PROCESS)
    assert found == [expected] * 2 and outcomes(some) == [expected] * 3


def test_a_users_mistake_on_the_hub_reaches_all(nodes: Callable[..., list[Cluster]]) -> None:
    some = nodes()
    join(some)
    end = End(2, "data.train: no such file", PROCESS, user_error=True)
    assert some[0].ended(end) == End(2, f"node 0 ({HOST}): data.train: no such file", PROCESS, user_error=True)
    assert {e.code for e in outcomes(some) if e} == {2}


@pytest.mark.parametrize("gone", [0, 2])
def test_a_node_whose_launcher_is_gone_is_lost(nodes: Callable[..., list[Cluster]], gone: int) -> None:
    some = nodes()
    join(some)
    some[gone].close()
    for end in outcomes([c for c in some if c is not some[gone]]):
        assert end is not None and end.code == 1 and f"node {gone} ({HOST}) was lost" in end.message


def test_a_silent_node_is_lost(nodes: Callable[..., list[Cluster]], monkeypatch: pytest.MonkeyPatch) -> None:
    some = nodes(lost_s=1.0)
    join(some)
    time.sleep(2.5)  # everybody beats: nobody is lost
    assert [c.outcome() for c in some] == [None] * 3
    some[2]._closed.set()  # its beat stops, its connection stays, as when a cable is pulled
    found = outcomes(some[:2])
    assert found[0] is not None and "node 2 (127.0.0.1) was lost" in found[0].message and found[0] == found[1]


def test_nodes_must_have_the_same_recipe(nodes: Callable[..., list[Cluster]]) -> None:
    some = nodes(2, (1,), of1="another")
    hub = threading.Thread(target=lambda: pytest.raises(AssertionError, some[0].join, impatient(3)))
    hub.start()
    with pytest.raises(UserError, match="node 1: its recipe, overrides or version differ from node 0's"):
        some[1].join(patience())
    hub.join()


def test_two_launchers_of_one_node(nodes: Callable[..., list[Cluster]]) -> None:
    some = nodes(2, (1,))
    join(some)
    again = Cluster([HOST] * 2, some[0].port, 1, [1], "r", 20)
    with pytest.raises(UserError, match="launch.node 1: a launcher of that node is already there"):
        again.join(patience())


def test_a_stranger_that_talks_nonsense_changes_nothing(nodes: Callable[..., list[Cluster]]) -> None:
    some = nodes(2, (1,))
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(some[0].join, patience())
        time.sleep(0.2)
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"node": "x"}\n', b'{"node": 0}\n', b"\xff" * 99 + b"\n"):
            with socket.create_connection((HOST, some[0].port)) as stranger:
                stranger.sendall(word)
                stranger.shutdown(socket.SHUT_WR)
                stranger.recv(1000)
        assert not joined.done()
        some[1].join(patience())
        joined.result(20)
    assert some[0].outcome() is None


def test_an_address_that_is_not_this_machines() -> None:
    with pytest.raises(UserError, match="node 0 cannot listen at 203.0.113.1:4000"):
        Cluster(["203.0.113.1", HOST], 4000, 0, [0], "r", 20).join(patience())


def impatient(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        assert time.monotonic() < deadline

    return check
