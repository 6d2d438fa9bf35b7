"""`opd study`: methods side by side on the same worlds, seeds and samples, every run an ordinary run folder."""
