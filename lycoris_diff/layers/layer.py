"""AdaptedLayer: runs a base layer with its active adapters, in one operation where it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..adapters.base import Adapter
from ..execution.costs import Folded, rides
from ..execution.engine import Call, Term, adapted
from ..execution.lengths import ROOM, Lengths, lengthened
from ..execution.narrow import narrowed
from ..execution.program import Program
from .choosing import lengthened_product, lengthens, scales_rows
from .frozen import Ready, frozen, prepared, settled
from .light import Parts, changes_cheaply, has_little_weight, is_small, keeps_little, run_light
from .parts import bias_change, plus, row_factor
from .plans import Plan
from .samples import Samples
from .separate import Active, Running, SeparateLayer, compute_dtype, masked, module_dropout, varied


class AdaptedLayer(SeparateLayer):
    """A layer that runs with its active adapters.

    Attributes:
        samples: which adapters every sample of a batch runs with; None is the active ones for all.
    """

    samples: Samples | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters."""
        if self.samples is not None and self.enabled:
            return self._per_sample(self.samples, x, *args, **kwargs)
        names = self.active if self.enabled else ()
        if self.merged:
            names = tuple(n for n in names if n not in self.merged)
        compiling = torch.compiler.is_compiling()
        fusable = bool(names) and not compiling and self._fusable(x)
        plan = self._plan(names, x) if fusable else None
        if plan is None and not compiling:
            everybody, names = names, self._at_work(names)
            if fusable and names and names != everybody:
                plan = self._plan(names, x)
        if plan is not None:
            return self._planned(plan, x)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if fusable:
            apart = (self.training and any([masked(self.adapter(n)) for n in names])) or self._all_around(names, x)
            if not apart:
                if not torch.is_autocast_enabled(x.device.type):
                    return self._fused(names, x)
                x = x.to(compute_dtype(x))
                with torch.autocast(x.device.type, enabled=False):
                    return self._fused(names, x)
        return self._separate(names, x, *args, **kwargs)

    def _fusable(self, x: Tensor) -> bool:
        """Whether the base layer allows it to run as one autograd operation of ours with its adapters."""
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or not self._transparent():
            return False
        parameters = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        plain = type(x) in _TENSORS and type(weight) in _TENSORS and (bias is None or type(bias) in _TENSORS)
        if not plain or (weight.requires_grad and torch.is_grad_enabled()) or x.device != weight.device or x.is_meta:  # type: ignore[union-attr]
            return False
        return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)  # type: ignore[union-attr]

    def _plan(self, names: tuple[str, ...], x: Tensor) -> Plan | None:
        """How they run in training, as found for an earlier input like this; None where every call has to find out."""
        if not torch.is_grad_enabled() or self.biased or torch.is_autocast_enabled(x.device.type):
            return None
        held: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]
        key: list[Any] = [names, x.shape, x.dtype, self.training]
        members: list[tuple[Adapter, float]] = []
        for name in names:
            adapter = held[name]
            found = adapter.setting()
            if found is None or (self.training and varied(adapter)):
                return None
            key += found, adapter.decomposed and lengthens(adapter)
            members.append((adapter, found[0]))
        kind = tuple(key)
        plan = self.plans.get(kind, _UNKNOWN)
        return self.plans.keep(kind, self._find(members, x)) if plan is _UNKNOWN else plan

    def _find(self, adapters: list[tuple[Adapter, float]], x: Tensor) -> Plan | None:
        inner, _ = self.geometry.enter(x)
        tokens = self.geometry.tokens(inner)
        small, little = is_small(self.geometry, tokens), has_little_weight(self.geometry)
        light = small or little
        parts: Parts = []
        terms: list[Term] = []
        for adapter, scale in adapters:
            f = adapter.inputs()
            if any([t.is_meta for t in f.values()]) or self._around(adapter, inner):
                return None
            choice, found = self._choose(adapter, f, inner, True, alone=len(adapters) == 1)
            cheap = adapter.depends_on_weight and changes_cheaply(self.geometry, tokens)
            program = found if choice.mode == "beside" and not cheap else None
            sampled = found.last if found is not None and choice.sampled else None
            if program is not None and adapter.depends_on_weight:
                return self._lengthening(adapter, scale, program, choice.folded, inner) if len(adapters) == 1 else None
            term = Running(adapter, f, program, sampled, choice.folded).term(False, inner)
            light = light and not any(term.folded)
            if program is None:
                light = light and little
            else:
                light = light and small and not program.eager_only and keeps_little(self.geometry, tokens, program, f)
            parts.append((adapter, program, scale))
            if term.direct:
                term = term._replace(names=tuple(adapter.factors()), scale=scale)
            terms.append(term)
        return Plan(parts, None if light else Call(self.geometry, tuple(terms), x.dtype))

    def _lengthening(self, adapter: Adapter, scale: float, program: Program, folds: Folded, x: Tensor) -> Plan | None:
        """How DoRA trains alone where its change is a product of two factors and its rows are scaled; None elsewhere.

        A wide product would keep much for backward.
        """
        product = lengthened_product(adapter, program)
        if product is None or self.geometry.out * program.width > max(x.numel(), ROOM):
            return None
        change = lambda total, base, f: adapter.add_delta(total, f)
        narrow = narrowed(program, self.geometry, x)
        term = Term(tuple(adapter.factors()), change, narrow, scale=scale, folded=folds)
        lengths = Lengths(adapter.magnitude_name, *product, rides(self.geometry.shape, self.geometry.tokens(x)))
        return Plan([(adapter, program, scale)], Call(self.geometry, (term,), x.dtype), lengths)

    def _planned(self, plan: Plan, x: Tensor) -> Tensor:
        geo = self.geometry
        parameters: Any = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight, bias = parameters["weight"], parameters["bias"]
        if plan.call is None:
            return run_light(geo, weight, bias, x, plan.parts)
        inner, lead = geo.enter(x)
        tensors: list[Tensor] = []
        for (adapter, *_), term in zip(plan.parts, plan.call.terms):
            tensors += (adapter.inputs() if term.scale is None else adapter.factors()).values()
        weight = geo.canonical(weight)
        if plan.lengths is not None:
            return geo.leave(lengthened(plan.call, plan.lengths, inner, weight, bias, tensors), lead)
        return geo.leave(adapted(plan.call, inner, weight, bias, None, tensors), lead)

    def _all_around(self, names: Sequence[str], x: Tensor) -> bool:
        """Whether nothing but changes that are better made on the layer's input or output is to run."""
        if any([self.adapter(n).around_cost is None for n in names]):
            return False
        inner, _ = self.geometry.enter(x)
        return all([self._around(self.adapter(n), inner) for n in names])

    def _fused(self, names: Sequence[str], x: Tensor) -> Tensor:
        geo = self.geometry
        parameters: Any = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        held, bias = parameters["weight"], parameters["bias"]
        inner, lead = geo.enter(x)
        weight = geo.canonical(held)
        sources = None if self.training else frozen([self.adapter(n) for n in names], (held, bias))
        if sources is None:
            ready = self._ready(names, inner, weight, bias)
        else:
            prepare = lambda: settled(self._ready(names, inner, weight, bias), weight.numel())
            setting = (names, x.dtype, *[self.adapter(n).scaling for n in names])
            ready = prepared(self, setting, sources, geo.tokens(inner), prepare)
        return geo.leave(adapted(ready.call, inner, weight, *ready[1:]), lead)

    def _ready(self, names: Sequence[str], x: Tensor, weight: Tensor, bias: Tensor | None) -> Ready:
        """What the fused operation takes beside the input and the weight."""
        active = self._prepare(names, x, plain_weight=True)
        if self.biased:
            bias = plus(bias, bias_change([member[:2] for member in active]))
            active = [member for member in active if member.adapter.changes_weight]
        row = self._row_factor(active, weight)
        terms = tuple([member.term(row is not None, x) for member in active])
        tensors = [t for member in active for t in member.f.values()]
        return Ready(Call(self.geometry, terms, x.dtype), bias, row, tensors)

    def _row_factor(self, active: Active, weight: Tensor) -> Tensor | None:
        """DoRA on the output axis, alone and at full strength, is a factor on every output row."""
        if len(active) != 1:
            return None
        adapter, f, program, *_ = active[0]
        if program is None or not scales_rows(adapter):
            return None
        if self.training and module_dropout(adapter):
            return None
        return row_factor(adapter, weight, f)


_TENSORS = (Tensor, nn.Parameter)
#: None stands for a plan that was looked for in vain
_UNKNOWN: Any = object()
