"""SeparateLayer: runs a base layer as it is, and its active adapters beside it in plain differentiable operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..errors import AdapterError
from ..execution.around import Around, Host, apply_around, run_around
from ..execution.costs import Choice, Folded, around_is_cheaper, scales_cheaply
from ..execution.engine import Term, cast, changed_weight
from ..execution.geometry import is_transformers_conv1d
from ..execution.narrow import narrowed
from ..execution.packed import describe, rearranged
from ..execution.program import Program
from ..execution.steps import Step
from .choosing import may_fold, on_rows, weighed
from .mergeable import MergeableLayer
from .parts import bias_change, plus, row_factor
from .samples import Samples


class Running(NamedTuple):
    """An active adapter in one call: its factors, and how it runs in the fused operation."""

    adapter: Adapter
    f: dict[str, Tensor]
    program: Program | None
    sampled: Step | None
    folded: Folded

    def term(self, keep_program: bool, x: Tensor) -> Term:
        """This adapter's part in the fused operation; what depends on the weight changes it unless its rows are scaled."""
        program = self.program if keep_program or not self.adapter.depends_on_weight else None
        names, change = tuple(self.f), self.adapter.add_change
        if program is None:
            return Term(names, change, None, self.sampled, change_entries=self.adapter.change_entries)
        return Term(names, change, narrowed(program, self.adapter.geometry, x), folded=self.folded)


Active = list[Running]


class Apart(NamedTuple):
    """An active adapter in plain operations: beside the layer, around it, or in its weight.

    Attributes:
        program: factored form of its delta, where that is run; with `around` that of DoRA, whose rows are scaled.
        around: the layer's input or output is multiplied.
    """

    adapter: Adapter
    f: dict[str, Tensor]
    program: Program | None
    around: bool


