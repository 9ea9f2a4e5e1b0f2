"""The contract of an adapter.

An adapter owns the factors of one algorithm on one weight. It says how its change of the weight is computed, and, where
there is one, how to apply the change without building it. A new algorithm is a subclass with a config and a `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..execution.around import Around, Host
from ..execution.engine import cast
from ..execution.geometry import Geometry, geometry_of
from ..execution.narrow import times_narrow
from ..execution.program import Program
from ..execution.rows import channel_view, scale_rows
from ..execution.weights import Factors
from ..functional import dora
from .config import AdapterConfig
from .storage import FactorStore, expect_shapes


@dataclass(frozen=True)
class Site:
    """Where an adapter is created: what an initialisation may depend on.

    Attributes:
        path: dotted path of the layer in the model.
        adapter_name: name of the adapter.
        layer: the base layer.
        weight: gives its canonical unmodified weight.
    """

    path: str
    adapter_name: str
    layer: nn.Module
    weight: Callable[[], Tensor]


_DORA = "DoRA (weight_decompose)"
#: strengths live in float32 tensors, whatever the dtype of the model
LARGEST_STRENGTH = torch.finfo(torch.float32).max
_NUMBERS = ("strength", "scaling")


class Adapter(FactorStore):
    """Factors of one algorithm on one weight.

    Subclasses define `shapes`, `fits`, `reset`, `delta` and, if there is one, `program`. Factors are parameters under the
    names of PEFT's file tensors; dotted names (``lora_A.weight``) become nested modules.

    Attributes:
        geometry: of the host layer.
        config: the layer's own config (patterns resolved).
        scaling: trained strength (alpha / r), a constant.
        strength: 0-d tensor, multiplies the trained strength; 1 is as trained, 0 is the base model.
        decomposed: DoRA is on.
        depends_on_weight: the change must be taken against the unmodified base weight; a subclass that knows better sets it
            after its ``super().__init__``.
    """

    config_class: ClassVar[type[AdapterConfig]]
    #: the change does not depend on the base weight
    additive: ClassVar[bool] = True
    #: factor names by the order in which files list them; subclasses set it
    factor_names: ClassVar[tuple[str, ...]] = ()
    #: name of the DoRA magnitude, empty when the algorithm cannot be decomposed
    magnitude_name: ClassVar[str] = ""
    #: name of the factor that is added to the host's bias, empty when the algorithm leaves it alone
    bias_name: ClassVar[str] = ""
    #: rounding the factors to a half precision would outweigh the change: they stay in float32
    wide_factors: ClassVar[bool] = False
    #: targets for ``target_modules=None``; None takes the defaults for the model's architecture
    default_targets: ClassVar[str | None] = None

    #: runs in every call even while off, so that switching it changes tensors only
    pinned: ClassVar[bool] = False

    #: what `row_statistics` keeps for backward is a few vectors
    small_row_statistics: ClassVar[bool] = False

    #: one adapter, not a sum of several, which is what has `members` of its own
    single: ClassVar[bool] = True

    strength: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "members" in vars(cls):
            cls.single = False

    def __init__(self, geometry: Geometry, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.geometry = geometry
        self.config = config
        self.scaling = config.scaling()
        self.register_buffer("strength", torch.ones(()), persistent=False)
        self._strength = 1.0
        self.decomposed = bool(self.magnitude_name) and self.magnitude_name in self.factor_shapes
        self.depends_on_weight = self.decomposed or not self.additive

    # --- what an algorithm defines -----------------------------------------------------------------------------------
    @classmethod
    def host(cls, layer: nn.Module) -> Geometry | None:
        """Geometry of a layer that can carry this algorithm, None for every other layer."""
        return geometry_of(layer)

    @classmethod
    def shapes(cls, geometry: Geometry, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of a new adapter's factors.

        Raises:
            ConfigError: the settings do not fit the layer.
        """
        raise NotImplementedError

    @classmethod
    def fits(cls, geometry: Geometry, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that factors found in a file compose to the layer's weight; the default asks for a new adapter's shapes.

        Raises:
            CheckpointError: naming the first tensor that does not fit.
        """
        expect_shapes(cls.shapes(geometry, config), shapes)

    def reset(self, site: Site) -> None:
        """Initialise the factors by ``config.init_weights``."""
        raise NotImplementedError

    def delta(self, f: Factors) -> Tensor:
        """Change of the weight, ``(out, in, *k)``, times ``f["scale"]``; for additive algorithms."""
        raise NotImplementedError

    def program(self, f: Factors) -> Program | None:
        """The factored form with ``f["scale"]`` inside, or None when there is none for this layer."""
        return None

    def program_key(self) -> Hashable:
        """What `program` depends on beside the shapes of the factors; a layer remembers its program until this changes."""
        return None

    @property
    def around_cost(self) -> int | None:
        """Multiply-adds a token of the maps in `packed_form`; None where only a packed weight is run around."""
        return None

    def packed_gap(self) -> str:
        """Why this cannot run on a layer whose weight is packed (quantized), "" when it can."""
        if self.decomposed:
            axis: str = self.config.dora_axis  # type: ignore[attr-defined]
            rows = axis == "out" and type(self).product is not Adapter.product and not self.geometry.kernel
            need = f"{_DORA} of {type(self).__name__} on axis {axis!r} needs all the weight's values in every step"
            return "" if rows else f'{need}, which LoRA and LoHa on axis "out" do not'
        return "its change is computed from the weight's values" if self.depends_on_weight else ""

    def packed_form(self, f: Factors, host: Host) -> Around | None:
        """The change at its strength without the weight's values, where it needs them; None where `packed_gap` says why."""
        pair, program = self.product(f), self.program(f)
        if not self.decomposed or pair is None or program is None or host.row_squares is None:
            return None
        up, down = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
        # W down^T by the layer's own operation, on k more tokens
        mixed = host.plain(down.to(host.dtype)).to(up.dtype)
        square = host.row_squares + ((2 * mixed.T + up @ (down @ down.T)) * up).sum(1)
        row, strength = dora.row_factors(f[self.magnitude_name], square), f["strength"]
        return Around(
            after=lambda y: y * channel_view((row - 1) * strength, y),
            beside=lambda x: scale_rows(program.run(self.geometry, x, cast(f, x.dtype)), row * strength, None),
        )

    def lengthened(self, row: Tensor, program: Program, f: Factors) -> Around:
        """DoRA's change at its strength, from its factors of the rows ``(out,)`` and the delta's factored form."""
        strength = f["strength"]

        def changed(x: Tensor, y: Tensor) -> Tensor:
            run = program.run(self.geometry, x, cast(f, x.dtype))
            if y.dtype.itemsize < 4 and not self.at_full_strength(f):  # rounded terms of opposite signs must not be large
                return y * channel_view(1 + (row - 1) * strength, y) + run * channel_view(row * strength, y)
            return torch.addcmul(y * (1 - strength).to(y.dtype), y + run, channel_view(row * strength, y))

        return Around(changed=changed)

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        """``total + delta``; override when it can be had in fewer passes."""
        return total + self.delta(f).to(total.dtype)

    def change_entries(self, base: Tensor, f: Factors) -> Tensor | None:
        """``base`` in its own dtype with this change alone, each entry rounded once; None unless single entries change."""
        return None

    def change(self, base: Tensor, f: Factors) -> Tensor:
        """Change of the weight as trained, for algorithms that are not additive."""
        raise NotImplementedError

    def settle(self, base: Callable[[], Tensor]) -> None:
        """Take what the algorithm needs of its layer's unmodified weight; called before anything is attached.

        Args:
            base: gives the canonical weight; most algorithms never ask.

        Raises:
            AdapterError: the weight is not to be had, or the factors do not belong to it.
        """

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Axes along which factors may be longer than needed, filled with zeros, without another change of the weight."""
        return {}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: Any) -> str | None:
        """Why PEFT cannot express this adapter on such a layer, None when it can; unknown algorithms cannot."""
        return f"PEFT does not know {cls.__name__}"

    def product(self, f: Factors) -> tuple[Tensor, Tensor] | None:
        """The flattened delta as a product ``(out, k) @ (k, in * K)`` with a small k; None when it has no such form."""
        return None

    def row_statistics(self, base: Tensor, f: Factors) -> tuple[Tensor, Tensor] | None:
        """``(sum_n base * delta, sum_n delta^2)`` for every row without building the delta; None when not possible."""
        pair = self.product(f)
        if pair is None:
            return None
        up, down = (t.to(base.dtype) for t in pair)
        return (times_narrow(base.flatten(1), down) * up).sum(1), ((up @ (down @ down.T)) * up).sum(1)

    # --- files -------------------------------------------------------------------------------------------------------
    @classmethod
    def owns(cls, name: str) -> bool:
        """Whether a file tensor of that name (below the layer's path) belongs to this algorithm."""
        return name in cls.factor_names or (bool(cls.magnitude_name) and name == cls.magnitude_name)

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors from a file's tensors; other spellings and codings become the usual ones.

        Raises:
            CheckpointError: the coding is damaged.
        """
        return dict(tensors)

    @classmethod
    def encode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The compact coding of one layer's tensors; the default has none and changes nothing."""
        return dict(tensors)

    # --- strength ----------------------------------------------------------------------------------------------------
    @property
    def changes_weight(self) -> bool:
        """Whether there is a change of the weight; only the bias may be changed."""
        return True

    @property
    def changes_bias(self) -> bool:
        """Whether the host's bias is changed as well."""
        return bool(self.bias_name) and self.bias_name in self.factor_shapes

    def bias_change(self, f: Factors) -> Tensor | None:
        """Change of the host's bias at the adapter's strength, ``(out,)`` in float32 or better; None when it stays."""
        if not self.changes_bias:
            return None
        change = f[self.bias_name]
        return f["strength"] * change.to(torch.promote_types(change.dtype, torch.float32))

    def get_strength(self) -> float:
        """Multiplier of the trained strength."""
        return self._strength

    def in_use(self) -> list[Adapter]:
        """The adapters this one consists of: itself, the parts of a sum, or what a slot holds."""
        return [self]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to add: at zero strength it is not run at all. `setting` is None then."""
        return self._strength == 0.0

    def switch(self, on: bool) -> None:
        """Be told whether the adapter is among the active ones; those that are not do not run, so most do not care."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """What moves or converts modules goes through this; strengths stay in float32 or better."""
        held = {name: t for name, t in self._buffers.items() if name in _NUMBERS and t is not None}
        super()._apply(fn, recurse)
        for name, before in held.items():
            after: Any = self._buffers[name]
            if after.dtype.itemsize < 4:
                self._buffers[name] = before.to(after.device, torch.float32)
        return self

    def set_strength(self, value: float) -> None:
        """Set the multiplier; it lives in a tensor, so a compiled model does not recompile."""
        self.strength.fill_(value)
        self._strength = float(value)

    # --- what the layer uses -----------------------------------------------------------------------------------------
    def inputs(self, exact: bool = False) -> dict[str, Tensor]:
        """Factors plus ``strength`` and ``scale`` (the factor on the delta); ``exact`` prefers the values as stored."""
        f = self.exact_factors() if exact else self.factors()
        buffers: Any = self._buffers
        strength = f["strength"] = buffers["strength"]
        f["scale"] = (torch.ones_like(strength) if self.depends_on_weight else strength) * self.scaling
        return f

    def setting(self) -> tuple[float, Hashable] | None:
        """What it trains with beside its factors: the factor on the delta as a number, and what its program depends on.

        None where that is no number, since the strength learns or it is a sum of several; and where it is `idle`, since layers
        ask for this before they leave such adapters out.
        """
        buffers: Any = self._buffers
        strength = self._strength
        if strength == 0.0 or not self.single or buffers["strength"].requires_grad:
            return None
        return float(self.scaling) if self.depends_on_weight else strength * self.scaling, self.program_key()

    def at_full_strength(self, f: Factors) -> bool:
        """Whether these inputs are at strength one for certain. Compiled code is not told: others would compile it again."""
        if torch.compiler.is_compiling() or f["strength"] is not self._buffers["strength"]:
            return False
        return self._strength == 1.0 and not f["strength"].requires_grad

    def members(self, exact: bool = False) -> list[tuple[Adapter, dict[str, Tensor]]]:
        """The adapters this one consists of, with their inputs: itself, or the parts of a sum."""
        return [(self, self.inputs(exact))]

    def add_change(self, total: Tensor, base: Tensor, f: Factors) -> Tensor:
        """``total`` plus this adapter's change of ``base`` at its strength: ``strength * (adapted(base) - base)``."""
        if not self.depends_on_weight:
            return self.add_delta(total, f)
        strength = f["strength"].to(base.dtype)
        if self.decomposed:
            axis: str = self.config.dora_axis  # type: ignore[attr-defined]
            adapted = dora.decompose(self.add_delta(base, f), f[self.magnitude_name].to(base.dtype), axis)
            return total + strength * (adapted - base)
        return total + strength * self.change(base, f).to(base.dtype)

    def init_magnitude(self, base: Tensor) -> None:
        """DoRA's start: the norm of the adapted weight, so that a new adapter changes nothing."""
        if self.decomposed and not self.strength.is_meta:
            f = self.inputs()
            work = base.to(torch.promote_types(base.dtype, torch.float32))
            magnitude = self.get_tensor(self.magnitude_name)
            with torch.no_grad():
                norm = dora.norms(self.add_delta(work, f), self.config.dora_axis)  # type: ignore[attr-defined]
                magnitude.copy_(norm.reshape(magnitude.shape))

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{k}={tuple(v)}" for k, v in self.factor_shapes.items())
        return f"{type(self).__name__.lower()} r={self.config.r} scaling={self.scaling:g} {shapes}"


def magnitude_shape(geometry: Geometry, axis: str) -> tuple[int, ...]:
    """Shape of DoRA's magnitude in LyCORIS' layout: ``(out, 1, ...)`` or ``(1, in, 1, ...)``."""
    ones = (1,) * len(geometry.kernel)
    return (geometry.out, 1, *ones) if axis == "out" else (1, geometry.inp, *ones)


Initialiser = Callable[[Tensor], Any]


def fill(adapter: Adapter, initialisers: Mapping[str, Initialiser]) -> None:
    """Run an initialiser on every factor that exists.

    Raises:
        AdapterError: a factor has no initialiser.
    """
    with torch.no_grad():
        for name in adapter.factor_shapes:
            if name == adapter.magnitude_name:
                continue
            if name not in initialisers:
                raise AdapterError(f"{type(adapter).__name__} has no initialiser for factor {name!r}")
            initialisers[name](adapter.get_tensor(name))
