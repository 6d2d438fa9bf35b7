"""Real vLLM against the learner's own forward pass: prompts, log-probs, pushed weights, caches, versions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STUDENT, config_of

from opd.batch import collate, make_samples
from opd.clips import ClipLoader
from opd.config import UserError
from opd.http import Server, ServerError, check_model
from opd.models import family_of
from opd.models.base import SpeechLM
from opd.objectives import EXCLUDED
from opd.prompts import read_manifest
from opd.rollout import VllmSampler
from opd.teacher import LocalTeacher, ServerTeacher
from opd.types import Prompt, Rollout, ScoredRollout
from opd.weight_sync import WeightSync


class InProcess:
    """The student in this process: what `WeightSync` asks of a learner, and reference log-probs."""

    def __init__(self) -> None:
        self.family = family_of(STUDENT)
        self.model = SpeechLM(self.family.load(torch.float32, "sdpa").eval(), self.family, ["llm"])

    def gathered(self, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self.model.hf.named_parameters():
            if p.requires_grad:
                yield name, p.data

    def perturb(self, scale: float) -> None:
        torch.manual_seed(int(scale * 1e6))
        for _, p in self.gathered():
            p.add_(torch.randn_like(p) * scale)

    @torch.no_grad()
    def logprobs(self, rollouts: list[Rollout], clips: dict[str, np.ndarray]) -> list[np.ndarray]:
        mb = collate(make_samples([ScoredRollout(r, None) for r in rollouts], clips, self.family))
        audio = None
        if mb.clips:
            audio = self.model.encode(self.family.features([clips[k] for k in mb.clips]))
        names = ("ids", "position_ids", "attends", "row", "positions")
        logits = self.model(**{n: getattr(mb, n) for n in names}, audio=audio)
        chosen = torch.log_softmax(logits, -1).gather(-1, mb.targets[..., None])[..., 0]
        return [row[: len(r.token_ids)].numpy() for row, r in zip(chosen, rollouts, strict=True)]


@pytest.fixture(scope="module")
def setup(data: Path, student_url: str, tmp_path_factory: pytest.TempPathFactory):
    config = config_of("2_xopd", data, tmp_path_factory.mktemp("run"), f"student.path={STUDENT}")
    local = InProcess()
    sampler = VllmSampler(config, local.family, [student_url])
    sync = WeightSync(sampler.servers, local.family, config, 0)
    prompts, bad = read_manifest(config.data.train)
    assert not bad
    batch, clips = ClipLoader(config, local.family.sampling_rate, len(prompts)).load_batch(
        list(enumerate(prompts[:6])), prompts
    )
    yield local, sampler, sync, [p for _, p in batch], clips
    sync.close()


def push(local: InProcess, sampler: VllmSampler, sync: WeightSync, version: int) -> None:
    sync.push(local, version)
    sampler.version = version


def sample(sampler: VllmSampler, prompts: list[Prompt], clips: dict[str, np.ndarray], view: str) -> list[Rollout]:
    return sampler.sample([(p, view, f"test/{i}") for i, p in enumerate(prompts)], clips, 4, 1.0)


def worst(local: InProcess, rollouts: list[Rollout], clips: dict[str, np.ndarray]) -> float:
    ours = local.logprobs(rollouts, clips)
    return max(float(np.abs(a - r.logprobs).max()) for a, r in zip(ours, rollouts, strict=True))


@pytest.mark.parametrize("view", ["speech", "text"])
def test_same_prompts_and_logprobs(setup, view: str) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 1)
    rollouts = sample(sampler, prompts, clips, view)  # raises when the server's prompt ids differ from the processor's
    assert len(rollouts) == 4 * len(prompts)
    assert all(r.version == 1 and len(r.token_ids) == len(r.logprobs) for r in rollouts)
    assert not {i for r in rollouts for i in r.token_ids} & set(local.family.banned_ids)
    assert worst(local, rollouts, clips) < 1e-4


def test_same_seed_same_responses(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 2)
    first, second = (sample(sampler, prompts, clips, "speech") for _ in range(2))
    same = sum(a.token_ids == b.token_ids for a, b in zip(first, second, strict=True))
    assert same >= 0.99 * len(first)
    assert len({r.token_ids for r in first}) > len(prompts)  # and the four answers are not one


def test_push_changes_what_it_must(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 3)
    local.perturb(0.02)
    assert worst(local, sample(sampler, prompts, clips, "speech"), clips) > 0.1  # not pushed yet: detected
    push(local, sampler, sync, 4)
    for view in ("speech", "text"):
        assert worst(local, sample(sampler, prompts, clips, view), clips) < 1e-4


def test_skipped_cache_reset_is_detected(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 5)
    sample(sampler, prompts, clips, "speech")
    local.perturb(0.03)
    tensors = [(local.family.to_vllm(name), tensor) for name, tensor in local.gathered()]
    sync.transport.send(tensors, sync.servers, 6)  # without the reset that `push` does
    sampler.version = 6
    assert worst(local, sample(sampler, prompts, clips, "speech"), clips) > 0.01
    push(local, sampler, sync, 7)
    assert worst(local, sample(sampler, prompts, clips, "speech"), clips) < 1e-4


@pytest.mark.parametrize(
    ("trim", "module"), [("1", "opd.vllm_models"), ("0", "vllm.model_executor.models.qwen2_audio")]
)
def test_whose_tower_the_server_runs(trim: str, module: str) -> None:
    code = "import vllm, opd.vllm_plugin as p; p.register(); models = vllm.ModelRegistry.models; "
    code += "print(models['Qwen2AudioForConditionalGeneration'].module_name)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OPD_TRIM_AUDIO": trim}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == [module], done.stderr


def test_wrong_version_is_refused(setup) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 8)
    sampler.version = 9
    with pytest.raises(ServerError, match="version 8, the learner is at 9"):
        sample(sampler, prompts, clips, "text")
    sampler.version = 8


def test_server_with_another_model_is_refused(student_url: str) -> None:
    with pytest.raises(UserError, match=r"rollout.urls: .* serves .*student, the recipe names other"):
        check_model(Server(student_url, 10), "rollout.urls", "recipes/tiny/teacher", "other")
    assert check_model(Server(student_url, 10), "rollout.urls", STUDENT, STUDENT) == 512


def test_unreachable_server_is_named() -> None:
    with pytest.raises(UserError, match="http://127.0.0.1:9: no vLLM server answers there"):
        Server("http://127.0.0.1:9", 2).model()


def test_both_teachers_agree(data: Path, teacher_url: str, setup, tmp_path: Path) -> None:
    local, sampler, sync, prompts, clips = setup
    push(local, sampler, sync, 10)
    rollouts = sample(sampler, prompts, clips, "speech")
    config = config_of("2_xopd", data, tmp_path, f"student.path={STUDENT}")
    here = LocalTeacher(config, local.family, torch.device("cpu"))
    config.teacher.urls = [teacher_url]
    there = ServerTeacher(config, local.family, torch.device("cpu"))
    for a, b in zip(here.score(rollouts), there.score(rollouts), strict=True):
        assert np.abs(a.teacher_logprobs - b.teacher_logprobs).max() < 1e-3
    assert here.respond(prompts, 24) == there.respond(prompts, 24)
    rows = here.logits(make_samples(here.score(rollouts), clips, local.family)[:2], 24)
    assert (rows[:, 0, local.family.banned_ids] == EXCLUDED).all()