class SeparateLayer(MergeableLayer):
    """A layer that runs with its active adapters wherever its base layer's weight may not be used directly.

    That is with hooks, quantized weights, dropout, `torch.compile`, `torch.func`, and where samples differ in their adapters.
    """

    def _at_work(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are run. A zero strength is not unless it trains: exactly the base, whatever the factors hold."""
        held: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]
        for name in names:
            if held[name].idle:
                return tuple([n for n in names if not held[n].idle or _trains(held[n])])
        return names

    def _transparent(self) -> bool:
        """Whether the base layer is a plain known class that nothing else watches, so that its weight may be used directly."""
        base: Any = self._modules["base_layer"]
        if type(base) not in _PLAIN and not (type(base).__name__ == "Conv1D" and is_transformers_conv1d(base)):
            return False
        own, shared = base.__dict__, _SHARED
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if shared["_global_forward_hooks"] or shared["_global_forward_pre_hooks"]:
            return False
        if shared["_global_backward_hooks"] or shared["_global_backward_pre_hooks"]:
            return False
        return not self.merged and "forward" not in own

    def _around(self, adapter: Adapter, x: Tensor) -> bool:
        cost = adapter.around_cost
        if cost is None or adapter.pinned or self.geometry.edges or not self._transparent():
            return False
        return around_is_cheaper(self.geometry.shape, self.geometry.tokens(x), _trains(adapter), cost)

    def _separate(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Plain differentiable operations: around the weight, or one with the changed weight, where the base may be bypassed.

        Else all beside it.
        """
        geo = self.geometry
        dtype = compute_dtype(x)
        inner, lead = geo.enter(x.to(dtype))
        active, shift = self._apart(names, inner)
        plain = self.has_plain_weight
        bypassed = plain and self._transparent()
        dense = [one for one in active if (one.around or one.program is None) and not (self.training and masked(one.adapter))]
        together = [one for one in dense if one.around]
        if together and (not plain or (bypassed and len(together) == len(dense))):
            host = self._host_around(dtype, *args, **kwargs)
            y = run_around([self._form(one, host) for one in together], inner, host)
            y = geo.leave(y if geo.kernel else y.contiguous(), lead)
        elif dense and bypassed:
            together = dense
            base: Any = self.base_layer
            bias, shift = plus(base.bias, shift), None
            weight = changed_weight(geo.canonical(base.weight), [one[:2] for one in dense], dtype)
            y = geo.leave(geo.apply(inner, weight, None if bias is None else bias.to(dtype)), lead)
        else:
            together = []
            y = self._host(x, *args, **kwargs)
        for one in active:
            if all([one is not done for done in together]):
                y = y + geo.leave(self._beside(one, inner), lead).to(y.dtype)
        return y if shift is None else y + shift.to(y.dtype).view(-1, *[1] * len(geo.kernel))

    def _host(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer itself.

        Raises:
            AdapterError: a quantized layer gives no gradient of its input; what comes before it would train on a wrong one.
        """
        watched = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
        if not watched or self.has_plain_weight:
            return self.base_layer(x, *args, **kwargs)
        y = None if rearranged(self.base_layer) else self.base_layer(x, *args, **kwargs)
        if y is None or not y.requires_grad:
            raise AdapterError(
                f"{self.path!r} ({describe(self.base_layer)}) gives no gradient of its input, so nothing before it can train. "
                "Quantize it weight-only, and keep bitsandbytes layers on the CPU in train mode (calls in eval mode rearrange "
                "them for inference); without training, call the model under torch.no_grad()"
            )
        return y

    def _host_around(self, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Host:
        """What changes that multiply the weight run around; a plain weight is used directly.

        Raises:
            AdapterError: the unmodified weight, against which they are taken, is not there.
        """
        geo = self.geometry
        bias: Any = getattr(self.base_layer, "bias", None)
        if self.has_plain_weight:
            held = self.base_weight()
            weight, bias = held.to(dtype), None if bias is None else bias.to(dtype)
            return Host(lambda x: geo.apply(x, weight, bias), bias, dtype, None, lambda x: geo.apply(x, weight, None), held)
        if self.merged:
            raise AdapterError(
                f"{self.path!r} ({describe(self.base_layer)}) has {list(self.merged)} merged into it; adapters that multiply "
                "its weight cannot run beside that. Merge them all, or unmerge (unfuse) first"
            )
        squares = None if self.row_squares is None else self.row_squares.to(self.base_layer.weight.device)  # type: ignore[arg-type]
        return Host(lambda x: self._host(x, *args, **kwargs), bias, dtype, squares)

    def _form(self, one: Apart, host: Host) -> Around:
        adapter, f, program, _ = one
        if program is not None and host.weight is not None:
            return adapter.lengthened(row_factor(adapter, host.weight, f), program, f)
        form = adapter.packed_form(f, host)
        if form is None:  # refused when attached; the weight was packed afterwards
            raise AdapterError(f"{self.path!r} ({describe(self.base_layer)}): {adapter.packed_gap() or 'quantize it first'}")
        return form

    def _per_sample(self, samples: Samples, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer once for the whole batch, and every sample's own adapters beside it.

        Raises:
            AdapterError: adapters are merged, or the batch is no multiple of the samples.
        """
        if self.merged:
            raise AdapterError(f"{list(self.merged)} are merged into the weights of all samples; unmerge (unfuse) them first")
        y = self._host(x, *args, **kwargs)
        for names, rows in samples.rows(len(x), x.device):
            at_work = tuple([n for n in names if n in self.adapters])
            at_work = at_work if torch.compiler.is_compiling() else self._at_work(at_work)
            if at_work:
                part = self._contribution(at_work, x.index_select(0, rows)).to(y.dtype)
                y = y.index_add(0, rows, part.expand(len(rows), *y.shape[1:]))
        return y

    def _contribution(self, names: Sequence[str], x: Tensor) -> Tensor:
        """What adapters add to the base layer's output; it broadcasts to that."""
        geo = self.geometry
        inner, lead = geo.enter(x.to(compute_dtype(x)))
        active, shift = self._apart(names, inner)
        total: Tensor | None = None
        for one in active:
            total = plus(total, geo.leave(self._beside(one, inner), lead))
        if shift is not None:
            total = plus(total, shift.view(-1, *[1] * len(geo.kernel)))
        assert total is not None  # an adapter changes the weight or the bias
        return total

    def _apart(self, names: Sequence[str], x: Tensor) -> tuple[list[Apart], Tensor | None]:
        """Active adapters for plain operations, those that change the weight; and the change of the bias, if there is one."""
        running, plain = self._prepare(names, x), self.has_plain_weight
        shift = None
        if self.biased:
            shift = bias_change([member[:2] for member in running])
            running = [member for member in running if member.adapter.changes_weight]
        active = []
        for adapter, f, program, *_ in running:
            program = None if program is None or program.eager_only else program
            around = False
            if adapter.depends_on_weight:
                cheap = plain and on_rows(adapter) and scales_cheaply(self.geometry.shape, self.geometry.tokens(x))
                program = program if cheap else None
                around = not plain or program is not None or self._around(adapter, x)
            active.append(Apart(adapter, f, program, around))
        return active, shift

    def _beside(self, one: Apart, x: Tensor) -> Tensor:
        """One adapter's own output, with its dropouts in training."""
        adapter, f, program, around = one
        if self.training and _input_dropout(adapter):
            x = F.dropout(x, _input_dropout(adapter))
        if around:
            host = self._host_around(x.dtype)
            out = apply_around(self._form(one, host), x, host)
        elif program is not None:
            out = program.run(self.geometry, x, cast(f, x.dtype))
        else:
            out = self.geometry.apply(x, self._change(adapter, f).to(x.dtype))
        return self._row_mask(adapter, out) if self.training and _output_dropout(adapter) else out

    def _prepare(self, names: Sequence[str], x: Tensor, plain_weight: bool | None = None) -> Active:
        """Active adapters with their factors and, where it is cheaper, their program."""
        if plain_weight is None:
            plain_weight = self.has_plain_weight
        active: Active = []
        for adapter, f in [member for name in names for member in self.adapter(name).members()]:
            if self.training and module_dropout(adapter):
                keep = (torch.rand((), device=x.device) >= module_dropout(adapter)).to(f["scale"].dtype)
                f["scale"], f["strength"] = f["scale"] * keep, f["strength"] * keep
            if any([t.is_meta for t in f.values()]) and not x.is_meta:
                raise AdapterError("an active adapter's factors are on the meta device; load a file into it first")
            choice, program = self._choose(adapter, f, x, plain_weight)
            runs = program if choice.mode == "beside" else None
            sampled = program.last if program is not None and choice.sampled else None
            active.append(Running(adapter, f, runs, sampled, choice.folded))
        return active

    def _choose(
        self, adapter: Adapter, f: dict[str, Tensor], x: Tensor, plain: bool, alone: bool = False
    ) -> tuple[Choice, Program | None]:
        program = adapter.program(f)
        if program is not None and not program.eager_only and not plain:
            return Choice("beside", program.cost, 0), program
        training = torch.is_grad_enabled() and any([t.requires_grad for t in f.values()])
        return weighed(adapter, program, self.geometry.tokens(x), training, may_fold(x), alone), program

    def _row_mask(self, adapter: Adapter, out: Tensor) -> Tensor:
        """Rank dropout: drop output rows of the adapter's part; never divides by zero."""
        p = _output_dropout(adapter)
        keep = (torch.rand(out.shape[1], device=out.device) >= p).to(out.dtype)
        if adapter.config.rank_dropout_scale:  # type: ignore[attr-defined]
            keep = keep / keep.mean().clamp_min(1 / keep.numel())
        return out * keep.view(1, -1, *[1] * (out.dim() - 2))

    def choices(self, x: Tensor) -> dict[str, Choice]:
        """How every active adapter would run on an input, with the cost model's figures."""
        inner, _ = self.geometry.enter(x)
        first = {n: self.adapter(n).members()[0] for n in self.active}
        plain, alone = self.has_plain_weight, len(first) == 1
        return {n: self._choose(adapter, f, inner, plain, alone)[0] for n, (adapter, f) in first.items()}


_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHARED = vars(torch.nn.modules.module)
#: fields of configs that hold a dropout's probability, by what is dropped
_OF_INPUT, _OF_OUTPUT, _OF_MODULE = ("lora_dropout", "miss_dropout"), "rank_dropout", "module_dropout"
_DROPOUTS = (*_OF_INPUT, _OF_OUTPUT, _OF_MODULE)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype an operation on ``x`` runs in: autocast's where it is on, which leaves float64 alone, else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64 else x.dtype


def _trains(adapter: Adapter) -> bool:
    """Whether this call records a gradient of one of its factors."""
    return torch.is_grad_enabled() and any([p.requires_grad for p in adapter.parameters()])


def module_dropout(adapter: Adapter) -> float:
    """Probability of skipping the adapter for a call."""
    return getattr(adapter.config, _OF_MODULE, 0.0)


def _input_dropout(adapter: Adapter) -> float:
    """Probability of dropping entries of the adapter's input."""
    return next(filter(None, [getattr(adapter.config, name, 0.0) for name in _OF_INPUT]), 0.0)


def _output_dropout(adapter: Adapter) -> float:
    """Probability of dropping rows of the adapter's output."""
    return getattr(adapter.config, _OF_OUTPUT, 0.0)


def varied(adapter: Adapter) -> bool:
    """Whether chance decides, in training, what the adapter adds."""
    return any(map(vars(adapter.config).get, _DROPOUTS))


def masked(adapter: Adapter) -> bool:
    """Whether the adapter, in training, sees another input or gives another output than the plain change of the weight."""
    return bool(_input_dropout(adapter) or _output_dropout(adapter))
