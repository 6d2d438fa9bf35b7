"""`opd study`: which runs it starts, which rate it takes, what it resumes, and how it bears failures."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from study_runs import KD, XOPD, FakeLauncher, leave, study_file, workplace

from opd.config.load import load_config
from opd.processes.commands import Command
from opd.processes.guard import Process
from opd.settings import UserError
from opd.study import command
from opd.study.command import main
from opd.study.grid import Study, choose
from opd.study.runs import Run
from opd.study.spec import SelectionSpec

pytestmark = pytest.mark.processes

KD_BEST = 4e-4


@pytest.fixture(autouse=True)
def _at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace(tmp_path, monkeypatch)
    monkeypatch.setattr("opd.study.command.POLL_S", 0.0)


def measure(run: Run) -> dict[str, float]:
    """kd is better at the larger rate; a seed adds a hundredth."""
    speech = {"base": 0.4, "kd": 0.5, "both-lambda-0": 0.6, "both-lambda-0.5": 0.7}[run.row.name]
    speech += 0.05 if run.rate == KD_BEST else 0.0
    return {
        "accuracy/speech": speech + 0.01 * (run.seed % 100) * (run.rate is not None),
        "accuracy/text": 0.9,
        "retention": 1.0,
    }


def run(path: Path, launcher: FakeLauncher, *only: str, **options: Any) -> int:
    settings = {"jobs": None, "dry_run": False, "report_only": False} | options
    return main(path, list(only), settings["jobs"], settings["dry_run"], settings["report_only"], launcher)


def test_rates_are_chosen_on_one_split_and_reported_on_the_other(tmp_path: Path) -> None:
    launcher = FakeLauncher(measure)
    assert run(study_file(tmp_path), launcher) == 0
    assert sorted(launcher.names) == sorted(
        [
            "well/base/select/seed_100",
            *(f"well/base/report/seed_{s}" for s in (0, 1)),
            *(f"well/kd/select/lr_{r}/seed_100" for r in ("0.0001", "0.0004")),
            *(f"well/kd/report/lr_0.0004/seed_{s}" for s in (0, 1)),
            # one rate: nothing to choose
            *(f"well/both-lambda-{x}/report/lr_0.0001/seed_{s}" for x in ("0", "0.5") for s in (0, 1)),
        ]
    )
    by_name = {r.name: r for r in launcher.started}
    select = load_config(KD, by_name["well/kd/select/lr_0.0001/seed_100"].overrides)
    assert (select.eval.test, select.optim.lr, select.run.seed) == ("v.jsonl", 1e-4, 100)
    assert (select.eval.start, select.eval.end, select.train.steps) == (None, True, 4)
    second = load_config(XOPD, by_name["well/both-lambda-0/report/lr_0.0001/seed_1"].overrides)
    assert second.student.path == str(tmp_path / "out/well/kd/report/lr_0.0004/seed_1")
    assert (second.objective.lambda_, second.rollout.n, second.eval.test) == (0, 8, "t.jsonl")
    assert second.run.seed == 1001  # a later stage goes on with other prompts
    base = load_config(XOPD, by_name["well/base/report/seed_0"].overrides)
    assert (base.train.steps, base.eval.start, base.eval.end) == (1, "base", False)


def test_a_run_never_starts_before_what_it_goes_on_from(tmp_path: Path) -> None:
    launcher = FakeLauncher(measure)
    run(study_file(tmp_path), launcher, jobs=8)
    for i, r in enumerate(launcher.started):
        assert r.start is None or r.start in launcher.started[:i]


def test_only_what_is_missing_is_run(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    run(path, FakeLauncher(measure))
    again = FakeLauncher(measure)
    assert run(path, again) == 0 and again.names == []
    shutil.rmtree(tmp_path / "out/well/kd/report/lr_0.0004/seed_1")
    assert run(path, again) == 0 and again.names == ["well/kd/report/lr_0.0004/seed_1"]


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = "well/kd/report/lr_0.0004/seed_0"
    launcher = FakeLauncher(lambda r: None if r.name == broken else measure(r))
    path = study_file(tmp_path)
    assert run(path, launcher) == 1
    out = capsys.readouterr().out
    assert f"FAILED {broken} (exit code 1): failed after step 0 of 4: it broke; its log" in out
    assert "    opd: error: the student server died" in out and f"\nfailed: {broken}\n" in out
    # what starts from it waits, seed 1 does not
    assert "well/both-lambda-0/report/lr_0.0001/seed_1" in launcher.names
    assert "well/both-lambda-0/report/lr_0.0001/seed_0" not in launcher.names
    table = (tmp_path / "out/study.md").read_text()
    assert (
        "| kd (incomplete) | 0.0004 | – |" in table and "**kd is incomplete**: 1 of 2 seeds finished, 1 failed" in table
    )
    mended = FakeLauncher(measure)
    assert run(path, mended) == 0  # the next time it is tried again
    assert set(mended.names) == {broken, *(f"well/both-lambda-{x}/report/lr_0.0001/seed_0" for x in ("0", "0.5"))}


def test_a_rate_that_fails_is_out_of_the_choice(tmp_path: Path) -> None:
    launcher = FakeLauncher(lambda r: None if r.phase == "select" and r.rate == KD_BEST else measure(r))
    assert run(study_file(tmp_path), launcher) == 1
    kd = json.loads((tmp_path / "out/study.json").read_text())["worlds"][0]["rows"][1]
    assert kd["rate"] == 1e-4 and kd["complete"]
    assert kd["notes"][-1] == "chosen without 0.0004, where a run failed"


def test_no_rate_is_chosen_without_the_untrained_student(tmp_path: Path) -> None:
    launcher = FakeLauncher(lambda r: None if (r.phase, r.row.name) == ("select", "base") else measure(r))
    assert run(study_file(tmp_path), launcher, "well/kd") == 1
    assert not [n for n in launcher.names if n.startswith("well/kd/report")]
    kd = json.loads((tmp_path / "out/study.json").read_text())["worlds"][0]["rows"][1]
    assert kd["rate"] is None and kd["state"] == "learning rate not chosen: 2 of 2 runs of its selection finished"


def test_a_folder_of_another_configuration_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study_file(tmp_path)
    run(path, FakeLauncher(measure))
    study_file(tmp_path, common={"train.steps": 5, "eval.test": "t.jsonl", "eval.retention": "r.jsonl"})
    launcher = FakeLauncher(measure)
    assert run(path, launcher, "well/kd") == 1
    out = capsys.readouterr().out
    assert "train.steps (4 -> 5); move that folder away" in out and "run.overwrite" not in out and not launcher.names
    assert load_config(KD, ["run.dir=x"]) and (tmp_path / "out/well/kd/select/lr_0.0001/seed_100/eval.jsonl").is_file()


def test_a_folder_that_cannot_be_used_chooses_no_rate(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    run(path, FakeLauncher(measure), "well/kd")
    shutil.rmtree(tmp_path / "out/well/kd/report")
    (tmp_path / f"out/well/kd/select/lr_{KD_BEST}/seed_100/eval.jsonl").write_text("")
    launcher = FakeLauncher(measure)
    assert run(path, launcher, "well/kd") == 1 and not launcher.names
    kd = json.loads((tmp_path / "out/study.json").read_text())["worlds"][0]["rows"][1]
    assert kd["rate"] is None
    assert kd["state"].startswith("learning rate not chosen: 1 of 2 runs of its selection finished, 1 cannot be used (")
    assert kd["state"].endswith(
        "expected an evaluation warmstart at step 4, found none; move that folder away, it will be run again)"
    )


@pytest.mark.parametrize("left", [0, 3])
def test_a_finished_run_whose_steps_are_not_all_there_is_not_counted(tmp_path: Path, left: int) -> None:
    path = study_file(tmp_path)
    run(path, FakeLauncher(measure))
    metrics = tmp_path / f"out/well/kd/report/lr_{KD_BEST}/seed_1/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:left]))
    assert run(path, FakeLauncher(measure), report_only=True) == 0
    kd, both = json.loads((tmp_path / "out/study.json").read_text())["worlds"][0]["rows"][1:3]
    expected = (
        f"1 of 2 seeds finished, 1 cannot be used ({metrics}: expected samples and seconds of 4 steps, found {left}"
    )
    assert kd["state"].startswith(expected) and not kd["complete"] and set(kd["by_seed"]) == {"0"}
    assert both["state"].startswith(expected)  # no more can what starts from it


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    path, second = study_file(tmp_path), FakeLauncher(measure)

    class Meanwhile(FakeLauncher):
        def start(self, run_: Run) -> Any:
            with pytest.raises(UserError, match=r"out .*/out: another `opd study` is at work there"):
                run(path, second)
            return super().start(run_)

    assert run(path, Meanwhile(measure), "well/kd") == 0 and not second.names
    assert run(path, second, "well/kd") == 0


def test_an_out_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"out .*/out: expected a folder that can be written"):
        run(study_file(tmp_path), FakeLauncher(measure))


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out: nothing to report yet"):
        run(study_file(tmp_path), FakeLauncher(measure), report_only=True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study_file(tmp_path)
    launcher = FakeLauncher(measure)
    assert run(path, launcher, dry_run=True) == 0 and not launcher.names and not (tmp_path / "out").exists()
    out = capsys.readouterr().out
    assert "missing   well/kd/select/lr_0.0001/seed_100\n" in out
    assert "open      well/both-lambda-0: 2 runs whose learning rate is not chosen yet" in out
    assert out.endswith("\n11 runs: 5 missing, 6 open\n")
    run(path, launcher)
    capsys.readouterr()
    run(path, launcher, dry_run=True)
    assert capsys.readouterr().out.endswith("11 runs: 11 finished\n")


def test_only_runs_a_row_and_what_it_needs(tmp_path: Path) -> None:
    launcher = FakeLauncher(measure)
    assert run(study_file(tmp_path), launcher, "*/both-lambda-0") == 0
    assert {r.row.name for r in launcher.started} == {"base", "kd", "both-lambda-0"}
    with pytest.raises(UserError, match=r"--only well/none: no such row; there are well/base, well/kd, "):
        run(study_file(tmp_path), launcher, "well/none")


def test_reports_are_written_from_folders_alone(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    run(path, FakeLauncher(measure))
    before = (tmp_path / "out/study.md").read_text()
    (tmp_path / "out/study.md").unlink()
    nothing = FakeLauncher(measure)
    assert run(path, nothing, report_only=True) == 0 and not nothing.names
    assert (tmp_path / "out/study.md").read_text() == before


def test_a_row_with_one_rate_has_selection_runs_where_another_row_selects_from_it(tmp_path: Path) -> None:
    methods = {"kd": {"recipe": KD}, "then": {"recipe": XOPD, "from": "kd", "rates": [1e-4, 2e-4]}}
    launcher = FakeLauncher(lambda r: {"accuracy/speech": 0.5, "accuracy/text": 0.9, "retention": 1.0})
    assert run(study_file(tmp_path, methods=methods), launcher) == 0
    (start,) = {r.start for r in launcher.started if r.row.name == "then" and r.phase == "select"}
    assert start is not None and start.name == "well/kd/select/lr_0.0001/seed_100" and start in launcher.started


def test_as_many_runs_at_a_time_as_jobs(tmp_path: Path) -> None:
    class Slow(FakeLauncher):
        under_way = most = 0

        def start(self, run: Run) -> Any:
            super().start(run)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            return Going(self)

    class Going:
        asked = 0

        def __init__(self, launcher: Slow) -> None:
            self.launcher = launcher

        @property
        def code(self) -> int | None:
            self.asked += 1
            self.launcher.under_way -= self.asked == 2
            return 0 if self.asked >= 2 else None

    launcher = Slow(measure)
    assert run(study_file(tmp_path), launcher, jobs=3) == 0
    assert launcher.most == 3 and launcher.under_way == 0 and len(launcher.names) == 11


def test_a_signal_ends_the_runs_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(FakeLauncher):
        def start(self, run: Run) -> Any:
            self.started.append(run)
            if len(self.started) == 2:
                signal.raise_signal(signal.SIGINT)
            return type("Started", (), {"code": None})()

    launcher = Endless(measure)
    assert run(study_file(tmp_path), launcher) == 130
    assert len(launcher.started) == len(launcher.stopped) == 2


def test_a_run_is_an_ordinary_launch_with_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(study_file(tmp_path))
    of_kd = study.run(study.rows["well/kd"], "select", 1e-4, 100)
    assert of_kd is not None
    asked: list[Command] = []

    def told(launch: Command, log: Path) -> Process:
        asked.append(launch)
        return Process(Command("told", [sys.executable, "-c", "print('told'); raise SystemExit(3)"], {}), log)

    monkeypatch.setattr(command, "Process", told)
    launcher = command.Launcher()
    started = launcher.start(of_kd)
    assert asked[0].argv == [sys.executable, "-m", "opd.cli", "launch", KD, *of_kd.overrides, "--plain"]
    while started.code is None:
        time.sleep(0.02)
    launcher.stop([started])
    assert started.code == 3 and command.tail(of_kd.log) == ["told"]
    of_kd.log.unlink()
    of_kd.log.mkdir()
    with pytest.raises(UserError, match=r"seed_100.log: expected a log that can be written"):
        launcher.start(of_kd)


def test_selection_needs_its_metrics(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    study = Study(path)
    for r in [x for row in study.rows.values() for x in study.named(row)]:
        leave(r, measure(r) | {"retention": None} if r.phase == "select" else measure(r))  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"row well/kd, rate 0.0001: selection needs retention"):
        Study(path).choice(study.rows["well/kd"])


# ---- choosing -----------------------------------------------------------------------------------------------------


def sweep(*values: tuple[float, float, float]) -> dict[float, dict[str, float]]:
    names = ("accuracy/speech", "accuracy/text", "retention")
    return {1e-4 * 2**i: dict(zip(names, v, strict=True)) for i, v in enumerate(values)}


BASE = {"accuracy/speech": 0.4, "accuracy/text": 0.96, "retention": 1.0}


def test_the_guard_rules_out_what_forgets() -> None:
    spec = SelectionSpec(seeds=[100], guard={"accuracy/text": 0.02, "retention": 0.05})
    found = choose(spec, BASE, sweep((0.5, 0.95, 1.0), (0.6, 0.94, 0.95), (0.9, 0.93, 1.0)), [])
    assert found.rate == 2e-4 and not found.notes  # exactly what is allowed passes
    assert [line["passes"] for line in found.sweep] == [True, True, False]
    assert found.sweep[2]["excess"] == pytest.approx(0.01)


def test_where_none_passes_the_least_loss_is_taken_and_said() -> None:
    spec = SelectionSpec(seeds=[100], guard={"accuracy/text": 0.02, "retention": 0.05})
    found = choose(spec, BASE, sweep((0.5, 0.80, 1.0), (0.6, 0.92, 0.90), (0.9, 0.5, 0.5)), [])
    assert found.rate == 2e-4  # 0.05 too much, against 0.14 and 0.45
    assert "no learning rate keeps what the guard asks (accuracy/text by 0.02, retention by 0.05)" in found.notes[0]


def test_a_rate_at_the_end_of_the_sweep_is_noted() -> None:
    spec = SelectionSpec(seeds=[100], guard={})
    assert "the largest that was tried" in choose(spec, BASE, sweep((0.5, 1, 1), (0.6, 1, 1)), []).notes[0]
    assert "the smallest that was tried" in choose(spec, BASE, sweep((0.6, 1, 1), (0.5, 1, 1)), []).notes[0]


def test_a_tie_goes_to_the_smaller_rate_and_is_said() -> None:
    spec = SelectionSpec(seeds=[100], guard={"retention": 0.05})
    found = choose(spec, BASE, sweep((0.5, 1, 1), (0.6, 1, 1), (0.1 * 6, 1, 1), (0.6, 1, 0.5)), [])
    assert found.rate == 2e-4  # the guard rules the last one out; 0.1 * 6 is more than 0.6 in binary
    assert found.notes == ["the rates 0.0002, 0.0004 tie on accuracy/speech: the smallest of them is taken"]
    lost = choose(spec, BASE, sweep((0.5, 1, 0.5), (0.6, 1, 0.5)), [])
    assert lost.rate == 1e-4
    assert lost.notes[1] == "the rates 0.0001, 0.0002 tie on what they lose: the smallest of them is taken"


def test_less_of_a_divergence_is_better() -> None:
    spec = SelectionSpec(seeds=[100], metric="misalignment", guard={"forgetting": 0.1})
    values = {1e-4: {"misalignment": 0.4, "forgetting": 0.05}, 2e-4: {"misalignment": 0.2, "forgetting": 0.15}}
    values[4e-4] = {"misalignment": 0.1, "forgetting": 0.5}
    assert choose(spec, {"misalignment": 0.5, "forgetting": 0.05}, values, []).rate == 2e-4
