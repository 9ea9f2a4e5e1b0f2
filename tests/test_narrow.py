"""Steps for narrow ranks against the plain ones: the same function and gradients, in another order of axes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Holder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lycoris_diff import LoKrConfig, LoraConfig, MissConfig, inject_adapter
from lycoris_diff.execution import narrow
from lycoris_diff.execution.geometry import Geometry, geometry_of
from lycoris_diff.execution.narrow import Across, Down, Sums, Up, narrowed
from lycoris_diff.execution.program import Program
from lycoris_diff.execution.steps import Mix, Pointwise, Shards, Window
from lycoris_diff.execution.weights import Factor

COUNTS = st.integers(1, 6)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def everything(program: Program, geo: Geometry, f: dict[str, torch.Tensor], x: torch.Tensor, grad: torch.Tensor) -> list:
    """The program's output in both ways, the gradients of its factors and of its input."""
    y, gx = draw(*grad.shape), draw(*x.shape)
    before, gx_before = y.clone(), gx.clone()
    z = program.start(geo, x, f)
    program.finish_(geo, y, z, f)
    found, gz = program.backward_direct(geo, x, z, f, set(f), grad, True)
    again, _ = program.backward_direct(geo, x, None, f, set(f), grad, True)
    program.push_(geo, gx, x, f, gz)
    leaves = {name: t.clone().requires_grad_() for name, t in f.items()}
    inner = x.clone().requires_grad_()
    out = program.run(geo, inner, leaves)
    wanted = [inner, *[leaves[name] for name in found]]
    by_autograd = torch.autograd.grad(out, wanted, grad)
    with_graph, _ = program.backward(geo, x, z, leaves, [leaves[name] for name in found], grad, True)
    last = [program.first.adjoint(geo, x, program.first.weight(f) if program.first.weight else None, gz)]
    return [
        *(y - before, out, gx - gx_before, by_autograd[0], *last),
        *(t for i, name in enumerate(found) for t in (found[name], again[name], by_autograd[1 + i], with_graph[i])),
    ]


