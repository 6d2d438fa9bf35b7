"""Every check of `opd doctor` that needs no server: what passes, what fails, and what the table makes of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doctor_world import ANSWERS, ASKED, ROOT, facts_of, lines, overrides, world, write

from opd.cli import main
from opd.doctor import command as doctor
from opd.doctor import live as doctor_model
from opd.doctor import preflight
from opd.doctor.checks import Check, Facts, Skip, Warned
from opd.doctor.probe import Mismatch
from opd.models.base import family_of
from opd.settings import UserError
from opd.types import Prompt, Rollout, ScoredRollout

__all__ = ["world"]  # a fixture

CHEAP = [
    "run folder", "DeepSpeed", "student", "teacher", "settings", "servers", "manifests", "versions", "tokenizers",
    "chat templates", "clips", "stop ids", "banned ids", "caches", "new weights", "placement", "memory",
]  # fmt: skip
LIVE = ["student server", "prompt ids", "log-probs", "samples", "weight push", "teacher reads"]
CHECKS = {c.name: c for c in preflight.checks()}


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_all_is_well(world: Path) -> None:
    found = lines(facts_of(world))
    assert list(found) == CHEAP and {line.outcome for line in found.values()} == {"pass"}
    assert found["tokenizers"].found == "same tokens, and the same ids for 14 texts"
    assert "; 4 text views alike in both" in found["chat templates"].found
    assert "4 of 4 decoded, 0 bad, 0 of them too long, clips of 1.0 to 1.8 s, 1.4 on" in found["clips"].found
    assert " + 24 of 512" in found["clips"].found
    assert found["stop ids"].found == "2 '<|im_end|>': both chat templates end turns so"
    assert found["banned ids"].found == "3 '<|AUDIO|>', 4 '<|audio_bos|>', 5 '<|audio_eos|>'; 0 padded rows"


def test_launch_goes_through_the_same_checks_and_stops_at_the_first_fault(world: Path) -> None:
    told = preflight.check(facts_of(world).config)
    assert [line.partition(":")[0] for line in told] == CHEAP
    (world / "0.wav").unlink()
    with pytest.raises(UserError, match="0.wav: no such audio file"):
        preflight.check(facts_of(world).config)


def test_a_run_that_asks_no_teacher_is_checked_without_one(world: Path) -> None:
    shutil.rmtree(world / "teacher")
    facts = facts_of(world, "objective.name=sft", "rollout.source=dataset", "teacher.path=")
    found = lines(facts)
    assert list(found) == CHEAP and {line.outcome for line in found.values()} <= {"pass", "warn"}
    assert found["teacher"].found == "none: nothing in this run reads or asks one"
    assert found["stop ids"].found == "2 '<|im_end|>': its chat template ends turns so"
    with pytest.raises(Skip, match="nothing in this run reads or asks a teacher"):
        doctor_model.teacher_reads(facts)
    file = world / "student/chat_template.jinja"  # the student's own is looked at nonetheless
    file.write_text(file.read_text().replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}Well: "))
    template = lines(facts_of(world, "objective.name=sft", "rollout.source=dataset", "teacher.path="))["chat templates"]
    assert template.outcome == "FAIL" and "the student's chat template: a prompt" in template.found


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_more_best_ids_than_a_vocabulary_has_are_refused(world: Path, name: str) -> None:
    asked = [f"objective.name={name}", "objective.advantage_clip="]
    assert lines(facts_of(world, *asked, "objective.top_k=503"))["settings"].outcome == "pass"
    found = lines(facts_of(world, *asked, "objective.top_k=504"))["settings"]
    said = "objective.top_k 504: expected at most 503, as many ids as the student's vocabulary has"
    assert (found.outcome, found.found) == ("FAIL", said)
    edit(world / "teacher/config.json", vocab_size=400)
    with pytest.raises(UserError, match="objective.top_k 503: expected at most 400, .* the teacher's vocabulary has"):
        preflight.check(facts_of(world, *asked, "objective.top_k=503").config)


def test_settings_that_are_not_read_are_named_and_allowed(world: Path) -> None:
    found = lines(facts_of(world, "objective.name=reverse_kl", "objective.mu=0.9", "teacher.field=skill"))["settings"]
    told = ["objective.advantage_clip is not read by reverse_kl", "objective.mu is not read by reverse_kl"]
    assert found.outcome == "warn" and found.found.split("; ") == [
        *told,
        "teacher.field is not read by teacher.kind local",
    ]


# ---- tokens -----------------------------------------------------------------------------------------------------


def test_another_meaning_of_ids_fails_and_what_relies_on_it_is_not_run(world: Path) -> None:
    file = world / "teacher/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    a, b = [t for t, i in ids.items() if i in (300, 301)]
    ids[a], ids[b] = ids[b], ids[a]
    file.write_text(json.dumps(tokenizer))
    found = lines(facts_of(world))
    assert found["tokenizers"].outcome == "FAIL" and "differs from the student's in 2 ids" in found["tokenizers"].found
    assert found["tokenizers"].remedy == CHECKS["tokenizers"].remedy
    assert (found["stop ids"].outcome, found["stop ids"].found) == ("not run", "needs tokenizers")
    assert found["clips"].outcome == found["banned ids"].outcome == "pass"


def test_the_same_tokens_that_split_texts_differently_fail(world: Path) -> None:
    file = world / "teacher/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    file.write_text(json.dumps(tokenizer))
    found = lines(facts_of(world))["tokenizers"]
    assert found.outcome == "FAIL" and 'same vocabulary, but "What is 12 plus 3?' in found.found


def test_a_teacher_without_tokenizer_fails(world: Path) -> None:
    for file in (world / "teacher").glob("tokenizer*"):
        file.unlink()
    found = lines(facts_of(world))["tokenizers"]
    assert found.outcome == "FAIL" and "expected tokenizer files" in found.found


def test_templates_may_differ_but_it_is_said(world: Path) -> None:
    file = world / "teacher/chat_template.jinja"
    file.write_text("<|im_start|>system\nAnswer.<|im_end|>\n" + file.read_text())
    found = lines(facts_of(world))["chat templates"]
    assert found.outcome == "warn" and "the text view of q0 has" in found.found
    assert "they part at 1: 'user\\nwhat is one plus two<|im_end|>' and 'system\\nAn" in found.found


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "{{ m['content'] }}",
            "{{ m['content'] if m['role'] == 'user' }}",
            "the teacher's chat template: no token ends the answer in '<|im_start|>user",
        ),
        (
            "{% if add_generation_prompt %}",
            "{% if add_generation_prompt %}Well: ",
            "the teacher's chat template: a prompt",
        ),
        ("{{ m['content'] }}", "{{ m['content'][:19] }}", "template loses the transcript 'what is one plus two'"),
    ],
)
def test_templates_that_no_reply_can_follow_fail(world: Path, old: str, new: str, told: str) -> None:
    file = world / "teacher/chat_template.jinja"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    found = lines(facts_of(world))["chat templates"]
    assert found.outcome == "FAIL" and told in found.found


def test_a_record_that_spells_the_placeholder_is_the_clips_affair(world: Path) -> None:
    record = {"audio": "0.wav", "transcript": "say <|AUDIO|>"}
    good = [{"audio": f"{i}.wav", "transcript": t} for i, t in enumerate(ASKED)]
    write(world, [record, *good])
    found = lines(facts_of(world, "data.max_bad_share=0.5"))
    assert {line.outcome for line in found.values()} == {"pass"}
    assert "train.jsonl:1: its text, transcript or response contains <|AUDIO|>, a control token" in found["clips"].found


def test_wrong_stop_ids_fail(world: Path) -> None:
    generation = world / "student/generation_config.json"
    edit(generation, eos_token_id=0)
    told = lines(facts_of(world))["stop ids"]
    assert told.outcome == "FAIL"
    assert told.found == (
        "the student's chat template ends a turn with 2 '<|im_end|>', generation stops at 0 '<|endoftext|>'"
    )
    edit(generation, eos_token_id=[2, 3])
    assert "stop id 3 '<|AUDIO|>' is banned" in lines(facts_of(world))["stop ids"].found
    edit(generation, eos_token_id=[2, 502])
    assert lines(facts_of(world))["stop ids"].outcome == "pass"
    edit(generation, eos_token_id=[2, 900])
    assert "stop id 900 is None to the student and None" in lines(facts_of(world))["stop ids"].found
    edit(generation, eos_token_id=[0, 2])
    assert lines(facts_of(world))["stop ids"].outcome == "pass"  # gold responses close with the template's own


def test_ids_that_are_not_banned_fail(world: Path) -> None:
    facts = facts_of(world)
    lines(facts)
    family = facts.family
    all_banned = list(family.banned_ids)
    family.banned_ids = [i for i in all_banned if i != family.audio_id]
    with pytest.raises(UserError, match=r"the audio placeholder 3 '<\|AUDIO\|>' is not banned"):
        CHECKS["banned ids"].run(facts)
    family.banned_ids, family.vocab_size = all_banned, family.vocab_size + 2
    with pytest.raises(UserError, match="2 padded rows of the vocabulary are not banned, such as 503"):
        CHECKS["banned ids"].run(facts)
    word = family.tokenizer(" plus", add_special_tokens=False).input_ids[0]
    family.banned_ids = [*all_banned, 503, 504, word]
    with pytest.raises(UserError, match=rf"has the banned id {word} 'Ġplus'"):
        CHECKS["banned ids"].run(facts)


# ---- data, devices ----------------------------------------------------------------------------------------------


def test_a_failure_stops_only_what_needs_it(world: Path) -> None:
    def fails(facts: Facts) -> str:
        raise ValueError("first\nsecond")

    def skips(facts: Facts) -> str:
        raise Skip("nothing to do")

    made = [
        Check("a", fails, "mend a"),
        Check("b", lambda f: "fine", "", ("a",)),
        Check("c", lambda f: Warned("odd"), ""),
        Check("d", skips, ""),
        Check("e", lambda f: "fine", "", ("c",), live=True),
        Check("f", lambda f: "fine", "", ("b", "d", "c"), live=True),
    ]
    found = list(doctor.examine(made, facts_of(world)))
    outcomes = [(line.name, line.outcome, line.found) for line in found]
    assert outcomes == [
        ("a", "FAIL", "ValueError: first"),
        ("b", "not run", "needs a"),
        ("c", "warn", "odd"),
        ("d", "not run", "nothing to do"),
        ("e", "pass", "fine"),
        ("f", "not run", "needs b, d"),
    ]
    assert str(found[0]).split() == ["a", "FAIL", "ValueError:", "first;", "remedy:", "mend", "a"]
    last = list(doctor.examine(made, facts_of(world), server=False))[-2:]
    assert [(line.outcome, line.found) for line in last] == [("not run", "--no-server")] * 2


def test_a_fact_that_nobody_has_found_out_names_the_check_that_does(world: Path) -> None:
    facts = facts_of(world)
    for check in (preflight.settings, doctor_model.log_probs, doctor_model.weight_push):
        with pytest.raises(Skip, match="^needs (student|prompt ids)$"):
            check(facts)
    (line,) = doctor.examine([Check("x", preflight.settings, "")], facts)
    assert (line.outcome, line.found) == ("not run", "needs student")
    preflight.student(facts)
    assert facts.student == f"{world}/student" and facts.family.vocab_size == 503
    with pytest.raises(AttributeError):
        facts.nonsense  # type: ignore[attr-defined] # noqa: B018


def test_exit_codes_and_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = "recipes/tiny/2_xopd.yaml", world / "found.json"
    assert main(["doctor", recipe, "--no-server", "--json", str(out), *overrides(world)]) == 0
    shown, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert found["passed"] and [c["name"] for c in found["checks"]] == [c.name for c in doctor.checks()]
    assert [line.split("  ")[0] for line in shown[:-1]] == [c["name"] for c in found["checks"]]
    edit(world / "student/generation_config.json", eos_token_id=0)
    assert main(["doctor", recipe, "--no-server", "--json", str(out), *overrides(world)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("fails: stop ids (")
    failed = next(c for c in json.loads(out.read_text())["checks"] if c["outcome"] == "FAIL")
    assert failed["name"] == "stop ids" and failed["remedy"] and not json.loads(out.read_text())["passed"]
    assert main(["doctor", "nowhere.yaml"]) == 2
    assert main(["doctor", recipe, "optim.lrr=1"]) == 2
    assert main(["doctor", recipe, "--json", f"{world}/none/found.json"]) == 2


def test_every_line_is_explained() -> None:
    table = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/doctor.md").read_text(), re.MULTILINE)
    names = [c.name for c in doctor.checks()]
    assert names == table == [*CHEAP, *LIVE]
    assert all(c.remedy for c in doctor.checks())
    for i, check in enumerate(doctor.checks()):
        assert set(check.needs) <= set(names[:i]), f"{check.name} needs what comes later"


# ---- what is said of the live server's answers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def family() -> Any:
    return family_of(str(ROOT / "recipes/tiny/student"))


def response(ids: tuple[int, ...], truncated: bool = False) -> Rollout:
    return Rollout(Prompt("q", ()), "speech", ids, np.zeros(len(ids), np.float32), 0, truncated)


def test_samples_that_are_well(family: Any) -> None:
    found = doctor_model.sampled([response((300, 2)), response((300, 301, 302), True)], family, 3)
    assert found == "2 responses without banned ids; 1 were cut after 3 tokens, the others ended"
    assert isinstance(doctor_model.sampled([response((300, 301, 302), True)], family, 3), Warned)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (response((300, 3, 2)), "holds the banned id 3"),
        (response((300, 2, 301, 2)), "goes on after a stop id"),
        (response((300, 301)), "ends wrongly flagged"),
        (response((300, 0), True), "ends after 2 of 24 tokens with 0, which is no stop id"),
    ],
)
def test_samples_that_are_not(family: Any, bad: Rollout, told: str) -> None:
    with pytest.raises(UserError, match=told):
        doctor_model.sampled([response((300, 2)), bad], family, 24)


SMALL, LARGE, NAN = Mismatch(1e-6, 1e-5), Mismatch(0.5, 4.0), Mismatch(float("nan"), float("nan"))


def test_a_push_that_does_what_it_must(world: Path) -> None:
    config = facts_of(world).config
    assert doctor_model.judge_push(LARGE, SMALL, SMALL, config).startswith("left out: mean 5.0e-01, greatest 4.0e+00")
    for stale, fresh, restored in ((LARGE, LARGE, SMALL), (LARGE, SMALL, LARGE), (LARGE, NAN, SMALL)):
        with pytest.raises(UserError, match="float32: at most 0.0001 and 0.0001"):
            doctor_model.judge_push(stale, fresh, restored, config)
    for stale in (SMALL, NAN):
        with pytest.raises(UserError, match="should cost more than 0.1"):
            doctor_model.judge_push(stale, SMALL, SMALL, config)


def test_limits_are_those_of_the_dtype(world: Path) -> None:
    rounding = Mismatch(0.02, 0.4)
    assert not doctor_model.agrees(rounding, facts_of(world).config)
    config = facts_of(world, "student.dtype=bfloat16").config
    assert doctor_model.agrees(rounding, config) and not doctor_model.agrees(Mismatch(0.06, 0.4), config)
    assert not doctor_model.agrees(Mismatch(0.02, 1.5), config) and not doctor_model.agrees(NAN, config)


class Reader:
    """The teacher's seam: `right` knows each record's response, the other reads nothing."""

    def __init__(self, family: Any, right: bool) -> None:
        self.family, self.right = family, right
        self.asked: list[Prompt] = []

    def own(self, prompt: Prompt) -> tuple[int, ...]:
        return (300 + int(prompt.id), 2)

    def respond(self, prompts: list[Prompt], max_tokens: int) -> list[tuple[tuple[int, ...], bool]]:
        self.asked += prompts
        return [(self.own(p), False) for p in prompts]

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        out = []
        for r in rollouts:
            gold = r.prompt.response and self.family.tokenizer(r.prompt.response, add_special_tokens=False).input_ids
            own = r.token_ids == (*gold, 2) if gold else r.token_ids == self.own(r.prompt)
            value = -0.5 if own and self.right else -2.0
            out.append(ScoredRollout(r, np.full(len(r.token_ids), value, np.float32)))
        return out


@pytest.mark.parametrize("gold", [True, False])
def test_a_teacher_that_reads(family: Any, gold: bool) -> None:
    prompts = [Prompt(str(i), (), response=a if gold else None) for i, a in enumerate(ANSWERS)]
    good = Reader(family, right=True)
    told = "gold responses" if gold else "its own greedy replies"
    found = doctor_model.preference(good, prompts, family, 24)
    assert found == f"{told}: a record's own before another's in 4 of 4, by 1.50 nats a token on average"
    assert bool(good.asked) != gold
    with pytest.raises(UserError, match="own before another's in 0 of 4, by 0.00 .*75% at least expected"):
        doctor_model.preference(Reader(family, right=False), prompts, family, 24)


def test_records_that_all_have_one_response_say_nothing(family: Any) -> None:
    prompts = [Prompt(str(i), (), response="three.") for i in range(3)]
    with pytest.raises(Skip, match="the 3 records have no two different responses"):
        doctor_model.preference(Reader(family, right=True), prompts, family, 24)
