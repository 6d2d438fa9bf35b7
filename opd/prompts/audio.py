"""Decode, validate and resample clips: soundfile and FFmpeg (PyAV) decode, torchaudio resamples.

soundfile takes the samples of plain wav, flac and their kin as they are, and fast. FFmpeg reads all else: of an mp3
without an info frame libsndfile guesses the length; m4a, webm, amr and telephone codecs it reads in part or not at all.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile

from opd.settings import UserError, regular_file
from opd.types import BadAudio, TooLong

Source = str | Path | bytes  # a file, or what one holds
COMMON = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac", ".3gp", ".webm", ".mka", ".amr")
SUFFIXES = (*COMMON, ".wma", ".caf", ".aif", ".aiff", ".au", ".sph", ".w64")  # looked for; what one is, its bytes tell
PLAIN = re.compile(b"fLaC|RIFF....WAVE|RF64|riff|FORM....AIF[FC]|caff|[.]snd", re.DOTALL)  # what soundfile reads
CODECS = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_16", "ALAC_24")
# libsndfile's log of a header: bytes that are declared, and that are there. Of wav, aiff and caf the sound's own chunk
# declares them, never the file's, which is wrong in many whole files.
CUT = re.compile(r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
VALID_FRAMES = re.compile(r"^ *Valid frames *: (\d+)", re.MULTILINE)  # of caf whose packets differ in size
DEMUXERS = "wav,w64,aiff,au,caf,voc,nistsphere,flac,mp3,aac,ogg,mov,matroska,amr,asf,wv,tta"  # no list of other files
GUESSED = ("mp3", "aac", "amr")  # whose length FFmpeg estimates
INFO_FRAME = re.compile(rb"\xff[\xe0-\xff]..(?:.{9}|.{17}|.{32})(?:Xing|Info)...[\1\3\5\7\t\v\r\x0f](.{4})", re.DOTALL)
MP3_FRAME = 2000  # bytes, at most
TAGS = (b"ID3", b"TAG", b"APETAGEX")  # between joined mp3 files
SILENCE = 1e-4  # peak below -80 dBFS: nothing that a model could hear
LOUDEST = 8.0  # peak of a float file; more is another scale, such as that of 16-bit integers
CANCELLED = 0.1  # of the loudest channel's level is left in the mean of the channels
SHORTEST_S = 0.05
RATES = (1000, 768_000)  # Hz
KERNEL = 2**25  # values of torchaudio's kernel, at most
HOLE_S = 0.1  # that passes unheard between two frames
PADDING_S = 0.1  # that encoders add and some containers count
LEAD_S = 1.0  # decoded before a piece: how a frame sounds may depend on those before it


class Sound(NamedTuple):
    """What a recording holds, or a piece of it."""

    wave: np.ndarray  # [samples, channels] float32
    rate: int  # Hz
    format: str  # as soundfile calls it where it reads it; MP3, OGG, else as FFmpeg does

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.wave) / self.rate


def load(source: str | bytes, rate: int, max_seconds: float, name: str = "") -> np.ndarray:
    """Decode a clip (any format, sample rate and number of channels) to mono float32 at `rate` Hz.

    Returns [samples] in [-1, 1]. Raises BadAudio for a missing, empty, truncated, silent, non-finite, too short or
    too long clip, or a file that is no audio; `name` is what messages call it.
    """
    sound = read(source, name, most=max_seconds)
    wave = mono(sound.wave)
    check(wave, sound.rate, _called(source, name))
    return whole_frames(resample(wave, sound.rate, rate), rate)


def read(source: Source, name: str = "", start: float = 0.0, stop: float = math.inf, most: float = math.inf) -> Sound:
    """Decode a recording as it is, whole or from second `start` to `stop`.

    Raises TooLong for more than `most` seconds, BadAudio for whatever else is wrong with it.
    """
    name = _called(source, name)
    with _opened(source, name) as (file, plain):
        end = min(stop, start + most + 1)
        parts = [_samples(plain, name, start, end)] if plain else list(_decoded(file, name, start, end))
    if not parts:
        raise BadAudio(f"{name}: holds no sound" + (f" from {start:g} s on" if start else ""))
    sound = parts[0] if len(parts) == 1 else parts[0]._replace(wave=np.concatenate([part.wave for part in parts]))
    if not RATES[0] <= sound.rate <= RATES[1]:
        raise BadAudio(f"{name}: sampled at {sound.rate} Hz, {RATES[0]} to {RATES[1]} expected")
    if sound.seconds > most:
        raise TooLong(f"{name}: {min(stop, seconds(source, name)) - start:.1f} s long, at most {most:g} s expected")
    peak = np.abs(sound.wave).max(initial=0.0)
    if not peak < math.inf:
        raise BadAudio(f"{name}: contains NaN or infinite samples")
    if peak > LOUDEST:
        cure = "; divide by 32768" if 16384 < peak <= 32768 else ""  # 16-bit integers
        raise BadAudio(f"{name}: samples up to {peak:.0f} in a float file: expected within ±1{cure}")
    return sound


def seconds(source: Source, name: str = "") -> float:
    """Length of a recording: by its header and last sample where soundfile reads it, else by decoding it.

    Raises BadAudio for one that is truncated.
    """
    name = _called(source, name)
    with _opened(source, name) as (file, plain):
        if plain is None:
            return sum(part.seconds for part in _decoded(file, name))
        _samples(plain, name, (plain.frames - 1) / plain.samplerate)
        return float(plain.frames / plain.samplerate)


def mono(wave: np.ndarray) -> np.ndarray:
    """[samples, channels] to [samples]: the mean, or the loudest channel where channels cancel each other out."""
    mean: np.ndarray = wave.mean(axis=1)
    if wave.shape[1] > 1 and len(wave):
        middle = np.ones(len(wave), np.float32) @ wave / len(wave)
        power = wave.T @ wave / len(wave) - np.outer(middle, middle)
        if power.mean() < CANCELLED**2 * power.diagonal().max():  # the mean of all is the power of the channels' mean
            return np.ascontiguousarray(wave[:, power.diagonal().argmax()])
    return mean


def heard(wave: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """[samples, channels] as a student hears it: [samples] mono float32 at `rate` Hz, in whole frames of 10 ms."""
    return whole_frames(resample(mono(wave), source_rate, rate), rate)


def check(wave: np.ndarray, rate: int, name: str) -> None:
    """Raise BadAudio unless `wave` [samples] is long enough and audible, which a constant is not."""
    if len(wave) < SHORTEST_S * rate:
        raise BadAudio(f"{name}: {len(wave) / rate:.3f} s of sound, at least {SHORTEST_S} s expected")
    peak = (float(wave.max()) - float(wave.min())) / 2
    if peak < SILENCE:
        raise BadAudio(f"{name}: silent (peak {peak:.1e}, at least {SILENCE:g} expected)")


def resample(wave: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """Resample [samples] by torchaudio's windowed-sinc kernel; by scipy's where that is huge (22257 Hz)."""
    if source_rate == rate:
        return np.ascontiguousarray(wave, dtype=np.float32)
    if source_rate * rate > KERNEL * math.gcd(source_rate, rate) ** 2:
        from scipy.signal import resample_poly

        return np.ascontiguousarray(resample_poly(wave, rate, source_rate), dtype=np.float32)
    return _resampler(source_rate, rate)(wave)


@lru_cache(maxsize=16)
def _resampler(source_rate: int, rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """Keeps the kernel, which takes many times as long to make as a clip to resample."""
    import torch
    import torchaudio

    kernel = torchaudio.transforms.Resample(source_rate, rate, dtype=torch.float32)
    return lambda wave: kernel(torch.from_numpy(wave)).numpy()


def whole_frames(wave: np.ndarray, rate: int) -> np.ndarray:
    """Fill [samples] up with silence to whole frames of 10 ms: what libraries make of half a frame differs."""
    return np.pad(wave, (0, -len(wave) % (rate // 100)))


def to_base64_wav(wave: np.ndarray, rate: int) -> str:
    """A float32 WAV in base64: the server decodes exactly the samples that the learner sees."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    return base64.b64encode(buffer.getvalue()).decode()


