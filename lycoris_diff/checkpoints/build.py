"""From the neutral form to the library's adapters, and to the change of the weight they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.combined import Combined, CombinedConfig
from ..adapters.config import AdapterConfig
from ..adapters.registry import ADAPTERS
from ..errors import AdapterError, CheckpointError
from ..execution.engine import cast
from ..execution.geometry import Geometry
from ..execution.norms import NormGeometry
from .checkpoint import Entry


def adapter_of(
    entries: Entry | Sequence[Entry],
    geometry: Geometry,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapter:
    """The library's adapter for what a file says about one weight.

    Args:
        entries: one algorithm, or several whose changes add up.
        geometry: of the layer.
        dtype: of the live factors; the file's own values are kept beside them for merging and saving where they differ.
        device: of the live factors.

    Raises:
        CheckpointError: an unknown algorithm or option, or factors that do not compose to the layer's weight.
    """
    if isinstance(entries, Entry):
        return _single(entries, geometry, dtype, device)
    if not entries:
        raise CheckpointError("a module has no algorithm on it")
    parts = [_single(entry, geometry, dtype, device) for entry in entries]
    if len(parts) == 1:
        return parts[0]
    config = CombinedConfig(parts=[part.config.to_dict() for part in parts], weights=[1.0] * len(parts))
    combined = Combined.of(config, dict(enumerate(parts)))
    combined.register_buffer("strength", torch.ones((), dtype=dtype, device=device), persistent=False)
    return combined


def config_of(entry: Entry) -> AdapterConfig:
    """The algorithm's config with the entry's rank, strength and options.

    Raises:
        CheckpointError: an unknown algorithm or option, or a strength that the algorithm has no place for.
    """
    cls = algorithm(entry)
    known = {f.name for f in fields(cls.config_class)}
    rank = max(entry.rank, 1)
    # the strength is resolved already, whatever root of the rank was in it
    settings: dict[str, Any] = {"r": rank, **{k: v for k, v in entry.options.items() if k != "use_rslora"}}
    if "alpha" in known:
        settings["alpha"] = entry.scale * rank
    elif entry.scale != 1.0:
        raise CheckpointError(f"{entry.algorithm} has a strength of {entry.scale:g}; the algorithm knows only 1")
    strange = sorted(settings.keys() - known)
    if strange:
        raise CheckpointError(f"{entry.algorithm} has no option {strange[0]!r}")
    config = cls.config_class(**settings)
    config.inference_mode = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options without effect are none of the reader's business
            config.check()
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    return config


def algorithm(entry: Entry) -> type[Adapter]:
    """The adapter class of an entry.

    Raises:
        CheckpointError: no algorithm has the name.
    """
    if entry.algorithm not in ADAPTERS:
        raise CheckpointError(f"unknown algorithm {entry.algorithm!r}; known are {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[entry.algorithm]


def geometry_from_shape(shape: Sequence[int]) -> Geometry:
    """A layer of which only the canonical weight's shape is known: stride one, no padding, one group, with a bias.

    A shape of one axis is a normalisation's.
    """
    if len(shape) == 1:
        return NormGeometry(shape[0], 1, has_bias=True)
    out, inp, *kernel = shape
    axes = len(kernel)
    ones, zeros = (1,) * axes, (0,) * axes
    return Geometry(out, inp, tuple(kernel), stride=ones, padding=zeros, dilation=ones, has_bias=True)


def entry_delta(entry: Entry | Sequence[Entry], site_shape: Sequence[int], weight: Tensor | None = None) -> Tensor:
    """Dense change of a weight by what a file says about it, as trained, in float64.

    Args:
        entry: one algorithm, or several whose changes add up.
        site_shape: canonical shape of the weight, ``(out, in / groups, *kernel)``, ``(dim,)`` for norms.
        weight: unmodified weight of that shape; only algorithms that depend on it (DoRA, GLoRA, OFT ...) need it.

    Returns:
        Change of the weight alone, a bias' change is not part of it.

    Raises:
        AdapterError: the algorithm needs ``weight``. CheckpointError: the factors do not fit the shape.
    """
    shape, geometry = tuple(site_shape), geometry_from_shape(site_shape)
    adapter = adapter_of(entry, geometry, torch.float64)
    if weight is None and adapter.depends_on_weight:
        names = " and ".join(sorted({e.algorithm for e in ([entry] if isinstance(entry, Entry) else entry)}))
        raise AdapterError(f"the change that {names} makes depends on the base weight; pass weight=")
    if weight is not None and tuple(weight.shape) != shape:
        raise AdapterError(f"the weight has shape {tuple(weight.shape)}, expected {shape}")
    base = torch.zeros(shape, dtype=torch.float64) if weight is None else weight.detach().to("cpu", torch.float64)
    with torch.no_grad():
        total = torch.zeros_like(base)
        for part, inputs in adapter.members():
            total = part.add_change(total, base, cast(inputs, torch.float64))
    return total.reshape(shape)


def _single(entry: Entry, geometry: Geometry, dtype: torch.dtype, device: torch.device | str) -> Adapter:
    cls = algorithm(entry)
    config = config_of(entry)
    values = cls.decode(geometry, entry.tensors)
    for name, value in values.items():
        if value.is_floating_point() == (name in cls.index_names):
            kind = "integers" if name in cls.index_names else "floats"
            raise CheckpointError(f"tensor {name!r} is {value.dtype}; expected {kind}")
    shapes = {k: tuple(v.shape) for k, v in values.items()}
    try:
        cls.fits(geometry, config, shapes)
    except CheckpointError:
        raise
    except AdapterError as error:  # settings that no layer of this size can have
        raise CheckpointError(str(error)) from error
    if cls.wide_factors:
        dtype = torch.promote_types(dtype, torch.float32)
    with torch.device("meta"):
        adapter = cls(geometry, config, shapes)
    for name, value in values.items():
        adapter.add_factor(name, value.to(device, dtype) if value.is_floating_point() else value.to(device))
    adapter.register_buffer("strength", torch.ones((), dtype=dtype, device=device), persistent=False)
    adapter.keep_exact({k: v for k, v in values.items() if v.is_floating_point() and v.dtype != dtype})
    adapter.requires_grad_(False)
    return adapter
