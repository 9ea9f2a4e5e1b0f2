"""LoHa (FedPara arXiv 2108.06098, LyCORIS arXiv 2309.14859): the Hadamard product of two low-rank matrices.

A Hadamard product of two rank-r products is one rank-r^2 product whose factors are Khatri-Rao products:
``((A1 B1) * (A2 B2))[o, n] = sum_ij (A1[o, i] A2[o, j]) (B1[i, n] B2[j, n])``. With Tucker cores the same holds for the
cores: they combine to one core of size ``(r^2, r^2, *k)``.
"""

from __future__ import annotations

from torch import Tensor

from .lora import tucker


def khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    """Column-wise Kronecker product: ``(r, n, ...), (s, n, ...) -> (r*s, n, ...)``."""
    return (first.unsqueeze(1) * second.unsqueeze(0)).flatten(0, 1)


def combined_core(core1: Tensor, core2: Tensor) -> Tensor:
    """Tucker core of the Hadamard product: ``(p, q, *k), (u, v, *k) -> (p*u, q*v, *k)``, Kronecker at every tap."""
    p, q, *kernel = core1.shape
    u, v = core2.shape[:2]
    product = core1[:, None, :, None] * core2[None, :, None, :]
    return product.reshape(p * u, q * v, *kernel)


def halves(out_factor: Tensor, in_factor: Tensor, core: Tensor | None) -> Tensor:
    """One half of the product: ``A @ B``, or with a core ``(p, q, *k)`` and ``A`` of shape ``(r, out)`` the Tucker form."""
    return out_factor @ in_factor if core is None else tucker(core, out_factor.mT, in_factor)
