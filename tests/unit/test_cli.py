"""The command line: helps without heavy imports, user errors as one line, a dry run that starts nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from opd import __version__
from opd.cli import EXTRA_OF, main
from opd.config.load import load_config
from opd.processes.commands import Command
from opd.processes.layout import layout

HEAVY = ("torch", "transformers", "vllm", "deepspeed", "datasets", "accelerate")
COMMANDS = ("launch", "check", "doctor", "train", "eval", "benchmark", "compare", "report")

RECIPE = """
run: {{dir: {dir}/run}}
student: {{path: {dir}/student, dtype: float32}}
teacher: {{path: {dir}/teacher}}
data: {{train: {dir}/train.jsonl}}
train: {{steps: 3, prompts_per_step: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe whose student and teacher are folders with an empty config."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen2_audio"}')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(dir=tmp_path))
    return path


def opd(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)])
def test_help_is_light(command: list[str]) -> None:
    code = f"""
import sys
import tomllib
from opd.cli import EXTRA_OF, main
try:
    main({[*command, "--help"]!r})
except SystemExit as e:
    assert e.code == 0, e.code
loaded = [m for m in {HEAVY!r} if m in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: opd")
    if not command:
        assert all(re.search(rf"^    {c}\s", done.stdout, re.MULTILINE) for c in COMMANDS)


def test_version() -> None:
    assert opd("--version").stdout.strip() == f"opd {__version__}"


@pytest.mark.parametrize("command", ["launch", "check", "doctor"])
def test_unknown_recipe_is_one_line_and_exit_2(command: str) -> None:
    done = opd(command, "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr == "opd: error: nowhere.yaml: no such recipe file\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr (did you mean lr?)"),
        ("train.steps=many", "train.steps"),
        ("student.path=./nowhere", "./nowhere"),
        ("nonsense", "expected key.path=value"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(recipe: Path, override: str, message: str) -> None:
    done = opd("launch", recipe, override, "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("opd: error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_dry_run_prints_the_commands_and_starts_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(recipe), "--dry-run", "teacher.kind=server"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("#")] == ["# student", "# teacher", "# learner"]
    assert not (recipe.parent / "run").exists()


def test_dry_run_may_come_before_the_run_that_it_starts_from(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = "runs/a-run-to-come"
    assert main(["launch", str(recipe), "--dry-run", f"student.path={before}", "student.family=voxtral"]) == 0
    shown = capsys.readouterr().out
    assert f"# not there yet: student.path {before}: " in shown and "--load-format mistral" in shown
    assert f"--model {before}/checkpoints/step_N/model" in shown
    assert main(["launch", str(recipe), "--dry-run", f"student.path={before}"]) == 2
    assert "name its family: student.family=" in capsys.readouterr().err


def test_overrides_may_follow_options(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", str(recipe), "optim.lr=1e-4", "--dry-run", "train.steps=7", "--plain", "run.seed=3"]) == 0
    learner = capsys.readouterr().out.split("# learner")[1]
    assert "optim.lr=1e-4 train.steps=7 run.seed=3" in learner


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["student"]),
        (["rollout.urls=[http://h:1]"], []),
        (["teacher.kind=server"], ["student", "teacher"]),
        (["teacher.kind=server", "teacher.urls=[http://h:1]"], ["student"]),
        (["rollout.source=dataset", "objective.name=kd"], []),
        (["rollout.source=dataset", "objective.name=kd", "eval.test=t.jsonl"], ["student"]),
        (["rollout.source=dataset", "objective.name=kd", "eval.test=t.jsonl", "eval.end=false"], []),
        (["rollout.source=dataset", "objective.name=kd", "eval.test=t", "eval.end=false", "eval.every=5"], ["student"]),
        (
            ["rollout.source=teacher", "objective.name=kd", "eval.retention=t", "eval.end=false", "eval.start=b"],
            ["student"],
        ),
    ],
)
def test_which_servers_are_needed(recipe: Path, overrides: list[str], names: list[str]) -> None:
    assert [p.name for p in layout(load_config(recipe, overrides)).servers] == names


def test_shell_can_be_pasted(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['A'], sys.argv[1:])"
    command = Command("x", [sys.executable, "-c", code, '["a b"]', "$HOME"], {"A": "it's; a 'b'"})
    done = subprocess.run(["bash", "-c", command.shell()], capture_output=True, text=True, check=True)
    assert done.stdout == "it's; a 'b' ['[\"a b\"]', '$HOME']\n"
    assert shlex.split(command.shell())[1:] == command.argv


def test_a_finished_run_starts_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opd.launch.state_of_run", lambda config: "finished")
    assert main(["launch", str(recipe)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("args", [["launch", "r.yaml", "--no-such"], ["launch"], ["nonsense"], []])
def test_wrong_usage_exits_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(args)
    assert e.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["launch", "check"])
def test_ctrl_c_exits_130(command: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.launch.state_of_run", _raise(KeyboardInterrupt()))
    monkeypatch.setattr("opd.doctor.preflight.check", _raise(KeyboardInterrupt()))
    assert main([command, str(recipe)]) == 130


def test_a_library_of_an_extra_is_named_with_the_extra(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    distributions = {"k_means_constrained": "k-means-constrained", "sklearn": "scikit-learn"}
    for library, extra in EXTRA_OF.items():
        name = distributions.get(library, library.replace("_", "-"))
        assert any(d.startswith(f"{name}>=") for d in extras[extra]), library
    monkeypatch.setattr("opd.doctor.preflight.check", _raise(ModuleNotFoundError("none", name="sklearn.metrics")))
    assert main(["check", str(recipe)]) == 2
    assert capsys.readouterr().err == "opd: error: sklearn is not installed: pip install 'opd[data]'\n"
    monkeypatch.setattr("opd.doctor.preflight.check", _raise(ModuleNotFoundError("none", name="torch")))
    with pytest.raises(ModuleNotFoundError):
        main(["check", str(recipe)])


def test_other_errors_keep_their_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.doctor.preflight.check", _raise(RuntimeError("a defect of ours")))
    for command in ("launch", "check"):
        with pytest.raises(RuntimeError, match="a defect of ours"):
            main([command, str(recipe)])


def _raise(error: BaseException) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise error

    return function
