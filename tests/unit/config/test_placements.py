"""Placements: what they refuse, and the exact commands that each shipped one comes to, per node.

`python tests/unit/config/test_placements.py` writes golden/*.txt beside it anew: read the difference first.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from opd.cli import main
from opd.config.load import load_config, placed
from opd.config.placement import Placement, load_placement, node_of
from opd.config.schema import Config
from opd.processes import commands as servers
from opd.processes.layout import layout
from opd.settings import UserError, read_yaml, validated

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
SHIPPED = ["laptop_cpu", "1gpu_shared", "2gpu_1r_1l", "4gpu_1r_1t_2l", "8gpu_2r_2t_4l", "8gpu_4r_4l_local_teacher"]
SHIPPED += ["2node_16gpu", "4node_32gpu"]
REAL = ["qwen3_omni_30b_a3b", "qwen2_5_omni_7b", "qwen2_audio_7b", "voxtral_mini_3b"]
GPU: dict[str, Any] = {"devices_per_node": 2, "rollout": [{"devices": [0]}], "learner": [{"devices": [1]}]}


def shown(name: str) -> str:
    """What `opd launch --dry-run` prints for a placement, without what differs between machines."""
    argv = ["launch", "recipes/qwen2_audio_7b/2_xopd.yaml", "student.path=Qwen/Qwen2-Audio-7B-Instruct", "--dry-run"]
    argv += [f"launch.placement=recipes/placements/{name}.yaml", "launch.port=8100"]
    machine = {"PATH": "/usr/bin"}
    out = io.StringIO()
    with patch.object(servers, "cores", lambda: 8), patch.dict(os.environ, machine), contextlib.redirect_stdout(out):
        for leaked in ("LD_PRELOAD", "VLLM_PLUGINS"):
            os.environ.pop(leaked, None)
        assert main(argv) == 0
    here = Path(sys.executable).parent
    text = out.getvalue().replace(sys.executable, "python").replace(f"{here}:/usr/bin", "...")
    return text.replace(f"LD_PRELOAD={sys.prefix}/lib/libiomp5.so ", "").replace(f"{ROOT}/", "")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_shipped_placement_is_tested() -> None:
    assert sorted(p.stem for p in Path("recipes/placements").glob("*.yaml")) == sorted(SHIPPED)


def test_what_a_recipe_leaves_open_is_filled_in_a_copy() -> None:
    raw = read_yaml(Path("recipes/tiny/2_xopd.yaml"))
    routes = {"teacher": {"kind": "routed", "routes": {"a": {"path": "x"}, "*": {"kind": "self"}}}}
    config = validated(Config, raw | routes, "recipe")
    before = config.model_dump()
    found = placed(config)
    assert config.model_dump() == before and config.launch.processes is None
    assert (found.rollout.transport, found.rollout.sleep, found.launch.processes) == ("file", False, 2)
    assert [t.kind for t in found.teacher.each.values()] == ["local", "self"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_commands_of_a_placement(name: str) -> None:
    assert shown(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_device_is_used_once(name: str) -> None:
    p = load_placement(f"recipes/placements/{name}.yaml")
    groups = [g for some in (p.rollout, p.teacher, p.learner) for g in some]
    used = [(g.node, d) for g in groups for d in g.devices]
    assert len(set(used)) == p.nodes * p.devices_per_node
    assert len(set(used)) == len(used) or name == "1gpu_shared"
    assert p.shared == (name == "1gpu_shared")


@pytest.mark.parametrize("recipe", ["1_warmstart", "2_xopd"])
@pytest.mark.parametrize("folder", REAL)
@pytest.mark.parametrize("placement", SHIPPED)
def test_recipes_of_real_models_launch_on_every_placement(folder: str, recipe: str, placement: str) -> None:
    path = f"recipes/{folder}/{recipe}.yaml"
    assert main(["launch", path, f"launch.placement=recipes/placements/{placement}.yaml", "--dry-run"]) == 0


@pytest.mark.parametrize("path", [f"recipes/{name}/3_xopd_lora.yaml" for name in ("qwen2_audio_7b", "voxtral_mini_3b")])
def test_recipes_with_lora_share_one_gpu(path: str) -> None:
    config = load_config(path)
    assert config.student.lora is not None and config.rollout.transport == "ipc" and config.rollout.sleep
    assert main(["launch", path, "--dry-run"]) == 0


def test_the_papers_settings() -> None:
    """arXiv 2603.24596: batch 256, 4 samples per prompt, lr 2e-6, lambda 0.5, the LLM alone, 27,847 prompts."""
    c = load_config("recipes/qwen3_omni_30b_a3b/2_xopd.yaml")
    assert (c.train.prompts_per_step, c.rollout.n, c.optim.lr, c.objective.lambda_) == (256, 4, 2e-6, 0.5)
    assert c.student.train == ["llm"] and c.student.lora is None and c.train.steps == 27847 // 256 + 1
    assert c.student.path == "runs/qwen3_omni_30b_a3b/warmstart" and c.objective.name == "xopd"
    assert c.teacher.path == "Qwen/Qwen3-30B-A3B-Instruct-2507"
    first = load_config("recipes/qwen3_omni_30b_a3b/1_warmstart.yaml")
    assert first.student.path == "Qwen/Qwen3-Omni-30B-A3B-Instruct" and first.student.train == ["llm"]
    assert (first.objective.name, first.objective.mu, first.objective.tau) == ("kd", 0.5, 2.0)


def test_what_a_placement_decides() -> None:
    def config(placement: str, *more: str) -> Config:
        path = f"launch.placement=recipes/placements/{placement}.yaml"
        return load_config("recipes/qwen2_audio_7b/2_xopd.yaml", [path, *more])

    def found(c: Config) -> tuple[Any, ...]:
        return c.teacher.kind, c.rollout.transport, c.rollout.sleep, c.launch.processes

    assert found(config("1gpu_shared")) == ("local", "ipc", True, 1)
    assert found(config("4gpu_1r_1t_2l")) == ("server", "nccl", False, 2)
    assert found(config("4gpu_1r_1t_2l", "teacher.kind=local", "rollout.transport=file")) == ("local", "file", False, 2)
    assert found(config("8gpu_4r_4l_local_teacher")) == ("local", "nccl", False, 4)
    assert found(config("laptop_cpu")) == ("local", "file", False, 2)
    with pytest.raises(UserError, match="has no teacher servers; set teacher.kind=local or teacher.urls"):
        config("2gpu_1r_1l", "teacher.kind=server")
    with pytest.raises(UserError, match="launch.processes 3: .*2gpu_1r_1l.yaml has 1 learner ranks"):
        config("2gpu_1r_1l", "launch.processes=3")
    with pytest.raises(UserError, match="train.prompts_per_step .3. must be at least launch.processes .4."):
        config("8gpu_2r_2t_4l", "train.prompts_per_step=3")


def test_a_warm_start_takes_whole_rows_from_a_local_teacher() -> None:
    c = load_config("recipes/voxtral_mini_3b/1_warmstart.yaml", [])
    assert c.teacher.kind == "local"
    assert [p.kind for p in layout(c).servers] == ["teacher"]  # which writes the responses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout": [{"devices": [2]}]}, "rollout: device 2 of devices_per_node: 2"),
        ({"rollout": [{"node": 1, "devices": [0]}]}, "rollout: node 1 of nodes: 1; they count from 0"),
        ({"rollout": [{"devices": [0], "count": 3}]}, "rollout: count 3 beside devices [0]; one of them says how many"),
        ({"rollout": [{"count": 65}]}, "rollout.0.count: Input should be less than or equal to 64"),
        ({"rollout": [{}]}, "rollout: a group of node 0 names no devices"),
        ({"rollout": [{"devices": [0, 0]}]}, "rollout: a device twice"),
        ({"rollout": [{"devices": [0]}, {"devices": [0]}]}, "rollout: a device in two groups"),
        ({"rollout": [{"devices": [0, 1], "tensor_parallel": 3}]}, "2 devices do not divide by tensor_parallel 3"),
        ({"teacher": [{"devices": [1]}]}, "a teacher server shares with nobody"),
        ({"learner": [{"devices": [0]}], "transport": "nccl"}, "transport nccl: rollout servers and learner need"),
        ({"transport": "ipc"}, "transport ipc: one rollout server and one rank must share a device"),
        ({"nodes": 2, "learner": [{"devices": [1]}, {"node": 1, "devices": [0, 1]}]}, "must have as many"),
        ({"learner": [{"devices": [0]}, {"devices": [1]}]}, "learner: one group a node"),
        ({"learner": []}, "learner: List should have at least 1 item"),
        ({"lerner": []}, "unknown key lerner (did you mean learner?)"),
    ],
)
def test_placements_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(GPU | change))
    with pytest.raises(UserError) as e:
        load_placement(str(path))
    assert message in str(e.value) and str(path) in str(e.value)


def test_nodes_have_addresses_and_ports() -> None:
    def places(*more: str) -> Any:
        placement = "launch.placement=recipes/placements/2node_16gpu.yaml"
        return layout(load_config("recipes/qwen2_audio_7b/2_xopd.yaml", [placement, *more]))

    with pytest.raises(UserError, match="has 2 nodes, found 0 addresses; name each node's, such as launch.hosts="):
        places()
    with pytest.raises(UserError, match="launch.hosts: 10.0.0.1 twice; expected an address of its own for each node"):
        places("launch.hosts=[10.0.0.1,10.0.0.1]")
    where = places("launch.hosts=[10.0.0.1,10.0.0.2]")
    urls = {kind: [p.url for p in where.servers if p.kind == kind] for kind in ("student", "teacher")}
    assert urls["student"] == ["http://10.0.0.1:8110", "http://10.0.0.1:8111"]
    assert urls["teacher"] == ["http://10.0.0.1:8112", "http://10.0.0.1:8113"]
    assert (where.hub_port, where.rendezvous_port, where.head) == (8100, 8101, 1)
    given = places("launch.hosts=[a,b]", "rollout.urls=[http://c:1]", "launch.port=9000")
    assert [p.url for p in given.servers] == ["http://a:9010", "http://a:9011"]  # the teacher's


def test_which_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(*more: str) -> int:
        placement = "launch.placement=recipes/placements/4node_32gpu.yaml"
        return node_of(load_config("recipes/qwen2_audio_7b/2_xopd.yaml", [placement, *more]))

    for name in ("OPD_NODE", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    assert node("launch.node=0") == 0 and node("launch.node=2") == 2
    with pytest.raises(UserError, match="has 4 nodes, and nothing says which one this is; set OPD_NODE=0"):
        node()
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert node() == 3 and node("launch.node=2") == 2
    assert node_of(load_config("recipes/qwen2_audio_7b/2_xopd.yaml", [])) == 0  # one node: whatever Slurm says
    monkeypatch.setenv("OPD_NODE", "1")
    assert node() == 1
    with pytest.raises(UserError, match="launch.node 4: .* has 4 nodes, from 0"):
        node("launch.node=4")
    monkeypatch.setenv("OPD_NODE", "first")
    with pytest.raises(UserError, match="OPD_NODE=first: expected the number of this node"):
        node()


def test_groups_on_the_cpu_have_counts() -> None:
    p = Placement.model_validate({"rollout": [{"count": 2}], "learner": [{"count": 3}]})
    assert p.rollout[0].parts() == [(), ()] and p.ranks == 3 and not p.shared


if __name__ == "__main__":
    os.chdir(ROOT)
    GOLDEN.mkdir(exist_ok=True)
    for each in SHIPPED:
        (GOLDEN / f"{each}.txt").write_text(shown(each))
        print(f"wrote {GOLDEN / each}.txt")
