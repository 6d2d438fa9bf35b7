"""`opd doctor` with real servers: the tiny pair passes every check; a server with other weights fails the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from live import STUDENT, config_of, recipe

from opd.cli import main
from opd.doctor.probe import PlainStudent
from opd.inference.weight_sync import WeightSync
from opd.models.base import family_of

LIVE = ["student server", "prompt ids", "log-probs", "samples", "weight push", "teacher reads"]


def doctor(data: Path, folder: Path, *more: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the lines by name."""
    path, overrides = recipe("2_xopd", data, folder / "run", f"student.path={STUDENT}", *more)
    code = main(["doctor", path, *overrides, "--json", str(folder / "found.json")])
    return code, {c["name"]: c for c in json.loads((folder / "found.json").read_text())["checks"]}


def test_the_tiny_pair_passes_every_check(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(data, tmp_path)
    assert code == 0, found
    assert {c["outcome"] for name, c in found.items() if name != "memory"} == {"pass"}
    assert found["memory"]["outcome"] in ("pass", "not run")
    assert [c for c in found if c in LIVE] == LIVE
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[:-1]] == list(found) and shown[-1].startswith("nothing fails")
    assert not (tmp_path / "run").exists()  # it leaves nothing in the run folder


def test_a_server_with_other_weights_fails(data: Path, tmp_path: Path, student_url: str) -> None:
    config = config_of("2_xopd", data, tmp_path, f"student.path={STUDENT}", f'rollout.urls=["{student_url}"]')
    other = PlainStudent(config, family_of(STUDENT), [], {})
    for _ in range(2):  # once is what the doctor itself will do
        other.perturb()
    sync = WeightSync(other.sampler.servers, other.family, config, 0)
    other.push(sync, 1)
    sync.close()
    code, found = doctor(data, tmp_path, f'rollout.urls=["{student_url}"]')
    assert code == 1 and [n for n, c in found.items() if c["outcome"] == "FAIL"] == ["log-probs"]
    assert "speech mean" in found["log-probs"]["found"] and "rollout.urls" in found["log-probs"]["remedy"]
    assert found["weight push"]["outcome"] == "pass"  # which leaves the originals there
