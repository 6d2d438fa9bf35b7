"""What is saved, when it becomes visible, what is kept, and what a resumed run reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from opd.config.load import resolve_model
from opd.models.base import family_of
from opd.settings import UserError
from opd.storage.run_folder import checkpoints
from opd.train import checkpoint

STUDENT = str(Path(__file__).parents[3] / "recipes/tiny/student")


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one: the barriers are real."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """Where DeepSpeed's engine stands: writes a file for its shards, remembers what it was told to load."""

    fails = False
    loaded: Any = None
    found: str | None = "found"

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        if self.fails:
            raise OSError("disk full")
        assert not save_latest and exclude_frozen_parameters
        Path(folder, tag).mkdir()
        Path(folder, tag, "rank_0.pt").write_text("shard")

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str | None, dict]:
        self.loaded = (Path(folder).name, tag, load_module_strict)
        return self.found, {}


@pytest.fixture
def learner() -> Any:
    student = SimpleNamespace(train=["llm"], lora=None)
    return SimpleNamespace(rank=0, world=1, engine=Engine(), config=SimpleNamespace(student=student))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one file."""

    def save_model(learner: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(checkpoint, "save_model", save_model)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_saved_model_is_the_one_in_memory_under_published_names(learner: Any, tmp_path: Path) -> None:
    family = family_of(STUDENT)
    hf: Any = family.load(torch.float32, "sdpa")
    with torch.no_grad():
        for i, p in enumerate(hf.parameters()):
            p += 0.001 * (i + 1)
    learner.family, learner.model = family, SimpleNamespace(hf=hf)
    learner.gathered = lambda trainable_only: () if trainable_only else hf.named_parameters()
    final = checkpoint.save(learner, str(tmp_path), 7, 1.5, keep=1)
    assert final == tmp_path / "checkpoints/step_7" and names(tmp_path) == ["step_7"]
    assert json.loads((final / "state.json").read_text()) == {"step": 7, "seconds": 1.5, "world": 1}
    assert (final / "optimizer/rank_0.pt").read_text() == "shard"
    assert resolve_model(str(tmp_path), "student.path") == str(final / "model")

    saved, shipped = load_file(final / "model/model.safetensors"), load_file(f"{STUDENT}/model.safetensors")
    assert saved.keys() == shipped.keys()
    again = family_of(str(final / "model"))
    assert (again.banned_ids, again.eos_ids) == (family.banned_ids, family.eos_ids)
    chat = [{"role": "user", "content": [{"type": "audio", "path": "x"}, {"type": "text", "text": "\nrepeat"}]}]
    assert again.prompt_ids(chat, [20000]) == family.prompt_ids(chat, [20000])
    reloaded = dict(again.load(torch.float32, "sdpa").named_parameters())
    for name, p in hf.named_parameters():
        assert torch.equal(reloaded[name], p) and torch.equal(saved[family.to_vllm(name)], p), name


def test_only_the_newest_are_kept(learner: Any, small: None, tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        checkpoint.save(learner, str(tmp_path), step, 0.0, keep=2)
    assert names(tmp_path) == ["step_10", "step_100"]


def test_a_full_disk_names_the_folder_and_what_a_checkpoint_takes(learner: Any, small: None, tmp_path: Path) -> None:
    checkpoint.save(learner, str(tmp_path), 10, 3.0, keep=2)

    def full(folder: str, **about: Any) -> None:
        torch.save({"exp_avg": torch.zeros(1 << 16)}, "/dev/full")

    learner.engine.save_checkpoint = full
    told = (
        r"/step_20 cannot be written \(the one before: \d+.\d KiB\): the disk of .*/checkpoints is full.*\[enforce fail"
    )
    with pytest.raises(UserError, match=told):
        checkpoint.save(learner, str(tmp_path), 20, 6.0, keep=1)
    assert names(tmp_path) == ["step_10"]


def test_a_checkpoint_that_was_cut_off_is_never_seen(learner: Any, small: None, tmp_path: Path) -> None:
    checkpoint.save(learner, str(tmp_path), 10, 3.0, keep=2)
    learner.engine.fails = True
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(learner, str(tmp_path), 20, 6.0, keep=1)
    assert names(tmp_path) == [".step_20.writing", "step_10"]
    assert checkpoint.load_newest(learner, str(tmp_path)) == (10, 3.0)
    assert learner.engine.loaded == ("step_10", "optimizer", False)
    (tmp_path / "checkpoints/.step_20.writing/left").write_text("behind")
    learner.engine.fails = False
    checkpoint.save(learner, str(tmp_path), 20, 7.0, keep=1)
    assert names(tmp_path) == ["step_20"] and not (tmp_path / "checkpoints/step_20/left").exists()


def test_a_step_that_is_there_already_is_replaced(learner: Any, small: None, tmp_path: Path) -> None:
    final = checkpoint.save(learner, str(tmp_path), 10, 3.0, keep=2)
    (final / "old").write_text("old")
    checkpoint.save(learner, str(tmp_path), 10, 4.0, keep=2)
    assert checkpoint.load_newest(learner, str(tmp_path)) == (10, 4.0) and not (final / "old").exists()


def test_the_newest_is_loaded(learner: Any, small: None, tmp_path: Path) -> None:
    assert checkpoint.load_newest(learner, str(tmp_path)) == (0, 0.0) and learner.engine.loaded is None
    for step in (9, 10):
        checkpoint.save(learner, str(tmp_path), step, float(step), keep=5)
    assert checkpoint.load_newest(learner, str(tmp_path)) == (10, 10.0)
    assert learner.engine.loaded == ("step_10", "optimizer", False)
    learner.engine.found = None  # DeepSpeed says so when shards are missing
    with pytest.raises(UserError, match="step_10/optimizer: incomplete; delete that checkpoint"):
        checkpoint.load_newest(learner, str(tmp_path))


def test_another_number_of_processes_is_refused(learner: Any, small: None, tmp_path: Path) -> None:
    checkpoint.save(learner, str(tmp_path), 10, 3.0, keep=2)
    learner.world = 4
    with pytest.raises(UserError, match="written by 1 learner processes, 4 now: set launch.processes=1") as e:
        checkpoint.load_newest(learner, str(tmp_path))
    assert f"student.path={tmp_path}/checkpoints/step_10/model" in str(e.value) and learner.engine.loaded is None


def test_other_ranks_write_nothing_of_their_own(learner: Any, small: None, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/.step_10.writing").mkdir(parents=True)  # rank 0 made it
    learner.rank = 1
    checkpoint.save(learner, str(tmp_path), 10, 3.0, keep=2)
    assert names(tmp_path) == [".step_10.writing"] and checkpoints(tmp_path) == []
