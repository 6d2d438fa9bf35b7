"""opd: train speech LLMs by on-policy distillation from a text teacher (X-OPD, arXiv 2603.24596)."""

__version__ = "0.1.0"
