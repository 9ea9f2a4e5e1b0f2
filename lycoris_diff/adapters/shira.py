"""SHiRA (arXiv 2406.13175): a few entries of the weight are trained, at positions fixed by a mask."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, CheckpointError, ConfigError
from ..execution.geometry import Geometry, is_transformers_conv1d
from ..execution.marks import mark
from ..execution.program import Program
from ..execution.sparse import Pattern, Sparse
from ..execution.weights import Factor, Factors, times_scale
from ..functional import shira
from .base import Adapter, Site
from .config import AdapterConfig
from .registry import register
from .storage import expect_shapes

MaskFunction = Callable[..., Tensor]


@dataclass(init=False)
class ShiraConfig(AdapterConfig):
    """Configuration of `ShiraModel`; fields as in PEFT.

    Attributes:
        r: ``r * (out + in*K)`` entries of the flattened weight are trained.
        mask_type: "random", or any other name together with ``config.mask_fn = f``.
        random_seed: makes the random masks reproducible; every layer and adapter still gets a mask of its own. None draws
            from torch's global generator.
        fan_in_fan_out: only meaningful for transformers' Conv1D, whose layout is known; corrected with a warning elsewhere.
        mask_fn: ``mask_fn(base_layer, r, **kwargs)`` returns a 0/1 mask of the weight's shape with as many ones as entries are
            trained; ``random_seed``, ``adapter_name`` and ``layer_name`` are passed if the function accepts them.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False

    peft_name: ClassVar[str] = "SHIRA"
    mask_fn: ClassVar[MaskFunction | None] = None  # an instance attribute once set; not part of the saved config

    def check(self) -> None:
        super().check()
        mask_fn = self.mask_fn
        if mask_fn is not None and not callable(mask_fn):
            raise ConfigError(f"ShiraConfig: mask_fn is {mask_fn!r}; expected a function")
        if self.mask_type != "random" and mask_fn is None and not self.inference_mode:
            raise ConfigError(
                f"ShiraConfig: mask_type={self.mask_type!r} needs a mask function; set config.mask_fn = your_function, "
                'or use mask_type="random"'
            )
        if self.random_seed is not None and (isinstance(self.random_seed, bool) or not isinstance(self.random_seed, int)):
            raise ConfigError(f"ShiraConfig: random_seed is {self.random_seed!r}; expected an integer or None")


