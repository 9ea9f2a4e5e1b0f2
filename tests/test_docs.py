"""The examples of the documentation run, and the picture of the architecture is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lycoris_diff"
#: top to bottom as in docs/architecture.md: a row may import the rows above it, and itself
ORDER = [
    {"errors"},
    {"functional", "wrapper", "patterns"},
    {"execution"},
    {"adapters"},
    {"layers"},
    {"targets", "biases"},
    {"bookkeeping"},
    {"building"},
    {"injection"},
    {"peft_format", "merging", "per_sample"},
    {"files"},
    {"model"},
    {"systems"},
    {"naming"},
    {"checkpoints"},
    {"diffusion"},
    {"__init__"},
    {"training", "tiny"},
    {"cli", "__main__"},
]


def run_examples(path: Path) -> int:
    """Run a document's examples one after the other; how many there are."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), scope)
    return len(blocks)


def test_readme_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "README.md") >= 2
    assert "trainable params" in capsys.readouterr().out
    assert (tmp_path / "my-lokr" / "adapter_model.safetensors").is_file()


def test_examples_of_loading_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "docs" / "loading.md") >= 7
    assert "match no module" in capsys.readouterr().out
    assert (tmp_path / "style-peft" / "adapter_config.json").is_file()


def test_examples_of_the_embedded_model_run():
    assert run_examples(ROOT / "docs" / "tiny.md") >= 1


def test_examples_of_quantized_models_run(capsys):
    pytest.importorskip("torchao.quantization")
    assert run_examples(ROOT / "docs" / "quantized.md") >= 2
    printed = capsys.readouterr().out
    assert "requantize=True" in printed and "change is lost: median" in printed


def test_examples_of_training_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "docs" / "training.md") >= 7
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "sks" / "sks.safetensors").is_file()


def test_quick_start_is_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick start")[1]
    commands = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)[:2]
    assert commands == ["make demo", "make test"]


def layer_of(name: str) -> int:
    return next(i for i, row in enumerate(ORDER) if name in row)


def imported(path: Path) -> set[str]:
    """Top-level names of the package that a file imports when it is loaded or later."""
    inside = path.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(inside[:-1])[: len(inside) - node.level]
                module = [*base, *(node.module.split(".") if node.module else [])]
                found |= {module[0]} if module else {alias.name for alias in node.names}
            elif node.module and node.module.split(".")[0] == "lycoris_diff":
                found.add([*node.module.split("."), "__init__"][1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        known = any(name in row for row in ORDER)
        if name == own or not known:
            continue
        assert layer_of(name) <= layer_of(own), f"{path.name} imports {name}, which stands below it"
    assert any(own in row for row in ORDER), f"{own} is not in the picture"


def test_the_picture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for entry in PACKAGE.iterdir():
        if entry.name.startswith("_") or entry.name in ("py.typed", "errors.py"):
            continue
        assert entry.name in text, f"docs/architecture.md does not mention {entry.name}"


def test_peft_and_lycoris_are_never_imported_at_runtime():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (peft|lycoris)\b", text, re.MULTILINE), path
