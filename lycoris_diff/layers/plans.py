"""What was found about how a layer's active adapters run in training, by kind of input: it is asked for in every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from ..execution.engine import Call
from .light import Parts

#: kinds of input, a layer
KINDS = 64


class Plan(NamedTuple):
    """How adapters run.

    Attributes:
        parts: the adapters with the programs that they run beside the layer, and their scales.
        call: the fused operation that they make; None for plain ones.
    """

    parts: Parts
    call: Call | None


class Plans(dict[Hashable, Plan | None]):
    """Plans of a layer. Copies of the layer, and pickles, start without any."""

    def get_or_find(self, key: Hashable, find: Callable[[], Plan | None]) -> Plan | None:
        """The plan for a key, found where there is none yet."""
        if key not in self:
            if len(self) >= KINDS:
                self.clear()
            self[key] = find()
        return self[key]

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()
