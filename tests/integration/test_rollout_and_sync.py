"""Real vLLM against the learner's own forward pass: prompts, log-probs, pushed weights, caches, versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from live import STUDENT, config_of, sample, worst

from opd.doctor.probe import PlainStudent
from opd.inference.client import Server, ServerError
from opd.inference.weight_sync import WeightSync
from opd.models.base import family_of
from opd.objectives.losses import EXCLUDED
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import read_manifest
from opd.settings import UserError
from opd.teachers.local import LocalTeacher
from opd.teachers.server import ServerTeacher
from opd.train.batch import make_samples


@pytest.fixture(scope="module")
def setup(data: Path, student_url: str, tmp_path_factory: pytest.TempPathFactory):
    config = config_of("2_xopd", data, tmp_path_factory.mktemp("run"), f"student.path={STUDENT}")
    config = config.changed({"rollout.urls": [student_url]})
    family = family_of(STUDENT)
    every, bad = read_manifest(config.data.train)
    assert not bad
    batch, clips = ClipLoader(config, family.sampling_rate, len(every)).load_batch(list(enumerate(every[:6])), every)
    prompts = [p for _, p in batch]
    local = PlainStudent(config, family, prompts, clips)
    sync = WeightSync(local.sampler.servers, family, config, 0)
    yield local, local.sampler, sync, prompts, clips
    sync.close()


@pytest.mark.parametrize("view", ["speech", "text"])
def test_same_prompts_and_logprobs(setup, view: str) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 1)
    rollouts = sample(sampler, prompts, clips, view)  # raises when the server's prompt ids differ from the processor's
    assert len(rollouts) == 4 * len(prompts)
    assert all(r.version == 1 and len(r.token_ids) == len(r.logprobs) for r in rollouts)
    assert not {i for r in rollouts for i in r.token_ids} & set(local.family.banned_ids)
    assert worst(local, rollouts) < 1e-4


def test_same_seed_same_responses(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 2)
    first, second = (sample(sampler, prompts, clips, "speech") for _ in range(2))
    same = sum(a.token_ids == b.token_ids for a, b in zip(first, second, strict=True))
    assert same >= 0.99 * len(first)
    assert len({r.token_ids for r in first}) > len(prompts)  # and the four answers are not one


def test_push_changes_what_it_must(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 3)
    local.perturb()
    assert worst(local, sample(sampler, prompts, clips, "speech")) > 0.1  # not pushed yet: detected
    local.push(sync, 4)
    for view in ("speech", "text"):
        assert worst(local, sample(sampler, prompts, clips, view)) < 1e-4


def test_skipped_cache_reset_is_detected(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 5)
    sample(sampler, prompts, clips, "speech")
    local.perturb()
    tensors = [(local.family.to_vllm(name), tensor) for name, tensor in local.gathered()]
    sync.transport.send(tensors, sync.servers, 6)  # without the reset that `push` does
    sampler.version = 6
    assert worst(local, sample(sampler, prompts, clips, "speech")) > 0.01
    local.push(sync, 7)
    assert worst(local, sample(sampler, prompts, clips, "speech")) < 1e-4


def test_whose_tower_the_server_runs() -> None:
    code = """
import os, vllm, opd.inference.plugin as plugin
for trim in "01":
    os.environ["OPD_TRIM_AUDIO"] = trim
    plugin.register()
    print(vllm.ModelRegistry.models["Qwen2AudioForConditionalGeneration"].module_name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    whose = ["vllm.model_executor.models.qwen2_audio", "opd.inference.trimmed_models"]
    assert done.stdout.splitlines()[-2:] == whose, done.stderr


def test_wrong_version_is_refused(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 8)
    sampler.version = 9
    with pytest.raises(ServerError, match="version 8, the learner is at 9"):
        sample(sampler, prompts, clips, "text")
    sampler.version = 8


def test_server_with_another_model_is_refused(student_url: str) -> None:
    with pytest.raises(UserError, match=r"rollout.urls: .* serves .*student, the recipe names other"):
        Server(student_url, 10).check_model("rollout.urls", "recipes/tiny/teacher", "other")
    assert Server(student_url, 10).check_model("rollout.urls", STUDENT, STUDENT) == 512


def test_unreachable_server_is_named() -> None:
    with pytest.raises(UserError, match="http://127.0.0.1:9: no vLLM server answers there"):
        Server("http://127.0.0.1:9", 2).check_model("rollout.urls", "m", "m")


def test_both_teachers_agree(data: Path, teacher_url: str, setup, tmp_path: Path) -> None:
    local, sampler, sync, prompts, clips = setup
    local.push(sync, 10)
    rollouts = sample(sampler, prompts, clips, "speech")
    config = config_of("2_xopd", data, tmp_path, f"student.path={STUDENT}")
    here = LocalTeacher(config, local.family, torch.device("cpu"))
    config = config.changed({"teacher.urls": [teacher_url]})
    there = ServerTeacher(config, local.family, torch.device("cpu"))
    for a, b in zip(here.score(rollouts), there.score(rollouts), strict=True):
        assert np.abs(a.teacher_logprobs - b.teacher_logprobs).max() < 1e-3
    assert here.respond(prompts, 24) == there.respond(prompts, 24)
    rows = here.logits(make_samples(here.score(rollouts), clips, local.family)[:2])(slice(None))
    assert (rows[:, local.family.banned_ids] == EXCLUDED).all()
