"""What a learner process that cannot start leaves in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from opd.config.load import load_config, prepare_run, state_of_run
from opd.models.base import family_of
from opd.storage.metrics import MetricsLog
from opd.storage.run_folder import checkpoints
from opd.train import __main__, checkpoint
from opd.train import loop as train
from opd.train.batch import make_batch
from opd.train.learner import StepResult
from opd.train.loop import report_step
from opd.train.verdict import Verdict
from opd.types import Prompt, Rollout, Sample, ScoredRollout, View

RECIPE = str(Path(__file__).parents[3] / "recipes/tiny/2_xopd.yaml")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one; exit codes as exceptions."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr("opd.train.__main__._init_distributed", lambda config: None)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(__main__.os, "_exit", leave)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def start(tmp_path: Path, *overrides: str) -> Any:
    try:
        return __main__.main([RECIPE, f"run.dir={tmp_path}/run", *overrides])
    except SystemExit as e:
        return e.code


def status(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run/status.json").read_text())


SERVER = 'rollout.urls=["http://127.0.0.1:9"]'


@pytest.mark.parametrize("phase", ["finished", "training"])
def test_a_refused_start_leaves_the_run_that_is_there_alone(
    tmp_path: Path, phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(RECIPE, [f"run.dir={tmp_path}/run"])
    prepare_run(config)
    (tmp_path / "run/checkpoints/step_60").mkdir()
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": phase}))
    assert start(tmp_path, "optim.lr=0.5") == 2
    assert "holds a run of another configuration: optim.lr (0.0002 -> 0.5)" in capsys.readouterr().err
    assert status(tmp_path) == {"phase": phase}


def test_a_run_that_is_finished_stays_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_run(load_config(RECIPE, [f"run.dir={tmp_path}/run"]))
    (tmp_path / "run/checkpoints/step_60").mkdir()
    (tmp_path / "run/status.json").write_text(json.dumps({"phase": "finished"}))
    assert start(tmp_path) == 0
    assert (
        "this run is finished" in capsys.readouterr().out
        and state_of_run(load_config(RECIPE, [f"run.dir={tmp_path}/run"])) == "finished"
    )


def test_a_run_without_its_servers_claims_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path) == 2
    assert "rollout.urls: rollout.source student needs a server" in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists() and not (tmp_path / "run/checkpoints").exists()


def test_a_mistake_of_the_run_itself_is_in_its_status(tmp_path: Path) -> None:
    assert start(tmp_path, f"student.path={tmp_path}/nowhere", SERVER) == 2
    found = status(tmp_path)
    assert (found["phase"], found["user_error"], found["detail"]) == ("failed", True, "rank 0")
    assert f"{tmp_path}/nowhere" in found["error"]


def test_a_fault_of_ours_is_in_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Any, log: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("opd.train.build.build", broken)
    assert start(tmp_path, SERVER) == 1
    found = status(tmp_path)
    assert (found["phase"], found["user_error"], found["error"]) == ("failed", False, "RuntimeError: broken")


def rollout(view: str, version: int, truncated: bool) -> Any:
    return SimpleNamespace(
        scored=SimpleNamespace(rollout=SimpleNamespace(view=view, version=version, truncated=truncated))
    )


def test_the_line_of_a_step(tmp_path: Path) -> None:
    written: list[dict[str, Any]] = []
    config = load_config(RECIPE, [f"run.dir={tmp_path}/run", "train.samples_per_step=0", "rollout.max_mismatch=0.5"])
    log = SimpleNamespace(step=written.append, status=lambda *_: None)
    parts: Any = SimpleNamespace(config=config, log=log, seconds=10.0)
    samples = [
        rollout("speech", 4, True),
        rollout("text", 3, False),
        rollout("text", 4, False),
        rollout("text", 4, False),
    ]
    batch: Any = SimpleNamespace(samples=samples, tokens=20, responses=4)
    clock = train.Clock()
    clock.lap("rollout")
    report_step(parts, 5, batch, StepResult({"mismatch/logprob": 0.4, "loss": 1.5}, []), clock)
    (line,) = written
    assert line["length/truncated"] == 0.25 and line["length/mean"] == 5.0 and line["version/lag"] == 1
    assert line["loss"] == 1.5 and line["step"] == 5 and line["tokens"] == 20
    assert line["time/step"] == pytest.approx(line["time/rollout"] + line["time/rest"])
    assert line["seconds"] == parts.seconds == pytest.approx(10.0 + line["time/step"])
    with pytest.raises(RuntimeError, match=r"step 6: mean .* is 0.600, more than rollout.max_mismatch=0.5"):
        report_step(parts, 6, batch, StepResult({"mismatch/logprob": 0.6}, []), clock)


def test_samples_show_their_own_advantages(tmp_path: Path) -> None:
    family = family_of(str(Path(RECIPE).parent / "student"))
    part = {"type": "audio", "path": "a.wav", "transcript": "one plus two"}
    prompt = Prompt("p", ({"role": "user", "content": [part]},))
    answers: list[tuple[View, tuple[int, ...]]] = [("text", (300, 2)), ("speech", (301, 302, 2)), ("speech", (303, 2))]
    scored = [ScoredRollout(Rollout(prompt, view, ids, None, 0, False), None) for view, ids in answers]
    config = load_config(RECIPE, [f"run.dir={tmp_path}/run", "train.samples_per_step=1"])
    batch = make_batch([Sample(s, [1], []) for s in scored], {}, config)
    shown: list[dict[str, Any]] = []
    log = SimpleNamespace(step=lambda _: None, sample=shown.append, status=lambda *_: None)
    parts: Any = SimpleNamespace(config=config, log=log, seconds=0.0, learner=SimpleNamespace(family=family))
    found = StepResult({}, [[0.1, 0.2], [1.1, 1.2, 1.3], [2.1, 2.2]])
    report_step(parts, 1, batch, found, train.Clock())
    assert [(s["view"], s["advantage"]) for s in shown] == [("speech", [1.1, 1.2, 1.3]), ("text", [0.1, 0.2])]
    assert [len(s["tokens"]) for s in shown] == [3, 2] and shown[0]["prompt"] == "user: one plus two"


@pytest.mark.parametrize(
    ("source", "end", "steps"),
    [("student", True, [2, 4]), ("student", False, [2, 4, 6]), ("mix", True, [2, 4]), ("teacher", True, [2, 4])],
)
def test_evaluations_in_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, end: bool, steps: list[int]
) -> None:
    name = {"student": "xopd", "mix": "forward_kl", "teacher": "kd"}[source]
    given = [f"run.dir={tmp_path}/run", f"rollout.source={source}", f"objective.name={name}", "train.steps=6"]
    config = load_config(RECIPE, [*given, "eval.every=2", f"eval.end={str(end).lower()}"])
    pushed: list[int] = []
    slept: list[Any] = []
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(train, "push", lambda parts, version: pushed.append(version))
    monkeypatch.setattr(train, "sleep_servers", slept.append)
    log = SimpleNamespace(evaluation=lines.append, status=lambda *_: None)
    learner = SimpleNamespace(engine=SimpleNamespace(zero_optimization_stage=lambda: 3), world_size=1, world=1)
    evaluator = SimpleNamespace(interim=lambda: {"retention": {"mean": 1.0, "stderr": 0.0, "n": 1}})
    parts: Any = SimpleNamespace(config=config, log=log, learner=learner, evaluator=evaluator, seconds=7.0)
    for step in range(1, 7):
        train.maybe_evaluate(parts, step)
    assert [line["step"] for line in lines] == steps and all(line["interim"] for line in lines)
    assert lines[0]["stage"] == config.run.stage and lines[0]["train_seconds"] == 7.0
    # off-policy nothing else gives the servers the current weights, and they shall sleep again
    assert pushed == (steps if source == "teacher" else []) and len(slept) == len(pushed)


SPOKEN = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.65, 10: 0.8, 12: 0.6}  # accuracy by step


class Watched:
    """A run without its steps, weights and servers: its loop, evaluations, verdicts and files are real."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
        given = [f"run.dir={tmp_path}/run", "train.steps=12", "train.checkpoint_every=3", "train.keep_checkpoints=1"]
        given += ["eval.every=2", "eval.best=accuracy/speech"]
        self.config = load_config(RECIPE, [*given, *overrides])
        self.folder = tmp_path / "run"
        self.steps: list[int] = []
        self.lose = 0  # the step whose checkpoint the machine does not live to see

        def save(learner: Any, run_dir: str, step: int, seconds: float, keep: int, best: Any) -> None:
            if step == self.lose:
                raise KeyboardInterrupt
            Path(run_dir, f"checkpoints/step_{step}").mkdir()
            checkpoint.settle(run_dir, keep, best)

        def report(parts: Any, done: int, *_: Any) -> None:
            self.steps.append(done)

        monkeypatch.setattr(train.checkpoint, "save", save)
        monkeypatch.setattr(train, "report_step", report)
        monkeypatch.setattr(train, "load_clips", lambda *_: ([], {}))
        for name in ("make_batch", "make_samples", "push", "sleep_servers"):
            monkeypatch.setattr(train, name, lambda *_, **__: None)

    def interim(self) -> dict[str, Any]:
        """Spoken accuracy as above, typed accuracy 2 points lower with every step."""
        numbers = {
            "accuracy/speech": (SPOKEN[self.steps[-1]], 0.02),
            "accuracy/text": (0.9 - 0.02 * self.steps[-1], 0.01),
        }
        return {name: {"mean": mean, "stderr": stderr, "n": 100} for name, (mean, stderr) in numbers.items()}

    def start(self) -> Any:
        """What `train.run` does once it has its parts."""
        if not self.folder.exists():
            prepare_run(self.config)
        log = MetricsLog(self.folder, [], "", "")
        engine = SimpleNamespace(zero_optimization_stage=lambda: 3)
        parts: Any = SimpleNamespace(config=self.config, log=log, seconds=0.0, verdict=Verdict(), sync=None, clips=None)
        parts.learner = SimpleNamespace(engine=engine, rank=0, world=1, family=None, step=lambda *_: {})
        parts.evaluator = SimpleNamespace(interim=self.interim)
        parts.source = SimpleNamespace(respond=lambda *_: [])
        parts.stream = SimpleNamespace(shard=lambda *_: [], epoch=lambda _: 0)
        parts.teacher = SimpleNamespace(score=lambda _: [])
        begin = int((checkpoints(self.folder) or [Path("step_0")])[-1].name[5:])
        log.truncate_after(begin)
        parts.verdict = train.judge(parts)
        parts.done = train.loop(parts, begin)
        return parts

    @property
    def left(self) -> list[str]:
        """Names of its checkpoints."""
        return [p.name for p in checkpoints(self.folder)]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of its eval.jsonl."""
        return [json.loads(line) for line in (self.folder / "eval.jsonl").read_text().splitlines()]


def test_the_best_is_saved_at_once_and_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(tmp_path, monkeypatch, "eval.patience=2")
    parts = run.start()
    assert parts.done == 8 and run.steps == list(range(1, 9))  # 4 was the best, 6 and 8 were not
    assert "accuracy/speech was not better than 0.7 of step 4 in 2 evaluations" in parts.verdict.stop
    assert run.left == ["step_4", "step_8"]  # no multiples of train.checkpoint_every; the newest, and the best
    best = json.loads((run.folder / "checkpoints/best.json").read_text())
    assert best == {"step": 4, "metric": "accuracy/speech", "value": 0.7, "stderr": 0.02}
    again = run.start()  # it died between its last checkpoint and its end: there it stays
    assert again.done == 8 and len(run.steps) == 8 and again.verdict == parts.verdict


@pytest.mark.parametrize("lose", [4, 6, 8])
def test_a_resumed_run_judges_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: int) -> None:
    """It dies while it saves: the best, one that train.checkpoint_every asks for, the one where it stops."""
    run = Watched(tmp_path, monkeypatch, "eval.patience=2")
    run.lose = lose
    with pytest.raises(KeyboardInterrupt):
        run.start()
    assert run.evaluations[-1]["step"] == lose
    run.lose = 0
    parts = run.start()
    assert parts.done == 8 and parts.verdict.best.step == 4 and run.left == ["step_4", "step_8"]
    assert [e["step"] for e in run.evaluations] == [2, 4, 6, 8]


def test_without_patience_the_best_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(tmp_path, monkeypatch, "train.steps=9")
    parts = run.start()
    assert parts.done == 9 and parts.verdict.stop == "" and run.left == ["step_4", "step_9"]
    (tmp_path / "plain").mkdir()
    plain = Watched(tmp_path / "plain", monkeypatch, "train.steps=9", "eval.best=")
    assert plain.start().verdict == Verdict() and plain.left == ["step_9"]
    assert not (plain.folder / "checkpoints/best.json").exists()


def test_warnings_are_in_the_log_the_evaluations_and_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Watched(tmp_path, monkeypatch, "train.steps=8", "eval.end=false", "eval.best=")
    run.start()
    told = "step 8: typed accuracy is 0.740, 0.120 ± 0.014 lower than at step 2 (eval.warn.text)"
    assert capsys.readouterr().out.splitlines()[-1] == f"warning: {told}"
    assert [len(e["warnings"]) for e in run.evaluations] == [0, 1, 1, 1]  # 0.04, 0.08 and 0.12 below the first
    assert run.evaluations[-1]["warnings"] == [{"name": "accuracy/text", "text": told}]
    assert status(tmp_path)["warnings"] == [told]
    log = MetricsLog(run.folder, [], "", "")
    log.truncate_after(4)  # a resumed run has the warnings of what it keeps
    assert [w.partition(":")[0] for w in log.warnings] == ["step 4"]
