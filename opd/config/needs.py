"""What a run needs, from its recipe alone: servers, teachers, copies, how much at a time. Imports no torch."""

from __future__ import annotations

from opd.config.placement import placement_of
from opd.config.schema import Config
from opd.config.teacher import TeacherConfig
from opd.settings import UserError
from opd.types import Prompt

# How much is in memory at a time: read by what works in such parts, and by `opd plan`.
CLIPS_PER_CALL = 8  # of the frozen tower
ELEMENTS = 1 << 26  # of a chunk's logits: 256 MiB in float32, times the few that an objective needs


def evaluates(config: Config) -> bool:
    """Whether the run evaluates at its start, in training or at its end."""
    e = config.eval
    return bool((e.test or e.retention) and (e.start or e.every or e.end))


def starts_student(config: Config) -> bool:
    """Whether the launcher starts the student's servers: they are needed, and the recipe names no running ones."""
    return not config.rollout.urls and (config.rollout.student_writes or evaluates(config))


def asks_teacher(config: Config) -> str:
    """What in the run reads the teacher or has it write, in words; empty: nothing does, and it need not be there."""
    if config.objective.reads != "nothing":
        return f"objective.name {config.objective.name} reads it"
    if config.rollout.teacher_writes:
        return f"with rollout.source {config.rollout.source} it writes responses"
    return "evaluations ask it; without any (eval.test= eval.retention=) it need not be there" * evaluates(config)


def asks_teacher_servers(config: Config) -> bool:
    """Whether teacher servers work in this run: they score, or they write a warm start's responses."""
    if config.teacher.about.servers == "all":
        return bool(asks_teacher(config))
    if not config.teacher.about.servers or config.objective.about.other_tokenizer:  # whose ids would be no answer
        return False
    return config.rollout.teacher_writes and bool(config.teacher.urls or placement_of(config).teacher)


def teacher_servers(config: Config) -> list[tuple[str, str, str]]:
    """Teacher servers that the recipe names and the run asks: setting, URL, and the model that they hold."""
    asked = asks_teacher(config) if config.teacher.about.routes else asks_teacher_servers(config)
    each = {f"routes.{k}.urls" if k else "urls": t for k, t in config.teacher.each.items() if asked and t.about.servers}
    return [(f"teacher.{key}", url, t.path) for key, t in each.items() for url in t.urls]


def uses_start(config: Config) -> bool:
    """Whether the student as it was at the start is asked: as a teacher, or as the reference."""
    teaches = any(t.about.weights == "student" for t in config.teacher.each.values())
    return config.objective.reference > 0 or (teaches and bool(asks_teacher(config)))


def copies_start(config: Config) -> bool:
    """Whether that takes a second copy of the student.

    With student.lora the learner's own weights without adapters are the start, unless the reference hears and something
    of the audio path is trained in full.
    """
    if not uses_start(config) or config.student.lora is None:
        return uses_start(config)
    moved = list(config.student.train) != ["llm"]
    return config.objective.reference > 0 and config.objective.lambda_ < 1 and moved


def shards_start(config: Config) -> bool:
    """Whether the ranks share that copy."""
    return config.teacher.shard or any(t.shard and t.about.weights == "student" for t in config.teacher.each.values())


def starts_teacher(config: Config) -> bool:
    """Whether the launcher starts teacher servers: they are asked, and the recipe names no running ones."""
    return not config.teacher.urls and asks_teacher_servers(config)


def route_of(teacher: TeacherConfig, prompt: Prompt) -> str:
    """Which of teacher.routes reads a prompt. Raises UserError, naming the record, when none does."""
    value = prompt.group if teacher.field == "group" else prompt.other.get(teacher.field, "")
    found = next((name for name in (value, "*") if name in teacher.routes), None)
    if found is None:
        has = f"{teacher.field} {value!r}" if value else f"no {teacher.field}"
        told = f"has {has}, which is no route of teacher.routes ({', '.join(teacher.routes)})"
        raise UserError(f'{prompt.place or prompt.id}: {told}; name it there, or "*" for all others')
    return found


def scored_tokens(config: Config) -> int:
    """Tokens of one forward pass of a teacher's server: prompt log-probs hold [tokens, V] in memory."""
    s = config.rollout.server
    return max(2048, s.max_model_len, s.max_num_seqs)
