"""GLoRA (arXiv 2306.07967): ``dW = s * (W A1 A2 + B1 B2)``, a low-rank map before the layer and one beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from ..execution.around import Around, Host, channels
from ..execution.geometry import Geometry
from ..execution.weights import Factors
from ..functional import glora, lora
from .base import Adapter, Site, fill
from .config import AlphaConfig
from .registry import register
from .storage import expect_shapes


@dataclass(init=False)
class GLoraConfig(AlphaConfig):
    """Configuration of `GLoraModel`.

    Attributes:
        use_effective_conv2d: a Tucker core in the second product, for convolutions.
    """

    use_effective_conv2d: bool = False

    peft_name: ClassVar[str] = "GLORA"


@register
class GLora(Adapter):
    """Factors ``glora_a1 (in, r)``, ``glora_a2 (r, in)``, ``glora_b1 (out, r)`` and ``glora_b2 (r, in, *k)``.

    With a core ``glora_bm (r, r, *k)`` the last is ``(r, in)``. The first product acts along the input channels of a group.
    """

    config_class = GLoraConfig
    factor_names = ("glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm")
    additive = False

    @classmethod
    def shapes(cls, geometry: Geometry, config: GLoraConfig) -> dict[str, tuple[int, ...]]:
        return _shapes(geometry, config.r, config.use_effective_conv2d and geometry.has_kernel)

    @classmethod
    def fits(cls, geometry: Geometry, config: GLoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        expect_shapes(_shapes(geometry, config.r, "glora_bm" in shapes), shapes)

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kernel axes of size one, which LyCORIS writes for convolutions, are dropped."""
        out = {k: v.flatten(1) if k != "glora_bm" and v.dim() > 2 else v for k, v in tensors.items()}
        second = out.get("glora_b2")
        if second is not None and second.dim() == 2 and "glora_bm" not in out and second.shape[1] == geometry.columns:
            out["glora_b2"] = second.reshape(-1, *geometry.shape[1:])
        return out

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {"glora_a1": (1,), "glora_a2": (0,), "glora_b1": (1,), "glora_b2": (0,), "glora_bm": (0, 1)}

    def reset(self, site: Site) -> None:
        kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
        last = nn.init.zeros_ if self.config.init_weights else kaiming
        fill(self, {**dict.fromkeys(self.factor_names, kaiming), "glora_a2": last, "glora_b2": last})

    def change(self, base: Tensor, f: Factors) -> Tensor:
        a1, a2, b1, b2 = (f[name].to(base.dtype) for name in self.factor_names[:4])
        core = f["glora_bm"].to(base.dtype) if "glora_bm" in f else None
        return f["scale"] * (glora.on_inputs(base, a1, a2) + lora.delta(b1, b2, core, tuple(base.shape)))

    @property
    def around_cost(self) -> int | None:
        if self.packed_gap() or self.geometry.has_kernel:
            return None
        return self.config.r * (3 * self.geometry.inp + self.geometry.out)

    def packed_gap(self) -> str:
        return "GLoRA maps the channels of every group alike" if self.geometry.groups > 1 else ""

    def packed_form(self, f: Factors, host: Host) -> Around:
        a1, a2, b1, b2 = (f[name] for name in self.factor_names[:4])
        scale, geo = f["scale"] * f["strength"], self.geometry

        def beside(x: Tensor) -> Tensor:
            if "glora_bm" in f:
                return geo.apply(x, lora.delta(b1 * scale, b2, f["glora_bm"], geo.shape).to(x.dtype))
            return channels(geo.apply(x, b2.to(x.dtype)), (b1 * scale,))

        return Around(before=lambda x: channels(x, (a2, a1 * scale)), beside=beside)


def _shapes(geometry: Geometry, r: int, core: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "glora_a1": (geometry.inp, r),
        "glora_a2": (r, geometry.inp),
        "glora_b1": (geometry.out, r),
        "glora_b2": (r, geometry.inp, *(() if core else geometry.kernel)),
    }
    return shapes | ({"glora_bm": (r, r, *geometry.kernel)} if core else {})
