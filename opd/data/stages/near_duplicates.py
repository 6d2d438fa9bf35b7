"""Texts that ask nearly the same, by the Jaccard similarity of their 3-word shingles."""

from __future__ import annotations

import math
import re

WORD = re.compile(r"\w+")
PERMUTATIONS = 128
RECALL = 0.995  # of the pairs that are just similar enough


def normal(text: str) -> str:
    """The words of a text in lower case, a space between them."""
    return " ".join(WORD.findall(text.lower()))


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two normal texts: the share of their shingles that both have."""
    a, b = _shingles(one), _shingles(other)
    return len(a & b) / len(a | b)


class NearTexts:
    """Finds what was taken before and is at least as similar as `least`, within (0, 1).

    MinHash sketches (Broder 1997) in bands find candidates; whether they are similar is counted on the texts. A text
    takes about 6 kB at 0.8.
    """

    def __init__(self, least: float) -> None:
        from datasketch import MinHashLSH

        self.least = least
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(least))

    def take(self, text: str, always: bool = False) -> list[str]:
        """The normal texts near this one; it is taken too when there are none, or `always`. None is taken twice."""
        from datasketch import MinHash

        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([s.encode(errors="surrogatepass") for s in _shingles(text)])
        near = sorted(t for t in self._index.query(sketch) if similarity(t, text) >= self.least)
        if (always or not near) and text not in self._index:
            self._index.insert(text, sketch)
        return near


def _shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _bands(least: float) -> tuple[int, int]:
    """How many bands of how many hashes: as few false candidates as RECALL at the threshold allows.

    Texts of similarity s share a band of r hashes with chance s^r, one of b bands with 1 - (1 - s^r)^b (Leskovec et
    al., Mining of Massive Datasets, 3.4).
    """
    best = PERMUTATIONS, 1
    for rows in range(1, PERMUTATIONS + 1):
        bands = math.ceil(math.log(1 - RECALL) / math.log1p(-(least**rows)))
        if bands * rows <= PERMUTATIONS:
            best = max(2, bands), rows
    return best
