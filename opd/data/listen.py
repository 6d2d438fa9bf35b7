"""A page with players: clips as they were recorded, and as training hears them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from opd.config.load import load_config
from opd.prompts import audio
from opd.prompts.augment import Augmenter
from opd.prompts.clips import ClipLoader
from opd.prompts.manifest import PromptStream, read_manifest
from opd.report.blocks import Block, Figure, Heading, Paragraph, document
from opd.settings import UserError, attempt
from opd.storage.json_lines import write_atomic
from opd.types import Prompt, audio_paths, transcript

RATE = 16000  # Hz, of every family so far


def main(recipe: str, overrides: list[str], out: Path, count: int, epochs: int) -> int:
    """Write the page for the first `count` records that a recipe trains on, in its first `epochs` epochs.

    Raises UserError for a mistake in the recipe, a manifest without usable clips, and a page that cannot be written.
    """
    config = load_config(recipe, overrides)
    prompts, bad = read_manifest(config.data.train)
    if not prompts:
        raise UserError(f"{config.data.train}: no usable record; the first: {bad[0]['place']}: {bad[0]['reason']}")
    augmenter = Augmenter(config.data.augment, config.run.seed, RATE)
    loader = ClipLoader(config, RATE, len(prompts))
    title = "What training hears"
    blocks: list[Block] = [Heading(title, 1), Paragraph(f"{recipe}, {config.data.train}")]
    if not config.data.augment.active:
        blocks.append(Paragraph("The recipe sets no data.augment: training hears the clips as they are.", "note"))
    shown = PromptStream(prompts, min(count, len(prompts)), config.run.seed).batch(0)
    for prompt in shown:
        blocks.append(Heading(prompt.id))
        made = attempt(_record, prompt, loader, augmenter, config.data.max_audio_seconds, epochs)
        blocks += [Paragraph(str(made), "warn")] if isinstance(made, ValueError) else made
    try:
        write_atomic(out, document(title, blocks))
    except OSError as e:
        raise UserError(f"--out {out}: expected a file that can be written ({e.strerror})") from e
    print(f"wrote {out}: {len(shown)} records")
    return 0


def _record(prompt: Prompt, loader: ClipLoader, augmenter: Augmenter, limit: float, epochs: int) -> list[Block]:
    parts: list[Block] = [Paragraph(transcript(prompt))]
    for place, (path, key) in enumerate(zip(audio_paths(prompt), audio_paths(loader.apart(prompt)), strict=True)):
        clean = audio.load(path, RATE, limit)
        parts.append(_player("as it is", clean))
        for epoch in range(epochs if augmenter.config.active else 0):
            heard = loader.load(prompt, epoch)
            assert heard is not None
            told = ", ".join(augmenter(clean, loader.name(prompt, place), epoch)[1])
            if told and np.array_equal(heard[key], clean):
                told = "left as it is: it would get too long"
            parts.append(_player(f"epoch {epoch + 1}: {told or 'as it is'}", heard[key]))
    return parts


def _player(what: str, wave: np.ndarray) -> Figure:
    import soundfile

    sound = io.BytesIO()
    soundfile.write(sound, wave / max(1.0, np.abs(wave).max()), RATE, format="WAV", subtype="PCM_16")
    source = f"data:audio/wav;base64,{base64.b64encode(sound.getvalue()).decode()}"
    return Figure(f"{what}, {len(wave) / RATE:.2f} s", sound=source)
