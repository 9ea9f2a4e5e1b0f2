"""AdaptedLayer: a base layer and its named adapters; runs the active ones, merges and unmerges."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..errors import AdapterError
from ..execution.around import Around, Host, apply_around, run_around
from ..execution.costs import Choice, around_is_cheaper, choose
from ..execution.engine import Call, Term, adapted, cast, changed_weight
from ..execution.geometry import Geometry, is_plain_weight, is_transformers_conv1d
from ..execution.packed import describe, rearranged
from ..execution.steps import Program, Step
from .frozen import Ready, forget, frozen, prepared, settled
from .parts import bias_change, plus, row_factor
from .rounded import PackedSnapshot, original, rounded, take, write_rounded
from .samples import Samples
from .snapshot import Snapshot, write


class Running(NamedTuple):
    """An active adapter in one call: its factors, and how it runs."""

    adapter: Adapter
    f: dict[str, Tensor]
    program: Program | None
    sampled: Step | None

    def term(self, keep_program: bool) -> Term:
        """This adapter's part in the fused operation; what depends on the weight changes it unless its rows are scaled."""
        program = self.program if keep_program or not self.adapter.depends_on_weight else None
        return Term(tuple(self.f), self.adapter.add_change, program, self.sampled if program is None else None)


Active = list[Running]


