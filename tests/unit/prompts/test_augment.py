"""What training hears: each effect by what it does to a signal, and the draws by what they depend on."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from opd.cli import main
from opd.config.load import load_config
from opd.config.schema import AugmentConfig
from opd.prompts.augment import PEAK, Augmenter
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import PromptStream, read_manifest
from opd.settings import UserError, validated
from opd.train import loop as train
from opd.train.verdict import Verdict
from opd.types import audio_paths

RATE = 16000
RECIPE = str(Path(__file__).parents[3] / "recipes/tiny/2_xopd.yaml")


def tone(hertz: float, seconds: float = 1.0, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def augmenter(seed: int = 0, **effects: dict) -> Augmenter:
    return Augmenter(AugmentConfig(**effects), seed, RATE)


def power(wave: np.ndarray, low: float, high: float) -> float:
    """Decibels within a band."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    at = np.fft.rfftfreq(len(wave), 1 / RATE)
    return float(10 * np.log10(spectrum[(at >= low) & (at < high)].sum() + 1e-12))


def test_without_effects_a_clip_is_what_it_was() -> None:
    wave, told = augmenter()(tone(440), "a.wav", 0)
    assert told == [] and np.array_equal(wave, tone(440))


def test_a_clip_depends_on_seed_name_and_epoch_alone() -> None:
    change = augmenter(noise={"share": 1.0, "range": [5.0, 25.0]}, reverb={"share": 0.5, "range": [0.1, 0.5]})
    first = change(tone(440), "a.wav", 0)[0]
    change(tone(300), "b.wav", 7)
    assert np.array_equal(first, change(tone(440), "a.wav", 0)[0])
    for other in (change(tone(440), "a.wav", 1), change(tone(440), "b.wav", 0)):
        assert not np.array_equal(first, other[0])
    again = augmenter(1, noise={"share": 1.0, "range": [5.0, 25.0]}, reverb={"share": 0.5, "range": [0.1, 0.5]})
    assert not np.array_equal(first, again(tone(440), "a.wav", 0)[0])


def test_an_effect_is_heard_as_often_as_asked_and_moves_no_other() -> None:
    alone = augmenter(clipping={"share": 0.3, "range": [3.0, 6.0]})
    both = augmenter(clipping={"share": 0.3, "range": [3.0, 6.0]}, telephone={"share": 0.5})
    names = [f"{i}.wav" for i in range(400)]
    wave = tone(440, 0.05)
    told = [[t for t in change(wave, n, 0)[1] if "clip" in t] for n in names for change in (alone,)]
    assert told == [[t for t in both(wave, n, 0)[1] if "clip" in t] for n in names]
    assert sum(map(bool, told)) / 400 == pytest.approx(0.3, abs=0.07)  # three standard errors


def test_speed_shortens_and_raises_the_pitch() -> None:
    wave, told = augmenter(speed={"share": 1.0, "range": [1.25, 1.25]})(tone(440), "a", 0)
    assert len(wave) == RATE * 100 // 125 and told == ["speed × 1.25"]
    peak = np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * RATE / len(wave)
    assert peak == pytest.approx(550, abs=2)


@pytest.mark.parametrize("files", [False, True])
def test_noise_lies_as_far_below_the_speech_as_asked(tmp_path: Path, files: bool) -> None:
    recording = np.random.default_rng(0).uniform(-0.3, 0.3, 5000).astype(np.float32)
    soundfile.write(tmp_path / "hum.wav", recording, RATE)
    noise = {"share": 1.0, "range": [12.0, 12.0]} | ({"files": str(tmp_path)} if files else {})
    speech = tone(440, level=0.2)
    heard, told = augmenter(noise=noise)(speech, "a", 0)
    added = heard - speech
    assert 10 * np.log10((speech**2).sum() / (added**2).sum()) == pytest.approx(12, abs=0.01)
    assert told == ["noise 12 dB below"]
    if not files:  # pink: an octave is as strong as the next
        assert power(added, 500, 1000) == pytest.approx(power(added, 2000, 4000), abs=1.5)


def test_reverberation_falls_by_60_decibels_in_its_time() -> None:
    impulse = np.zeros(RATE, np.float32)
    impulse[0] = 0.5
    heard, _ = augmenter(reverb={"share": 1.0, "range": [0.4, 0.4]})(impulse, "a", 0)
    assert len(heard) == RATE
    tail = heard[32:].astype(np.float64) ** 2
    left = 10 * np.log10(np.cumsum(tail[::-1])[::-1] / tail.sum() + 1e-20)  # Schroeder's backward integration
    at = [int(np.argmax(left < level)) / RATE for level in (-5, -25)]
    assert 3 * (at[1] - at[0]) == pytest.approx(0.4, rel=0.1)
    assert tail.sum() / float(heard[0]) ** 2 == pytest.approx(0.5, rel=1e-3)


