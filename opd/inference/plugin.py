"""Loaded by vLLM in each of its processes (entry point `vllm.general_plugins`): registers what is ours.

The weight transports of rollout.transport: vLLM imports their engines (engines.py) by name when it uses one.
With OPD_TRIM_AUDIO=1 in the environment, models of trimmed_models.py stand in for vLLM's.
"""

from __future__ import annotations

import os

BACKENDS = {"file": "opd_file", "nccl": "opd_nccl", "ipc": "opd_ipc"}  # by rollout.transport
ENGINES = {"opd_file": "FileEngine", "opd_nccl": "NcclEngine", "opd_ipc": "IpcEngine"}
TRIM_AUDIO = "OPD_TRIM_AUDIO"
TRIMMED = {
    "Qwen2AudioForConditionalGeneration": "opd.inference.trimmed_models:TrimmedQwen2Audio",
    "GraniteSpeechForConditionalGeneration": "opd.inference.trimmed_models:ClipwiseGraniteSpeech",
}


def register() -> None:
    """Register our engines with vLLM's factory, once per process, and the trimmed models where asked for."""
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for backend, engine in ENGINES.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "opd.inference.engines", engine)
    if os.environ.get(TRIM_AUDIO) == "1":
        for architecture, model in TRIMMED.items():
            ModelRegistry.register_model(architecture, model)