@register
class Shira(Adapter):
    """Values ``shira_weight (n,)`` at ``shira_indices (2, n)`` (int32 row and column of the flattened weight)."""

    config_class = ShiraConfig
    factor_names = ("shira_weight", "shira_indices")
    index_names = ("shira_indices",)
    _sorted: tuple[Tensor, tuple[int, int], Pattern] | None = None

    @classmethod
    def shapes(cls, geometry: Geometry, config: ShiraConfig) -> dict[str, tuple[int, ...]]:
        count, total = config.r * (geometry.out + geometry.columns), geometry.out * geometry.columns
        if count > total:
            raise ConfigError(f"SHiRA: r={config.r} asks for {count} entries, the weight has only {total}; choose a smaller r")
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    @classmethod
    def fits(cls, geometry: Geometry, config: ShiraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        count = shapes.get("shira_weight", (0,))[0]
        expect_shapes({"shira_weight": (count,), "shira_indices": (2, count)}, shapes)
        if count > geometry.out * geometry.columns:
            raise CheckpointError(f"{count} SHiRA values do not fit a weight of shape {geometry.shape}")

    @classmethod
    def owns(cls, name: str) -> bool:
        return super().owns(name) or name == "shira_gaps"

    @classmethod
    def decode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        columns = geometry.columns
        if "shira_gaps" in out:
            positions = shira.decode_gaps(out.pop("shira_gaps"), geometry.out * columns)
            out["shira_indices"] = torch.stack([positions // columns, positions % columns])
        indices = out.get("shira_indices")
        if indices is not None and indices.dim() == 2 and indices.shape[0] == 2 and indices.numel():
            low, high = indices.amin(1).tolist(), indices.amax(1).tolist()
            if min(low) < 0 or high[0] >= geometry.out or high[1] >= columns:
                raise CheckpointError(
                    f"shira_indices run from {low} to {high}; the weight has {geometry.out} rows and {columns} columns"
                )
            out["shira_indices"] = indices.to(torch.int32)
        return out

    @classmethod
    def encode(cls, geometry: Geometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        positions, order = shira.flat_indices(tensors["shira_indices"], geometry.columns).sort()
        if bool((positions.diff() == 0).any()):
            raise AdapterError("SHiRA positions repeat; such an adapter cannot be saved with compact=True")
        return {"shira_weight": tensors["shira_weight"][order], "shira_gaps": shira.encode_gaps(positions)}

    @classmethod
    def rank_axes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {"shira_weight": (0,), "shira_indices": (1,)}

    @classmethod
    def peft_gap(cls, geometry: Geometry, config: ShiraConfig) -> str | None:
        return "PEFT's SHiRA knows Linear only" if geometry.kernel or geometry.transposed else None

    def reset(self, site: Site) -> None:
        config: ShiraConfig = self.config  # type: ignore[assignment]
        if config.fan_in_fan_out and not is_transformers_conv1d(site.layer):
            warnings.warn(
                f"fan_in_fan_out=True, but {site.path!r} is {type(site.layer).__name__}, not Conv1D; using False",
                stacklevel=2,
            )
        if config.mask_fn is None:
            positions = self._random(config.random_seed, site)
        else:
            positions = self._from_mask(config.mask_fn, site)
        columns = self.geometry.columns
        indices = torch.stack([positions // columns, positions % columns])
        with torch.no_grad():
            self.get_buffer("shira_indices").copy_(indices)
            weight = self.get_parameter("shira_weight")
            if config.init_weights:
                weight.zero_()
            else:
                nn.init.normal_(weight)

    def _random(self, seed: int | None, site: Site) -> Tensor:
        count, total = self.factor_shapes["shira_weight"][0], self.geometry.out * self.geometry.columns
        generator = None
        if seed is not None:
            digest = hashlib.sha256(f"{seed}/{site.adapter_name}/{site.path}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return shira.random_positions(total, count, generator)

    def _from_mask(self, mask_fn: MaskFunction, site: Site) -> Tensor:
        config: ShiraConfig = self.config  # type: ignore[assignment]
        offered = {"random_seed": config.random_seed, "adapter_name": site.adapter_name, "layer_name": site.path}
        expected = self.geometry.shape[::-1] if self.geometry.transposed else self.geometry.shape  # also of packed weights
        mask = mask_fn(site.layer, config.r, **_accepted(mask_fn, offered))
        if not isinstance(mask, Tensor) or mask.shape != expected:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"SHiRA: mask_fn returned {shape} for {site.path!r}; expected a mask of shape {tuple(expected)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ConfigError(f"SHiRA: mask_fn returned values other than 0 and 1 for {site.path!r}")
        positions = self.geometry.canonical(mask).reshape(-1).nonzero().squeeze(1).cpu()
        count = self.factor_shapes["shira_weight"][0]
        if positions.numel() != count:
            raise ConfigError(
                f"SHiRA: mask_fn set {positions.numel()} entries for {site.path!r}; r={config.r} asks for {count}"
            )
        return positions

    def program(self, f: Factors) -> Program | None:
        geo, values = self.geometry, f["shira_weight"]
        if geo.kernel or torch.compiler.is_compiling():
            return None
        # measured: an entry costs a sparse kernel about eight multiply-adds, seven in the sampled gradient; the transposed
        # copies and their addition cost eleven passes over input and output, most of which `width` stands for
        last = Sparse(Factor("shira_weight", scaled=True), self._pattern())
        count, width = values.numel(), 9 * (geo.inp + geo.out) // 2
        return Program(None, last, cost=8 * count, width=width, sampled_cost=7 * count, eager_only=True)

    def program_key(self) -> Hashable:
        if self.geometry.kernel or self.get_buffer("shira_indices").is_meta:
            return None
        return id(self._pattern())  # of no other pattern as long as a program with this one is kept

    def _pattern(self) -> Pattern:
        """Sorted positions, kept until the indices change."""
        indices = self.get_buffer("shira_indices")
        kept = self._kept(indices)
        if kept is None:
            with torch.inference_mode(False):  # training may come later
                kept = Pattern.of(shira.flat_indices(indices, self.geometry.columns), self.geometry.out, self.geometry.columns)
            self._sorted = indices, mark(indices), kept
        return kept

    def _kept(self, indices: Tensor) -> Pattern | None:
        """What is kept of these indices, if anything is."""
        if torch.compiler.is_compiling() or self._sorted is None:
            return None
        held, marked, pattern = self._sorted
        return pattern if held is indices and marked == mark(indices) else None

    def delta(self, f: Factors) -> Tensor:
        values = f["shira_weight"] * f["scale"]
        return shira.scatter(values, f["shira_indices"], self.geometry.out, self.geometry.columns).view(self.geometry.shape)

    def change_entries(self, base: Tensor, f: Factors) -> Tensor | None:
        kept = self._kept(f["shira_indices"])
        if kept is None or not kept.distinct or not base.is_contiguous():
            return None
        values, flat = times_scale(f["shira_weight"], f["scale"]), base.view(-1)
        wide = torch.promote_types(base.dtype, torch.float32)
        fresh = (flat[kept.flat].to(wide) + values.to(wide)).to(base.dtype)
        return flat.index_put((kept.flat,), fresh).view(base.shape)

    def add_delta(self, total: Tensor, f: Factors) -> Tensor:
        values = times_scale(f["shira_weight"], f["scale"]).to(total.dtype)
        if total.dim() == 2 and total.stride(0) == 1 != total.stride(1):  # stored the other way round, and so it stays
            flat = shira.flat_indices(f["shira_indices"].flip(0), self.geometry.out)
            return total.mT.reshape(-1).index_add(0, flat, values).view(total.mT.shape).mT
        kept = self._kept(f["shira_indices"])
        flat = shira.flat_indices(f["shira_indices"], self.geometry.columns) if kept is None else kept.flat
        return total.reshape(-1).index_add(0, flat, values).view(total.shape)


def _accepted(function: MaskFunction, offered: dict[str, Any]) -> dict[str, Any]:
    """The keywords a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    names = {p.name for p in parameters}
    return {k: v for k, v in offered.items() if k in names}