def _called(source: Source, name: str) -> str:
    return name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))


class _Quiet(io.BufferedReader):
    """Where a header is damaged, decoders seek before the first byte, and print a stack trace of what that raises."""

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(at, whence)
        except (OSError, ValueError):
            return -1


@contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[BinaryIO, soundfile.SoundFile | None]]:
    """A recording's bytes, and soundfile's reader of it where that is exact.

    Whatever is raised meanwhile becomes BadAudio: what decoders raise is of many types.
    """
    plain = None
    try:
        if not isinstance(source, bytes):
            regular_file(source, "audio file")
        with _Quiet(io.BytesIO(source) if isinstance(source, bytes) else io.FileIO(source)) as file:
            head = file.read(12)
            if not head:
                raise BadAudio(f"{name}: the file is empty (0 bytes)")
            plain = _plain(source, name) if PLAIN.match(head) else None
            if head.startswith(b"OggS") and not _ogg_whole(file):
                raise BadAudio(f"{name}: truncated or damaged: pages of its Ogg stream are missing")
            file.seek(0)
            yield file, plain
    except BadAudio:
        raise
    except Exception as e:
        reason = f"{name}: not readable as audio ({getattr(e, 'strerror', None) or e})"
        raise BadAudio(str(e) if isinstance(e, UserError) else reason) from e
    finally:
        if plain:
            plain.close()


