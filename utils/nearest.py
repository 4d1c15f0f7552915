"""The known word that a misspelt one was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the known word most like the given one; "" if none is like it."""
    found = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def nearest_family(word: str, known: Iterable[str]) -> str:
    """`nearest` for model names, which prefers names that begin with the word.

    If none is near, up to five names that share its longest beginning of at least three letters.
    """
    names = list(known)
    if hint := nearest(word, [name for name in names if name.startswith(word)] or names):
        return hint
    for length in range(len(word), 2, -1):
        alike = [name for name in names if name.startswith(word[:length])]
        if alike:
            return f"; did you mean one of {', '.join(alike[:5])}?"
    return ""
