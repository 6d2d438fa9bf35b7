"""Workers of a stage: threads that share its function, or processes that each begin it once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from opd.data.engine.stage import ClipStore, Drop, Record, Stage, Work, audio_parts
from opd.endpoint import Failed
from opd.settings import attempt

Outcome = tuple[str, Any]  # ("record", Record), ("drop", reason) or ("failed", reason)
THREADS = 16  # requests to an endpoint at a time, unless --workers says otherwise


class Pool:
    """Makes records of a stage, `count` at a time. Raises UserError when the stage cannot begin."""

    def __init__(self, stage: Stage, store: ClipStore, count: int | None) -> None:
        self._others = set(multiprocessing.active_children())
        self._executor: Executor
        self._do: Callable[[Record], Outcome]
        if stage.endpoints or stage.workers == "thread":
            self.count = count or THREADS
            self._do = partial(_outcome, stage.begin(store), store)
            self._executor = ThreadPoolExecutor(self.count)
        else:
            self.count = count or len(os.sched_getaffinity(0))
            self._do = _in_process
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.count, spawn, initializer=_start, initargs=(stage, store))

    def submit(self, record: Record) -> Future[Outcome]:
        """Have a record made. The future raises what the stage raises besides Drop and Failed."""
        # workers inherit this mask: Ctrl-C is for the parent, which ends them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._executor.submit(self._do, record)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self, flying: Collection[Future[Outcome]], patience: float | None = None) -> None:
        """Take back what has not begun, and wait for the rest, `patience` seconds at most; none: as long as it takes.

        After that, processes are killed; threads cannot be, and Python waits for them when it exits.
        """
        begun = [future for future in flying if not future.cancel()]
        late = wait(begun, timeout=patience).not_done
        if late:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
        self._executor.shutdown(wait=not late, cancel_futures=True)


def _outcome(work: Work, store: ClipStore, record: Record) -> Outcome:
    made = attempt(_made, work, store, record)
    return ("drop", f"not usable: {made}") if isinstance(made, ValueError) else made


def _made(work: Work, store: ClipStore, record: Record) -> Outcome:
    try:
        made = work(record)
        for part in audio_parts(made):
            part["path"] = store.adopt(part["path"])
        json.dumps(made, ensure_ascii=False).encode()
        return "record", made
    except Drop as e:
        return "drop", str(e)
    except Failed as e:
        return "failed", str(e)
    except UnicodeEncodeError:
        return "failed", "nonsense: half a surrogate pair, which is no text"


# In a worker process: what it does, and its function once it has begun.
_given: tuple[Stage, ClipStore] | None = None
_work: Work | None = None


def _start(stage: Stage, store: ClipStore) -> None:
    global _given
    _given = stage, store
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes on the same cores only wait for one another
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes would wait for work for ever after their parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_process(record: Record) -> Outcome:
    global _work
    assert _given is not None
    stage, store = _given
    if _work is None:
        _work = stage.begin(store)  # here, not in _start: what it raises reaches the parent
    return _outcome(_work, store, record)
