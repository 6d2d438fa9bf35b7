"""Recipes: every key that there is. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from opd.config.objective import ObjectiveConfig
from opd.config.teacher import TeacherConfig
from opd.scoring.scorer import ScoringConfig
from opd.settings import Section

# Metrics by which checkpoints can be told apart: +1 where higher is better, -1 where lower is.
Higher = Literal["accuracy/speech", "accuracy/text", "retention"]
Lower = Literal["misalignment", "forgetting", "reverse_kl/speech", "reverse_kl/text"]
Metric = Literal[Higher, Lower]
BETTER = dict.fromkeys(get_args(Higher), 1) | dict.fromkeys(get_args(Lower), -1)


class RunConfig(Section):
    """The run folder, its seed, and what the run makes."""

    dir: str = Field("", description="run folder, resumed by the same command; none: runs/<recipe>-<hash of config>")
    stage: str = Field("", description="name of what this run makes, in evaluations and reports; none: objective.name")
    seed: NonNegativeInt = 0
    overwrite: bool = Field(False, description="delete whatever run the folder holds and start anew")


class LoraConfig(Section):
    """Low-rank adapters on the LLM's linear layers (LoRA, arXiv 2106.09685), through PEFT."""

    r: PositiveInt = Field(16, description="rank of the update")
    alpha: PositiveFloat = Field(32.0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what goes into an adapter, in training")
    targets: list[str] = Field([], description="names of linear layers; none: all of the LLM's but its output layer")


class StudentConfig(Section):
    """The speech LLM and which of its parts are trained."""

    path: str = Field(
        min_length=1, description="checkpoint folder, hub id, or a run: RUN (its newest checkpoint), RUN:best, RUN:40"
    )
    family: str | None = Field(None, description="see `opd families`; none: by the checkpoint's config.json")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    train: list[Literal["tower", "adapter", "llm"]] = Field(["llm"], min_length=1, description="what is not frozen")
    attention: Literal["sdpa", "eager"] = "sdpa"
    lora: LoraConfig | None = Field(None, description="train adapters instead of the LLM's own weights")


class Effect(Section):
    """How often an effect is heard, and how strong it is: uniform within the range."""

    share: float = Field(ge=0, le=1, description="of the clips")
    range: list[float] = Field([], max_length=2)

    @model_validator(mode="after")
    def _ordered(self) -> Effect:
        if self.range and (len(self.range) != 2 or self.range[0] > self.range[1]):
            raise ValueError(f"range: expected [lowest, highest], found {self.range}")
        return self


class Noise(Effect):
    """Noise at a signal-to-noise ratio."""

    files: str | None = Field(None, description="folder of recordings of noise; none: pink noise")


class AugmentConfig(Section):
    """data.augment: which effects a training clip may get, in this order; evaluations hear clean clips."""

    speed: Effect = Effect(share=0.0, range=[0.9, 1.1])  # factor; the pitch moves with it
    reverb: Effect = Effect(share=0.0, range=[0.1, 0.5])  # seconds to fall by 60 dB
    noise: Noise = Noise(share=0.0, range=[5.0, 25.0])  # dB below the speech
    clipping: Effect = Effect(share=0.0, range=[2.0, 10.0])  # dB that the peaks are too loud by
    telephone: Effect = Effect(share=0.0)

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        for name, lowest, highest in (("speed", 0.5, 2.0), ("reverb", 0.01, 5.0), ("clipping", 0.0, 40.0)):
            effect = getattr(self, name)
            if effect.range and not lowest <= effect.range[0] <= effect.range[1] <= highest:
                raise ValueError(f"{name}.range: expected values from {lowest:g} to {highest:g}, found {effect.range}")
        for name in ("speed", "reverb", "noise", "clipping"):
            if getattr(self, name).share and not getattr(self, name).range:
                raise ValueError(f"{name}.range is required with {name}.share")
        return self

    @property
    def active(self) -> bool:
        """Whether any clip may be changed."""
        return any(getattr(self, name).share for name in type(self).model_fields)


class DataConfig(Section):
    """The training manifest and how much of it may be bad."""

    train: str = Field(min_length=1, description="manifest (JSONL, or anything `datasets` reads as JSON or Parquet)")
    max_audio_seconds: PositiveFloat = 30.0
    max_bad_share: float = Field(0.01, ge=0, le=1, description="the run fails when more of the records are bad")
    check: NonNegativeInt = Field(256, description="records decoded before training starts; 0 decodes all")
    weight: str | None = Field(
        None, description="number of the records that weighs them in the loss, such as `weight` of `opd data verify`"
    )
    augment: AugmentConfig = AugmentConfig()


class ServerConfig(Section):
    """How the launcher starts a vLLM server; ignored when URLs are given."""

    max_model_len: PositiveInt = Field(2048, description="tokens of a prompt and its response")
    max_num_seqs: PositiveInt = 256
    kv_cache_gib: PositiveInt = Field(1, description="VLLM_CPU_KVCACHE_SPACE, CPU only")
    threads: NonNegativeInt = Field(0, description="OpenMP threads of the server, CPU only; 0: all cores")
    trim_audio: bool = Field(True, description="run the audio tower over the clips only, not their fixed window")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of a GPU that a server takes; none: as the placement, else 0.9"
    )
    args: list[str] = Field([], description="further arguments of the vLLM server")


