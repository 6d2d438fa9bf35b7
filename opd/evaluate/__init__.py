"""`opd eval`: the gap between what a student hears and what it reads, and `opd compare` of several."""
