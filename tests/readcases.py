"""What the tests of reading share: LyCORIS' networks on one layer of every kind, and formulas that `rebuild` has not."""

from __future__ import annotations

import rebuild
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lycoris_diff.checkpoints.parse import raw_from_tensors


class Layers(nn.Module):
    """One layer of every kind that an adapter may sit on, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.linear = nn.Linear(24, 32)
        self.plain = nn.Linear(32, 16, bias=False)
        self.conv1d = nn.Conv1d(16, 24, 3, padding=1)
        self.conv2d = nn.Conv2d(16, 24, 3, padding=1)
        self.point = nn.Conv2d(16, 24, 1)
        self.conv3d = nn.Conv3d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.group = nn.GroupNorm(4, 16)
        with torch.no_grad():
            for layer in (self.norm, self.group):
                layer.weight.normal_(1, 0.1)
                layer.bias.normal_()
        self.double()


INPUTS = {
    "linear": (5, 24), "plain": (5, 32), "conv1d": (2, 16, 9), "conv2d": (2, 16, 7, 6), "point": (2, 16, 3, 3),
    "conv3d": (1, 8, 4, 4, 3), "norm": (5, 32), "group": (2, 16, 3),
}  # fmt: skip


def apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's own operation with another weight."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    return conv(x, weight, bias, padding=layer.padding, groups=layer.groups)


def boft(entry, weight: Tensor) -> Tensor:
    """Row by row: in stage i the rows of a block lie 2^i half blocks apart."""
    blocks, shape = entry.tensors["oft_blocks"].double(), weight.shape
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    limit = entry.options["constraint"] * shape[0]
    skew = blocks - blocks.mT
    if limit and float(skew.norm()) > limit:
        skew = skew * limit / skew.norm()
    rows = weight.flatten(1)
    for stage, rotations in enumerate((eye + skew) @ torch.linalg.inv(eye - skew)):
        step = 2**stage * (blocks.shape[-1] // 2)
        order = torch.arange(shape[0]).reshape(-1, 2, step).transpose(1, 2).reshape(-1)
        turned = torch.cat([r @ piece for r, piece in zip(rotations, rows[order].split(blocks.shape[-1]))])
        rows = torch.empty_like(rows).index_copy(0, order, turned)
    rescale = entry.tensors.get("rescale")
    return rows.reshape(shape) * (1.0 if rescale is None else rescale.double().reshape(-1, *[1] * (weight.dim() - 1)))


def changed(entries, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with all entries, each against the unmodified weight."""
    total, moved = weight, bias
    for entry in entries:
        if entry.algorithm == "NORM":
            total = total + entry.tensors["w_norm"].double()
            moved = moved + entry.tensors["b_norm"].double() if "b_norm" in entry.tensors else moved
        elif entry.algorithm == "LYCORIS_BOFT":
            total = total + boft(entry, weight) - weight
        else:
            after, own = rebuild.change_weight(entry, weight, bias)
            total = total + after - weight
            if own is not None:
                moved = moved + own - bias
    return total, moved


def lycoris_file(path, algo, dim=4, alpha=2.0, linear_only=False, dtype=torch.float64, **options):
    """A file that LyCORIS writes for a network with random factors, the network in place, and the untouched layers."""
    from lycoris import LycorisNetwork, create_lycoris

    before = {k: getattr(LycorisNetwork, k) for k in vars(LycorisNetwork) if k.isupper()}
    base, model = Layers(), Layers().to(dtype)
    if linear_only:
        for name in ("conv1d", "conv2d", "conv3d"):
            delattr(model, name)
    LycorisNetwork.apply_preset({"target_module": ["Layers"], "target_name": []})
    try:
        network = create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=alpha, algo=algo, train_norm=True, **options)
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    network.to(dtype).eval()
    with torch.no_grad():
        for module in network.loras:
            for name, value in module.named_parameters():
                if "dora_scale" in name or "rescale" in name:
                    value.mul_(1 + 0.3 * torch.rand_like(value))
                else:
                    value.add_(0.1 * torch.randn_like(value))
    network.save_weights(str(path), dtype, {"by": "test"})
    return base, model


# --- one module at a time
def pair(rank=3, out=6, columns=8):
    """Up and down of a LoRA."""
    torch.manual_seed(rank)
    return torch.randn(out, rank), torch.randn(rank, columns)


def only(tensors, **options):
    """Entries of a file with these tensors on its only module."""
    (module,) = raw_from_tensors({f"lora_unet_a.{k}": v for k, v in tensors.items()}, **options).modules
    return module.entries


def check(tensors, shape, delta, **options):
    """One module's entries change a weight by just this."""
    weight = torch.randn(shape, dtype=torch.float64)
    entries = only(tensors, **options)
    after, _ = changed(entries, weight, torch.zeros(shape[0], dtype=torch.float64))
    want = delta(weight) if callable(delta) else delta
    assert (after - weight - want).norm() <= 1e-12 * max(1.0, float(want.norm()))
    return entries


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)
