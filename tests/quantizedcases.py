"""Linear layers as torchao and bitsandbytes quantize them, and the numbers that their weights stand for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import more_adapters
import oracles
import pytest
import torch
from cases import ALGORITHMS, factors
from torch import Tensor, nn


def _torchao(config: Callable) -> Callable[[nn.Linear], nn.Linear]:
    def quantize(layer: nn.Linear) -> nn.Linear:
        quantization = pytest.importorskip("torchao.quantization")
        holder = nn.Sequential(layer)
        quantization.quantize_(holder, config(quantization))
        return holder[0]

    return quantize


def _nf4(layer: nn.Linear, nested: bool = True) -> nn.Linear:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        compress_statistics=nested,
    )
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def _int8(layer: nn.Linear) -> nn.Linear:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


SCHEMES: dict[str, Callable[[nn.Linear], nn.Linear]] = {
    "torchao-int8": _torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int4": _torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4, granularity=q.PerGroup(8))),
    "bnb-nf4": _nf4,
    "bnb-int8": _int8,
}
#: activations are rounded as well: no gradient of the input
DYNAMIC = _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig())
#: in plain words: config makers of every algorithm, by case
MAKERS: dict[str, Callable] = {k: v for k, v in ALGORITHMS.items() if "tucker" not in k}
MAKERS |= {k: v[0] for k, v in more_adapters.CASES.items() if k != "glora-core"}
#: cases that need every value of the weight in every step -> a word of why
REFUSED = {
    "miss-bat": "block of the weight",
    "lora-dora-in": "axis 'in'",
    "loha-dora-in": "axis 'in'",
    "lokr-dora": "of LoKr",
    "lokr-dora-in": "of LoKr",
    "tlora": "singular",
    "tlora-last": "singular",
    "tlora-middle": "singular",
}
ACCEPTED = [name for name in MAKERS if name not in REFUSED]


class Unknown(nn.Linear):
    """A layer of a library nobody has heard of: an int8 weight and one scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight = nn.Parameter((layer.weight * 500).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 500, self.bias)


def linear(inp: int = 24, out: int = 36, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inp, out).to(dtype).requires_grad_(False)


def quantized(scheme: str, **sizes) -> nn.Linear:
    return SCHEMES[scheme](linear(**sizes)).requires_grad_(False)


def values(layer: nn.Module) -> Tensor:
    """The weight that a quantized layer stands for, by its library's own function, in float64."""
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).double()
    if kind == "Int8Params":
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scales.double().unsqueeze(1) / 127
    return weight.dequantize().double()


def dense(layer: nn.Module) -> nn.Linear:
    """An ordinary float64 layer with those values."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64).requires_grad_(False)
    plain.weight.copy_(values(layer))
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain


def change(case: str, config, tensors: dict[str, Tensor], plain: nn.Linear) -> Tensor:
    """Change of the weight by float64 factors, from the formulas."""
    if case in more_adapters.CASES:
        return more_adapters.CASES[case][1](config, tensors, plain.weight, plain) - plain.weight
    return oracles.delta(config, tensors, plain)


def doubles(adapted: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's factors as float64 leaves."""
    found = {k: v.detach().clone() for k, v in factors(adapted, name).items()}
    return {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in found.items()}


def expected(case: str, config, tensors: dict[str, Tensor], plain: nn.Linear, x: Tensor) -> Tensor:
    y = x @ (plain.weight + change(case, config, tensors, plain)).T + plain.bias
    return y + tensors["diff_b"] if "diff_b" in tensors else y


def packed_bits(layer: nn.Module) -> list[Tensor]:
    """Every stored tensor of a quantized weight, copied."""
    weight = layer.weight
    if hasattr(type(weight), "__tensor_flatten__"):
        return [getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.state2.absmax, state.offset] if state.nested else []
        return [weight.data.clone(), state.absmax.clone(), *[t.clone() for t in nested]]
    return [weight.data.clone(), (layer.state.SCB if weight.SCB is None else weight.SCB).clone()]


def settings(layer: nn.Module) -> tuple:
    """What a scheme leaves open: sizes of blocks, dtypes, nesting, which 4-bit numbers."""
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    found = [type(weight), weight.dtype, weight.shape, weight.requires_grad]
    found += [list(getattr(weight, "block_size", ())), getattr(weight, "target_dtype", None)]
    if state is not None:
        found += [state.quant_type, state.blocksize, state.nested, state.dtype, state.shape, layer.quant_state is state]
    return tuple(found)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def dequantizations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the dequantizing functions of either library, one entry a call."""
    torchao = pytest.importorskip("torchao.quantization")
    functional = pytest.importorskip("bitsandbytes.functional")
    calls: list[str] = []
    owners = [(torchao.Int8Tensor, "dequantize"), (torchao.IntxUnpackedToInt8Tensor, "dequantize")]
    owners += [(functional, n) for n in ("dequantize_4bit", "dequantize_blockwise", "int8_vectorwise_dequant")]
    with monkeypatch.context() as patch:
        for owner, name in owners:
            patch.setattr(owner, name, _counted(getattr(owner, name), name, calls))
        yield calls


def _counted(function: Callable, name: str, calls: list[str]) -> Callable:
    def run(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings of casts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
