"""MergeableLayer: a base layer with its named adapters, the weight they make of its own, and that weight in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..errors import AdapterError
from ..execution.engine import cast, changed_weight
from ..execution.geometry import Geometry, is_plain_weight
from ..execution.packed import describe
from ..execution.precision import outside_autocast
from .frozen import forget
from .parts import bias_change, plus
from .plans import Plans
from .rounded import PackedSnapshot, original, rounded, take, write_rounded
from .snapshot import Snapshot, write


class MergeableLayer(nn.Module):
    """A layer with adapters, merged or not. The base layer stays a child and is never altered while unmerged.

    Attributes:
        base_layer: the host.
        adapters: named adapters.
        geometry: how the host applies its weight.
        active: names of the adapters in use, in order.
        enabled: False runs the base layer alone.
        biased: some adapter changes the bias.
        path: in the model, for messages.
        may_round: a packed (quantized) weight may be rounded anew to merge into it.
        plans: how the adapters run in training, by kind of input.
        row_squares: squared row norms of a packed weight, ``(out,)``, once an adapter has needed them.
        loss: what that lost in the last merge, relative to the change of the weight; None where nothing was rounded.
    """

    biased = False
    path = ""
    may_round = False
    row_squares: Tensor | None = None  # no buffer: it stays in float32
    loss: float | None = None

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
        self.plans = Plans()
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise  # hooks and notes that other libraries put on a layer are that layer's own
            return getattr(super().__getattr__("base_layer"), name)

    def _apply(self, fn: Any, recurse: bool = True) -> MergeableLayer:
        self._forget()  # nothing stays behind on a device that the model leaves
        super()._apply(fn, recurse)
        return self

    def _forget(self) -> None:
        forget(self)
        self.plans.clear()

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
        self._forget()
        self.biased = self.biased or adapter.changes_bias

    def remove(self, name: str) -> None:
        """Take an adapter out that is not merged."""
        del self.adapters[name]
        self._forget()
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

    def _change(self, adapter: Adapter, f: dict[str, Tensor]) -> Tensor:
        """One adapter's change of the weight, canonical, in float32 or better where the base weight enters."""
        with outside_autocast(adapter.strength.device):
            if not adapter.depends_on_weight:
                return adapter.delta(f)
            weight = self.values()
            work = weight.to(torch.promote_types(weight.dtype, torch.float32))
            return adapter.add_change(torch.zeros_like(work), work, f)

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
        return changed_weight(base, dense, base.dtype) if dense else base.clone()

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
            return self.base_weight()
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

    def extra_repr(self) -> str:
        state = f", merged={list(self.merged)}" if self.merged else ""
        return f"active={list(self.active)}{state}"
