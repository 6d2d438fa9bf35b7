"""What an answer is worth: rules, judges, and the scoring of public benchmarks. Imports no torch."""

from opd.scoring.answers import MATCHES, check_answer, choice_of, correct, key_of, number_of
from opd.scoring.judge import Judge, verdict
from opd.scoring.scorer import Scorer, ScoringConfig
from opd.scoring.voicebench import Grade

__all__ = [
    "MATCHES",
    "Grade",
    "Judge",
    "Scorer",
    "ScoringConfig",
    "check_answer",
    "choice_of",
    "correct",
    "key_of",
    "number_of",
    "verdict",
]
