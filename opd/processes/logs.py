"""What processes leave in their logs, and which line of it was the cause of an end."""

from __future__ import annotations

import re
import signal
from pathlib import Path

STARTED = "=== opd starts: "  # a log file keeps what earlier starts wrote


# A vLLM process's name and its logger's head; lines that only say that something before them went wrong.
HEAD = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR \S+ \S+ \[\S+\] )?")
ERROR = re.compile(r"[\w.]*(Error|Exception|error)(:|$)|[\w.]+: error: ")
ECHO = re.compile("ChildFailedError|EngineDeadError|Engine core initialization failed")
# Of torch's elastic agent, and of DeepSpeed's launcher.
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?Signal \d+ \((\w+)\)", re.DOTALL)
RETURN_CODE = re.compile(r"exits with return code = -(\d+)")
# What C++, glibc, OpenMP and Python's runtime say before they abort a process.
LAST_WORDS = re.compile(
    r"^.*(?:terminate called|what\(\): |Fatal Python error|OMP: Error|Assertion .* failed|double free|free\(\): |"
    r"malloc\(\): |corrupted ).*$",
    re.MULTILINE,
)


def killed(log: Path) -> str | None:
    """Which learner rank was killed by which signal, from the launcher's log since its last start; None if none was.

    With what the aborted process said last, in 300 characters at most.
    """
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    if found := ROOT_CAUSE.search(text):
        who, by = f"rank {found[1]}", found[2]
    elif found := RETURN_CODE.search(text):
        who, by = "a rank", signal.Signals(int(found[1])).name
    else:
        return None
    said = "; ".join(line.strip() for line in LAST_WORDS.findall(text)[-2:])
    return f"{who} was killed by {by}{': ' if said else ''}{said}"[:300]


def cause(log: Path, code: int) -> str:
    """Why a process ended, from its exit code and its log since its last start: one line of 300 characters at most."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "it was killed by SIGKILL; was memory short?"
    text = log.read_text(errors="replace").rpartition(STARTED)[2]
    lines = [HEAD.sub("", line).strip() for line in text.splitlines()[1:] if line.strip()]
    if told := [line for line in lines if line.startswith("opd: error: ")]:
        return told[-1].removeprefix("opd: error: ")[:300]
    if gone := killed(log):
        return gone
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    if not errors:
        return (lines or ["its log is empty"])[-1][:300]
    i = next((i for i in reversed(errors) if not ECHO.search(lines[i])), errors[-1])
    more = lines[i + 1 : i + 3] if "validation error" in lines[i] else []  # pydantic explains itself below
    return " ".join([lines[i], *more])[:300]
