"""`opd eval`: the gap between the speech view and the text view, and `opd compare` of several."""
