"""The entry of processes that work for a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.processes.worker import main, worker
from opd.settings import RunFailed, UserError
from opd.storage.metrics import MetricsLog


def works(log: MetricsLog, word: str, times: int) -> None:
    log.status("finished", word * times, 1, 1)


def fails(log: MetricsLog, how: str) -> None:
    raise {"user": UserError, "run": RunFailed, "bug": KeyError}[how](f"because of {how}")


def call(folder: Path, name: str, **given: Any) -> tuple[int, dict[str, Any]]:
    """Exit code of a function of this file, and what status.json says."""
    code = main(f"{__name__}:{name}", str(folder), json.dumps(given))
    return code, json.loads((folder / "status.json").read_text())


def test_a_function_is_called_with_its_arguments(tmp_path: Path) -> None:
    code, status = call(tmp_path, "works", word="ab", times=2)
    assert code == 0 and (status["phase"], status["detail"]) == ("finished", "abab")


def test_how_it_ended_is_in_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, status = call(tmp_path, "fails", how="user")
    assert code == 2 and (status["error"], status["user_error"]) == ("because of user", True)
    assert capsys.readouterr().err == "opd: error: because of user\n"
    for how, error, told in (("run", RunFailed, "because of run"), ("bug", KeyError, "KeyError: 'because of bug'")):
        (tmp_path / "status.json").unlink()
        with pytest.raises(error):
            call(tmp_path, "fails", how=how)
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["phase"], status["error"], status["user_error"]) == ("failed", told, False)


def test_its_command_runs(tmp_path: Path) -> None:
    command = worker("tasks", f"{__name__}:fails", tmp_path, {"how": "user"})
    assert command.argv[0] == sys.executable and command.env["CUDA_VISIBLE_DEVICES"] == ""
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command.argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": here})
    assert (done.returncode, done.stderr) == (2, "opd: error: because of user\n")
