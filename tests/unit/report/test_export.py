"""What `opd export` writes, what it says of it, and what it refuses; on checkpoints of the tiny student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from report_runs import evaluation, make_run
from safetensors.torch import load_file, save_file

from opd.cli import main
from opd.config.load import dump_config, load_config
from opd.config.schema import LoraConfig
from opd.models.base import family_of
from opd.models.lora import adapters, inject, save_adapter
from opd.report import model_card
from opd.report.export import export
from opd.report.model_card import METRICS, hub_id, label
from opd.settings import UserError

ROOT = Path(__file__).parents[3]
STUDENT = ROOT / "recipes/tiny/student"


def made(
    folder: Path,
    steps: tuple[int, ...],
    student: str = "org/speech-llm",
    told: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A run whose checkpoints are the tiny student, with all of a recipe's settings."""
    lines = [
        evaluation("base", 0, 0.25),
        evaluation("xopd", steps[0], 0.5, interim=True),
        evaluation("xopd", steps[-1], 0.75),
    ]
    make_run(folder, lines, student=student, status=told)
    config = dump_config(
        load_config(ROOT / "recipes/tiny/2_xopd.yaml", [f"student.path={student}", f"run.dir={folder}"])
    )
    for key, value in more.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    about = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(about | {"config": config}))
    for step in steps:
        shutil.copytree(STUDENT, folder / f"checkpoints/step_{step}/model")
    return folder


def adapted(checkpoint: Path) -> None:
    """Adapters beside a checkpoint's model, as training writes them."""
    family = family_of(str(STUDENT))
    hf: Any = family.load(torch.float32, "sdpa")
    inject(hf, family, LoraConfig(r=4), seed=0)
    save_adapter(hf, {a.name: a.value() for a in adapters(hf)}, checkpoint / "adapter")


def front(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_a_model_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoProcessor, GenerationConfig, Qwen2AudioForConditionalGeneration

    run = made(tmp_path / "run", (2, 4))
    out = tmp_path / "out/model"
    told = export(run, out)
    shipped = {p.name for p in STUDENT.iterdir()}
    assert {p.name for p in out.iterdir()} == shipped | {"README.md", "recipe.yaml"}
    model, info = Qwen2AudioForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = load_file(STUDENT / "model.safetensors")
    assert load_file(out / "model.safetensors").keys() == theirs.keys()
    assert AutoProcessor.from_pretrained(out).tokenizer.get_vocab() and GenerationConfig.from_pretrained(out)
    count = sum(p.numel() for p in model.parameters())
    assert f"{run}/checkpoints/step_4: model of {count:,} parameters in {len(theirs)} tensors, all of them fit" in told
    size = (out / "model.safetensors").stat().st_size
    assert f"wrote {out}/model.safetensors ({size:,} bytes)" in told
    assert not list((tmp_path / "out").glob(".*"))  # nothing is left aside


def test_the_card_says_what_the_hub_asks_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made(tmp_path / "xopd", (2, 4), data__train="hub:org/spoken/part:train"), out)
    data = front(out)
    assert (data["base_model"], data["base_model_relation"]) == ("org/speech-llm", "finetune")
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "unknown",
        "transformers",
        "audio-text-to-text",
    )
    assert data["datasets"] == ["org/spoken"] and {"opd", "xopd"} <= set(data["tags"])
    ((name, results),) = [(m["name"], m["results"]) for m in data["model-index"]]
    assert name == "xopd"
    by_set = {r["dataset"]["name"]: {m["name"]: m for m in r["metrics"]} for r in results}
    spoken = by_set["data/tiny/test.jsonl"]["accuracy, spoken questions"]
    assert (spoken["type"], spoken["value"]) == ("accuracy", 0.75)
    assert spoken["args"] == {"unit": "share", "stderr": 0.02, "n": 100}
    assert set(by_set["data/tiny/retention.jsonl"]) == {"accuracy on a skill that was not trained"}
    text = (out / "README.md").read_text()
    assert text.split("---\n")[2].startswith("\n# xopd\n\norg/speech-llm, trained further so") and text.endswith(
        "stage.\n"
    )
    assert "| accuracy, spoken questions | share | 0.25 ± 0.02 | 0.75 ± 0.02 | 100 |" in text
    assert "- student: org/speech-llm: unknown, see https://huggingface.co/org/speech-llm" in text
    assert "- teacher: recipes/tiny/teacher: unknown" in text and "arXiv 2603.24596" in text and "λ 0.5" in text