def check(plain: Program, x: torch.Tensor, geo: Geometry, f: dict[str, torch.Tensor]) -> None:
    other = narrowed(plain, geo, x)
    assert other is not plain
    grad = draw(x.shape[0], geo.out)
    for expected, found in zip(everything(plain, geo, f, x, grad), everything(other, geo, f, x, grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # both ways of one program agree, so that not both can be wrong alike
    y, out, gx, by_autograd, adjoint, *pairs = everything(other, geo, f, x, grad)
    torch.testing.assert_close(y, out, rtol=1e-10, atol=1e-10)
    for other_gx in (gx, adjoint):
        torch.testing.assert_close(other_gx, by_autograd, rtol=1e-10, atol=1e-10)
    for i in range(0, len(pairs), 4):
        for found in pairs[i + 1 : i + 4]:
            torch.testing.assert_close(found, pairs[i], rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(tokens=st.sampled_from([0, 1, 64, 77, 128]), rank=st.integers(1, narrow.NARROW - 1), inp=st.integers(1, 40), out=COUNTS)
def test_one_slice(tokens, rank, inp, out):
    f = {"down": draw(rank, inp), "up": draw(out, rank), "scale": torch.tensor(0.7, dtype=torch.float64)}
    program = Program(Pointwise(Factor("down")), Pointwise(Factor("up", scaled=True)), width=rank)
    check(program, draw(tokens, inp), Geometry(out, inp), f)


@settings(deadline=None, max_examples=40)
@given(tokens=st.sampled_from([0, 3, 64]), rank=st.integers(1, 4), b=COUNTS, d=COUNTS, more=COUNTS, fewer=COUNTS)
def test_slices(tokens, rank, b, d, more, fewer):
    a, c = 2 * rank + more, 2 * rank + fewer
    f = {"w1": draw(a, c), "down": draw(rank, d), "up": draw(b, rank), "scale": torch.tensor(0.7, dtype=torch.float64)}
    first, last = Pointwise(Factor("down"), groups=c), Pointwise(Factor("up"), groups=a)
    program = Program(first, last, Mix(Factor("w1", scaled=True)), width=max(a, c) * rank)
    check(program, draw(tokens, c * d), Geometry(a * b, c * d), f)
    if a * b > 2:
        part = replace(program, last=Window(last.weight, last, 1, a * b - 2, a * b))
        check(part, draw(tokens, c * d), Geometry(a * b - 2, c * d), f)


@settings(deadline=None, max_examples=40)
@given(tokens=st.sampled_from([0, 1, 64, 77, 128]), rank=st.integers(1, narrow.NARROW - 1), more=st.integers(0, 20), out=COUNTS)
def test_shards(tokens, rank, more, out):
    f = {"block": draw(rank, out), "scale": torch.tensor(0.7, dtype=torch.float64)}
    wide = Pointwise(Factor("block", scaled=True, swapped=True, shape=(out, rank)))
    check(Program(Shards(None, rank), wide, width=rank), draw(tokens, rank + more), Geometry(out, rank + more), f)


class TestWhen:
    def test_steps(self):
        x = draw(64, 320)
        program = self.program(LoraConfig(r=8, target_modules=["layer"]))
        found = narrowed(program, Geometry(320, 320), x)
        assert (type(found.first), type(found.last)) == (Down, Up)
        found = narrowed(self.program(LoKrConfig(r=8, target_modules=["layer"])), Geometry(320, 320), x)
        assert (type(found.first), type(found.mid), type(found.last)) == (Down, Across, Up)
        found = narrowed(self.program(MissConfig(r=8, target_modules=["layer"])), Geometry(320, 320), x)
        assert (type(found.first), type(found.last)) == (Sums, Up)

    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=16, target_modules=["layer"]),
            LoKrConfig(r=8, decompose_factor=8, target_modules=["layer"]),
            LoKrConfig(r=8, full_matrix=True, target_modules=["layer"]),
            MissConfig(r=8, mini_r=32, init_weights="mini", target_modules=["layer"]),
        ],
        ids=["rank", "slices", "full", "tiles"],
    )
    def test_not(self, config):
        program = self.program(config)
        assert narrowed(program, Geometry(320, 320), draw(64, 320)) is program

    def test_not_for_what_was_not_measured(self):
        program = self.program(LoraConfig(r=8, target_modules=["layer"]))
        for x in (draw(64, 320).bfloat16(), draw(64, 320).to("meta")):
            assert narrowed(program, Geometry(320, 320), x) is program
        conv = geometry_of(nn.Conv2d(320, 320, 1))
        assert narrowed(program, conv, draw(1, 320, 4, 4)) is program

    def test_the_layer_takes_them(self, fused, monkeypatch):
        """In training and without gradients."""
        used = []
        real = Up.add_
        monkeypatch.setattr(Up, "add_", lambda *args: (used.append(1), real(*args))[1])
        model = self.model(LoraConfig(r=8, target_modules=["layer"]))
        x = torch.randn(64, 320)
        model(x)
        with torch.no_grad():
            model(x)
        assert len(used) == 2

    @staticmethod
    def model(config):
        model = Holder(nn.Linear(320, 320))
        inject_adapter(model, config)
        return model

    def program(self, config):
        adapter = self.model(config).layer.adapter("default")
        return adapter.program(adapter.inputs())


@settings(deadline=None, max_examples=40)
@given(rows=st.sampled_from([0, 1, 63, 64, 128]), rank=st.integers(1, 20), n=st.integers(1, 30))
def test_times_narrow(rows, rank, n):
    x, weight = draw(rows, n).requires_grad_(), draw(rank, n).requires_grad_()
    grad = draw(rows, rank)
    expected, found = x @ weight.T, narrow.times_narrow(x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    both = [torch.autograd.grad(y, (x, weight), grad) for y in (expected, found)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-10, atol=1e-10)


def test_blocks():
    threads = torch.get_num_threads()
    assert narrow.token_blocks(narrow.ROWS * threads) == threads
    assert narrow.token_blocks(threads) == 1
    if threads > 1:
        assert narrow.token_blocks(narrow.ROWS * threads + 1) == 1
