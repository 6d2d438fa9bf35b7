"""recipes/cluster: parsed by those who will read them, and the Slurm scripts run with a stand-in for Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.load import load_config
from opd.processes.commands import learner
from opd.processes.layout import layout

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "recipes/cluster"
RECIPE = "recipes/qwen3_omni_30b_a3b/2_xopd.yaml"
# What Slurm would do, on this machine: name the hosts; run the command once per node.
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames n[1-4]" ] && printf 'n1\\nn2\\nn3\\nn4\\n'
"""
SRUN = """#!/bin/sh
shift
for node in 0 1 2 3; do SLURM_NODEID=$node "$@"; done
"""
PROGRAM = """#!/bin/sh
echo "node $SLURM_NODEID: $(basename "$0") $@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job; `opd` and `accelerate` print what they are asked for."""
    programs = {"bin/scontrol": SCONTROL, "bin/srun": SRUN, ".venv/bin/opd": PROGRAM, ".venv/bin/accelerate": PROGRAM}
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "64"}
    return {**os.environ, **job, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def submit(script: str, env: dict[str, str], *args: str) -> list[str]:
    done = subprocess.run(["bash", str(CLUSTER / script), *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_job_launches_on_every_node(slurm: dict[str, str]) -> None:
    lines = submit("launch.sbatch", slurm, RECIPE, "optim.lr=1e-6", "run.dir=runs/a b")
    wanted = f"opd launch {RECIPE} launch.hosts=[n1,n2,n3,n4] --plain optim.lr=1e-6 run.dir=runs/a b"
    assert lines == [f"node {n}: {wanted}" for n in range(4)]


def test_a_job_of_the_learner_alone(slurm: dict[str, str]) -> None:
    lines = submit("learner.sbatch", slurm, RECIPE, 'rollout.urls=["http://h:1"]')
    wanted = "accelerate launch --config_file recipes/cluster/accelerate_2node.yaml --machine_rank {} "
    wanted += f'--main_process_ip n1 --module opd.train {RECIPE} rollout.urls=["http://h:1"]'
    assert lines[:2] == [f"node {n}: {wanted.format(n)}" for n in range(2)]


def test_the_job_has_the_shape_of_its_placement() -> None:
    from opd.config.placement import load_placement

    p = load_placement(str(ROOT / "recipes/placements/4node_32gpu.yaml"))
    text = (CLUSTER / "launch.sbatch").read_text()
    assert f"--nodes={p.nodes}\n" in text and f"--gpus-per-node={p.devices_per_node}\n" in text
    learner = (CLUSTER / "learner.sbatch").read_text()
    assert f"--nodes={len(p.learner)}\n" in learner


def test_accelerate_reads_its_config() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(CLUSTER / "accelerate_2node.yaml"))
    assert (found.num_machines, found.num_processes, found.distributed_type.value) == (2, 16, "DEEPSPEED")
    assert found.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    assert (ROOT / found.deepspeed_config["deepspeed_config_file"]).is_file()


def test_deepspeed_reads_the_hostfile() -> None:
    code = "from deepspeed.launcher.runner import fetch_hostfile as f; print(dict(f('recipes/cluster/hostfile')))"
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.strip().splitlines()[-1] == "{'node2': 8, 'node3': 8}", done.stderr


def test_the_users_own_accelerate_config_moves_no_rank(tmp_path: Path) -> None:
    """accelerate reads it where it is given none: other devices, another number of ranks, another ZeRO stage."""
    home = tmp_path / ".cache/huggingface/accelerate"
    home.mkdir(parents=True)
    zero1 = f"{{deepspeed_config_file: {tmp_path}/zero1.json, zero3_init_flag: false}}"
    hostile = f"distributed_type: DEEPSPEED\ngpu_ids: '0,1'\nnum_processes: 8\ndeepspeed_config: {zero1}\n"
    (home / "default_config.yaml").write_text(hostile)
    (tmp_path / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    seen = ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    (tmp_path / "seen.py").write_text(f"import os; print('seen', *map(os.environ.get, {seen!r}))")
    config = load_config(RECIPE, ["launch.placement=recipes/placements/4gpu_1r_1t_2l.yaml", f"run.dir={tmp_path}/run"])
    command = learner(config, RECIPE, [], layout(config), 0)
    assert command is not None
    argv = [*command.argv[: command.argv.index("opd.train")], "seen"]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")} | command.env
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=240)
    told = [line for line in done.stdout.splitlines() if line.startswith("seen")]
    assert told == ["seen 2,3 2 None"] * 2, done.stderr
