"""Every container is heard as it is, and refused where something of it is missing."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from sound_files import BY_FFMPEG, BY_SOUNDFILE, RATE, SECONDS, encoded, speech, wav

from opd.prompts import audio
from opd.types import BadAudio, TooLong

KINDS = [*BY_SOUNDFILE, *BY_FFMPEG]
WAVE = speech()
FILES: dict[str, bytes] = {}
PCM = (WAVE * 32767).astype("<i2").tobytes()


def file(kind: str) -> bytes:
    return FILES.setdefault(kind, encoded(kind, WAVE))


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_is_heard_whole(kind: str, tmp_path: Path) -> None:
    sound = audio.read(file(kind))
    assert sound.wave.dtype == np.float32 and sound.wave.shape[1] == 1
    padded = 0.2 if kind in ("mka", "fragments", "aac", "bare mp3", "m4a", "moov last") else 0.05  # by the encoder
    assert sound.seconds == pytest.approx(SECONDS, abs=padded) and audio.seconds(file(kind)) == pytest.approx(
        sound.seconds
    )
    path = tmp_path / "named.WAV"  # the bytes decide, not the name
    path.write_bytes(file(kind))
    assert np.array_equal(audio.read(path).wave, sound.wave)
    level = float(np.sqrt((sound.wave**2).mean()))
    assert level == pytest.approx(float(np.sqrt((WAVE**2).mean())), rel=0.6)  # noise is hard on speech codecs


@pytest.mark.parametrize("kind", [*[*BY_SOUNDFILE][:4], "rf64", "w64", "aiff", "au", "caf", "sph", "flac"])
def test_samples_are_what_libsndfile_takes_them_for(kind: str) -> None:
    expected, rate = soundfile.read(io.BytesIO(file(kind)), dtype="float32", always_2d=True)
    assert np.array_equal(audio.read(file(kind)).wave, expected) and rate == RATE


UNTOLD = ("bare mp3", "live webm", "fragments", "aac", "amr")  # nothing tells how long they are meant to be
CUT = [(kind, share) for kind in KINDS for share in (0.9, 0.5, 0.1) if kind not in UNTOLD]
CUT += [(kind, 0.999) for kind in BY_SOUNDFILE if kind != "mp3"]


@pytest.mark.parametrize(("kind", "share"), CUT)
def test_what_is_cut_off_is_refused(kind: str, share: float) -> None:
    cut = file(kind)[: int(share * len(file(kind)))]
    with pytest.raises(BadAudio, match=r"x: (truncated|not readable as audio \(Invalid data)"):
        audio.read(cut, "x")
    with pytest.raises(BadAudio, match="x: "):
        audio.seconds(cut, "x")


def refused(content: bytes, why: str) -> None:
    with pytest.raises(BadAudio, match=f"x: {why}"):
        audio.read(content, "x")


def test_an_mp3_that_ends_amid_a_frame_or_in_its_second_part_is_refused() -> None:
    bare, whole = file("bare mp3"), file("mp3")
    refused(bare[: len(bare) // 2 + 30], "truncated: ends amid a frame")
    refused(bare[:-20] + b"TAG" + bytes(125), "truncated")
    refused(whole + whole[:-1], "truncated")
    with av.open(io.BytesIO(whole)) as container:
        frames = [packet.pos for packet in container.demux(audio=0) if packet.size]
    refused(whole + whole[: frames[-3]], "truncated: .* s declared")
    assert audio.seconds(bare + b"TAG" + bytes(125)) == audio.seconds(bare)


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_every_page_of_an_ogg_file_is_asked_for(kind: str) -> None:
    whole = encoded(kind, speech(3.0))
    refused(whole[: len(whole) // 3] + whole[len(whole) // 2 :], "truncated or damaged: pages")
    refused(whole[: len(whole) // 2] + whole, "truncated or damaged: pages")
    assert audio.seconds(whole * 2) == pytest.approx(6.0, abs=0.1)


def test_a_cut_alac_is_refused_and_a_form_of_another_kind() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format="CAF", subtype="ALAC_16")
    assert audio.seconds(buffer.getvalue()) == SECONDS
    refused(buffer.getvalue()[:-3], "truncated: 16000 frames declared, 12288 found")
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, RATE, format="SVX", subtype="PCM_16")
    refused(buffer.getvalue()[:-2000], "not readable as audio")


@pytest.mark.parametrize("declared", [0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x7FFFF000])
def test_an_unknown_size_means_what_is_there(declared: int) -> None:
    sound = audio.read(wav(PCM, declared, riff=0xFFFFFFFF))
    assert np.array_equal(sound.wave, audio.read(wav(PCM, len(PCM))).wave)


@pytest.mark.parametrize("riff", [0, 36, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_the_data_chunk_decides_never_the_files_size(riff: int) -> None:
    assert audio.read(wav(PCM, len(PCM), riff)).seconds == SECONDS
    assert audio.read(wav(PCM, len(PCM) // 2, riff, after=b"LIST\0\0\0\0")).seconds == SECONDS / 2
    with pytest.raises(BadAudio, match=f"x: truncated: {2 * len(PCM)} bytes declared, {len(PCM)} found"):
        audio.read(wav(PCM, 2 * len(PCM), riff), "x")


def test_an_mp3_without_an_info_frame_and_joined_ones_are_read_to_the_end() -> None:
    whole = encoded("mp3", np.concatenate([np.zeros(RATE, np.float32), WAVE]))  # its first frames are small
    with av.open(io.BytesIO(whole)) as container:
        bare = whole[next(container.demux(audio=0)).pos :]
    assert audio.read(bare).seconds == pytest.approx(1 + SECONDS, abs=0.2)
    assert audio.seconds(whole * 2) == pytest.approx(2 * (1 + SECONDS), abs=0.3)
    tagged = b"ID3\4\0\0\0\0\0\x0b" + b"TSSE\0\0\0\1\0\0\3" + file("bare mp3")
    assert audio.seconds(tagged * 2) == pytest.approx(2 * SECONDS, abs=0.5)
    assert audio.seconds(whole + bytes(3000)) == pytest.approx(audio.seconds(whole), abs=0.1)
    with pytest.raises(BadAudio, match="x: truncated or damaged after"):
        audio.read(file("bare mp3") + bytes(3000), "x")  # which may be what has not arrived


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "mp3", "m4a", "webm", "live webm", "mka"])
def test_a_hole_in_the_middle_is_refused(kind: str) -> None:
    whole = encoded(kind, speech(6.0))
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(1500) + whole[middle + 1500 :]
    with pytest.raises(BadAudio, match="x: (truncated|damaged)"):
        audio.read(damaged, "x")


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "bare mp3", "ogg", "opus", "m4a", "webm", "live webm", "aac"])
def test_a_piece_is_that_part_of_the_whole(kind: str) -> None:
    long = encoded(kind, speech(8.0, 1))
    whole, piece = audio.read(long), audio.read(long, "", 4.25, 5.5)
    assert piece.seconds == pytest.approx(1.25, abs=0.002)
    first = int(4.25 * whole.rate)
    lags = range(-whole.rate // 500, whole.rate // 500 + 1)  # containers count milliseconds
    inner = piece.wave[100:-100]
    errors = [np.abs(whole.wave[first + lag + 100 :][: len(inner)] - inner).mean() for lag in lags]
    assert min(errors) < 0.01
    with pytest.raises(TooLong, match="x: 8.* s long, at most 3 s expected"):
        audio.read(long, "x", most=3)


def test_another_scale_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, WAVE * 32768, RATE, subtype="FLOAT")
    with pytest.raises(BadAudio, match=r"x.wav: samples up to \d+ in a float file: expected within ±1"):
        audio.load(str(path), RATE, 30)
    soundfile.write(path, WAVE * 5, RATE, subtype="FLOAT")
    assert np.array_equal(audio.load(str(path), RATE, 30), WAVE * 5)


def test_odd_rates_are_resampled_in_little_memory(tmp_path: Path) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(22257) / 22257).astype(np.float32) / 2
    soundfile.write(tmp_path / "x.wav", tone, 22257, subtype="FLOAT")
    heard = audio.load(str(tmp_path / "x.wav"), 16000, 30)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    assert len(heard) == 16000 and np.abs(heard - expected)[200:-200].max() < 1e-3
    soundfile.write(tmp_path / "x.wav", np.tile(tone, 10), 1_000_000)
    with pytest.raises(BadAudio, match="sampled at 1000000 Hz, 1000 to 768000 expected"):
        audio.load(str(tmp_path / "x.wav"), 16000, 30)


def test_silence_is_what_does_not_change(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.full(RATE, 0.25, np.float32), RATE)
    with pytest.raises(BadAudio, match="x.wav: silent"):
        audio.load(str(tmp_path / "x.wav"), RATE, 30)


@pytest.mark.parametrize(("second", "left"), [(-0.9 * WAVE, True), (WAVE, False), (0 * WAVE, False)])
def test_channels_that_cancel_each_other_are_heard_by_the_loudest(second: np.ndarray, left: bool) -> None:
    both = np.stack([WAVE, second], 1)
    assert np.array_equal(audio.mono(both), WAVE if left else both.mean(axis=1))
    shifted = both + np.float32(0.1)  # a constant in both is no sound of either
    assert np.array_equal(audio.mono(shifted), shifted[:, 0] if left else shifted.mean(axis=1))


@pytest.mark.parametrize("content", [b"x", b"RIFF", b"ID3", b"OggS", b"fLaC", b"#EXTM3U\n/etc/passwd\n", b"ffconcat"])
def test_what_is_no_sound_is_refused_in_one_line(content: bytes) -> None:
    for junk in (content, content + bytes(range(256)) * 20):
        with pytest.raises(BadAudio, match="^x: [^\n]*$"):
            audio.read(junk, "x")
    with pytest.raises(BadAudio, match="the file is empty"):
        audio.read(b"", "x")


@pytest.mark.parametrize("kind", ["wav", "24 bits", "w64", "aiff", "caf", "flac", "mp3", "ogg", "m4a", "webm", "amr"])
def test_damaged_bytes_are_heard_or_refused_in_one_line(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(len(kind))
    for _ in range(20):
        damaged = bytearray(file(kind))
        at = random.integers(100, size=3)
        damaged[at[0] : at[0] + 4] = random.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        damaged[at[1]] = at[2]
        with contextlib.suppress(BadAudio):
            assert audio.read(bytes(damaged), "x", most=30).seconds <= 30
    assert capfd.readouterr() == ("", "")


def test_ffmpeg_is_loaded_when_it_is_needed() -> None:
    code = "import sys, opd.prompts.audio, opd.data.stages.natural; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
