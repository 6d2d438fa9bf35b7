"""Sound in many containers, as soundfile and FFmpeg write it."""

from __future__ import annotations

import io
import tempfile

import av
import numpy as np
import soundfile

RATE = 8000
SECONDS = 2.0
BY_SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "float": ("WAV", "FLOAT"),
    "8 bits": ("WAV", "PCM_U8"),
    "24 bits": ("WAVEX", "PCM_24"),
    "mu-law": ("WAV", "ULAW"),
    "gsm": ("WAV", "GSM610"),
    "g721": ("WAV", "G721_32"),
    "adpcm": ("WAV", "IMA_ADPCM"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
BY_FFMPEG = {
    "m4a": ("ipod", "aac", {"movflags": "faststart"}),
    "moov last": ("ipod", "aac", {}),
    "fragments": ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}),
    "aac": ("adts", "aac", {}),
    "webm": ("webm", "libopus", {}),
    "live webm": ("webm", "libopus", {"live": "1"}),
    "amr": ("amr", "libopencore_amrnb", {}),
    "mka": ("matroska", "aac", {}),
    "bare mp3": ("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
}


def speech(seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """[samples] of noise that rises and falls."""
    wave = np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE))
    return (wave * (1.1 + np.sin(np.arange(len(wave)) / 500))).clip(-0.9, 0.9).astype(np.float32)


def encoded(kind: str, wave: np.ndarray) -> bytes:
    """[samples] or [samples, channels] at 8 kHz in a container; FFmpeg's of one channel."""
    buffer = io.BytesIO()
    if kind in BY_SOUNDFILE:
        format, subtype = BY_SOUNDFILE[kind]
        soundfile.write(buffer, wave, RATE, format=format, subtype=subtype)
        return buffer.getvalue()
    format, codec, options = BY_FFMPEG[kind]
    with tempfile.NamedTemporaryFile() as file:  # a header that is moved to the front needs one with a name
        with av.open(file.name, "w", format=format, options=options) as container:
            _write(container, codec, wave)
        return file.read()


def _write(container: av.container.OutputContainer, codec: str, wave: np.ndarray) -> None:
    stream = container.add_stream(codec, rate=RATE)
    stream.codec_context.layout = "mono"
    frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
    frame.rate = RATE
    for packet in [*stream.encode(frame), *stream.encode(None)]:
        container.mux(packet)


def wav(pcm: bytes, declared: int, riff: int | None = None, after: bytes = b"") -> bytes:
    """A wav of 16 bits whose header says what it is told to."""
    head = b"WAVEfmt " + b"".join(n.to_bytes(k, "little") for n, k in ((16, 4), (1, 2), (1, 2), (RATE, 4)))
    head += b"".join(n.to_bytes(k, "little") for n, k in ((2 * RATE, 4), (2, 2), (16, 2)))
    riff = 36 + declared if riff is None else riff
    return b"RIFF" + riff.to_bytes(4, "little") + head + b"data" + declared.to_bytes(4, "little") + pcm + after
