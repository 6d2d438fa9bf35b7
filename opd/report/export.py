"""`opd export`: a checkpoint as the folder that one pushes to the Hub. Imports no torch until it verifies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from opd.models.registry import quiet, whole_weights
from opd.report.model_card import Exported, base_of, label, model_card
from opd.report.runs import Run, read_run, student_of
from opd.settings import UserError
from opd.storage import run_folder as saved

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # weights that run code as they are loaded
WEIGHTS = (".safetensors", ".safetensors.index.json")
OF_THE_MODEL = ("config.json", "params.json")  # an adapter's base has its own
RECIPE = "recipe.yaml"
HEAD = "# The recipe of the last stage, every key resolved; no addresses, absolute paths cut to their last name.\n"
# Addresses and places of one machine: nobody else's business, and of no use to others.
PRIVATE = ("launch", "rollout.urls", "rollout.transfer_dir", "teacher.urls", "run.dir")


def export(run: Path, out: Path, which: str = saved.LAST, merge: bool = False, overwrite: bool = False) -> list[str]:
    """Write a checkpoint of a run to `out`, ready to push; returns what there is to say, a line each.

    Model files as safetensors, or with student.lora the adapter unless `merge`; tokenizer, processor and generation
    config; the resolved recipe; README.md, the model card. Written aside, tried with transformers, then renamed.
    `which`: last, best, or a step. Raises UserError for a folder that is no run, a checkpoint that is not there or does
    not load, and an `out` that is there, unless it is an earlier export and `overwrite` says to replace it.
    """
    found = pipeline(run)
    checkpoint = saved.find(run, which, str(run))
    adapter = (checkpoint / "adapter").is_dir() and not merge
    if merge and not (checkpoint / "adapter").is_dir():
        raise UserError(f"--merge: {checkpoint} has no adapter; its model is whole as it is, leave --merge out")
    _may_write(out, overwrite)
    aside = out.absolute().with_name(f".{out.absolute().name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _copy(checkpoint, aside, adapter)
        try:
            tried = try_adapter(aside, checkpoint / "model") if adapter else try_model(aside)
        except UserError as e:  # the copy goes; what is wrong with it is wrong with what was copied
            raise UserError(str(e).replace(str(aside), str(checkpoint / "model"))) from e
        recipe = yaml.safe_dump(_public(found[-1].config), sort_keys=False, allow_unicode=True)
        (aside / RECIPE).write_text(HEAD + recipe, encoding="utf-8")
        about = Exported(found, int(checkpoint.name[5:]), adapter, tried.model_class, tried.parameters)
        model_card(about).save(aside / "README.md")
        old = aside.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(aside, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be written there ({e.strerror or e}); choose another --out") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return _told(found, checkpoint, out, adapter, tried)


def pipeline(run: Path) -> list[Run]:
    """The run and the runs that its student came from, as far as they are here, the first one first."""
    found = [read_run(run)]
    while True:
        start = student_of(found[0])
        inside = (start, *start.parents) if start.exists() else ()
        home = next((p for p in inside if (p / "config.yaml").is_file() and (p / "checkpoints").is_dir()), None)
        if home is None or any(home == r.folder.resolve() for r in found):
            return found
        found.insert(0, read_run(home))


def _may_write(out: Path, overwrite: bool) -> None:
    ours = (out / RECIPE).is_file() and (out / "README.md").is_file() and not (out / ".git").exists()
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: is there already; choose another folder, or replace it with --overwrite")
    if out.exists() and not ours:
        raise UserError(f"--out {out}: --overwrite replaces only an earlier export, and this is none; choose another")


def _copy(checkpoint: Path, out: Path, adapter: bool) -> None:
    """Model files, or those of the adapter with all of the model's that are neither weights nor its architecture."""
    for path in sorted((checkpoint / "model").iterdir()):
        if path.name.endswith(PICKLED):
            expected = "expected weights as safetensors alone"
            raise UserError(f"{path}: {expected}; this file does not belong there, remove it")
        if adapter and (path.name.endswith(WEIGHTS) or path.name in OF_THE_MODEL):
            continue
        shutil.copytree(path, out / path.name) if path.is_dir() else shutil.copyfile(path, out / path.name)
    for path in sorted((checkpoint / "adapter").iterdir()) if adapter else ():
        shutil.copyfile(path, out / path.name)


