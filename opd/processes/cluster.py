"""Launchers of several nodes: they start a run together and end it together. Imports nothing heavy.

Node 0's launcher is the hub: the others hold a connection to it. Everyone says now and then that it lives; whoever ends
badly says why; a node that falls silent is lost. The hub hears all sides for a moment, picks the message that lies
nearest to the cause, and everybody ends with it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opd.settings import UserError

TELL_S = 30.0  # between two words on who is still missing
BEATS = 6  # in the time after which a silent node is lost
HEAR_ALL_S = 3.0  # after the first bad news, for news nearer to its cause
VERDICT_S = 10.0  # a member waits so long for the hub's word on a failure of its own
LINE = 1 << 16

# How near a message lies to its cause: the greatest wins, then the first.
OUTCOME = 0  # a learner's error may follow from another node's
PROCESS = 1  # a dead process, a lost node, a user's mistake


@dataclass(frozen=True)
class End:
    """How a run ended: exit code, what to tell, how near to the cause."""

    code: int
    message: str = ""
    nearness: int = OUTCOME
    user_error: bool = False


class Alone:
    """A run on one node: nobody to wait for."""

    _end: End | None = None  # the verdict: the same on all nodes

    def join(self, check: Callable[[], None]) -> None:
        """Nobody else starts."""

    def outcome(self) -> End | None:
        """How the run ended, once that is known here; nobody else ends the run of one node."""
        return self._end

    def finished(self, check: Callable[[], None]) -> End:
        """The learner on this node is done, and so is the run."""
        return End(0)

    def ended(self, end: End) -> End:
        """What happened here is what happened."""
        return end

    def close(self) -> None:
        """Nothing is open."""


class Cluster(Alone):
    """One launcher among those of all nodes."""

    def __init__(self, hosts: list[str], port: int, node: int, learners: list[int], recipe: str, lost_s: float) -> None:
        """`learners`: nodes with learner ranks; `recipe`: a digest that all nodes must share; `lost_s`: seconds of
        silence after which a node is lost."""
        self.hosts, self.port, self.node, self.learners = hosts, port, node, set(learners)
        self.hub = f"{hosts[0]}:{port}"
        self.recipe, self.lost_s = recipe, lost_s
        self._news: list[End] = []  # hub: what was heard, before the verdict
        self._done: set[int] = set()  # hub: nodes whose learner is done
        self._peers: dict[int, socket.socket] = {}  # hub: by node; member: the hub under 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener: socket.socket | None = None

    def join(self, check: Callable[[], None]) -> None:
        """Return when the launchers of all nodes are there. `check` is called meanwhile and may raise.

        Raises UserError when the hub's address cannot be used or another node has another recipe.
        """
        self._told = time.monotonic()  # when it was last said who is missing
        if self.node == 0:
            self._listen()
            while len(self._peers) < len(self.hosts) - 1 and self._end is None and not self._news:
                missing = [f"{n} ({h})" for n, h in enumerate(self.hosts) if n not in self._peers and n != 0]
                self._pause(check, f"node 0 listens at {self.hub}; still missing: node {', '.join(missing)}")
        else:
            self._connect(check)
        threading.Thread(target=self._beat, daemon=True).start()

    def finished(self, check: Callable[[], None]) -> End:
        """This node's learner is done: wait for the others'. Returns how the run ended."""
        self._tell({"done": True})
        while self._end is None:
            self._pause(check)
        return self._end

    def ended(self, end: End) -> End:
        """Something ended badly here: tell the others, and learn how it began."""
        self._tell({"end": vars(end)})
        deadline = time.monotonic() + VERDICT_S
        while self._end is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._end or end

    def close(self) -> None:
        """Say good-bye."""
        self._closed.set()
        with self._lock:
            for s in filter(None, (*self._peers.values(), self._listener)):
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)
                s.close()

    def _listen(self) -> None:
        try:
            self._listener = socket.create_server((self.hosts[0], self.port))
        except OSError as e:
            remedy = "name an address of this machine that the others reach, or another launch.port"
            raise UserError(f"launch.hosts: node 0 cannot listen at {self.hub} ({e.strerror or e}); {remedy}") from e
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(peer,), daemon=True).start()

    def _welcome(self, peer: socket.socket) -> None:
        peer.settimeout(self.lost_s)
        lines = _lines(peer)
        hello: Any = next(lines, {})
        node = hello.get("node")
        fault = None
        if not isinstance(node, int) or not 0 < node < len(self.hosts):
            fault = f"launch.node {node}: expected 1 to {len(self.hosts) - 1}"
        elif node in self._peers:
            fault = f"launch.node {node}: a launcher of that node is already there"
        elif hello.get("recipe") != self.recipe:
            fault = f"node {node}: its recipe, overrides or version differ from node 0's; give all nodes the same"
        with self._lock:
            _send(peer, {"fault": fault})
            if fault is None:
                self._peers[node] = peer
        if fault is None:
            self._hear(node, lines)
        else:
            print(f"refused a launcher: {fault}", file=sys.stderr, flush=True)
            peer.close()

    def _connect(self, check: Callable[[], None]) -> None:
        while True:
            try:
                hub = socket.create_connection((self.hosts[0], self.port), timeout=5)
                break
            except OSError as e:  # not there yet
                self._pause(check, f"node {self.node} does not reach node 0's launcher at {self.hub} ({e})")
        hub.settimeout(self.lost_s)
        _send(hub, {"node": self.node, "recipe": self.recipe})
        lines = _lines(hub)
        answer = next(lines, None)
        if answer is None or answer.get("fault"):
            hub.close()
            raise UserError(answer["fault"] if answer else f"{self.hub}: no launcher answers there")
        self._peers[0] = hub
        threading.Thread(target=self._hear, args=(0, lines), daemon=True).start()

    def _hear(self, node: int, lines: Any) -> None:
        for line in lines:
            if "end" in line:
                end = End(**line["end"])
                self._heard(node, end) if self.node == 0 else self._settle(end)
            elif "done" in line:
                self._hear_done(node)
        if self._end is None and not self._closed.is_set():
            what = f"node {node} ({self.hosts[node]}) was lost: its launcher is gone or unreachable; "
            lost = End(1, f"{what}the same command on every node resumes from the last checkpoint", PROCESS)
            self._heard(None, lost) if self.node == 0 else self._settle(lost)

    def _tell(self, line: dict[str, Any]) -> None:
        """A word to the hub; the hub hears itself."""
        if self.node == 0:
            self._heard(0, End(**line["end"])) if "end" in line else self._hear_done(0)
        elif 0 in self._peers:
            with self._lock:
                _send(self._peers[0], line)

    def _beat(self) -> None:
        while not self._closed.wait(self.lost_s / BEATS):
            with self._lock:
                for peer in self._peers.values():
                    _send(peer, {})

    def _pause(self, check: Callable[[], None], missing: str = "") -> None:
        """A short wait; now and then it says what is missing."""
        check()
        time.sleep(0.1)
        if missing and time.monotonic() - self._told > TELL_S:
            self._told = time.monotonic()
            print(missing, file=sys.stderr, flush=True)

    def _heard(self, node: int | None, end: End) -> None:
        if node is not None:
            end = replace(end, message=f"node {node} ({self.hosts[node]}): {end.message}")
        with self._lock:
            self._news.append(end)
            first = len(self._news) == 1
        if first:
            threading.Thread(target=self._judge, daemon=True).start()

    def _judge(self) -> None:
        time.sleep(HEAR_ALL_S)
        with self._lock:
            self._settle(max(self._news, key=lambda e: e.nearness))

    def _hear_done(self, node: int) -> None:
        with self._lock:
            self._done.add(node)
            if self._done >= self.learners and not self._news:
                self._settle(End(0))

    def _settle(self, end: End) -> None:
        if self._end is None:
            if self.node == 0:
                for peer in self._peers.values():
                    _send(peer, {"end": vars(end)})
            self._end = end


def _send(peer: socket.socket, line: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a lost peer is noticed by who hears it
        peer.sendall(json.dumps(line).encode() + b"\n")


def _lines(peer: socket.socket) -> Any:
    """Objects that a peer sends, until it is gone, silent for the socket's time-out, or talks nonsense."""
    with contextlib.suppress(OSError, ValueError), peer.makefile("rb") as f:
        while line := f.readline(LINE):
            found = json.loads(line)
            if not isinstance(found, dict):
                return
            yield found
