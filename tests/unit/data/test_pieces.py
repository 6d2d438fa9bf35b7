"""Long recordings: transcripts with times, and pieces cut at silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from natural_data import RATE, SRT, noise, run, save

from opd.data.stages.recordings import Segment, pieces, read_segments


def test_transcripts_with_times(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text(SRT)
    expected = [Segment(0, 2, "one"), Segment(2, 4, "two and a half"), Segment(5, 7.5, "three")]
    assert read_segments(tmp_path / "a.srt") == expected
    (tmp_path / "a.vtt").write_text("WEBVTT\n\n" + SRT.replace(",", ".").replace("00:00:", "00:").replace("1\n", "", 1))
    assert read_segments(tmp_path / "a.vtt") == expected
    (tmp_path / "a.json").write_text(json.dumps({"segments": [{**s._asdict(), "tokens": []} for s in expected]}))
    assert read_segments(tmp_path / "a.json") == expected
    for text, why in (
        ('{"segments": [{"start": 0}]}', "expected"),
        ('{"segments": []}', "holds no text"),
        ('{"segments": [{"start": 3, "end": 1, "text": "x"}]}', "times are not in order"),
        ('{"segments": [{"start": NaN, "end": 1, "text": "x"}]}', "times are not in order"),
        ("[", "Expecting"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            read_segments(tmp_path / "a.json")


def test_pieces_are_as_few_as_fit() -> None:
    segments = [Segment(i * 2.0, i * 2.0 + 1.6, f"w{i}") for i in range(6)]

    def pause(a: Segment, b: Segment) -> tuple[float, float] | None:
        return None if a.text == "w3" else (a.end, b.start)

    found = list(pieces(segments, 12.0, 5.0, pause))
    assert [p.text for p in found] == ["w0 w1", "w2", "w3 w4", "w5"]  # w3 and w4 cannot be cut apart
    ends = [(round(p.start, 6), round(p.end, 6)) for p in found]
    assert ends == [(0, 3.8), (3.8, 5.8), (5.8, 9.8), (9.8, 11.8)]
    assert [p.text for p in pieces(segments, 12.0, 60.0, pause)] == ["w0 w1 w2 w3 w4 w5"]
    assert [p.text for p in pieces(segments, 12.0, 5.0, lambda a, b: None)] == ["w0 w1 w2 w3 w4 w5"]


def test_long_recordings_are_cut_at_silence(tmp_path: Path) -> None:
    # speech 0-2, hiss 2-3, speech 3-5, a breath too short to cut in, speech 5.1-7, silence 7-9, speech 9-10
    hiss = noise(1, 9, 0.001)
    parts = [noise(2, 1), hiss, noise(2, 2), hiss[:800], noise(1.9, 3), np.zeros(2 * RATE, np.float32), noise(1, 4)]
    wave = np.concatenate(parts)
    source = tmp_path / "in"
    save(source / "talk.flac", wave)
    times = [(0.1, 2.2, "one"), (2.8, 5.0, "two"), (5.0, 7.3, "three"), (8.9, 10.0, "four")]  # as a recogniser has them
    told = {"segments": [{"start": a, "end": b, "text": t} for a, b, t in times]}
    (source / "talk.json").write_text(json.dumps(told))
    save(source / "drone.wav", noise(6, 5))
    (source / "drone.srt").write_text(SRT)
    save(source / "brief.wav", noise(3, 6))
    (source / "brief.srt").write_text(SRT)
    summary, rows, dropped = run(source, tmp_path / "m.jsonl", max_seconds=5.0)
    assert [(r["id"], r["text"]) for r in rows] == [
        ("brief", "one two and a half three"),
        ("talk/1", "one"),
        ("talk/2", "two three"),
        ("talk/3", "four"),
    ]
    assert [r["seconds"] for r in rows[1:]] == pytest.approx([2.2, 0.2 + 4 + 0.2, 0.2 + 1], abs=0.03)
    second, _ = soundfile.read(rows[2]["path"], dtype="float32")
    assert _found(second, wave)
    assert summary.dropped == {"too long": 1} and "drone.wav" in dropped[0] and "no silence to cut at" in dropped[0]
    longer = run(source, tmp_path / "m.jsonl", max_seconds=5.0, pause_s=1.5)
    assert [r["text"] for r in longer[1]] == ["one two and a half three", "four"]  # one two three is 7.2 s in one


@pytest.mark.parametrize(("below", "cut"), [(22, False), (28, True)])
def test_silence_is_25_decibels_below_the_speech(tmp_path: Path, below: float, cut: bool) -> None:
    hum = noise(1, 9, 0.2 * 10 ** (-below / 20))
    save(tmp_path / "in" / "talk.wav", np.concatenate([noise(2, 1), hum, noise(2, 2)]))
    told = [{"start": 0.0, "end": 2.0, "text": "one"}, {"start": 3.0, "end": 5.0, "text": "two"}]
    (tmp_path / "in" / "talk.json").write_text(json.dumps({"segments": told}))
    save(tmp_path / "in" / "other.wav", noise(1, 3))
    (tmp_path / "in" / "other.txt").write_text("other")
    _, rows, dropped = run(tmp_path / "in", tmp_path / "m.jsonl", max_seconds=4.0)
    assert [r["text"] for r in rows] == ["other", *(["one", "two"] if cut else [])]
    assert [d.partition(":")[0] for d in dropped] == ([] if cut else ["too long"])


def _found(piece: np.ndarray, wave: np.ndarray) -> bool:
    """Whether a piece is a stretch of the recording, within the error of 16 bits."""
    starts = np.arange(int(2.6 * RATE), int(3.0 * RATE))
    return any(np.abs(wave[s : s + len(piece)] - piece).max() < 1e-4 for s in starts)