class RolloutConfig(Section):
    """Where responses come from, how they are sampled, how new weights get there."""

    source: Literal["student", "teacher", "dataset", "mix"] = "student"
    student_share: float = Field(0.5, gt=0, lt=1, description="mix: share of prompts that the student answers")
    n: PositiveInt = Field(4, description="responses per prompt and view (source: student)")
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 512
    urls: list[str] = Field([], description="base URLs of running servers; empty: the launcher starts one")
    timeout_s: PositiveFloat = 300.0
    concurrency: PositiveInt = 256
    max_mismatch: PositiveFloat = Field(0.5, description="mean |learner - sampler| log-prob that stops the run")
    transport: Literal["file", "nccl", "ipc"] | None = Field(
        None, description="carries new weights to the servers; none: as the placement has it, file without one"
    )
    sleep: bool | None = Field(None, description="they sleep while the learner works; none: if they share its device")
    transfer_dir: str = Field(
        "/dev/shm", min_length=1, description="file: folder that learner and servers share, for new weights"
    )
    server: ServerConfig = ServerConfig()

    @property
    def student_writes(self) -> bool:
        """Whether the student samples responses while it learns: every step then pushes its weights."""
        return self.source in ("student", "mix")

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher writes responses."""
        return self.source in ("teacher", "mix")


class OptimConfig(Section):
    """AdamW, its learning-rate schedule, gradient clipping."""

    lr: PositiveFloat = 2e-6
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr_share: float = Field(0.1, ge=0, le=1, description="of lr, at the last step")
    grad_clip: PositiveFloat = 1.0


class TrainConfig(Section):
    """Steps, batches, memory, checkpoints."""

    steps: PositiveInt
    prompts_per_step: PositiveInt = 256
    micro_batch_tokens: PositiveInt = Field(8192, description="padded tokens in one forward and backward pass")
    gradient_checkpointing: bool = True
    deepspeed: str = Field("deepspeed_configs/zero3.json", min_length=1, description="ZeRO stage/offload/buckets only")
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    samples_per_step: NonNegativeInt = Field(2, description="rollouts per view and step written to samples.jsonl")
    timeout_s: PositiveInt = Field(1800, description="a collective that waits longer ends the run")


class WarnConfig(Section):
    """What makes an evaluation warn, compared with the run's first one on the same records."""

    text: float = Field(0.03, ge=0, le=1, description="typed accuracy lost, as a share of the records")
    retention: float = Field(0.03, ge=0, le=1, description="retention lost, likewise")
    length: float = Field(2.0, gt=1, description="times the first mean length of a view's responses")
    errors: NonNegativeFloat = Field(2.0, description="standard errors that a change must exceed too")


