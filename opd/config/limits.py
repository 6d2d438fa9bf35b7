"""Sizes that the learner keeps to and the estimate of its memory counts with. Imports no torch."""

ELEMENTS = 1 << 26  # of a chunk's logits: 256 MiB in float32, times the few that an objective needs
CLIPS_PER_CALL = 8  # of the frozen tower
