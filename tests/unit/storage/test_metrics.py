"""Standard errors against hand-worked numbers; the files of a run folder by content."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd.scoring.statistics import mean_stderr, ratio_stderr
from opd.settings import UserError
from opd.storage.json_lines import Line, read_lines
from opd.storage.metrics import MetricsLog


def log_in(folder: Path, sinks: list[str] | None = None) -> MetricsLog:
    return MetricsLog(folder, sinks or [], "project", "name")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_mean_stderr_by_hand() -> None:
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, over 4: 7/6
    assert mean_stderr([1, 2, 3, 6]) == {"mean": 3.0, "stderr": pytest.approx(math.sqrt(7 / 6)), "n": 4}
    # a share p of N: p (1 - p) / (N - 1)
    assert mean_stderr([1, 1, 1, 0])["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_too_few_values_have_no_error() -> None:
    assert mean_stderr([]) == {"mean": None, "stderr": None, "n": 0}
    assert mean_stderr([0.25]) == {"mean": 0.25, "stderr": None, "n": 1}
    assert ratio_stderr([], []) == {"mean": None, "stderr": None, "n": 0}
    assert ratio_stderr([1.0, 2.0], [0.0, 0.0]) == {"mean": None, "stderr": None, "n": 2}
    assert ratio_stderr([2.0], [4.0]) == {"mean": 0.5, "stderr": None, "n": 1}


def test_ratio_stderr_by_hand() -> None:
    # m = 6/4 = 1.5; residuals 1 - 1.5, 2 - 1.5, 3 - 3 = -.5, .5, 0; sqrt(3/2 * .5) / 4
    assert ratio_stderr([1, 2, 3], [1, 1, 2]) == {"mean": 1.5, "stderr": pytest.approx(math.sqrt(0.75) / 4), "n": 3}


def test_ratio_stderr_with_equal_denominators_is_mean_stderr() -> None:
    values = [0.3, 1.2, -0.4, 2.0]
    got, expected = ratio_stderr([5 * v for v in values], [5.0] * 4), mean_stderr(values)
    assert got["mean"] == pytest.approx(expected["mean"]) and got["stderr"] == pytest.approx(expected["stderr"])


def test_ratio_stderr_matches_the_spread_of_repeated_draws() -> None:
    rng = random.Random(0)
    means, errors = [], []
    for _ in range(400):
        b = [float(rng.randint(1, 29)) for _ in range(200)]
        found = ratio_stderr([n * rng.gauss(0.5, 0.3) for n in b], b)  # the tokens of a record move together
        means.append(found["mean"])
        errors.append(found["stderr"])
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)


def test_ratio_stderr_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio_stderr([1.0, 2.0], [1.0])


def test_what_json_cannot_say_becomes_null_at_any_depth(tmp_path: Path) -> None:
    numbers = {"a": (float("nan"), np.float32("inf")), "b": {"c": np.int64(3)}, "d": np.array([1.5, np.nan])}
    log_in(tmp_path).step({"step": 1, "loss": float("nan"), **numbers})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "a": [None, None], "b": {"c": 3}, "d": [1.5, None]}
    ]


def test_every_line_is_readable_at_once_and_appended(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.step({"step": 1, "loss": 0.5})
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{"step": 1, "loss": 0.5}]
    sample = {"step": 1, "id": "a", "text": "zwölf\nDächer\u2028"}
    log.sample(sample)
    log.evaluation({"stage": "base", "step": 0, "accuracy/speech": {"mean": 0.5, "stderr": 0.1, "n": 25}})
    log_in(tmp_path).step({"step": 2, "loss": 0.25})
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list(read_lines(tmp_path / "samples.jsonl")) == [sample]
    assert next(read_lines(tmp_path / "eval.jsonl"))["accuracy/speech"]["n"] == 25


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.status("training", "", 3, 9)
    log.status("failed", "rank 1", 4, 9, "out of memory")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        **{"phase": "failed", "detail": "rank 1", "step": 4, "steps": 9},
        **{"error": "out of memory", "user_error": False, "warnings": []},
    }
    assert os.listdir(tmp_path) == ["status.json"]


def test_truncate_after_drops_later_steps_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    for step in (1, 2, 3):
        log.step({"step": step})
        log.sample({"step": step, "id": f"s{step}"})
    log.evaluation({"stage": "base", "step": 0})
    log.evaluation({"stage": "xopd", "step": 3})
    with open(tmp_path / "samples.jsonl", "ab") as f:
        f.write('{"step": 1, "id": "hä'.encode()[:-1])  # in the middle of a character, too
    log.truncate_after(2)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [r["id"] for r in lines(tmp_path / "samples.jsonl")] == ["s1", "s2"]
    assert [r["stage"] for r in lines(tmp_path / "eval.jsonl")] == ["base"]
    log.step({"step": 3})
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["eval.jsonl", "metrics.jsonl", "samples.jsonl"]


def test_truncate_after_keeps_a_whole_line_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log = log_in(tmp_path)
    log.truncate_after(2)
    log.step({"step": 3})
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 2', r"expected a JSON object, found '\{\"step\": 2'"),
        (b"\xff\xfe", r"expected a JSON object, found '\\\\xff\\\\xfe'"),
        (b"[" * 100_000, r"expected a JSON object, found '\[\[\["),
        (b"[1]", "expected an object, found list"),
        (b"null", "expected an object, found NoneType"),
        (b'{"loss": 1.0}', "expected a key step, found none"),
        (b'{"step": "2"}', 'step: Input should be a valid integer, found "2"'),
        (b'{"step": -2}', "step: Input should be greater than or equal to 0, found -2"),
    ],
)
def test_a_broken_line_is_an_error_with_its_place(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"metrics\.jsonl:2: {message}"):
        log_in(tmp_path).truncate_after(2)
    assert path.read_bytes() == before


def test_read_lines_skips_blank_lines_and_reads_what_python_writes_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_lines(path)) == []
    path.write_text('\n{"step": 1, "loss": NaN, "lr": 1e999}\r\n\n{"step": 2')
    assert list(read_lines(path)) == [{"step": 1, "loss": None, "lr": None}]


def test_read_lines_of_a_folder_and_of_another_shape(tmp_path: Path) -> None:
    class Named(Line):
        name: str

    with pytest.raises(UserError, match=r"expected a readable file \(Is a directory\)"):
        list(read_lines(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: expected a key name, found none"):
        list(read_lines(tmp_path / "a.jsonl", Named))


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboard"])
def test_a_missing_sink_names_the_package_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if package == "tensorboard" else package, None)
    with pytest.raises(UserError, match=rf"metrics\.sinks: {package} is not installed; `pip install {package}`"):
        log_in(tmp_path, [package])


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_trackers_get_finite_numbers_at_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    calls: list[Any] = []
    fake = ModuleType(package)
    fake.init = lambda **settings: calls.append(settings)  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append((values, step))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, fake)
    log = log_in(tmp_path, [package])
    log.step({"step": 1, "steps": 2, "loss": 0.5, "grad_norm": float("nan")})
    none = {"mean": None, "stderr": None, "n": 0}
    retention = {"mean": 0.75, "stderr": 0.1, "n": 4}
    told = {"warnings": [{"name": "retention", "text": "fell"}]}
    log.evaluation({"stage": "xopd", "step": 1, "retention": retention, "forgetting": none} | told)
    log.close()
    # no key "step" among the values: trackio keeps that name for itself
    numbers = [({"loss": 0.5}, 1), ({"eval/retention": 0.75, "eval/warnings": 1}, 1)]
    assert calls == [{"project": "project", "name": "name"}, *numbers, "finish"]


def test_tensorboard_gets_the_numbers_and_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def writer(folder: str) -> SimpleNamespace:
        calls.append(folder)
        noted = {name: lambda name=name: calls.append(name) for name in ("flush", "close")}
        return SimpleNamespace(add_scalar=lambda *a: calls.append(a), **noted)

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = log_in(tmp_path, ["tensorboard"])
    log.step({"step": 3, "loss": 0.5})
    log.close()
    assert calls == [str(tmp_path / "tensorboard"), ("loss", 0.5, 3), "flush", "close"]


def test_metrics_import_no_torch() -> None:
    code = "import sys, opd.storage.metrics; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_copies_of_a_record_are_no_evidence() -> None:
    values, names = [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]
    once = ratio_stderr(values, [1.0] * 4, names)
    assert once == {**mean_stderr(values), "stderr": pytest.approx(mean_stderr(values)["stderr"])}
    many = ratio_stderr(values * 9, [1.0] * 36, names * 9)
    assert many == {"mean": 0.75, "stderr": pytest.approx(once["stderr"]), "n": 36}
    assert ratio_stderr([1.0, 0.0], [1.0, 1.0], ["a", "a"]) == {"mean": 0.5, "stderr": None, "n": 2}


def test_the_first_failure_is_the_one_that_counts(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.status("training", "", 7, 9)
    log.failed(1, 9, "the server is gone", user_error=False)
    log.failed(0, 9, "connection closed by peer", user_error=True)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["error"], found["detail"], found["step"]) == ("the server is gone", "rank 1", 7)
    assert not found["user_error"]
    log.status("loading", "", 0, 9)
    log.failed(0, 9, "again", user_error=True)
    assert json.loads((tmp_path / "status.json").read_text())["error"] == "again"


def test_a_full_disk_takes_no_word_on_a_failure_and_that_is_no_failure_of_its_own(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.status("training", "", 7, 9)
    (tmp_path / f".status.json.{os.getpid()}").symlink_to("/dev/full")  # where it is written
    log.failed(0, 9, "the disk is full", user_error=True)
    assert json.loads((tmp_path / "status.json").read_text())["phase"] == "training"
    assert os.listdir(tmp_path) == ["status.json"]
