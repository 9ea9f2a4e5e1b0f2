"""The benchmark scripts on a model of a few kilobytes: contenders of the same size, all numbers, nothing measured twice."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytest.importorskip("lycoris")
pytest.importorskip("peft")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark
    import benchmark_compiled
    import benchmark_layers
    import benchmark_operations

    threads = torch.get_num_threads()
    # silence and the allocator's settings would stay for other tests
    for module in (benchmark, benchmark_compiled, benchmark_layers, benchmark_operations):
        monkeypatch.setattr(module, "prepare_process", lambda threads, keep_memory=True: torch.set_num_threads(threads))
    yield {
        "models": benchmark,
        "operations": benchmark_operations,
        "compiled": benchmark_compiled,
        "layers": benchmark_layers,
    }
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.startswith("benchmark")]:
        del sys.modules[name]


def case(scripts, targets, algorithm):
    return scripts["models"].Case("tiny", targets, algorithm, "float32", "cpu")


PEERS = {"lora": 4, "lokr": 4, "lokr-f8-full": 4, "loha": 4, "loha-r32": 4, "dora": 3, "oft": 2, "miss": 2, "shira": 2}
QUICK = [("lokr", "attention"), ("shira", "attention")]
REST = [(name, targets) for name in PEERS for targets in ("attention", "conv") if (name, targets) not in QUICK]


@pytest.fixture(scope="module")
def crew():
    """A process of every contender; the scripts are found there because this process finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        from benchmark_turns import Crew

        with Crew(["base", "ours", "PEFT", "LyCORIS", "LyCORIS bypass"], 1) as members:
            yield members


