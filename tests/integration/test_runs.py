"""Whole runs through the command line: warm start, X-OPD, resume after kill -9, bad inputs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import soundfile
from live import ROOT, STUDENT, config_of, opd, recipe, serving

from opd.cli import main
from opd.config.load import resolve_model
from opd.processes.commands import student_server
from opd.processes.layout import Place
from opd.prompts.audio import resample


def lines(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def launch(name: str, data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    path, overrides = recipe(name, data, run, *more)
    done = opd("launch", path, *overrides, "--plain")
    log = run / "logs/learner.log"
    if done.returncode and log.is_file():  # the folder goes with the machine; this is shown with the failure
        done.stderr += "".join(log.read_text(errors="replace").splitlines(keepends=True)[-60:])
    return done


def error_line(capsys) -> str:
    """The error of a command that ran in this process: the last line on stderr, no stack trace before it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("opd: error: ")
    return last


def processes_of(run: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(run) in a for a in p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def warm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished 3-step warm start."""
    run = tmp_path_factory.mktemp("warm") / "run"
    done = launch("1_warmstart", data, run)
    assert done.returncode == 0, done.stderr + done.stdout
    return run


@pytest.fixture(scope="module")
def xopd(data: Path, warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An X-OPD run from the warm start, evaluated before, at every step and after, that stops after 3 of 5 steps."""
    run = tmp_path_factory.mktemp("xopd") / "run"
    done = launch("2_xopd", data, run, f"student.path={warm}", *STOPS, *held(data))
    assert done.returncode == 0, done.stderr + done.stdout
    return run


# The tiny student tells men from women without a fault: no later evaluation is better than the first.
STOPS = ["train.samples_per_step=99", "train.steps=5", "eval.every=1", "eval.best=retention", "eval.patience=2"]


def held(data: Path) -> list[str]:
    return [f"eval.test={data}/test.jsonl", f"eval.retention={data}/retention.jsonl", "eval.start=base"]


def test_warm_start_then_xopd(data: Path, warm: Path, xopd: Path, tmp_path: Path) -> None:
    losses = [m["loss"] for m in lines(warm)]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    run = xopd
    steps = lines(run)
    assert [m["step"] for m in steps] == [1, 2, 3]
    for m in steps:
        assert m["mismatch/logprob"] < 1e-4 and abs(m["ratio/mean"] - 1) < 1e-3 and m["version/lag"] == 0
        assert m["reverse_kl/speech"] > 0 and m["tokens"] > 0
    first, *interim, last = lines(run, "eval")
    assert [(e["step"], e["retention"]["mean"]) for e in interim] == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert stops(run)
    assert (first["stage"], last["stage"], last["step"]) == ("base", "xopd", 3)
    assert last["learner"] == {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
    for name in ("accuracy/speech", "accuracy/text", "accuracy/teacher", "retention", "misalignment", "forgetting"):
        assert last[name]["n"] > 0 and last[name]["mean"] is not None
    assert not processes_of(run), "processes left behind"
    report = opd("report", str(warm), str(run), "--out", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr
    stages = json.loads((tmp_path / "report" / "report.json").read_text())["stages"]
    assert [s["name"] for s in stages][-1] == "xopd"
    assert "<svg" in (tmp_path / "report" / "report.html").read_text()
    again = launch("2_xopd", data, run, f"student.path={warm}", *STOPS, *held(data))
    assert again.returncode == 0 and "finished" in again.stdout


def stops(run: Path) -> bool:
    """Whether a run ended as its evaluations say it must: after step 3, with the checkpoint of step 1 as its best."""
    status = json.loads((run / "status.json").read_text())
    best = json.loads((run / "checkpoints/best.json").read_text())
    kept = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
    ended = status["phase"] == "finished" and status["detail"].startswith("stopped at step 3: retention was not better")
    named = resolve_model(f"{run}:best", "student.path") == f"{run}/checkpoints/step_1/model"
    return ended and named and (best["step"], best["value"]) == (1, 1.0) and kept == ["step_1", "step_2", "step_3"]


def test_resume_after_kill_gives_the_same_losses(data: Path, warm: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    path, overrides = recipe("1_warmstart", data, run)
    _kill_learner_after(1, run, path, overrides)
    resumed = opd("launch", path, *overrides, "--plain")
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    a, b = ([m["loss"] for m in lines(r)] for r in (warm, run))
    assert len(a) == len(b) == 3
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5


def test_resumed_xopd_samples_the_same(data: Path, warm: Path, xopd: Path, tmp_path: Path) -> None:
    """Against a run with a server of its own: this one's is running, and outlives the rank."""
    run = tmp_path / "killed"
    own = [f"student.path={warm}", *STOPS, *held(data)]
    with serving(student_server(config_of("2_xopd", data, tmp_path, *own), Place.here("student")), tmp_path) as url:
        path, overrides = recipe("2_xopd", data, run, *own, f'rollout.urls=["{url}"]')
        _kill_learner_after(1, run, path, overrides)
        resumed = opd("launch", path, *overrides, "--plain")
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    a, b = ([(s["step"], s["id"], s["view"], s["tokens"]) for s in lines(r, "samples")] for r in (xopd, run))
    assert [x[:3] for x in a] == [x[:3] for x in b]
    assert sum(x == y for x, y in zip(a, b, strict=True)) >= 0.99 * len(a)
    assert stops(run) and [e["step"] for e in lines(run, "eval")] == [0, 1, 2, 3, 3]


def _kill_learner_after(step: int, run: Path, path: str, overrides: list[str]) -> None:
    """Start a run and `kill -9` a learner rank once `step` steps are done; the launcher must say so and stop."""
    command = [sys.executable, "-m", "opd.cli", "launch", path, *overrides, "--plain"]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run / f"checkpoints/step_{step}").is_dir():
            break
        time.sleep(0.02)
    started = [p for p in processes_of(run) if "opd.train" in p.cmdline()]
    ranks = [p for p in started if not {"accelerate.commands.launch", "opd.processes.guard"} & set(p.cmdline())]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1 and "the learner ended" in err, err
    assert not processes_of(run), "processes left behind"


def test_checkpoint_loads_everywhere(warm: Path, tmp_path: Path) -> None:
    """transformers and a fresh vLLM agree on the log-probs of the checkpoint's own samples."""
    model = warm / "checkpoints" / "step_3" / "model"
    script = Path(__file__).parent / "checkpoint_parity.py"
    done = subprocess.run([sys.executable, str(script), str(model)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-4


@pytest.mark.parametrize("mu", [0.5, 0.0])
def test_warm_start_whose_responses_a_server_writes(
    data: Path, warm: Path, teacher_url: str, tmp_path: Path, mu: float
) -> None:
    """At mu = 0 nothing reads the teacher's logits: the whole teacher is on the server. Else the ranks share one."""

    def answered() -> float:
        page = httpx.get(f"{teacher_url}/metrics", trust_env=False).text
        found = [line for line in page.splitlines() if line.startswith("vllm:request_success_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    before, run = answered(), tmp_path / "run"
    more = [
        f'teacher.urls=["{teacher_url}"]',
        f"objective.mu={mu}",
        "teacher.shard=true" if mu else "teacher.kind=server",
    ]
    done = launch("1_warmstart", data, run, *more)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "servers: 0 hold the student, 1 the teacher" in done.stdout
    assert answered() - before == 3 * 4  # steps x prompts
    a, b = ([(s["step"], s["id"], s["view"], s["tokens"]) for s in lines(r, "samples")] for r in (warm, run))
    assert a == b and len(a) == 3 * 4
    local, served = lines(warm), lines(run)
    if mu:
        assert [m["loss"] for m in served] == pytest.approx([m["loss"] for m in local], abs=1e-5)
    else:
        assert [m["loss"] for m in served] == pytest.approx([m["kd/ce"] for m in served], abs=1e-5)
        assert served[0]["loss"] < local[0]["loss"] and not any("kd/kl" in m for m in served)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr (did you mean lr?)"),
        ("train.steps=many", "train.steps"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("student.path=recipes/nowhere", "recipes/nowhere"),
        ("train.deepspeed=nowhere.json", "nowhere.json"),
        (f"teacher.path={STUDENT}", "expected a text LLM, found model_type 'qwen2_audio'"),
        ('rollout.urls=["http://127.0.0.1:9"]', "no vLLM server answers there"),
        ("rollout.max_tokens=500", "raise rollout.server.max_model_len"),
    ],
)
def test_user_errors_are_one_line(data: Path, tmp_path: Path, capsys, override: str, message: str) -> None:
    path, overrides = recipe("2_xopd", data, tmp_path / "run", f"student.path={STUDENT}")
    assert main(["launch", path, *overrides, override]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("fault", ["transcript", "empty", "silent", "nan", "truncated", "garbage", "long", "missing"])
def test_bad_records_are_named_before_training(data: Path, tmp_path: Path, capsys, fault: str) -> None:
    folder = tmp_path / "data"
    (folder / "audio").mkdir(parents=True)
    source = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:4]]
    for r in source:
        name = r["messages"][0]["content"][0]["path"]
        shutil.copy(data / name, folder / name)
    part = source[2]["messages"][0]["content"][0]
    clip = folder / part["path"]
    if fault == "transcript":
        del part["transcript"]
    elif fault == "empty":
        clip.write_bytes(b"")
    elif fault == "silent":
        soundfile.write(clip, np.zeros(16000), 16000)
    elif fault == "nan":
        soundfile.write(clip, np.full(16000, np.nan), 16000, subtype="FLOAT")
    elif fault == "truncated":
        clip.write_bytes(clip.read_bytes()[:3000])
    elif fault == "garbage":
        clip.write_bytes(b"this is no audio at all" * 50)
    elif fault == "long":
        soundfile.write(clip, np.random.default_rng(0).normal(0, 0.1, 16000 * 31), 16000)
    else:
        clip.unlink()
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in source))
    path, overrides = recipe("2_xopd", data, tmp_path / "run", f"student.path={STUDENT}", f"data.train={manifest}")
    assert main(["check", path, *overrides]) == 2
    last = error_line(capsys)
    assert f"{manifest}:3" in last and "mend or remove" in last


def test_own_data_in_bfloat16_with_a_teacher_server(data: Path, tmp_path: Path) -> None:
    """wav, flac, mp3 and ogg at several rates, mono and stereo; gradient checkpointing; the teacher on vLLM."""
    records = map(json.loads, (data / "train.jsonl").read_text().splitlines())
    source = [r for r in records if "plus" in str(r["messages"])][:8]  # what the student is bad at
    with open(tmp_path / "my.jsonl", "w") as manifest:
        for i, r in enumerate(source):
            part = r["messages"][0]["content"][0]
            kind, rate = ("wav", "flac", "mp3", "ogg")[i % 4], (8000, 16000, 44100, 48000)[i // 2]
            wave, old = soundfile.read(data / part["path"], dtype="float32")
            wave = resample(wave, old, rate)
            soundfile.write(tmp_path / f"{i}.{kind}", wave if i % 2 else np.stack([wave, wave / 2], 1), rate)
            manifest.write(json.dumps({"audio": f"{i}.{kind}", "transcript": part["transcript"]}) + "\n")
    run = tmp_path / "run"
    own = ["student.dtype=bfloat16", "teacher.dtype=bfloat16", "teacher.kind=server", "rollout.max_mismatch=0.5"]
    own += ["train.gradient_checkpointing=true", "train.steps=2", f"data.train={tmp_path}/my.jsonl"]
    done = launch("2_xopd", data, run, f"student.path={STUDENT}", *own)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "8 records, 0 bad" in done.stdout
    for m in lines(run):
        assert 0 < m["mismatch/logprob"] < 0.05 and m["grad_norm"] > 0 and m["reverse_kl/speech"] > 0.1
    assert not processes_of(run), "processes left behind"


def test_other_tokenizer_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(ROOT / "recipes/tiny/teacher", teacher)
    text = (teacher / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    ids = vocabulary["model"]["vocab"]
    a, b = [t for t, i in ids.items() if i in (300, 301)]
    ids[a], ids[b] = ids[b], ids[a]
    (teacher / "tokenizer.json").write_text(json.dumps(vocabulary))
    path, overrides = recipe("2_xopd", data, tmp_path / "run", f"student.path={STUDENT}", f"teacher.path={teacher}")
    assert main(["check", path, *overrides]) == 2 and "differs from the student's in 2 ids" in error_line(capsys)


@pytest.mark.parametrize(
    ("folder", "fault", "message"),
    [
        ("teacher", "cut", "teacher.path {path}: model.safetensors is damaged"),
        ("student", "cut", "student.path {path}: model.safetensors is damaged"),
        ("student", "gone", "student.path {path}: expected model.safetensors, found none"),
        ("teacher", "tokenizer", "teacher.path {path}: expected tokenizer files such as tokenizer.json, found none"),
    ],
)
def test_damaged_checkpoints_are_named(
    data: Path, tmp_path: Path, capsys, folder: str, fault: str, message: str
) -> None:
    path = tmp_path / folder
    shutil.copytree(ROOT / "recipes/tiny" / folder, path)
    weights = path / "model.safetensors"
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif fault == "gone":
        weights.unlink()
    else:
        for file in path.glob("tokenizer*"):
            file.unlink()
    file, overrides = recipe("2_xopd", data, tmp_path / "run", f"student.path={STUDENT}")
    assert main(["check", file, *overrides, f"{folder}.path={path}"]) == 2
    assert message.format(path=path) in error_line(capsys)


def test_held_out_records_must_all_be_good(data: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    record = json.loads((folder / "test.jsonl").read_text().splitlines()[2])
    (folder / record["messages"][0]["content"][0]["path"]).write_bytes(b"")
    path, overrides = recipe("2_xopd", folder, tmp_path / "run", f"student.path={STUDENT}", "data.check=1")
    assert main(["check", path, *overrides, f"eval.test={folder / 'test.jsonl'}"]) == 2
    assert "test.jsonl:3: " in (last := error_line(capsys)) and "0 bytes" in last and "held-out" in last


def test_bad_record_in_mid_run_is_skipped_and_listed(tmp_path: Path, data: Path) -> None:
    from opd.config.load import load_config
    from opd.prompts.clips import ClipLoader
    from opd.prompts.manifest import read_manifest
    from opd.settings import UserError

    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    run = tmp_path / "run"
    run.mkdir()
    path, overrides = recipe("2_xopd", folder, run, f"student.path={STUDENT}", "data.max_bad_share=0.03")
    config = load_config(path, overrides)
    prompts, _ = read_manifest(config.data.train)
    loader = ClipLoader(config, 16000, len(prompts))
    Path(prompts[1].messages[0]["content"][0]["path"]).write_bytes(b"gone bad after the start")
    batch, clips = loader.load_batch(list(enumerate(prompts[:3])), prompts)
    assert [p.id for _, p in batch] == [prompts[0].id, prompts[2].id, prompts[2].id] and len(clips) == 2
    (bad,) = lines(run, "bad_records")
    assert bad["id"] == prompts[1].id and "not readable as audio" in bad["reason"]
    Path(prompts[5].messages[0]["content"][0]["path"]).unlink()
    with pytest.raises(UserError, match="2 of 48 records are bad"):
        loader.load_batch([(0, prompts[5])], prompts)