def test_numbers_are_those_of_the_very_weights(tmp_path: Path) -> None:
    run = made(tmp_path / "run", (2, 3, 4))
    (run / "checkpoints/best.json").write_text('{"step": 2, "metric": "accuracy/speech", "value": 0.5, "stderr": 0.1}')
    told = export(run, tmp_path / "last")
    assert "note: the best by accuracy/speech is step 2: --checkpoint best" in told
    told = export(run, tmp_path / "best", "best")
    text = (tmp_path / "best/README.md").read_text()
    assert not any("--checkpoint best" in line for line in told) and "chosen as the best by accuracy/speech" in text
    values = {m["value"] for r in front(tmp_path / "best")["model-index"][0]["results"] for m in r["metrics"]}
    assert 0.5 in values and not values & {0.25} and "| accuracy, spoken questions | share | 0.5 ± 0.02 | 100 |" in text
    assert "An evaluation in training" in text
    export(run, tmp_path / "none", "3")
    text = (tmp_path / "none/README.md").read_text()
    assert "The weights of step 3 were not evaluated." in text and "model-index" not in front(tmp_path / "none")


def test_an_adapter_or_the_model_that_it_is_merged_into(tmp_path: Path) -> None:
    from peft import PeftModel

    run = made(tmp_path / "run", (4,), student__lora={"r": 4, "alpha": 32.0, "dropout": 0.0, "targets": []})
    adapted(run / "checkpoints/step_4")
    out = tmp_path / "adapter"
    told = export(run, out)
    files = {p.name for p in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "processor_config.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    PeftModel.from_pretrained(family_of(str(STUDENT)).load(torch.float32, "sdpa"), out)
    assert (front(out)["base_model_relation"], front(out)["library_name"]) == ("adapter", "peft")
    tensors = load_file(out / "adapter_model.safetensors")
    count = sum(v.numel() for v in tensors.values())
    assert (
        f"{run}/checkpoints/step_4: adapter of {count:,} parameters in {len(tensors)} tensors, all of them fit" in told
    )
    assert "LoRA r 4, alpha 32, dropout 0;" in (out / "README.md").read_text()
    export(run, tmp_path / "merged", merge=True)
    assert (tmp_path / "merged/model.safetensors").is_file() and not (tmp_path / "merged/adapter_config.json").exists()
    name, value = next(iter(tensors.items()))
    path = run / "checkpoints/step_4/adapter/adapter_model.safetensors"
    save_file(tensors | {name: torch.zeros(3, 5)}, path)
    with pytest.raises(UserError, match=rf"1 weights of the adapter do not fit, such as {name}: .*found \[3, 5\]"):
        export(run, tmp_path / "again")


def test_runs_that_it_came_from_are_told(tmp_path: Path) -> None:
    warm = made(tmp_path / "warm", (3,), run__stage="warmstart", objective__name="kd")
    run = made(tmp_path / "run", (4,), student=str(warm))
    export(run, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "1. **warmstart**: cross-entropy and forward KL" in text and "2. **xopd**: cross-modal" in text
    assert front(tmp_path / "out")["base_model"] == "org/speech-llm" and {"kd", "xopd"} <= set(
        front(tmp_path / "out")["tags"]
    )


def test_licences_and_language_come_from_the_parents_cards(tmp_path: Path) -> None:
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for folder, text in (
        (student, "license: other\nlicense_name: own\nlanguage: [en, de]"),
        (teacher, "license: apache-2.0"),
    ):
        folder.mkdir()
        (folder / "README.md").write_text(f"---\n{text}\n---\n# x\n")
    run = made(tmp_path / "run", (4,), student=str(student), teacher__path=str(teacher))
    told = export(run, tmp_path / "out")
    data, text = front(tmp_path / "out"), (tmp_path / "out/README.md").read_text()
    assert (data["license"], data["license_name"], data["language"]) == ("other", "own", ["en", "de"])
    assert "- student: student: other own" in text and "- teacher: teacher: apache-2.0" in text
    assert "base_model" not in data and not any("is not known here" in line for line in told)
    assert str(tmp_path) not in text  # where things lie here is nobody's business


def test_the_recipe_names_no_machine(tmp_path: Path) -> None:
    hosts = {
        "launch__hosts": ["10.0.0.1"],
        "rollout__urls": ["http://10.0.0.1:1"],
        "teacher__urls": ["http://10.0.0.2:1"],
    }
    export(made(tmp_path / "run", (4,), data__train=f"{tmp_path}/mine.jsonl", **hosts), tmp_path / "out")
    text = (tmp_path / "out/recipe.yaml").read_text()
    assert "10.0.0" not in text and str(tmp_path) not in text
    kept = yaml.safe_load(text)
    assert kept["data"]["train"] == "mine.jsonl" and kept["optim"]["lr"] == 2e-4 and "launch" not in kept


def test_a_folder_is_replaced_only_when_told_and_only_an_export(tmp_path: Path) -> None:
    run, out = made(tmp_path / "run", (2, 4)), tmp_path / "out"
    export(run, out)
    with pytest.raises(UserError, match=r"--out .*out: is there already.*--overwrite"):
        export(run, out)
    (out / "mine.txt").write_text("x")
    export(run, out, "2", overwrite=True)
    assert "Step 2 of the run" in (out / "README.md").read_text() and not (out / "mine.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="replaces only an earlier export"):
        export(run, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/thesis.tex").read_text() == "precious"


def spoilt(run: Path, how: str) -> None:
    path = run / "checkpoints/step_4/model/model.safetensors"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
        return
    if how == "pickle":
        (path.parent / "pytorch_model.bin").write_bytes(b"x")
        return
    tensors = load_file(path)
    name = "audio_tower.layer_norm.bias"
    if how == "missing":
        del tensors[name]
    elif how == "more":
        tensors["extra.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "model.safetensors is damaged"),
        ("pickle", "pytorch_model.bin: expected weights as safetensors alone"),
        ("missing", "finds 1 weights missing, such as .*audio_tower.layer_norm.bias"),
        ("more", "finds 1 weights unexpected, such as extra.weight"),
        ("shape", "finds 1 weights misshapen, such as .*audio_tower.layer_norm.bias"),
    ],
)
def test_what_does_not_load_is_not_written(tmp_path: Path, how: str, message: str) -> None:
    run = made(tmp_path / "run", (4,))
    spoilt(run, how)
    with pytest.raises(UserError, match=message) as e:
        export(run, tmp_path / "out")
    assert ".writing" not in str(e.value)  # the copy is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "run", (4,))
    empty = make_run(tmp_path / "empty", [])
    for args, message in (
        ([str(tmp_path / "nowhere")], "expected a run folder, found nothing"),
        ([str(empty)], "a run folder without a finished checkpoint"),
        ([str(run), "--checkpoint", "best"], "expected checkpoints/best.json, found none"),
        ([str(run), "--checkpoint", "9"], "kept (4), found '9'"),
        ([str(run), "--checkpoint", "newest"], "expected last, best or a step"),
        ([str(run), "--merge"], "has no adapter; its model is whole as it is"),
    ):
        assert main(["export", *args, "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1, err
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path}/out/README.md (" in capsys.readouterr().out


def test_a_run_that_warned_or_did_not_finish_says_so(tmp_path: Path) -> None:
    run = made(tmp_path / "run", (4,), told={"phase": "failed", "error": "disk full", "steps": 9})
    last = evaluation("xopd", 4, warnings=[{"name": "retention", "text": "step 4: retention is 0.2"}])
    with open(run / "eval.jsonl", "a") as f:
        f.write(json.dumps(last) + "\n")
    export(run, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "- A warning of its run: step 4: retention is 0.2." in text
    assert "- Its run did not finish: failed after step 3 of 9: disk full." in text


def test_names() -> None:
    assert label("/home/someone/data/x.jsonl") == "x.jsonl" and label("data/x.jsonl") == "data/x.jsonl"
    assert hub_id("Qwen/Qwen2-Audio-7B-Instruct") == "Qwen/Qwen2-Audio-7B-Instruct"
    for path in ("runs/mine", "recipes/tiny/student", "/a/b", "opd", "./a", "recipes/tiny"):
        assert hub_id(path) is None, path
    from opd.storage.metrics import EVAL_METRICS

    assert set(METRICS) == set(EVAL_METRICS) - {"accuracy/teacher"}
    assert model_card.Parent("x").licence == "unknown, see where x is from"