class AdaptedLayer(nn.Module):
    """A layer with adapters. The base layer stays a child and is never altered while unmerged.

    Attributes:
        base_layer: the host.
        adapters: named adapters.
        geometry: how the host applies its weight.
        active: names of the adapters in use, in order.
        enabled: False runs the base layer alone.
        biased: some adapter changes the bias.
        samples: which adapters every sample of a batch runs with; None is the active ones for all.
        path: in the model, for messages.
        may_round: a packed (quantized) weight may be rounded anew to merge into it.
        row_squares: squared row norms of a packed weight, ``(out,)``, once an adapter has needed them.
        loss: what that lost in the last merge, relative to the change of the weight; None where nothing was rounded.
    """

    biased = False
    path = ""
    may_round = False
    row_squares: Tensor | None = None  # no buffer: it stays in float32
    loss: float | None = None
    samples: Samples | None = None

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.geometry = geometry
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.suspended: tuple[str, ...] = ()
        self.snapshot: Snapshot | PackedSnapshot | None = None
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise  # hooks and notes that other libraries put on a layer are that layer's own
            return getattr(super().__getattr__("base_layer"), name)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        forget(self)  # nothing stays behind on a device that the model leaves
        super()._apply(fn, recurse)
        return self

    # --- settings by adapter name ------------------------------------------------------------------------------------
    @property
    def scaling(self) -> Mapping[str, float]:
        """Strength of every adapter as applied: trained scaling times `set_scale`; read-only."""
        return MappingProxyType({k: a.scaling * a.get_strength() for k, a in self.named_adapters()})

    @property
    def r(self) -> Mapping[str, int]:
        """Rank of every adapter."""
        return MappingProxyType({k: a.config.r for k, a in self.named_adapters()})

    @property
    def alpha(self) -> Mapping[str, float]:
        """Alpha of the adapters that have one."""
        return self._setting("alpha")

    @property
    def mini_r(self) -> Mapping[str, int]:
        """Block width of the MiSS adapters."""
        return self._setting("mini_r")

    def _setting(self, name: str) -> Mapping[str, Any]:
        return MappingProxyType({k: getattr(a.config, name) for k, a in self.named_adapters() if hasattr(a.config, name)})

    def named_adapters(self) -> list[tuple[str, Adapter]]:
        """Names and adapters in order."""
        return list(self.adapters.items())  # type: ignore[arg-type]

    def adapter(self, name: str) -> Adapter:
        """One adapter by name."""
        found: Any = self._modules["adapters"]._modules[name]  # type: ignore[union-attr]
        return found

    def add(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in; it is not active yet."""
        self.adapters[name] = adapter
        self.biased = self.biased or adapter.changes_bias

    def remove(self, name: str) -> None:
        """Take an adapter out that is not merged."""
        del self.adapters[name]
        forget(self)
        self.active = tuple(n for n in self.active if n != name)
        self.suspended = tuple(n for n in self.suspended if n != name)
        self.biased = any(adapter.changes_bias for _, adapter in self.named_adapters())

    # --- base weight -------------------------------------------------------------------------------------------------
    @property
    def has_plain_weight(self) -> bool:
        """Whether the base layer holds its weight as an ordinary floating tensor of the expected shape."""
        weight: Any = getattr(self.base_layer, "weight", None)
        return is_plain_weight(weight) and tuple(self.geometry.canonical(weight).shape) == self.geometry.shape

    def base_weight(self) -> Tensor:
        """Unmodified canonical base weight, also while merged.

        Raises:
            AdapterError: the weight is packed or quantized.
        """
        weight: Any = getattr(self.base_layer, "weight", None)
        if not self.has_plain_weight:
            raise AdapterError(
                f"{self.path!r} ({describe(self.base_layer)}) is packed (quantized): what is computed from the values of its "
                "weight is refused. Use the unquantized model for it"
            )
        if weight.is_meta:
            with align_module_device(self.base_layer):  # offloaded: the hook brings it for as long as it is needed
                weight = self.base_layer.weight
        if self.snapshot is not None:
            weight = self._original("weight", weight)
        return self.geometry.canonical(weight)

    def _original(self, name: str, current: Tensor | None) -> Any:
        """A parameter as it was before merging."""
        held = {} if self.snapshot is None else self.snapshot.tensors
        value = held.get(name, current)
        weight: Any = self.base_layer.weight
        return None if value is None else value.to(weight.device)

    # --- forward -----------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters."""
        if self.samples is not None and self.enabled:
            return self._per_sample(self.samples, x, *args, **kwargs)
        names = self.active if self.enabled else ()
        if self.merged:
            names = tuple(n for n in names if n not in self.merged)
        names = self._at_work(names)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling() and self._fusable(names, x) and not self._all_around(names, x):
            if not torch.is_autocast_enabled(x.device.type):
                return self._fused(names, x)
            x = x.to(compute_dtype(x))
            with torch.autocast(x.device.type, enabled=False):
                return self._fused(names, x)
        return self._separate(names, x, *args, **kwargs)

    def _at_work(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those that are run. A zero strength is not unless it trains: exactly the base, whatever the factors hold."""
        if torch.compiler.is_compiling():
            return names
        return tuple([n for n in names if not self.adapter(n).idle or self._trains(n)])

    def _trains(self, name: str) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter(name).parameters())

    def _transparent(self) -> bool:
        """Whether the base layer is a plain known class that nothing else watches, so that its weight may be used directly."""
        base: Any = self._modules["base_layer"]
        known = type(base) in _PLAIN or (type(base).__name__ == "Conv1D" and is_transformers_conv1d(base))
        return known and not self.merged and "forward" not in base.__dict__ and not has_hooks(base)

    def _fusable(self, names: Sequence[str], x: Tensor) -> bool:
        """Whether base and adapters may run as one autograd operation of ours."""
        if torch._C._are_functorch_transforms_active() or not self._transparent():
            return False
        parameters = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        plain = type(x) in _TENSORS and type(weight) in _TENSORS and (bias is None or type(bias) in _TENSORS)
        if not plain or (weight.requires_grad and torch.is_grad_enabled()) or x.device != weight.device or x.is_meta:  # type: ignore[union-attr]
            return False
        if self.training and any([_masked(self.adapter(n)) for n in names]):
            return False
        return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)  # type: ignore[union-attr]

    def _all_around(self, names: Sequence[str], x: Tensor) -> bool:
        """Whether nothing but changes that are better made on the layer's input or output is to run."""
        if any([self.adapter(n).around_cost is None for n in names]):
            return False
        inner, _ = self.geometry.enter(x)
        return all([self._around(self.adapter(n), inner) for n in names])

    def _around(self, adapter: Adapter, x: Tensor) -> bool:
        cost = adapter.around_cost
        if cost is None or adapter.pinned or self.geometry.edges or not self._transparent():
            return False
        training = torch.is_grad_enabled() and any([p.requires_grad for p in adapter.parameters()])
        return around_is_cheaper(self.geometry.shape, self.geometry.tokens(x), training, cost)

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
            ready = prepared(self, (names, x.dtype), sources, geo.tokens(inner), prepare)
        return geo.leave(adapted(ready.call, inner, weight, *ready[1:]), lead)

    def _ready(self, names: Sequence[str], x: Tensor, weight: Tensor, bias: Tensor | None) -> Ready:
        """What the fused operation takes beside the input and the weight."""
        active = self._prepare(names, x, plain_weight=True)
        if self.biased:
            bias = plus(bias, bias_change([member[:2] for member in active]))
            active = [member for member in active if member.adapter.changes_weight]
        row = self._row_factor(active, weight)
        terms = tuple([member.term(keep_program=row is not None) for member in active])
        tensors = [t for member in active for t in member.f.values()]
        return Ready(Call(self.geometry, terms, x.dtype), bias, row, tensors)

    def _separate(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Plain differentiable operations: one with the changed weight where the base may be bypassed, else all beside it."""
        geo = self.geometry
        dtype = compute_dtype(x)
        inner, lead = geo.enter(x.to(dtype))
        active, shift = self._apart(names, inner)
        plain = self.has_plain_weight
        dense = [(a, f) for a, f, p in active if p is None and not (self.training and _masked(a))]
        around = [(a, f) for a, f in dense if a.depends_on_weight and (not plain or self._around(a, inner))]
        if around:
            host = self._packed_host(dtype, *args, **kwargs)
            members = [(self._form(a, f, host), f["strength"]) for a, f in around]
            y = geo.leave(run_around(members, inner, host).contiguous(), lead)
            active = [(a, f, p) for a, f, p in active if all(a is not d for d, _ in around)]
        elif dense and self._transparent() and plain:
            base: Any = self.base_layer
            weight, bias = geo.canonical(base.weight), base.bias
            bias, shift = plus(bias, shift), None
            y = geo.apply(inner, changed_weight(weight, dense).to(dtype), None if bias is None else bias.to(dtype))
            y = geo.leave(y, lead)
            active = [(a, f, p) for a, f, p in active if all(a is not d for d, _ in dense)]
        else:
            y = self._host(x, *args, **kwargs)
        for adapter, f, program in active:
            y = y + geo.leave(self._beside(adapter, f, program, inner), lead).to(y.dtype)
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

    def _packed_host(self, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Host:
        """What changes that multiply the packed weight run around.

        Raises:
            AdapterError: the unmodified weight, against which they are taken, is not there.
        """
        if self.merged:
            raise AdapterError(
                f"{self.path!r} ({describe(self.base_layer)}) has {list(self.merged)} merged into it; adapters that multiply "
                "its weight cannot run beside that. Merge them all, or unmerge (unfuse) first"
            )
        bias = self.base_layer._parameters.get("bias")
        squares = None if self.row_squares is None else self.row_squares.to(self.base_layer.weight.device)  # type: ignore[arg-type]
        return Host(lambda x: self._host(x, *args, **kwargs), bias, dtype, squares)

    def _form(self, adapter: Adapter, f: dict[str, Tensor], host: Host) -> Around:
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
            at_work = self._at_work(tuple([n for n in names if n in self.adapters]))
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
        for adapter, f, program in active:
            total = plus(total, geo.leave(self._beside(adapter, f, program, inner), lead))
        if shift is not None:
            total = plus(total, shift.view(-1, *[1] * len(geo.kernel)))
        assert total is not None  # an adapter changes the weight or the bias
        return total

    def _apart(self, names: Sequence[str], x: Tensor) -> tuple[list[tuple[Adapter, dict[str, Tensor], Program | None]], Any]:
        """Active adapters for plain operations, those that change the weight; and the change of the bias, if there is one."""
        running = self._prepare(names, x)
        shift = None
        if self.biased:
            shift = bias_change([member[:2] for member in running])
            running = [member for member in running if member.adapter.changes_weight]
        return [(a, f, None if p is not None and (p.eager_only or a.depends_on_weight) else p) for a, f, p, _ in running], shift

    def _beside(self, adapter: Adapter, f: dict[str, Tensor], program: Program | None, x: Tensor) -> Tensor:
        """One adapter's own output, with its dropouts in training."""
        if self.training and _input_dropout(adapter):
            x = F.dropout(x, _input_dropout(adapter))
        if program is not None:
            out = program.run(self.geometry, x, cast(f, x.dtype))
        elif adapter.depends_on_weight and not self.has_plain_weight:
            host = self._packed_host(x.dtype)
            out = apply_around(self._form(adapter, f, host), f["strength"], x, host)
        else:
            out = self.geometry.apply(x, self._change(adapter, f).to(x.dtype))
        return self._row_mask(adapter, out) if self.training and _output_dropout(adapter) else out

    def _change(self, adapter: Adapter, f: dict[str, Tensor]) -> Tensor:
        """One adapter's change of the weight, canonical, in float32 or better where the base weight enters."""
        if not adapter.depends_on_weight:
            return adapter.delta(f)
        weight = self.values()
        work = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return adapter.add_change(torch.zeros_like(work), work, f)

    def _prepare(self, names: Sequence[str], x: Tensor, plain_weight: bool | None = None) -> Active:
        """Active adapters with their factors and, where it is cheaper, their program."""
        if plain_weight is None:
            plain_weight = self.has_plain_weight
        active: Active = []
        for adapter, f in [member for name in names for member in self.adapter(name).members()]:
            if self.training and _module_dropout(adapter):
                keep = (torch.rand((), device=x.device) >= _module_dropout(adapter)).to(f["scale"].dtype)
                f["scale"], f["strength"] = f["scale"] * keep, f["strength"] * keep
            if any([t.is_meta for t in f.values()]) and not x.is_meta:
                raise AdapterError("an active adapter's factors are on the meta device; load a file into it first")
            choice, program = self._choose(adapter, f, x, plain_weight)
            runs = program if choice.mode == "beside" else None
            active.append(Running(adapter, f, runs, program.last if program is not None and choice.sampled else None))
        return active

    def _choose(self, adapter: Adapter, f: dict[str, Tensor], x: Tensor, plain: bool) -> tuple[Choice, Program | None]:
        program = adapter.program(f)
        if program is not None and not program.eager_only and not plain:
            return Choice("beside", program.cost, 0), program
        training = torch.is_grad_enabled() and any([t.requires_grad for t in f.values()])
        cost, width = (None, 0) if program is None else (program.cost, program.width)
        sampled = None if program is None else program.sampled_cost
        decide = choose if torch.compiler.is_compiling() else _choose  # compilers look through a cache, with a warning
        return decide(self.geometry.shape, self.geometry.tokens(x), training, cost, width, sampled_cost=sampled), program

    def _row_factor(self, active: Active, weight: Tensor) -> Tensor | None:
        """DoRA on the output axis, alone and at full strength, is a factor on every output row."""
        if len(active) != 1:
            return None
        adapter, f, program, _ = active[0]
        lone = adapter.decomposed and program is not None and adapter.get_strength() == 1.0
        if not lone or adapter.config.dora_axis != "out":  # type: ignore[attr-defined]
            return None
        if self.training and _module_dropout(adapter):
            return None
        return row_factor(adapter, weight, f)

    def _row_mask(self, adapter: Adapter, out: Tensor) -> Tensor:
        """Rank dropout: drop output rows of the adapter's part; never divides by zero."""
        p = _output_dropout(adapter)
        keep = (torch.rand(out.shape[1], device=out.device) >= p).to(out.dtype)
        if adapter.config.rank_dropout_scale:  # type: ignore[attr-defined]
            keep = keep / keep.mean().clamp_min(1 / keep.numel())
        return out * keep.view(1, -1, *[1] * (out.dim() - 2))

    # --- merging -----------------------------------------------------------------------------------------------------
    def get_delta_weight(self, name: str) -> Tensor:
        """Change of the base weight by one adapter at its strength, in the base layer's layout, float32 or better.

        Shape as ``base_layer.weight``. For weight-dependent adapters it is taken against the unmodified base weight.
        """
        members = self.adapter(name).members(exact=True)
        changes = [self._change(a, cast(f, torch.promote_types(a.strength.dtype, torch.float32))) for a, f in members]
        return self.geometry.stored(sum(changes[1:], changes[0]))

    def get_delta_bias(self, name: str) -> Tensor | None:
        """Change of the base bias by one adapter at its strength, ``(out,)``; None when it leaves the bias alone."""
        return bias_change(self.adapter(name).members(exact=True))

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> Tensor:
        """The base weight with the named adapters' changes, summed in float32 or better and cast once; canonical."""
        base = self.values()
        dense = [(adapter, f) for adapter, f in self._exact_members(names, base) if adapter.changes_weight]
        return changed_weight(base, dense).to(base.dtype) if dense else base.clone()

    @torch.no_grad()
    def merged_bias(self, names: Iterable[str]) -> Tensor | None:
        """The base bias with the named adapters' changes, as `merged_weight`; None when there is neither."""
        weight = self.values()
        bias = self._original("bias", self.base_layer._parameters["bias"])
        total = plus(bias, bias_change(self._exact_members(names, weight)))
        return None if total is None else total.to(weight.dtype if bias is None else bias.dtype)

    def values(self) -> Tensor:
        """Unmodified canonical base weight; of a packed one the numbers it stands for, in float32."""
        if self.has_plain_weight:
            return self.base_weight().detach()
        return self.geometry.canonical(original(self.base_layer, self.snapshot))

    def _exact_members(self, names: Iterable[str], base: Tensor) -> list[tuple[Adapter, dict[str, Tensor]]]:
        """Adapters whose strength is not zero with their stored factors, in the dtype for merging."""
        found = []
        for adapter, f in (m for n in names if n in self.adapters for m in self.adapter(n).members(exact=True)):
            if not adapter.idle:
                work = torch.promote_types(torch.promote_types(base.dtype, torch.float32), adapter.strength.dtype)
                found.append((adapter, {k: v.to(base.device) for k, v in cast(f, work).items()}))
        return found

    def merged_tensors(self, names: Iterable[str]) -> dict[str, Tensor | None]:
        """What the base layer's parameters are with the named adapters merged, in its own layout."""
        names = tuple(names)
        values: dict[str, Tensor | None] = {"weight": self.geometry.stored(self.merged_weight(names))}
        if self.biased:
            values["bias"] = self.merged_bias(names)
        return values

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the merged adapters, or of those that `resume` merges again."""
        return self.merged or self.suspended

    def merge(self, names: Iterable[str]) -> None:
        """Write the named adapters into the base layer; the original is kept in host memory for `unmerge`.

        A suspended layer waits with it until `resume`.

        Raises:
            AdapterError: the weight is packed, and `may_round` does not allow to round it anew.
        """
        names = tuple(n for n in names if n in self.adapters)
        if not names:
            self.unmerge()
            return
        if not self.enabled:
            self.suspended = names
            return
        self._write(names, keep=True)
        self.merged = names

    def merge_for_good(self, names: Iterable[str]) -> None:
        """Write the named adapters into the base layer; nothing is kept to undo it. Raises as `merge`."""
        self._write(tuple(names), keep=False)

    def _write(self, names: tuple[str, ...], keep: bool) -> None:
        if not self.has_plain_weight:
            self._write_rounded(names, keep)
            return
        values = self.merged_tensors(names)
        if keep:
            assert not isinstance(self.snapshot, PackedSnapshot)
            self.snapshot = Snapshot.take(self.base_layer, values, self.snapshot)
        write(self.base_layer, values)

    def _write_rounded(self, names: tuple[str, ...], keep: bool) -> None:
        if not self.may_round:
            raise AdapterError(
                f"{self.path!r} ({describe(self.base_layer)}) has a packed weight; merging rounds the change away in part and "
                "must be asked for: requantize=True"
            )
        values = self.merged_tensors(names)
        wanted: Any = values["weight"]
        fresh, loss = rounded(self.base_layer, wanted, self.snapshot)
        if keep:
            self.snapshot = take(self.base_layer, values, self.snapshot)
        if fresh is None and isinstance(self.snapshot, PackedSnapshot):
            self.snapshot.restore(self.base_layer)
        write_rounded(self.base_layer, fresh, values)
        self.loss = loss

    def unmerge(self) -> None:
        """Put the original weight and bias back, bit for bit."""
        if self.snapshot is not None:
            self.snapshot.restore(self.base_layer)
        self.snapshot, self.merged, self.suspended, self.loss = None, (), (), None

    def suspend(self) -> None:
        """Be exactly the base layer until `resume`; merged adapters are taken out meanwhile."""
        held = self.held
        self.unmerge()
        self.enabled, self.suspended = False, held

    def resume(self) -> None:
        """Undo `suspend`."""
        self.enabled = True
        if self.suspended:
            self.merge(self.suspended)
        self.suspended = ()

    def choices(self, x: Tensor) -> dict[str, Choice]:
        """How every active adapter would run on an input, with the cost model's figures."""
        inner, _ = self.geometry.enter(x)
        first = {n: self.adapter(n).members()[0] for n in self.active}
        return {n: self._choose(adapter, f, inner, self.has_plain_weight)[0] for n, (adapter, f) in first.items()}

    def extra_repr(self) -> str:
        state = f", merged={list(self.merged)}" if self.merged else ""
        return f"active={list(self.active)}{state}"


_choose = functools.lru_cache(maxsize=4096)(choose)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TENSORS = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def has_hooks(layer: nn.Module) -> bool:
    """Whether a hook of the layer's own, or a global one, wants to see the layer called."""
    own, shared = layer.__dict__, vars(torch.nn.modules.module)
    return any([own[name] for name in _HOOKS]) or any([shared[name] for name in _GLOBAL_HOOKS])


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype an operation on ``x`` runs in: autocast's where it is on, else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _module_dropout(adapter: Adapter) -> float:
    """Probability of skipping the adapter for a call."""
    return getattr(adapter.config, "module_dropout", 0.0)


def _input_dropout(adapter: Adapter) -> float:
    """Probability of dropping entries of the adapter's input."""
    return getattr(adapter.config, "lora_dropout", 0.0) or getattr(adapter.config, "miss_dropout", 0.0)


def _output_dropout(adapter: Adapter) -> float:
    """Probability of dropping rows of the adapter's output."""
    return getattr(adapter.config, "rank_dropout", 0.0)


def _masked(adapter: Adapter) -> bool:
    """Whether the adapter, in training, sees another input or gives another output than the plain change of the weight."""
    return bool(_input_dropout(adapter) or _output_dropout(adapter))
