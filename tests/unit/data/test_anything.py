"""Whatever text and whatever bytes: commands end well, or with one line; no record is lost without a word."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from fake_openai import FakeOpenAI, Reply, serving, tone
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from opd.cli import main
from opd.scoring.answers import MATCHES, check_answer, choice_of, correct, number_of
from opd.types import Prompt

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]
RATE, SECONDS = 16000, 1.5
KINDS = ("wav", "w64", "aiff", "au", "flac", "ogg", "mp3", "m4a", "webm", "caf")
COMPARED = ("exact", "regex", "choice", "number", "tokens")  # by no judge
CODECS = {"mp3": "libmp3lame", "m4a": "aac", "webm": "libopus"}

# all planes, halves of surrogate pairs too, and what means something to somebody
WORDS = ["<|im_end|>", "<|AUDIO|>", "\ufeff", "\u200b", "\u0928\u093f", "12 + 7", "1.000,5", "\x00", "\r\n"]
HALVES = st.text(st.characters(categories=("Cs",)), max_size=2)
TEXT = st.lists(st.text(max_size=12) | HALVES | st.sampled_from(WORDS), max_size=5).map("".join)
VALUE = TEXT | st.none() | st.integers() | st.floats() | st.lists(TEXT, max_size=2) | st.booleans()
FIELDS = ("transcript", "id", "answer", "match", "choices", "response", "group", "tolerance", "audio", "messages")
RECORD = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, VALUE))
quick = settings(
    max_examples=int(os.environ.get("OPD_EXAMPLES", 10)),
    deadline=None,
    derandomize="OPD_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


def spoken(kind: str) -> bytes:
    """A second and a half of sound as a file of a kind."""
    wave = np.random.default_rng(0).uniform(-0.3, 0.3, int(RATE * SECONDS)).astype(np.float32)
    out = io.BytesIO()
    if kind not in CODECS:
        soundfile.write(out, wave, RATE, format=kind.upper())
        return out.getvalue()
    out.name = f"clip.{kind}"
    with av.open(out, "w") as container:
        stream: Any = container.add_stream(CODECS[kind], rate=48000, layout="mono")
        resampler = av.AudioResampler(stream.format, "mono", 48000, stream.frame_size or 960)
        frame = av.AudioFrame.from_ndarray(wave[None], "flt", "mono")
        frame.sample_rate = RATE
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return out.getvalue()


FILES = {kind: spoken(kind) for kind in KINDS}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file whose header was changed, that was cut, or both; or any bytes under its name."""
    kind = draw(st.sampled_from(KINDS))
    whole = bytearray(FILES[kind])
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=4)):
        whole[at] = byte
    cut = draw(st.none() | st.integers(0, len(whole)))
    return kind, draw(st.binary(max_size=200)) if draw(st.integers(0, 9)) == 0 else bytes(whole[:cut])


def ends(capsys: pytest.CaptureFixture[str], *command: str) -> int:
    """Run a command, which must end well or with one line. An exception fails the test by itself."""
    code = main(list(command))
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("opd: error: ")]
    assert "Traceback" not in said.err and (code, len(errors)) in ((0, 0), (2, 1)), said.err
    return code


def check(capsys: pytest.CaptureFixture[str], folder: Path, manifest: Path) -> int:
    os.chdir(ROOT)
    own = ["student.path=recipes/tiny/student", "objective.name=sft", "objective.advantage_clip=", "teacher.path="]
    own += ["rollout.source=dataset", "eval.test=", "eval.retention=", "data.max_bad_share=1", f"run.dir={folder}/run"]
    return ends(capsys, "check", "recipes/tiny/2_xopd.yaml", f"data.train={manifest}", *own)


def kept(out: Path) -> list[int]:
    """How many records a stage wrote, and how many it dropped."""
    dropped = out.with_suffix(".stage") / "dropped.jsonl"
    return [len(f.read_text().splitlines()) if f.is_file() else 0 for f in (out, dropped)]


@quick
@given(st.lists(damaged(), min_size=1, max_size=8))
def test_recordings(tmp_path_factory: Any, capsys: pytest.CaptureFixture[str], files: list[tuple[str, bytes]]) -> None:
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i, (kind, content) in enumerate(files):
        (folder / f"clips/{i}.{kind}").parent.mkdir(exist_ok=True)
        (folder / f"clips/{i}.{kind}").write_bytes(content)
        (folder / f"clips/{i}.txt").write_text("what is one and two")
        rows.append({"audio": f"clips/{i}.{kind}", "transcript": "what is one and two", "response": "three"})
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = folder / "out/m.jsonl"
    code = ends(capsys, "data", "natural", str(folder / "clips"), "--out", str(out))
    written, dropped = kept(out)
    assert written + dropped == len(files) if code == 0 else written == 0
    check(capsys, folder, folder / "m.jsonl")
    ends(capsys, "data", "card", str(folder / "m.jsonl"), "--out", str(folder / "card"))


@quick
@given(st.lists(RECORD, min_size=1, max_size=5))
def test_records(tmp_path_factory: Any, capsys: pytest.CaptureFixture[str], records: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.wav").write_bytes(FILES["wav"])
    rows = [{"audio": "a.wav", "transcript": "one", "response": "two"} | r for r in records]
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    check(capsys, folder, folder / "m.jsonl")
    ends(capsys, "data", "card", str(folder / "m.jsonl"), "--out", str(folder / "card"))
    ends(capsys, "data", "prompts", str(folder / "m.jsonl"), "--out", str(folder / "p/m.jsonl"), "mapping=text")


@quick
@given(st.lists(TEXT, min_size=1, max_size=6), st.lists(TEXT, min_size=6, max_size=6))
def test_texts(tmp_path_factory: Any, capsys: pytest.CaptureFixture[str], texts: list[str], heard: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "lines.txt").write_bytes("\n".join(texts).encode(errors="surrogatepass"))
    ends(capsys, "data", "prompts", str(folder / "lines.txt"), "--out", str(folder / "p/m.jsonl"), "mapping=text")
    rows = []
    for i, text in enumerate(texts):
        (folder / f"{i}.wav").write_bytes(tone(0.5 + i / 10, rate=RATE, channels=1))
        (folder / f"{i}.txt").write_bytes(text.encode(errors="surrogatepass"))
        rows.append({"id": str(i), "audio": f"{i}.wav", "transcript": text})
    ends(capsys, "data", "natural", str(folder), "--out", str(folder / "n/m.jsonl"), "min_seconds=0.1")
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = {(folder / f"{i}.wav").read_bytes(): heard[i] for i in range(len(texts))}
    with serving(FakeOpenAI(lambda call: Reply({"text": said[call.body["file"]]}))) as recogniser:
        asr = f'asr={{"url": "{recogniser.url}", "model": "whisper", "retries": 1}}'
        ends(capsys, "data", "verify", str(folder / "m.jsonl"), "--out", str(folder / "v/m.jsonl"), asr)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXT, TEXT, st.lists(TEXT, max_size=4), st.sampled_from(MATCHES))
def test_answers(said: str, answer: str, choices: list[str], match: Any) -> None:
    number_of(said), choice_of(said, choices)
    try:
        check_answer(answer, match, [*choices, answer])
    except ValueError:
        return
    prompt = Prompt("p", ({"role": "user", "content": "q"},), answer=answer, match=match, choices=(*choices, answer))
    if match in COMPARED:
        assert correct(prompt, said) in (True, False)