def test_clipping_cuts_the_peaks_off() -> None:
    heard, _ = augmenter(clipping={"share": 1.0, "range": [6.0, 6.0]})(tone(440, level=0.8), "a", 0)
    level = 0.8 * 10 ** (-6 / 20)
    assert np.abs(heard).max() == pytest.approx(level, abs=1e-6)
    assert np.isclose(np.abs(heard), level).mean() == pytest.approx(2 / np.pi * np.arccos(10 ** (-6 / 20)), abs=0.01)


def test_a_telephone_line_keeps_its_band() -> None:
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    heard, _ = augmenter(telephone={"share": 1.0})(noise, "a", 0)
    assert len(heard) == len(noise)
    inside = power(heard, 1000, 2000)
    assert inside == pytest.approx(power(noise, 1000, 2000), abs=1)
    assert power(heard, 4500, 8000) < inside - 30 and power(heard, 20, 100) < inside - 20


def test_nothing_gets_louder_than_full_scale() -> None:
    heard, _ = augmenter(noise={"share": 1.0, "range": [0.0, 0.0]})(tone(440, level=0.99), "a", 0)
    assert np.abs(heard).max() <= PEAK and heard.dtype == np.float32


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        ({"speed": {"share": 0.5, "range": [1.1, 0.9]}}, "expected [lowest, highest]"),
        ({"speed": {"share": 0.5, "range": [0.1, 1.0]}}, "speed.range: expected values from 0.5 to 2"),
        ({"reverb": {"share": 1.5}}, "reverb.share"),
        ({"reverb": {"share": 0.5}}, "reverb.range is required"),
        ({"echo": {"share": 0.5}}, "unknown key echo"),
    ],
)
def test_settings_that_cannot_be(effects: dict, message: str) -> None:
    with pytest.raises(UserError, match="recipe") as e:
        validated(AugmentConfig, effects, "recipe")
    assert message in str(e.value)


