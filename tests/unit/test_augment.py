"""What training hears: each effect by what it does to a signal, and the draws by what they depend on."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from opd.augment import PEAK, AugmentConfig, Augmenter
from opd.cli import main
from opd.clips import ClipLoader
from opd.config import load_config
from opd.prompts import PromptStream, read_manifest
from opd.settings import UserError, validated

RATE = 16000
RECIPE = str(Path(__file__).parents[2] / "recipes/tiny/2_xopd.yaml")


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
    assert [len(heard[str(manifest.parent / f"{n}.wav")]) for n in "ab"] == [RATE * 100 // 80, int(1.95 * RATE)]
    assert len(kept) == 2  # the second would be too long at that speed: it stays as it is


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