def _public(node: Any, key: str = "") -> Any:
    """Of a recipe what does not concern one machine alone; absolute paths are cut to their last name."""
    if isinstance(node, dict):
        kept = {k: f"{key}.{k}".lstrip(".") for k in node}
        return {k: _public(v, kept[k]) for k, v in node.items() if kept[k] not in PRIVATE and k != "urls"}
    if isinstance(node, list):
        return [_public(v, key) for v in node]
    return label(node) if isinstance(node, str) else node


class Tried(NamedTuple):
    """What transformers found in a folder."""

    model_class: str
    tensors: int
    parameters: int


def try_model(folder: Path) -> Tried:
    """Have transformers load a whole model onto the meta device: every weight has its place, and its shape.

    Config, tokenizer and processor are loaded as they are. Raises UserError for what is missing, too much or misshapen.
    """
    import transformers

    from opd.models.base import family_of

    whole_weights(str(folder), "checkpoint")
    family = family_of(str(folder))
    with quiet():  # it prints a table of its own where weights do not fit; ours is the error
        try:
            hf, info = getattr(transformers, family.model_class).from_pretrained(
                folder, device_map="meta", output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
            )
        except (RuntimeError, ValueError) as e:
            raise UserError(f"checkpoint: transformers does not load it: {str(e).splitlines()[0]}") from e
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "misshapen": "mismatched_keys"}
    for word, key in kinds.items():
        if wrong := sorted(str(name) for name in info[key]):
            raise UserError(f"checkpoint: transformers finds {len(wrong)} weights {word}, such as {wrong[0]}")
    return Tried(family.model_class, len(hf.state_dict()), sum(p.numel() for p in hf.parameters()))


def try_adapter(folder: Path, model: Path) -> Tried:
    """Hold an adapter's names and shapes against PEFT's own for the model. Raises UserError for what differs."""
    import peft
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError, safe_open

    from opd.models.base import family_of

    family = family_of(str(model))
    hf = family.outline()
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), hf, low_cpu_mem_usage=True)
    state = peft.get_peft_model_state_dict(hf, save_embedding_layers=False)
    expected = {f"base_model.model.{n}": list(v.shape) for n, v in state.items()}
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as f:
            there = {n: f.get_slice(n).get_shape() for n in f.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as e:
        raise UserError(f"checkpoint: {SAFETENSORS_WEIGHTS_NAME} is damaged: {e}") from e
    if wrong := sorted(n for n in expected.keys() | there.keys() if expected.get(n) != there.get(n)):
        shapes = f"{wrong[0]}: expected {expected.get(wrong[0])}, found {there.get(wrong[0])}"
        raise UserError(f"checkpoint: {len(wrong)} weights of the adapter do not fit, such as {shapes}")
    return Tried(family.model_class, len(there), sum(v.numel() for v in state.values()))


def _told(runs: list[Run], checkpoint: Path, out: Path, adapter: bool, tried: Tried) -> list[str]:
    lines = [f"wrote {p} ({p.stat().st_size:,} bytes)" for p in sorted(out.rglob("*")) if p.is_file()]
    what = f"{'adapter' if adapter else 'model'} of {tried.parameters:,} parameters in {tried.tensors} tensors"
    lines.append(f"{checkpoint}: {what}, all of them fit")
    best = saved.best_of(runs[-1].folder)
    if best is not None and checkpoint.name != f"step_{best['step']}":
        lines.append(f"note: the best by {best['metric']} is step {best['step']}: --checkpoint best")
    base = base_of(runs)
    if adapter and "/" not in (base.hub or ""):
        told = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        others = "others need it too, or export with --merge"
        lines.append(f"note: the adapter's base is {told}, no model of the Hub: {others}")
    if base.license is None:
        unknown = f"the licence of {base.name} is not known here"
        lines.append(f"note: {unknown}; fill in `license` in README.md before you push")
    return lines
