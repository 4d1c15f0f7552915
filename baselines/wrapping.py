"""How wrappers build the classifier inside, and report keywords that neither of the two knows.

A wrapper passes the keywords that are not its own to the classifier, so a misspelt keyword of the
wrapper is only noticed there.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from utils.errors import one_line
from utils.nearest import nearest

_UNKNOWN = re.compile(r"(?:takes no|unexpected keyword argument) '(\w+)'")


def make_backbone(
    backbone: Callable[..., nn.Module] | nn.Module,
    keywords: Mapping[str, Any],
    wrapper: str,
    own: Iterable[str],
) -> nn.Module:
    """The net to be wrapped, built with the keywords that are not the wrapper's `own`.

    ValueError if the net is built already and there are keywords, and for one that neither knows.
    """
    known = sorted(set(own) - {"backbone"})
    if isinstance(backbone, nn.Module):
        _refuse(keywords, wrapper, known)
        return backbone
    try:
        return backbone(**keywords)
    except (TypeError, ValueError) as error:
        said = one_line(error)
        found = _UNKNOWN.search(said)
        if found is None or found[1] not in keywords:
            raise
        word, words = found[1], f"(known: {', '.join(known)})"
        if hint := nearest(word, known):
            raise ValueError(f"{wrapper} takes no {word!r}{hint} {words}; {said}") from error
        raise ValueError(f"{said}; nor does {wrapper} {words}") from error


def _refuse(keywords: Mapping[str, Any], wrapper: str, known: list[str]) -> None:
    for word in keywords:
        if hint := nearest(word, known):
            raise ValueError(f"{wrapper} takes no {word!r}{hint} (known: {', '.join(known)})")
    if keywords:
        raise ValueError(
            f"{', '.join(keywords)}: the backbone is built already; give its node "
            "`_partial_: true` so that it can take them"
        )