def _plain(source: Source, name: str) -> soundfile.SoundFile | None:
    """None for what soundfile cannot read, or not exactly. Raises BadAudio for what is cut off."""
    try:
        found = soundfile.SoundFile(_Quiet(io.BytesIO(source)) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError:
        return None
    for declared, there in (map(int, match) for match in CUT.findall(found.extra_info)):
        unknown = declared % 2**31 >= 2**31 - 2**16  # pipes and killed recorders leave about all ones
        if declared > there and not unknown:
            raise BadAudio(f"{name}: truncated: {declared} bytes declared, {there} found")
    valid = VALID_FRAMES.search(found.extra_info)
    if valid and int(valid[1]) > found.frames:
        raise BadAudio(f"{name}: truncated: {valid[1]} frames declared, {found.frames} found")
    return found if found.subtype in CODECS and 0 < found.frames < 2**62 else None  # a length that its header tells


def _samples(plain: soundfile.SoundFile, name: str, start: float, stop: float = math.inf) -> Sound:
    first, last = (int(min(at * plain.samplerate, plain.frames)) for at in (start, stop))
    try:
        plain.seek(first)
        wave = plain.read(max(0, last - first), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as e:
        raise BadAudio(f"{name}: truncated or damaged: {e.error_string.removeprefix('Error : ')}") from e
    if len(wave) < last - first:
        raise BadAudio(f"{name}: truncated: {last - first} frames declared, {len(wave)} found")
    return Sound(wave, plain.samplerate, plain.format)


def _decoded(file: BinaryIO, name: str, start: float = 0.0, stop: float = math.inf) -> Iterator[Sound]:
    """Part after part as FFmpeg decodes them, scaled as libsndfile scales. Raises BadAudio where parts are missing."""
    import av

    with av.open(file, "r", options={"format_whitelist": DEMUXERS}) as container:
        if not container.streams.audio:
            raise BadAudio(f"{name}: holds no sound")
        kind, origin, end = container.format.name, None, None
        if start > LEAD_S:
            origin = next(container.decode(audio=0)).time or 0.0
            container.seek(int((origin + start - LEAD_S) * av.time_base))
        resampler = av.AudioResampler(format="flt")
        for part in _frames(container, file, name, origin is None):
            for frame in resampler.resample(part):
                origin = frame.time or 0.0 if origin is None else origin
                at = (end or 0.0) if frame.time is None else frame.time - origin
                if end is not None and at - end > HOLE_S:
                    raise BadAudio(f"{name}: damaged: nothing from {end:.2f} s to {at:.2f} s")
                if at >= stop:
                    return
                rate, wave = frame.sample_rate, frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
                end = at + len(wave) / rate
                first, last = (round((min(max(edge, at), end) - at) * rate) for edge in (start, stop))
                if first < last:
                    yield Sound(wave[first:last], rate, kind.upper() if kind in ("mp3", "ogg") else kind)


def _frames(container: Any, file: BinaryIO, name: str, whole: bool) -> Iterator[Any]:
    """Frame after frame. Raises BadAudio for one that is damaged, and for a `whole` recording that ends too early."""
    import av

    stream, kind, found, cut = container.streams.audio[0], container.format.name, 0.0, False
    end, last = 0.0, b""
    length = stream.duration and stream.duration * stream.time_base
    if length is None and len(container.streams) == 1 and container.duration:
        length = container.duration / av.time_base
    told = 0.0 if kind in GUESSED else float(length or 0)
    for packet in container.demux(stream):
        data, lasts = bytes(packet), float((packet.duration or 0) * packet.time_base)
        if kind == "mp3":
            info = INFO_FRAME.search(data if found else _before(file, packet.pos or 0))
            told += (int.from_bytes(info[1], "big") + bool(found)) * lasts if info else 0  # the first is no packet
            last = data or last
        try:
            for frame in packet.decode():
                end = max(end, (frame.time or 0.0) + frame.samples / frame.sample_rate)
                yield frame
        except av.FFmpegError as e:
            if kind == "mp3" and (data.startswith(TAGS) or 0 < told <= found and not any(data)):
                continue  # what lies between joined files, or fills up the last
            raise BadAudio(f"{name}: truncated or damaged after {found:.2f} s: {e.strerror}") from e
        found += lasts
        cut = cut or packet.is_corrupt
    if last:  # a parser takes as many bytes as a frame's header says
        parsed = av.CodecContext.create(stream.codec.name, "r").parse(last + bytes(MP3_FRAME))
        cut = cut or bool(parsed) and parsed[0].size > len(last)
    found = max(found, end)
    slack = 1e-3 if kind == "mp3" or stream.codec.name.startswith("pcm_") else PADDING_S
    if whole and found + slack < told:
        raise BadAudio(f"{name}: truncated: {told:.2f} s declared, {found:.2f} s found")
    if whole and cut and kind != "wav":  # whose size may be unknown, and is asked before
        raise BadAudio(f"{name}: truncated: ends amid a frame after {found:.2f} s")


def _before(file: BinaryIO, first: int) -> bytes:
    """What may hold an info frame: the bytes before the `first` byte of sound."""
    place = file.tell()
    data = file.read(first - file.seek(max(0, first - MP3_FRAME)))
    file.seek(place)
    return data


def _ogg_whole(file: BinaryIO) -> bool:
    """Whether an Ogg file holds every page of its streams up to the last (RFC 3533), which decoders do not ask."""
    following: dict[bytes, int] = {}  # page of each stream that is not at its end
    at, size = 0, file.seek(0, io.SEEK_END)
    while at < size:
        file.seek(at)
        head = file.read(27 + 255).ljust(27, b"\0")
        if not head.startswith(b"OggS"):
            break
        serial, page = head[14:18], int.from_bytes(head[18:22], "little")
        if page != following.pop(serial, 0):
            return False
        if not head[5] & 4:
            following[serial] = page + 1
        at += 27 + head[26] + sum(head[27 : 27 + head[26]])
    return at <= size and not following