@pytest.mark.parametrize(("algorithm", "targets"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_contenders_are_equally_large(scripts, crew, algorithm, targets):
    """`measure` refuses what is not; every library that has an algorithm there takes part."""
    row = scripts["models"].measure(case(scripts, targets, algorithm), crew, 1, 1)
    assert row.parameters["ours"] > 0
    everywhere = scripts["models"].ALGORITHMS[algorithm].conv or targets == "attention"
    assert len(row.step) == PEERS[algorithm] - (not everywhere)
    assert row.step.keys() == row.forward.keys() == row.saved.keys() == row.parameters.keys()


def test_turns(scripts, crew):
    """Everybody passes after every block, forward and backward; alone, a step is one turn."""
    names = list(crew.prepare(case(scripts, "attention", "lora")))
    blocks = 12  # of the tiny UNet: eight residual ones, four of a transformer
    steps, forwards = crew.step(names), crew.forward(names[::-1])
    assert {len(turns) for turns in steps.values()} == {2 * blocks + 1}
    assert {len(turns) for turns in forwards.values()} == {blocks + 1}
    assert all(second > 0 for turns in steps.values() for second in turns)
    assert len(crew.step(["ours"])["ours"]) == 1


def test_ratio_of_turns(scripts):
    """A burst counts for the turn that it hit."""
    ratio = sys.modules["benchmarking"].Ratio
    base = [[1.0, 2.0] for _ in range(9)]
    steps = [[1.1, 2.5] for _ in range(8)]
    steps[2][0] = steps[5][1] = 50.0
    found = ratio.of_turns(steps, base)
    assert found.rounds == 8 and found.median == found.low == pytest.approx(3.6 / 3)
    assert not ratio.of_turns([[1.1], [2.0], [1.1]], base).conclusive


def test_what_fails_in_a_process_is_told(scripts, crew):
    """By everybody's answer being read, so that the next question gets its own."""
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        crew.prepare(case(scripts, "attention", "nothing"))
    assert len(crew.prepare(case(scripts, "attention", "miss"))) == 3


def test_the_end_of_a_process_is_told_at_once(scripts):
    """Also where others wait for its turn."""
    with sys.modules["benchmark_turns"].Crew(["base", "ours"], 1) as two:
        two.prepare(case(scripts, "attention", "lora"))
        two._processes[1].kill()
        start = time.perf_counter()
        with pytest.raises(RuntimeError, match="the process of ours ended; is there memory enough for all of base, ours"):
            two.step(["base", "ours"])
    assert time.perf_counter() - start < 60


def test_contenders_compute_the_same_base(scripts):
    """With factors that change nothing, everyone gives the base model's output."""
    subject = case(scripts, "conv", "lora")
    call = subject.call()
    with torch.no_grad():
        expected = subject.contender("base").forward(call)
        for name in ("ours", "PEFT", "LyCORIS", "LyCORIS bypass"):
            contender = subject.contender(name)
            assert not torch.allclose(contender.forward(call), expected, atol=1e-4)
            for parameter in contender.trainable:
                parameter.zero_()
            torch.testing.assert_close(contender.forward(call), expected, atol=1e-5, rtol=1e-5)


def test_far_peers_are_measured_less(scripts, crew, monkeypatch):
    models = scripts["models"]
    assert models.far([[2.0]] * 5, [[1.0]] * 5) and models.far([[1.0]] * 5, [[2.0]] * 5)
    assert not models.far([[1.2]] * 5, [[1.0]] * 5) and not models.far([[1.1], [9], [9], [1.1], [1.1]], [[1.0]] * 5)
    monkeypatch.setattr(models, "far", lambda values, ours: values is not ours)
    row = models.measure(case(scripts, "attention", "lora"), crew, 7, 7)
    assert row.step["PEFT"].rounds == models.FIRST < row.step["ours"].rounds == row.rounds == 7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept():
    """Large tensors come from the heap, which is not given back, instead of mappings of their own."""
    program = """
import torch
from pathlib import Path
from benchmarking import prepare_process
def on_heap(tensor):
    heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    low, high = (int(edge, 16) for edge in heap.split()[0].split("-"))
    return low <= tensor.data_ptr() < high
assert not on_heap(torch.ones(2**24))
prepare_process(1)
assert on_heap(torch.ones(2**24)) and torch.get_num_threads() == 1
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_report(scripts, tmp_path, capsys, monkeypatch):
    files = {name: tmp_path / name for name in ("all.json", "page.md", "chart.png")}
    given = ["--models", "tiny", "--targets", "attention", "--rounds", "2", "--most-rounds", "2", "--threads", "1"]
    given += ["--contenders", "ours", "PEFT", "--json", str(files["all.json"]), "--markdown", str(files["page.md"])]
    scripts["models"].main([*given, "--algos", "lora"])
    (first,) = json.loads(files["all.json"].read_text())
    measured = first["rows"]
    assert [row["case"]["algorithm"] for row in measured] == ["lora"]
    abacus = {"machine": {"CPU": "an abacus"}, "rows": [{**measured[0], "base_seconds": 9000.0}]}
    files["all.json"].write_text(json.dumps([first, abacus]))
    scripts["models"].main([*given, "--algos", "lora", "lokr"])
    kept, last = json.loads(files["all.json"].read_text())
    assert kept == abacus  # rows of another machine stay apart
    rows = last["rows"]
    assert rows[0] == measured[0]  # kept, not measured again
    assert [row["case"]["algorithm"] for row in rows] == ["lora", "lokr"]
    page = files["page.md"].read_text()
    assert page.count("| tiny | attention |") == 3
    assert page.index("an abacus") < page.index("| 9000.00 |") < page.index(first["machine"]["versions"])
    pytest.importorskip("matplotlib")
    scripts["models"].main([*given, "--algos", "lora", "--chart", str(files["chart.png"])])
    assert files["chart.png"].stat().st_size > 1000


def test_the_readme_shows_what_was_measured(scripts):
    from benchmark_results import earlier
    from benchmark_summary import summary

    table = summary(earlier(SCRIPTS.parent / "docs" / "benchmarks.json"))
    assert table.count("| LoKr") >= 2
    assert table in (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")


def test_summary_is_of_the_machine_with_most_numbers(scripts):
    """A few rows measured elsewhere afterwards do not take the table's place."""
    from benchmark_results import Series, earlier
    from benchmark_summary import summary

    whole = earlier(SCRIPTS.parent / "docs" / "benchmarks.json")[0]
    part = Series({**whole.machine, "CPU": "another"}, dict(list(whole.rows.items())[:3]))
    same = Series(part.machine, whole.rows)
    assert summary([whole, part]) == summary([part, whole]) == summary([whole])
    assert "another" in summary([whole, same])


def test_peak_memory(scripts):
    """Two steps, in a process of its own."""
    assert scripts["models"].peak_in_child(case(scripts, "attention", "lora"), "ours") > 2**26


def test_operations(scripts, tmp_path):
    page = tmp_path / "page.md"
    given = ["--models", "tiny", "--targets", "conv", "--algos", "lora", "shira", "--rounds", "1", "--threads", "1"]
    scripts["operations"].main([*given, "--markdown", str(page)])
    lines = [line for line in page.read_text().splitlines() if line.startswith("| tiny")]
    assert len(lines) == 2
    assert " / " in lines[0]
    assert " / " not in lines[1]  # PEFT has no SHiRA on convolutions


@pytest.mark.slow
def test_compiled(scripts, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    models = sys.modules["benchmark_models"]
    block = lambda: models.Stack([models.BasicTransformerBlock(64, 2, 32, cross_attention_dim=64)])
    inputs = partial(models._tokens, 8, 5, 64, 64)
    workload = models.Workload(block, inputs, "hidden_states", {"attention": models.TRANSFORMER})
    monkeypatch.setitem(models.WORKLOADS, "block", workload)
    given = ["--models", "block", "--algos", "lokr", "--rounds", "1", "--threads", "1", "--markdown", str(page)]
    scripts["compiled"].main(given)
    (line,) = [line for line in page.read_text().splitlines() if line.startswith("| block")]
    assert "| - |" not in line and float(line.split("|")[-2]) > 0


class TestLayers:
    """Single layers."""

    @pytest.mark.parametrize(("seconds", "turns"), [((1.0, 1.45, 2.0), 6), ((1.0, 1.44, 2.0), 3), ((1.0, 1.5, 2.0), 3)])
    def test_what_is_near_its_target_is_measured_longer(self, scripts, monkeypatch, seconds, turns):
        """Three rounds, and three more where 1.45 lies within the quartiles, which steps that all take as long are."""
        layers, taken = scripts["layers"], []
        names = dict(zip(("base", "ours", "PEFT"), seconds, strict=True))
        monkeypatch.setattr(layers, "TURN", 0.0)
        contenders = layers.make_contenders(small := layers.Case("linear", 32, 32, 4), layers.ALGORITHMS["shira"])
        assert list(contenders) == list(names)
        for name, contender in contenders.items():
            took = names[name], names[name]
            monkeypatch.setattr(contender, "times", lambda *args, took=took, name=name: taken.append(name) or took)
        monkeypatch.setattr(layers, "make_contenders", lambda case, algorithm: contenders)
        row = layers.measure(small, "shira", 3, 6, 1)
        assert taken.count("ours") == 1 + turns
        assert row.step["ours"].median == pytest.approx(seconds[1]) and row.target.met(row) == (seconds[1] <= 1.45)

    def test_table(self, scripts, tmp_path, monkeypatch):
        monkeypatch.setattr(scripts["layers"], "TURN", 0.0)
        page = tmp_path / "page.md"
        page.write_text("# Page\n", encoding="utf-8")
        scripts["layers"].CASES[:] = [scripts["layers"].Case("conv", 16, 16, 4)]
        scripts["layers"].main(
            ["--rounds", "2", "--most-rounds", "2", "--algos", "loha", "--warmup", "0", "--markdown", str(page)]
        )
        text = page.read_text(encoding="utf-8")
        assert "| conv-16x16@4 | loha |" in text and "2 interleaved rounds" in text
