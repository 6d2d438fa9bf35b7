"""How much is in memory at a time: read by what works in such parts, and by `opd plan`. Imports no torch."""

from __future__ import annotations

from opd.config.schema import Config

CLIPS_PER_CALL = 8  # of the frozen tower
ELEMENTS = 1 << 26  # of a chunk's logits: 256 MiB in float32, times the few that an objective needs


def scored_tokens(config: Config) -> int:
    """Tokens of one forward pass of a teacher's server: prompt log-probs hold [tokens, V] in memory."""
    s = config.rollout.server
    return max(2048, s.max_model_len, s.max_num_seqs)