class EvalConfig(ScoringConfig):
    """What is measured on held-out records, when, and what follows from it."""

    test: str | None = Field(None, description="manifest of held-out questions with answers")
    retention: str | None = Field(None, description="manifest of a skill that training must not cost")
    limit: PositiveInt | None = Field(None, description="records of each manifest; all by default")
    kl_limit: PositiveInt = Field(128, description="records for misalignment, forgetting and reverse KL")
    start: str | None = Field(None, description="name of an evaluation before the first step; none: no evaluation")
    end: bool = Field(True, description="evaluate after the last step, under the name run.stage")
    every: PositiveInt | None = Field(
        None, description="steps between evaluations in training, without divergences but that of eval.best"
    )
    every_limit: PositiveInt = Field(100, description="records of each manifest in those")
    best: Metric | None = Field(None, description="the checkpoint that is best by this metric is kept, and named")
    patience: PositiveInt | None = Field(
        None, description="evaluations in a row without a better eval.best that end the run; none: it takes all steps"
    )
    warn: WarnConfig = WarnConfig()
    groups: list[str] | None = Field(
        None, description="opd eval: fields of the records to tabulate by; none: strings of few values, and seconds"
    )
    bins: dict[str, list[float]] = Field(
        {}, description="opd eval: edges between groups of a number; else its quartiles"
    )


class LaunchConfig(Section):
    """What `opd launch` starts, and where (opd/config/placement.py)."""

    placement: str | None = Field(None, description="YAML of recipes/placements; none: all on this machine, no GPUs")
    hosts: list[str] = Field([], description="address of each node of the placement, under which the others reach it")
    node: NonNegativeInt | None = Field(None, description="which node this is; none: OPD_NODE or SLURM_NODEID says")
    port: PositiveInt | None = Field(
        None, le=65000, description="first of the ports taken; none: free ones, 8100 on several nodes"
    )
    launcher: Literal["accelerate", "deepspeed"] = Field("accelerate", description="starts the learner processes")
    lost_after_s: PositiveFloat = Field(60.0, description="a node that is silent for longer ends the run everywhere")
    processes: PositiveInt | None = Field(None, description="learner's, of all nodes; none: as the placement, else 2")
    threads: NonNegativeInt = Field(0, description="OpenMP threads of a learner process, CPU only; 0: share the cores")
    health_timeout_s: PositiveInt = 600


class MetricsConfig(Section):
    """Where numbers go besides metrics.jsonl."""

    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="beside metrics.jsonl")
    project: str = "opd"


class Config(Section):
    """A recipe. Every key is here; unknown ones are refused."""

    run: RunConfig = RunConfig()
    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig
    train: TrainConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    launch: LaunchConfig = LaunchConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.objective.check(self.rollout.source, self.teacher)
        if self.objective.reference > 0 and not self.rollout.student_writes:
            found = self.rollout.source
            raise ValueError(f"objective.reference is for on-policy responses: rollout.source student, found {found}")
        if not self.rollout.urls and self.rollout.server.max_model_len <= self.rollout.max_tokens:
            more = f"more than rollout.max_tokens ({self.rollout.max_tokens}): no prompt would fit beside a response"
            raise ValueError(f"rollout.server.max_model_len ({self.rollout.server.max_model_len}) must be {more}")
        best = self.eval.best
        if self.eval.patience is not None and best is None:
            raise ValueError("eval.patience needs eval.best, the metric that is to improve, found none")
        for key in ("every", "retention" if best == "retention" else "test"):
            if best is not None and getattr(self.eval, key) is None:
                raise ValueError(f"eval.best {best} needs eval.{key}, found none")
        if self.student.lora is not None and "llm" not in self.student.train:
            raise ValueError(f"student.lora adapts the LLM: student.train must hold llm, found {self.student.train}")
        return self
