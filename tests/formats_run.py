"""What an adapter file does to a pipeline through the public interface, compared with what it must do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from community import CommunityFile, Expected
from tinymodels import components, pipeline
from torch import Tensor, nn

import lycoris_diff
from lycoris_diff import AdapterError

Changes = dict[str, dict[str, Tensor]]

_MODELS: dict[tuple[str, torch.dtype], dict[str, nn.Module]] = {}


def models(family: str, dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    """Copies of a family's tiny components; float64 by default, where nothing is rounded."""
    if (family, dtype) not in _MODELS:
        _MODELS[family, dtype] = components(family, dtype)
    return {name: copy.deepcopy(part) for name, part in _MODELS[family, dtype].items()}


def parameters(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Component -> parameter name without the adapters' wrappers -> value; adapters' own parameters are left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for component, model in parts.items():
        own = found.setdefault(component, {})
        wrapped = [name for name, m in model.named_modules() if hasattr(m, "base_layer")]
        for name, value in model.named_parameters():
            inside = [w for w in wrapped if name.startswith(f"{w}.")]
            if not inside:
                own[name] = value.detach().clone()
            elif name.startswith(f"{inside[0]}.base_layer."):
                own[inside[0] + name[len(f"{inside[0]}.base_layer") :]] = value.detach().clone()
    return found


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    """Equal names, dtypes and bits."""
    flat = lambda x: {(c, n): t for c, own in x.items() for n, t in own.items()}
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def changed(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> Changes:
    """What is different between two states of the parameters."""
    return {
        c: {n: after[c][n].double() - value.double() for n, value in own.items() if not torch.equal(after[c][n], value)}
        for c, own in before.items()
    }


def changes(family: str, parts: Mapping[str, nn.Module], path: Path, **options: Any) -> tuple[Changes, Any]:
    """Load, fuse, look, take off: the change of every parameter in float64, and the report.

    After taking off, every parameter must be the original bit for bit, and no wrapper may be left.
    """
    pipe = pipeline(family, parts=dict(parts))
    before = parameters(parts)
    classes = {c: [type(m) for m in model.modules()] for c, model in parts.items()}
    report = lycoris_diff.load_adapter(pipe, path, "file", **options)
    lycoris_diff.fuse_adapters(pipe)
    after = parameters(parts)
    lycoris_diff.unfuse_adapters(pipe)
    lycoris_diff.unload_adapters(pipe)
    assert same(before, parameters(parts)), "unloading did not restore the weights"
    assert classes == {c: [type(m) for m in model.modules()] for c, model in parts.items()}, "unloading left something behind"
    return changed(before, after), report


def difference(found: Changes, expected: Expected) -> dict[str, float]:
    """Parameter -> relative error of its change; infinite for a change that should not be there."""
    errors: dict[str, float] = {}
    left = {(c, n): t for c, own in found.items() for n, t in own.items()}
    for component, modules in expected.items():
        for path, pair in modules.items():
            for attribute, want in zip(("weight", "bias"), pair):
                if want is None:
                    continue
                got = left.pop((component, f"{path}.{attribute}"), torch.zeros_like(want))
                errors[f"{component}.{path}.{attribute}"] = float((got.reshape(want.shape) - want).norm() / want.norm())
    errors |= {f"{c}.{n}": float("inf") for c, n in left}
    return errors


def check(family: str, file: CommunityFile, folder: Path, tolerance: float = 1e-9, **options: Any) -> Any:
    """The file does what it must do, to the last of its modules; returns the report."""
    assert file.modules and file.expected, "the fixture is empty"
    found, report = changes(family, models(family), file.write(folder / "file"), **options)
    errors = difference(found, file.expected)
    bad = {name: error for name, error in errors.items() if not error < tolerance}
    assert not bad, f"{len(bad)} of {len(errors)} wrong: {dict(list(bad.items())[:6])}"
    return report


def refused(family: str, path: Path, parts: dict[str, nn.Module] | None = None, **options: Any) -> str:
    """Loading raises an AdapterError (or OSError) and leaves every parameter and module alone; returns the message."""
    parts = models(family) if parts is None else parts
    pipe = pipeline(family, parts=parts)
    before, classes = parameters(parts), [type(m) for p in parts.values() for m in p.modules()]
    try:
        lycoris_diff.load_adapter(pipe, path, "file", **options)
    except (AdapterError, OSError) as error:
        assert same(before, parameters(parts)) and classes == [type(m) for p in parts.values() for m in p.modules()]
        assert str(error), "a refusal without a message"
        return str(error)
    raise AssertionError("the file was loaded")
