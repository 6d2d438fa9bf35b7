"""`opd plan`: verdicts, recommendation, remedies, tables, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opd.cli import main
from opd.config.load import load_config
from opd.config.schema import Config
from opd.plan.estimate import Machine, Plan, Use, alternatives, estimate, gib, load, recommended, where
from opd.plan.learner_memory import Lengths
from opd.plan.page import _span, page, remedy, to_json
from opd.plan.server_memory import GIB, SLEEPING
from opd.plan.step_time import Speeds, learner_flops, push_seconds, scoring_seconds

RECIPE = "recipes/tiny/2_xopd.yaml"
PLACEMENTS = Path("recipes/placements")
VOXTRAL = ["student.path=mistralai/Voxtral-Mini-3B-2507", "student.family=voxtral"]
AUDIO = ["student.path=Qwen/Qwen2-Audio-7B-Instruct", "student.family=qwen2_audio"]
REAL = [
    "student.dtype=bfloat16",
    "teacher.dtype=bfloat16",
    "teacher.kind=",
    "train.gradient_checkpointing=true",
    "train.prompts_per_step=64",
    "rollout.max_tokens=512",
    "rollout.server.max_model_len=2048",
]
FOUR_LOCAL = f"launch.placement={PLACEMENTS}/8gpu_4r_4l_local_teacher.yaml"


def audio(*overrides: str) -> list[str]:
    return [*AUDIO, "teacher.path=Qwen/Qwen2-7B-Instruct", *REAL, *overrides]


def voxtral(*overrides: str) -> list[str]:
    return [*VOXTRAL, "teacher.path=mistralai/Ministral-3B-Instruct", *REAL, *overrides]


def config(overrides: list[str]) -> Config:
    return load_config(RECIPE, overrides)


def test_verdict_per_device() -> None:
    plan = estimate(config(audio(FOUR_LOCAL)))
    assert plan.fits and len(plan.uses) == 8
    servers, learners = plan.uses[:4], plan.uses[4:]
    assert all(u.needs == int(80 * GIB * 0.9) for u in servers)
    assert all(u.needs > plan.learner.peak for u in learners)
    small = estimate(config(audio(FOUR_LOCAL)), Machine(memory=40))
    assert not small.fits
    (line,) = small.shortfalls
    assert line.startswith("node 0 GPU 4-7: learner, loss needs ") and line.endswith(" short")
    assert small.uses[4].short == small.uses[4].needs - 40 * GIB
    fewer = estimate(config(audio(FOUR_LOCAL)), Machine(gpus=4))
    assert fewer.shortfalls == ["needs 8 GPUs on a node, given 4"]


def test_more_nodes_than_given() -> None:
    placed = f"launch.placement={PLACEMENTS}/2node_16gpu.yaml"
    plan = estimate(config(audio(placed)), Machine(nodes=1))
    assert plan.shortfalls == ["needs 2 nodes, given 1"] and not plan.fits
    assert estimate(config(audio(placed)), Machine(nodes=2)).fits


def test_every_group_of_servers_is_judged(tmp_path: Path) -> None:
    placed = tmp_path / "mixed.yaml"
    groups = [{"devices": [0, 1], "tensor_parallel": 2}, {"devices": [2]}, {"devices": [3], "memory": 0.5}]
    groups.append({"devices": [4], "node": 1, "memory": 0.9})
    learner = [{"devices": [5, 6, 7]}]
    placed.write_text(
        yaml.safe_dump({"nodes": 2, "devices_per_node": 8, "rollout": groups, "learner": learner, "transport": "nccl"})
    )
    plan = estimate(config(audio(f"launch.placement={placed}")), Machine(memory=20))
    two, one, half = plan.servers
    assert [s.tensor_parallel for s in plan.servers] == [2, 1, 1]
    assert [s.share for s in plan.servers] == [18 * GIB, 18 * GIB, 10 * GIB]
    assert [len(groups) for groups in plan.servers.values()] == [1, 2, 1]  # groups 1 and 3 are alike
    assert two.missing == 0 and 0 < one.missing < half.missing == one.missing + 8 * GIB
    short = [s for s in plan.shortfalls if s.startswith("student server")]
    assert short[0].startswith("student server on node 0 GPU 2; node 1 GPU 4: its share 18.0 GiB less weights ")
    assert short[0].endswith(f" is {gib(one.missing)} short of one sequence of 2048 tokens")
    assert short[1].startswith("student server on node 0 GPU 3: its share 10.0 GiB") and len(short) == 2
    shares = {(u.node, u.device): u.moments["student server"]["student server's share"] for u in plan.uses[:5]}
    assert shares == {(0, 0): two.share, (0, 1): two.share, (0, 2): one.share, (1, 4): one.share, (0, 3): half.share}
    lines = page(plan, {}, None, None)
    assert "Student server, each of 2 GPUs: node 0 GPU 0-1" in lines
    assert "Student server, each of 1 GPUs: node 0 GPU 2; node 1 GPU 4" in lines
    told = to_json(plan, {}, None, None)["servers"]
    assert [s["devices"] for s in told] == [[[0, 0], [0, 1]], [[0, 2], [1, 4]], [[0, 3]]]
    assert plan.time is not None and plan.time.at_once == 1  # as if all were the one that holds nothing


def test_server_and_learner_on_one_gpu() -> None:
    placed = f"launch.placement={PLACEMENTS}/1gpu_shared.yaml"
    plan = estimate(config(voxtral(placed, "student.lora={}")))
    (use,) = plan.uses
    asleep = next(rows for name, rows in use.moments.items() if name.startswith("learner"))
    awake = use.moments["student server"]
    assert asleep["sleeping server"] == SLEEPING and awake["student server's share"] == 32 * GIB
    assert awake["learner, at rest"] == plan.learner.resident + GIB
    beside = estimate(config(voxtral(placed, "student.lora={}", "rollout.sleep=false"))).uses[0]
    assert beside.moments[beside.worst]["sleeping server"] > 32 * GIB


def test_more_ranks_and_offload_need_less_of_each_device() -> None:
    peaks = [
        estimate(config(audio(f"launch.placement={PLACEMENTS}/{name}.yaml"))).learner.device["AdamW's moments"]
        for name in ("2gpu_1r_1l", "4gpu_1r_1t_2l", "8gpu_2r_2t_4l")
    ]
    assert [round(peaks[0] / p, 3) for p in peaks] == [1, 2, 4]
    off = estimate(config(audio(FOUR_LOCAL, "train.deepspeed=deepspeed_configs/zero3_offload.json")))
    assert "AdamW's moments" not in off.learner.device and off.learner.host["AdamW's moments"] == peaks[2]
    tight = estimate(
        config(audio(FOUR_LOCAL, "train.deepspeed=deepspeed_configs/zero3_offload.json")), Machine(host=64)
    )
    assert [s for s in tight.shortfalls if s.startswith("node 0 host: ")]


def test_recommendation_and_remedy() -> None:
    overrides = audio(f"launch.placement={PLACEMENTS}/2gpu_1r_1l.yaml")
    plans = alternatives(RECIPE, overrides, Machine(gpus=8, nodes=1), PLACEMENTS)
    best = recommended(plans)
    assert best is not None
    chosen = plans[best]
    assert isinstance(chosen, Plan) and chosen.time is not None
    fitting = [p for p in plans.values() if isinstance(p, Plan) and p.fits and p.time]
    assert chosen.time.step == min(p.time.step for p in fitting if p.time) and chosen.fits
    plan = estimate(config(overrides))
    assert not plan.fits
    cure = remedy(RECIPE, overrides, plan)
    assert cure is not None and estimate(load(RECIPE, [*overrides, *cure])).fits
    assert remedy(RECIPE, overrides, estimate(config(overrides), Machine(memory=4))) is None


def test_time_and_push() -> None:
    plan = estimate(config(audio(FOUR_LOCAL)), Machine(response_tokens=256))
    assert plan.typical == Lengths(64 + 250, 64, 256, 10.0) and plan.time is not None
    tokens = 64 * ((314 + 4 * 256) + (64 + 4 * 256))
    tower = 64 * 10 * 50 * plan.student.count("tower") * 2
    output, answered = 156032 * 4096, 64 * 2 * 4 * 256  # the output layer is at work at response tokens, and once
    layers = plan.student.active - output
    arithmetic = 8 * layers * tokens + 6 * output * answered + tower
    assert learner_flops(plan.config, plan.student, plan.typical) == pytest.approx(arithmetic, rel=1e-12)
    read = 64 * 2 * 4 * (64 + 256)
    speeds = Speeds(tflops=1.0, dense=0.5)
    expected = 2 * plan.teacher.active * read / (4 * 0.5e12)
    assert scoring_seconds(plan.config, plan.teacher, 4, plan.typical, speeds) == pytest.approx(expected)
    assert plan.push == plan.student.count("llm") * 2
    assert push_seconds(10**9, "file", 1.0) == 2.0 and push_seconds(10**9, "nccl", 1.0) == 1.0
    assert plan.time.sync == plan.push / 50e9
    lean = estimate(config(audio(FOUR_LOCAL, "student.lora={}")))
    arithmetic = 6 * layers * tokens + 4 * output * answered + tower
    assert learner_flops(lean.config, lean.student, plan.typical) == pytest.approx(arithmetic, rel=1e-12)


def test_a_run_to_come_has_the_shape_of_its_recipe(tmp_path: Path) -> None:
    for name, path, run in (("1", "recipes/tiny/student", "runs/first"), ("2", "runs/first", "runs/second")):
        raw = yaml.safe_load(Path("recipes/tiny/2_xopd.yaml").read_text())
        raw["student"] |= {"path": path, "family": "qwen2_audio"}
        raw["run"]["dir"] = run
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    assert load(str(tmp_path / "2.yaml"), []).student.path == "recipes/tiny/student"


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", RECIPE, *audio(FOUR_LOCAL)]) == 0
    page = capsys.readouterr().out
    assert "from shipped shapes (opd/plan/shapes.yaml), not its config.json" in page
    assert (
        "It fits: node 0 GPU" in page and "assumed: 989 TFLOPS" in page and "Recommended: recipes/placements/" in page
    )
    assert main(["plan", RECIPE, *audio(FOUR_LOCAL), "--memory", "24", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and len(told["shortfalls"]) > 0
    assert told["learner"]["peak"] > 24 * GIB and told["models"]["student"]["parameters"]["llm"] > 7e9
    assert main(["plan", RECIPE, "student.path=recipes/tiny/student"]) == 0
    assert "Time: not estimated on a CPU" in capsys.readouterr().out
    assert main(["plan", RECIPE, "student.path=recipes/tiny/student", "--memory", "0"]) == 2
    assert "--memory: expected a number above 0 and at most 1e+12, found 0.0" in capsys.readouterr().err
    for option, value in (("--memory", "nan"), ("--host-memory", "inf"), ("--tflops", "-inf"), ("--bandwidth", "nan")):
        assert main(["plan", RECIPE, "student.path=recipes/tiny/student", f"{option}={value}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"opd: error: {option}: expected a number above 0 and at most 1e+12, found {value}"
    assert main(["plan", RECIPE, "student.path=recipes/tiny/student", "--response-tokens", "25"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--response-tokens 25: expected at most rollout.max_tokens, which is 24" in line
    assert main(["plan", RECIPE, "student.path=recipes/tiny/student", "--response-tokens", "24"]) == 0
    assert main(["plan", RECIPE, "student.path=nope"]) == 2
    assert "student.path nope: expected a checkpoint folder, a run folder or a hub id" in capsys.readouterr().err
    assert main(["plan", RECIPE, "student.path=recipes/tiny/student", "teacher.path=no/where"]) == 2
    assert "teacher.path no/where: no readable config.json" in capsys.readouterr().err
    assert main(["plan", RECIPE, "student.path=recipes/tiny/teacher", "student.family="]) == 2
    assert "is not supported; see `opd families`" in capsys.readouterr().err


def test_words() -> None:
    assert [gib(n) for n in (GIB, GIB // 2, 1 << 20, 2048)] == ["1.0 GiB", "0.5 GiB", "1.0 MiB", "2.0 KiB"]
    spans = {59: "59 s", 60: "1 min", 174: "3 min", 3599: "60 min", 3600: "1.0 h", 36000: "10.0 h"}
    assert [_span(s) for s in spans] == list(spans.values())
    uses = [Use(0, 0, 1), Use(0, 1, 1), Use(0, 3, 1), Use(1, 2, 1), Use(2, None, 1)]
    assert where(uses) == "node 0 GPU 0-1, 3; node 1 GPU 2; node 2 host"


def test_imports_no_torch() -> None:
    rooms = ("estimate", "page", "learner_memory", "server_memory", "step_time", "shapes")
    modules = ", ".join(f"opd.plan.{m}" for m in rooms)
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", ["", "recipes/tiny/teacher"])
def test_a_teacher_that_nothing_asks_takes_no_place(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["student.path=recipes/tiny/student", "eval.test=", "eval.retention=", "objective.name=sft"]
    given += ["rollout.source=dataset", f"teacher.path={path}"]
    plan = estimate(config(given))
    assert plan.teacher is None and plan.fits and not [k for k in plan.learner.device if "teacher" in k]
    assert not [k for k in plan.learner.phases if "teacher" in k]
    assert main(["plan", RECIPE, *given, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["models"]) == {"student"}
    assert main(["plan", RECIPE, *given]) == 0
    assert "teacher    none: nothing in this run asks one" in capsys.readouterr().out
