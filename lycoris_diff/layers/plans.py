"""What was found about how a layer's active adapters run in training, by kind of input: it is asked for in every step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from ..execution.engine import Call
from ..execution.lengths import Lengths
from .light import Parts

#: kinds of input, a layer
KINDS = 64


class Plan(NamedTuple):
    """How adapters run.

    Attributes:
        parts: the adapters with the programs that they run beside the layer, and their scales.
        call: the fused operation that they make; None for plain ones.
        lengths: how the operation's rows get theirs (DoRA), where they do.
    """

    parts: Parts
    call: Call | None
    lengths: Lengths | None = None


class Plans(dict[Hashable, Plan | None]):
    """Plans of a layer. Copies of the layer, and pickles, start without any."""

    def keep(self, key: Hashable, plan: Plan | None) -> Plan | None:
        """The plan, kept for a key; there are only so many."""
        if len(self) >= KINDS:
            self.clear()
        self[key] = plan
        return plan

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()
