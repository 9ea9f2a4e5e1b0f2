"""Regular expressions that come from files."""

from __future__ import annotations

import re

from .errors import CheckpointError

#: what tells how a regular expression is built: escapes and sets, which are no more than one character, and the rest
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()*+|]|\{\d*,?\d*\}", re.DOTALL)


def check_pattern(pattern: str, where: str) -> None:
    """Refuse a stranger's regular expression that is none, or may take for ever: repeats or choices in a repeated group.

    Raises:
        CheckpointError: naming the pattern.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where} has {pattern!r}, which is no regular expression: {error}") from error
    groups, inner, end = [False], False, -1
    for token in _TOKENS.finditer(pattern):
        kind = token[0][0]
        if kind == "(":
            groups.append(False)
        elif kind == ")":
            inner, end = groups.pop(), token.end()
            groups[-1] |= inner
        elif kind == "|":
            groups[-1] = True
        elif kind in "*+{":
            if inner and token.start() == end:
                raise CheckpointError(
                    f"{where} has {pattern!r}, where a repeated group holds repeats or choices; that can take for ever. "
                    "Write the names themselves"
                )
            groups[-1] = True
