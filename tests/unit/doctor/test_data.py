"""The doctor's checks of manifests and prompts."""

from __future__ import annotations

from pathlib import Path

from doctor_world import ASKED, facts_of, lines, world, write

__all__ = ["world"]  # a fixture


def test_records_are_weighed_by_a_number_above_0(world: Path) -> None:
    good = [{"audio": f"{i}.wav", "transcript": t, "weight": 1 - i / 9} for i, t in enumerate(ASKED)]
    write(world, good)
    assert lines(facts_of(world, "data.weight=weight"))["manifests"].outcome == "pass"
    for bad, found in (({"weight": 0}, "found 0.0"), ({"weight": "x"}, "found 'x'"), ({}, "the record has none")):
        write(world, [*good[:1], {"audio": "1.wav", "transcript": ASKED[1], **bad}])
        told = lines(facts_of(world, "data.weight=weight"))["manifests"]
        assert told.outcome == "FAIL"
        assert f"train.jsonl:2: expected a number above 0 by the name 'weight', {found}" in told.found


def test_ids_that_are_numbers_are_told_and_others_refused(world: Path) -> None:
    rows = [{"audio": f"{i}.wav", "transcript": t, "id": 10 + i} for i, t in enumerate(ASKED)]
    write(world, rows)
    told = lines(facts_of(world))["manifests"]
    assert told.outcome == "pass" and f"{len(rows)} ids are numbers, taken as text, such as '10'" in told.found
    write(world, [*rows[:1], {**rows[1], "id": ["1"]}])
    told = lines(facts_of(world))["manifests"]
    assert told.outcome == "FAIL" and "train.jsonl:2: id: expected a string or a number, found list" in told.found


def test_held_out_records_need_an_answer_and_no_response(world: Path) -> None:
    held_out = f"eval.test={world}/train.jsonl"
    write(world, [{"audio": "0.wav", "transcript": ASKED[0], "answer": "three."}])
    assert lines(facts_of(world, held_out))["manifests"].outcome == "pass"
    told = lines(facts_of(world, held_out, "eval.every=1", "eval.best=misalignment"))["manifests"]
    assert told.outcome == "FAIL" and "eval.best misalignment: follows gold responses, and no record of" in told.found
    write(world, [{"audio": "0.wav", "transcript": ASKED[0], "response": "three."}])
    told = lines(facts_of(world, held_out))["manifests"]
    assert "train.jsonl:1: an evaluation needs an `answer`, the record lacks one" in told.found


def test_prompts_without_room_are_counted_and_refused(world: Path) -> None:
    longest = int(lines(facts_of(world))["clips"].found.partition("at most ")[2].split()[0])
    short = f"rollout.server.max_model_len={longest + 23}"
    found = lines(facts_of(world, short))["clips"]
    assert found.outcome == "FAIL" and f"its {longest} prompt ids and rollout.max_tokens=24 do not fit" in found.found
    facts = facts_of(world, short, "data.max_bad_share=0.3")
    found = lines(facts)["clips"]
    assert found.outcome == "pass" and "4 of 4 decoded, 1 bad, 1 of them too long" in found.found
    assert len(facts.records) == 3
    found = lines(facts_of(world, "data.max_audio_seconds=1.4", "data.max_bad_share=0.5"))["clips"]
    assert "2 bad, 2 of them too long" in found.found
