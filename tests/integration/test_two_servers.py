"""Two real vLLM servers of the student: both hold what was pushed, and only those that do are asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import STUDENT, config_of, sample, serving_student, worst

import opd.rollout.sampler
from opd.doctor.probe import PlainStudent
from opd.inference.weight_sync import WeightSync
from opd.models.base import family_of
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import read_manifest


@pytest.fixture(scope="module")
def second_url(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_student(data, tmp_path_factory.mktemp("second")) as url:
        yield url


def test_two_servers_follow_the_learner(
    data: Path,
    student_url: str,
    second_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    urls = [student_url, second_url]
    config = config_of("2_xopd", data, tmp_path, f"student.path={STUDENT}")
    config = config.changed({"rollout.urls": urls})
    family = family_of(STUDENT)
    prompts, _ = read_manifest(config.data.train)
    loader = ClipLoader(config, family.sampling_rate, len(prompts))
    batch, clips = loader.load_batch(list(enumerate(prompts[:6])), prompts)
    chosen = [p for _, p in batch]
    local = PlainStudent(config, family, chosen, clips)
    sampler, sync = local.sampler, WeightSync(local.sampler.servers, family, config, 0)
    used: list[str] = []
    post_all = opd.rollout.sampler.post_all

    def watched(*args: Any) -> Any:
        answers = post_all(*args)
        used.extend(a.url for a in answers)
        return answers

    monkeypatch.setattr(opd.rollout.sampler, "post_all", watched)

    def check(version: int) -> None:
        """Push other weights; every answer must then be of these, half of them from each server."""
        local.perturb()
        local.push(sync, version)
        for view in ("speech", "text"):
            used.clear()
            assert worst(local, sample(sampler, chosen, clips, view)) < 1e-4
            assert sorted(map(used.count, urls)) == [3, 3]

    check(31)
    # as after a restart by its owner: another version, and a transfer engine that knows nothing of ours
    second = sampler.servers[1]
    second.post("/update_weight_version", {"new_version": "default"})
    second.post("/init_weight_transfer_engine", {"init_info": {"folder": str(tmp_path)}})
    used.clear()
    assert worst(local, sample(sampler, chosen, clips, "text")) < 1e-4
    assert set(used) == {student_url}
    left_out = f"{second_url}: holds weights of version default, the learner is at 31: left out until the next push"
    assert capsys.readouterr().err.count(left_out) == 1
    check(32)
    assert "left out" not in capsys.readouterr().err
    sync.close()
