"""`opd eval` on real vLLM servers: sampled divergences against transformers, the command, its resumption, comparing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import STUDENT, TEACHER, opd

from opd.doctor.probe import PlainStudent
from opd.evaluate.records import eval_config, read_items
from opd.evaluate.worker import Gap
from opd.models.base import family_of
from opd.objectives.losses import divergence
from opd.prompts import audio
from opd.prompts.clips import ContextLimit
from opd.scoring.statistics import ratio_stderr
from opd.teachers.local import LocalTeacher
from opd.train.batch import make_samples
from opd.types import Rollout, ScoredRollout, View, audio_paths

RECORDS = 12
SAMPLES = 4  # of each record, for the estimate against the exact divergence


def overrides(data: Path, **more: Any) -> list[str]:
    given = {"student.path": STUDENT, "eval.test": f"{data}/test.jsonl", "eval.retention": f"{data}/retention.jsonl"}
    given |= {"data.train": f"{data}/train.jsonl", "eval.limit": RECORDS, "launch.health_timeout_s": 240}
    return [f"{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in (given | more).items()]


def with_urls(data: Path, student_url: str, teacher_url: str, **more: Any) -> list[str]:
    return overrides(data, **{"rollout.urls": [student_url], "teacher.urls": [teacher_url]}, **more)


class Spy(Gap):
    """Keeps what was scored, and how."""

    seen: list[tuple[list[Rollout], list[Any]]]

    def watch(self) -> None:
        self.seen = []
        for who in (self.sampler, self.teacher):
            self._watch(who)

    def _watch(self, who: Any) -> None:
        score = who.score

        def spied(rollouts: list[Rollout], *rest: Any) -> Any:
            found = score(rollouts, *rest)
            self.seen.append((rollouts, found))
            return found

        who.score = spied


@pytest.fixture(scope="module")
def measured(data: Path, original_url: str, teacher_url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(gap, test items, what was measured of them, clips, the student here)."""
    out = tmp_path_factory.mktemp("gap")
    config = eval_config("recipes/tiny/2_xopd.yaml", with_urls(data, original_url, teacher_url), out, True)
    family = family_of(STUDENT)
    gap = Spy(config, family, ContextLimit(family, config.rollout.max_tokens, 512))
    gap.watch()
    items = [i for i in read_items(config) if i.part == "test"]
    found = gap.measure(items)
    paths = [p for i in items for p in audio_paths(i.prompt)]
    clips = {p: gap.limit.filled(audio.load(p, family.sampling_rate, 30.0)) for p in paths}
    return gap, items, found, clips, PlainStudent(config, family, [i.prompt for i in items], clips)


def as_view(rollouts: list[Rollout], view: View) -> list[Rollout]:
    return [Rollout(r.prompt, view, r.token_ids, None, r.version, r.truncated) for r in rollouts]


def test_scored_tokens_are_those_of_transformers(measured: Any) -> None:
    gap, items, found, _, local = measured
    (read, by_text), (heard, by_speech), (wrote, by_teacher), (_, read_teachers), *own = gap.seen
    assert {r.view for r in read} == {"text"} and {r.view for r in heard} == {"speech"}
    assert [r.token_ids for r in read] == [r.token_ids for r in heard]
    scored = [k for k, s in enumerate(by_speech) if s is not None]
    assert len(scored) >= 0.8 * RECORDS  # of the few whose text becomes other ids, none is used
    gaps = []
    for rollouts, told in ((read, by_text), (heard, by_speech), (wrote, read_teachers)):
        for ours, theirs in zip(local.logprobs(rollouts), told, strict=True):
            if theirs is not None:
                gaps.append(np.abs(ours - theirs).max())
    assert max(gaps) < 1e-4
    teacher = LocalTeacher(gap.config, gap.family, torch.device("cpu"))
    exact = [s.teacher_logprobs for s in teacher.score(wrote)]
    told = [s.teacher_logprobs for s in by_teacher]
    assert max(np.abs(a - b).max() for a, b in zip(exact, told, strict=True)) < 1e-4
    # and what is kept of a record is the difference of these
    for k, one in enumerate(found):
        m, f = one["misalignment/sampled"], one["forgetting/sampled"]
        assert (m is None) == (k not in scored)
        if m is not None:
            assert m["tokens"] == len(read[k].token_ids)
            assert m["nats"] == pytest.approx(float(np.sum(by_text[k] - by_speech[k])), abs=1e-4)
        assert f["nats"] == pytest.approx(float(np.sum(told[k] - read_teachers[k])), abs=1e-4)
    assert [r.view for rollouts, _ in own for r in rollouts] == ["speech"] * RECORDS + ["text"] * RECORDS


