"""A small study file and a launcher that writes run folders instead of training, for the tests of `opd study`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import evaluation, step

from opd.config.load import prepare_run
from opd.study.runs import Run, config_of

ROOT = Path(__file__).parents[2]
XOPD, KD = str(ROOT / "recipes/tiny/2_xopd.yaml"), str(ROOT / "recipes/tiny/1_warmstart.yaml")
Numbers = dict[str, Any]  # means by metric; `groups` as an evaluation has them


def study_file(tmp_path: Path, **changes: Any) -> Path:
    """Two rates for kd, one for what goes on from it at two λ; one world, one seed to select, two to report."""
    content: dict[str, Any] = {
        "out": str(tmp_path / "out"),
        "jobs": 2,
        "common": {"train.steps": 4, "eval.test": "t.jsonl", "eval.retention": "r.jsonl"},
        "worlds": {"well": {"student.path": str(ROOT / "recipes/tiny/student")}},
        "selection": {"seeds": [100], "set": {"eval.test": "v.jsonl", "eval.retention": "rv.jsonl"}},
        "report": {"seeds": [0, 1]},
        "rates": [1e-4],
        "base": XOPD,
        "reference": "kd",
        "methods": {
            "kd": {"recipe": KD, "rates": [1e-4, 4e-4]},
            "both": {"from": "kd", "recipe": XOPD, "lambda": {0: {"rollout.n": 8}, 0.5: {}}},
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run there, beside the manifests and models that the small study and its recipes name."""
    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "r.jsonl", "v.jsonl", "rv.jsonl", "data/tiny/train.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")


class Ended:
    """A launch that was over before it began."""

    def __init__(self, code: int) -> None:
        self.code = code


class FakeLauncher:
    """Writes what a run would leave; `measure` gives its metrics, None for a run that fails."""

    def __init__(self, measure: Callable[[Run], Numbers | None]) -> None:
        self.measure, self.started, self.stopped = measure, list[Run](), list[Any]()

    def start(self, run: Run) -> Ended:
        """A whole run at once."""
        self.started.append(run)
        found = self.measure(run)
        leave(run, found)
        if found is None:
            run.log.write_text("starting\n\nopd: error: the student server died\n")
        return Ended(0 if found is not None else 1)

    def stop(self, started: list[Any]) -> None:
        """Notes what it was asked to end."""
        self.stopped += started

    @property
    def names(self) -> list[str]:
        """What was started, in order."""
        return [r.name for r in self.started]


def _estimate(value: Any) -> Any:
    return value if isinstance(value, dict) else {"mean": value, "stderr": 0.01, "n": 50}


def leave(run: Run, found: Numbers | None, responses: int = 128) -> None:
    """The run folder of a finished run with these means, or of a failed one: steps of 2 s each."""
    config = config_of(run)
    prepare_run(config)
    folder = run.folder
    steps = config.train.steps
    status = {"phase": "finished" if found is not None else "failed", "detail": "", "step": steps, "steps": steps}
    (folder / "status.json").write_text(json.dumps(status | {"error": None if found is not None else "it broke"}))
    if found is None:
        return
    stage, at = ("base", 0) if run.rate is None else (config.run.stage, steps)
    lines = [evaluation(stage, at, **{k: _estimate(v) for k, v in found.items()})]
    if config.eval.every and run.rate is not None:
        lines[0]["first"] = {"accuracy/speech": {"mean": 0.35, "stderr": 0.1, "n": 5}}
        lines.insert(0, evaluation(stage, steps // 2, 0.3, interim=True))
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    per_second = {"samples_per_s": responses / 2.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step(i + 1, **per_second)) + "\n" for i in range(steps)))