def test_a_folder_without_noise_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.augment.noise.files .* expected a folder with"):
        augmenter(noise={"share": 1.0, "range": [5.0, 5.0], "files": str(tmp_path)})


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two clips, the second almost as long as is allowed."""
    for name, seconds in (("a", 1.0), ("b", 1.95)):
        soundfile.write(tmp_path / f"{name}.wav", tone(440, seconds), RATE)
    records = [{"id": n, "audio": f"{n}.wav", "transcript": n} for n in "ab"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "m.jsonl"


def loader(manifest: Path, seed: int = 0) -> ClipLoader:
    slow = ["data.augment.speed.share=1.0", "data.augment.speed.range=[0.8, 0.8]"]
    more = [
        f"data.train={manifest}",
        f"run.seed={seed}",
        f"run.dir={manifest.parent}/run",
        "data.max_audio_seconds=2.0",
    ]
    return ClipLoader(load_config(RECIPE, [*more, *slow]), RATE, 2)


def test_training_clips_are_changed_and_evaluated_ones_are_not(manifest: Path) -> None:
    prompts, _ = read_manifest(str(manifest))
    first, second = (loader(manifest).load(p) for p in prompts)
    assert first is not None and second is not None
    assert len(next(iter(first.values()))) == RATE
    kept, heard = loader(manifest).load_batch(list(enumerate(prompts)), prompts, epoch=0)
    assert [len(heard[audio_paths(p)[0]]) for _, p in kept] == [RATE * 100 // 80, int(1.95 * RATE)]
    assert len(kept) == 2  # the second would be too long at that speed: it stays as it is


NOISE = "data.augment={noise: {share: 1.0, range: [0, 30]}}"


def test_records_that_share_a_clip_hear_it_apart(manifest: Path) -> None:
    part = {"type": "audio", "path": "a.wav", "transcript": "x"}
    rows = [{"id": i, "messages": [{"role": "user", "content": [part] * n}]} for i, n in (("p", 2), ("q", 1))]
    rows += [{"audio": "a.wav", "transcript": "y"}]

    def heard(folder: Path, order: int) -> dict[str, list[np.ndarray]]:
        """By id, or line where a record has none; the record takes what is its own, alone or in a batch."""
        file = folder / "shared.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        prompts, bad = read_manifest(str(file))
        assert not bad
        config = load_config(RECIPE, [f"data.train={file}", f"run.dir={folder}/run", NOISE])
        kept, clips = ClipLoader(config, RATE, 3).load_batch(list(enumerate(prompts[::order])), prompts, epoch=1)
        return {p.id.rpartition(":")[2]: [clips[k] for k in audio_paths(p)] for _, p in kept}

    found = heard(manifest.parent, 1)
    assert {k: len(v) for k, v in found.items()} == {"p": 2, "q": 1, "3": 1}
    four = [wave for waves in found.values() for wave in waves]
    assert all(not np.array_equal(a, b) for i, a in enumerate(four) for b in four[:i])
    elsewhere = manifest.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.wav").write_bytes((manifest.parent / "a.wav").read_bytes())
    again = heard(elsewhere, -1)
    assert all(np.array_equal(a, b) for k in found for a, b in zip(found[k], again[k], strict=True))


def test_the_listening_page_has_an_epoch_of_its_own_for_each(manifest: Path) -> None:
    page = manifest.parent / "listen.html"
    more = [f"data.train={manifest}", f"run.dir={manifest.parent}/run", NOISE]
    assert main(["data", "listen", RECIPE, *more, "--out", str(page), "--epochs", "2"]) == 0
    told = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text())
    sounds = re.findall(r"base64,([^']*)'", page.read_text())
    prompts, _ = read_manifest(str(manifest))
    config = load_config(RECIPE, more)
    for prompt in prompts:
        clips = [ClipLoader(config, RATE, 2).load(prompt, epoch) for epoch in (0, 1)]
        (first,), (second,) = ((*c.values(),) for c in clips if c is not None)
        at = next(i for i, s in enumerate(sounds) if played(s, first))
        assert told[at].startswith("epoch 1: noise") and told[at + 1].startswith("epoch 2: noise")
        assert told[at].partition("noise")[2] != told[at + 1].partition("noise")[2]  # so many dB
        assert played(sounds[at + 1], second) and not played(sounds[at + 1], first)


def played(sound: str, wave: np.ndarray) -> bool:
    """Whether a player has a waveform, within the error of 16 bits."""
    found, _ = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
    return len(found) == len(wave) and bool(np.abs(found - wave).max() < 1e-4)


def test_training_hears_the_epoch_of_its_step(manifest: Path) -> None:
    prompts, _ = read_manifest(str(manifest))
    heard: list[int | None] = []

    def load_batch(batch: list, spare: list, epoch: int | None = None) -> None:
        heard.append(epoch)
        raise InterruptedError

    def start(step: int) -> None:
        parts = SimpleNamespace(
            config=load_config(RECIPE, []),
            learner=SimpleNamespace(rank=0, world=1),
            teacher=None,
            stream=PromptStream(prompts, 2, 0),
            clips=SimpleNamespace(load_batch=load_batch, bad={}),
            verdict=Verdict(),
        )
        with pytest.raises(InterruptedError):
            train.loop(parts, step)  # type: ignore[arg-type]

    for step in range(3):
        start(step)
    assert heard == [0, 1, 2]


def test_the_epoch_of_a_batch_is_that_of_its_first_prompt(manifest: Path) -> None:
    prompts, _ = read_manifest(str(manifest))
    stream = PromptStream(prompts * 5, 4, 0)
    assert [stream.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_the_listening_page_plays_what_training_hears(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = manifest.parent / "listen.html"
    effects = "data.augment={speed: {share: 1.0, range: [0.8, 0.8]}}"
    more = [f"data.train={manifest}", f"run.dir={manifest.parent}/run", "data.max_audio_seconds=2.0", effects]
    assert main(["data", "listen", RECIPE, *more, "--out", str(page), "--epochs", "2"]) == 0
    assert f"wrote {page}: 2 records" in capsys.readouterr().out
    told = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text())
    slow, stays = "speed × 0.80, 1.25 s", "left as it is: it would get too long, 1.95 s"
    one, other = (
        ["as it is, 1.00 s", f"epoch 1: {slow}", f"epoch 2: {slow}"],
        ["as it is, 1.95 s", f"epoch 1: {stays}", f"epoch 2: {stays}"],
    )
    assert told in (one + other, other + one)
    sounds = re.findall(r"base64,([^']*)'", page.read_text())
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[told.index(f"epoch 1: {slow}")])))
    assert (len(wave), rate) == (RATE * 100 // 80, RATE)
