"""Weights that a library keeps packed: read once as ordinary numbers, written anew by the layer's own scheme.

Neither happens while a layer runs; that is the base layer's own kernel. No library is imported unless a layer of its is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import AdapterError

#: storage types of diffusers' layerwise casting
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Scheme(NamedTuple):
    """How a kind of packed weight is read, written and put into its layer.

    Attributes:
        name: of the library and the kind.
        refusal: why this layer's weight cannot be read or written just now, "" when it can.
        read: the weight of a parameter, ``(out, in, *k)`` as stored, in float32.
        pack: a parameter like the first with other values (float32, of the weight's shape).
        hold: the layer's parameter with everything that belongs to it.
        install: put such a parameter in the layer's place.
    """

    name: str
    refusal: Callable[[nn.Module], str]
    read: Callable[[Any], Tensor]
    pack: Callable[[Any, Tensor], nn.Parameter]
    hold: Callable[[Any], nn.Parameter]
    install: Callable[[Any, nn.Parameter], None]


def describe(layer: nn.Module) -> str:
    """A layer and its weight in words: class, class of the weight, stored dtype and library where it is known."""
    weight: Any = layer._parameters.get("weight")
    scheme = _find(layer)
    kind = f"{type(weight).__name__} {getattr(weight, 'dtype', None)}"
    return f"{type(layer).__name__}, weight {kind}" + (f" of {scheme.name}" if scheme else "")


def scheme_of(layer: nn.Module) -> Scheme:
    """The scheme of a layer's packed weight, which `unreadable` has not refused."""
    found = _find(layer)
    assert found is not None
    return found


def unreadable(layer: nn.Module) -> str:
    """Why the numbers a packed weight stands for cannot be had, "" when they can."""
    found = _find(layer)
    known = ", ".join(s.name for s in _SCHEMES.values())
    return f"of packed weights only those of {known} can be read" if found is None else found.refusal(layer)


def held_weight(layer: nn.Module) -> nn.Parameter:
    """The layer's packed parameter with everything that belongs to it, safe from what the layer does when it runs.

    Raises:
        AdapterError: it cannot be read.
    """
    why = unreadable(layer)
    if why:
        raise AdapterError(f"{describe(layer)}: {why}; leave the adapter unmerged")
    return scheme_of(layer).hold(layer)


def _find(layer: nn.Module) -> Scheme | None:
    weight: Any = layer._parameters.get("weight")
    if weight is None:
        return None
    if weight.dtype in _FLOAT8 and type(weight) in (Tensor, nn.Parameter):
        return _SCHEMES["float8"]
    library = type(weight).__module__.partition(".")[0]
    return _SCHEMES.get(f"{library}.{type(weight).__name__}")


def _always(layer: nn.Module) -> str:
    return ""


def _take(layer: nn.Module) -> nn.Parameter:
    return layer._parameters["weight"]  # type: ignore[return-value]


def _put(layer: nn.Module, parameter: nn.Parameter) -> None:
    layer._parameters["weight"] = parameter


# --- torchao -------------------------------------------------------------------------------------------------------------
def _read_torchao(weight: Any) -> Tensor:
    values: Tensor = weight.dequantize()
    return values.float()


def _pack_int8(weight: Any, values: Tensor) -> nn.Parameter:
    from torchao.quantization import MappingType, PerGroup, PerRow, PerTensor

    rows, group = weight.block_size
    whole = group == weight.shape[1]
    granularity = PerTensor() if rows > 1 else PerRow() if whole else PerGroup(group)
    asymmetric = weight.zero_point is not None and bool((weight.zero_point != 0).any())
    packed = type(weight).from_hp(
        values.to(weight.dtype),
        granularity,
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        act_quant_kwargs=weight.act_quant_kwargs,
        reduce_range=weight.reduce_range,
    )
    return nn.Parameter(packed, requires_grad=False)


def _pack_intx(weight: Any, values: Tensor) -> nn.Parameter:
    from torchao.quantization import MappingType

    packed = type(weight).from_hp(
        values.to(weight.dtype),
        tuple(weight.block_size),
        weight.target_dtype,
        mapping_type=MappingType.ASYMMETRIC if bool((weight.zero_point != 0).any()) else MappingType.SYMMETRIC,
        activation_quantization=weight.activation_quantization,
    )
    return nn.Parameter(packed, requires_grad=False)


def _scaled_activations(layer: nn.Module) -> str:
    """Static scales belong to the weight they were calibrated with."""
    weight: Any = layer._parameters["weight"]
    fixed = weight.act_quant_scale is not None or weight.act_pre_scale is not None
    return "its activations have scales calibrated for this very weight" if fixed else ""


# --- bitsandbytes --------------------------------------------------------------------------------------------------------
def rearranged(layer: nn.Module) -> bool:
    """Whether bitsandbytes has rearranged a 4-bit weight for inference on the CPU, after which it gives no gradients."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _not_packed_yet(layer: nn.Module) -> str:
    weight: Any = layer._parameters["weight"]
    if weight.quant_state is None:
        return "it is quantized when it is moved to a device, which has not happened yet"
    if rearranged(layer):
        return "bitsandbytes has rearranged and rounded it for inference on the CPU; merge before the first call in eval mode"
    return ""


def _read_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return values.float()


def _pack_4bit(weight: Any, values: Tensor) -> nn.Parameter:
    packed: nn.Parameter = type(weight)(values.to(weight.quant_state.dtype), **_settings_4bit(weight)).to(weight.device)
    return packed


def _settings_4bit(weight: Any) -> dict[str, Any]:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    return {name: getattr(weight, name) for name in names}


def _hold_4bit(layer: Any) -> nn.Parameter:
    """The library rearranges parameter and state in place when a layer runs: what is kept is a copy."""
    return _copy_4bit(layer.weight)


def _copy_4bit(weight: Any) -> nn.Parameter:
    state = copy.deepcopy(weight.quant_state)
    return type(weight)(weight.data.clone(), quant_state=state, bnb_quantized=True, **_settings_4bit(weight))


def _put_4bit(layer: Any, parameter: Any) -> None:
    own: Any = _copy_4bit(parameter)
    own.module = layer
    layer._parameters["weight"] = own
    layer.quant_state = own.quant_state


def _int8_state(layer: Any) -> str:
    held = layer.weight
    if held.dtype != torch.int8:
        return "it is quantized when it is moved to a device, which has not happened yet"
    return ""


def _read_8bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    values: Tensor = int8_vectorwise_dequant(weight.data, weight.SCB)
    return values.float()


def _pack_8bit(weight: Any, values: Tensor) -> nn.Parameter:
    fresh = type(weight)(values, requires_grad=False, has_fp16_weights=False)
    packed: nn.Parameter = fresh.cpu().to(weight.device)  # quantizes
    return packed


def _hold_8bit(layer: Any) -> nn.Parameter:
    """After the first call scales live in the layer's state; a parameter that carries them is one that never ran."""
    weight, state = layer.weight, layer.state
    scales = state.SCB if weight.SCB is None else weight.SCB
    return type(weight)(weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=scales)


def _put_8bit(layer: Any, parameter: Any) -> None:
    layer.state.CB = layer.state.SCB = None
    # the first call takes the scales out of the parameter: ours stays whole
    layer._parameters["weight"] = type(parameter)(
        parameter.data, requires_grad=False, has_fp16_weights=False, CB=parameter.data, SCB=parameter.SCB
    )


# --- layerwise casting ---------------------------------------------------------------------------------------------------
def _pack_float8(weight: Tensor, values: Tensor) -> nn.Parameter:
    largest = torch.finfo(weight.dtype).max
    return nn.Parameter(values.clamp(-largest, largest).to(weight.dtype), requires_grad=False)


_SCHEMES: dict[str, Scheme] = {
    "torchao.Int8Tensor": Scheme("torchao int8", _scaled_activations, _read_torchao, _pack_int8, _take, _put),
    "torchao.IntxUnpackedToInt8Tensor": Scheme("torchao intx", _always, _read_torchao, _pack_intx, _take, _put),
    "bitsandbytes.Params4bit": Scheme("bitsandbytes 4-bit", _not_packed_yet, _read_4bit, _pack_4bit, _hold_4bit, _put_4bit),
    "bitsandbytes.Int8Params": Scheme("bitsandbytes int8", _int8_state, _read_8bit, _pack_8bit, _hold_8bit, _put_8bit),
    "float8": Scheme("8-bit floats", _always, lambda w: w.float(), _pack_float8, _take, _put),
}