def test_the_estimates_are_unbiased(measured: Any) -> None:
    """Against the exact divergences, from full rows, along the very samples: within three standard errors of the
    difference, record by record."""
    gap, items, _, clips, local = measured
    prompts = [i.prompt for i in items]
    jobs = [(p, "text", f"unbiased/{p.id}") for p in prompts]
    read = gap.sampler.sample(jobs, clips, SAMPLES, 1.0, check=False)
    heard = as_view(read, "speech")
    teacher = LocalTeacher(gap.config, gap.family, torch.device("cpu"))
    seeds = list(range(len(prompts) * SAMPLES))
    many = [p for p in prompts for _ in range(SAMPLES)]
    wrote = [
        Rollout(p, "text", y, None, -1, c) for p, (y, c) in zip(many, gap.teacher.sample(many, 24, seeds), strict=True)
    ]
    assert len({r.token_ids for r in wrote}) > len(prompts)

    def logits(rollouts: list[Rollout]) -> list[torch.Tensor]:
        samples = make_samples([ScoredRollout(r, None) for r in rollouts], clips, gap.family)
        return [local.eval_logits([s])[1][0, : len(s.response_ids)].log_softmax(-1) for s in samples]

    def theirs(rollouts: list[Rollout]) -> list[torch.Tensor]:
        samples = make_samples([ScoredRollout(r, None) for r in rollouts], clips, gap.family)
        return [teacher.logits([s])(slice(0, len(s.response_ids))).log_softmax(-1) for s in samples]

    pairs = {"misalignment": (read, logits(read), logits(heard)), "forgetting": (wrote, theirs(wrote), logits(wrote))}
    for name, (rollouts, p, q) in pairs.items():
        exact = [float(divergence(a, b).sum()) for a, b in zip(p, q, strict=True)]
        picked = [torch.tensor(r.token_ids)[:, None] for r in rollouts]
        sampled = [float((a - b).gather(-1, y).sum()) for a, b, y in zip(p, q, picked, strict=True)]
        tokens = [float(len(r.token_ids)) for r in rollouts]
        asked = [r.prompt.id for r in rollouts]
        off = ratio_stderr([s - e for s, e in zip(sampled, exact, strict=True)], tokens, asked)
        mean = ratio_stderr(exact, tokens, asked)["mean"]
        assert mean > 0.001 and abs(off["mean"]) <= 3 * off["stderr"], (name, mean, off)


def test_the_command_goes_on_and_compares(data: Path, original_url: str, teacher_url: str, tmp_path: Path) -> None:
    urls = with_urls(data, original_url, teacher_url, **{"eval.limit": 6})
    recipe, a = "recipes/tiny/2_xopd.yaml", tmp_path / "a"
    first = opd("eval", recipe, *urls, "--out", str(a), "--plain")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "12 of 12 records to measure" in first.stdout
    lines = [json.loads(x) for x in (a / "records.jsonl").read_text().splitlines()]
    assert [x["part"] for x in lines] == ["test"] * 6 + ["retention"] * 6
    assert all(set(x["views"]) == {"speech", "text", "teacher"} for x in lines[:6])
    evaluation = json.loads((a / "eval.jsonl").read_text())
    right = [x["views"]["speech"]["right"] for x in lines[:6]]
    assert evaluation["accuracy/speech"]["mean"] == pytest.approx(sum(right) / 6)
    assert evaluation["accuracy/teacher"]["mean"] > 0.8 and evaluation["misalignment/sampled"]["mean"] > 0
    more = with_urls(data, original_url, teacher_url, **{"eval.limit": 8})
    grown = opd("eval", recipe, *more, "--out", str(a), "--plain")
    assert "4 of 16 records to measure" in grown.stdout and grown.returncode == 0, grown.stdout + grown.stderr
    kept = [json.loads(x) for x in (a / "records.jsonl").read_text().splitlines()]
    assert [x for x in kept if x["id"] in {y["id"] for y in lines}] == lines
    # servers of its own, without a teacher, other settings
    b = tmp_path / "b"
    own = overrides(data, **{"eval.limit": 8, "rollout.max_tokens": 8, "rollout.server.max_model_len": 512})
    done = opd("eval", recipe, *own, "--out", str(b), "--no-teacher", "--plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy/teacher" not in json.loads((b / "eval.jsonl").read_text())
    assert "Cut off at rollout.max_tokens" in done.stdout
    refused = opd("compare", str(a), str(b))
    assert refused.returncode == 2 and "measured under other settings: rollout.max_tokens" in refused.stderr
    compared = opd("compare", str(a), str(b), "--unlike", "--out", str(tmp_path / "c"))
    assert compared.returncode == 0 and "b - a" in compared.stdout, compared.stderr
    found = json.loads((tmp_path / "c" / "compare.json").read_text())["differences"]["b"]
    assert found["accuracy/speech"]["records"] == 8 and "drop/speech" not in found
    assert math.isfinite(found["length/text"]["difference"]) and found["length/text"]["difference"] < 0


def test_a_server_with_another_model_is_named(data: Path, teacher_url: str, tmp_path: Path) -> None:
    given = overrides(data, **{"rollout.urls": [teacher_url], "eval.limit": 2})
    done = opd("eval", "recipes/tiny/2_xopd.yaml", *given, "--out", str(tmp_path / "x"), "--no-teacher", "--plain")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"rollout.urls: {teacher_url} serves {TEACHER}, the recipe names" in done.stderr
