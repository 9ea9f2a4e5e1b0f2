"""Training through torch.compile: the same steps as without, one graph, and errors that name the layer all the same."""

from __future__ import annotations

import functools

import pytest
import smallpipelines
import torch
from trainingcases import draw, outputs, short_run, small_pipe

from lycoris_diff import AdapterError, LoKrConfig, LoraConfig
from lycoris_diff.training import load_trained, train_dreambooth
from lycoris_diff.training.loop import Loop

UNET = LoraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.2", "conv1"])
TEXT = LoKrConfig(r=2, target_modules=["q_proj", "fc1"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a C++ compiler, and what it did."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield torch._dynamo.utils.counters
    torch.compiler.reset()


def shallow_pipe():
    """With one block each way, since tracing takes its time."""
    pipe = small_pipe()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipe.unet = smallpipelines.small_unet(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
        ).eval()
    return pipe


def train(pipe, pictures, out, **changes):
    return train_dreambooth(pipe, short_run(pictures, out, adapters={"unet": UNET, "text_encoder": TEXT}, **changes))


def test_the_same_steps(traced, pictures, tmp_path):
    eager, compiled, fresh = shallow_pipe(), shallow_pipe(), shallow_pipe()
    previews = {"preview_prompts": ("a",), "preview_every": 1, "preview_steps": 2}
    plain = train(eager, pictures, tmp_path / "1", **previews)
    assert not traced["stats"]
    report = train(compiled, pictures, tmp_path / "2", compile=True, **previews)
    assert traced["stats"]["unique_graphs"] == 2, "one for the steps, one for the held-out loss"
    assert not traced["graph_break"]
    assert report.losses == pytest.approx(plain.losses, rel=1e-5)
    assert report.held_out_after == pytest.approx(plain.held_out_after, rel=1e-5)
    torch.testing.assert_close(outputs(compiled), outputs(eager), rtol=1e-5, atol=1e-5)
    assert set(load_trained(fresh, tmp_path / "2")) == {"unet", "text_encoder"}
    torch.testing.assert_close(outputs(fresh), outputs(compiled), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_pictures_of_several_shapes(traced, tmp_path, monkeypatch):
    """Steps of another shape are the same graph with sizes as numbers, not one graph a bucket."""
    pictures = draw(tmp_path / "pictures", sizes=((16, 16), (20, 12), (12, 20)))
    changes = {"aspect_buckets": True, "bucket_step": 4, "max_train_steps": 8, "train_batch_size": 1}
    plain = train(shallow_pipe(), pictures, tmp_path / "1", **changes)
    pipe, shapes = shallow_pipe(), set()
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x, *args, **kwargs: shapes.add(x.shape[-2:]) or encode(x, *args, **kwargs))
    report = train(pipe, pictures, tmp_path / "2", compile=True, **changes)
    assert len(shapes) == 3 and not traced["graph_break"]
    assert traced["stats"]["unique_graphs"] <= 4, "steps and the held-out loss, each with and without sizes as numbers"
    assert report.losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_layer_that_breaks_is_named(traced, pictures, tmp_path, monkeypatch):
    """In a step, and when the held-out loss is taken; no hook looks inside a graph."""
    pipe = shallow_pipe()
    bad = pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    before = dict(vars(pipe.unet))
    take = Loop.take_step

    def breaking(loop):
        with torch.no_grad():
            bad.weight.view(-1)[0] = float("nan")
        return take(loop)

    monkeypatch.setattr(Loop, "take_step", breaking)
    name = r"it begins in unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.ff\.net\.2\. "
    with pytest.raises(AdapterError, match=f"step 1: the training loss is nan; {name}"):
        train(pipe, pictures, tmp_path / "1", compile=True)
    with pytest.raises(AdapterError, match=f"the held-out loss is nan; {name}"):
        train(pipe, pictures, tmp_path / "2", compile=True)
    assert not traced["graph_break"]
    assert vars(pipe.unet).keys() == before.keys()


@pytest.mark.slow
def test_inductor(pictures, tmp_path):
    """With the backend that people use, which needs a C++ compiler."""
    torch.compiler.reset()
    eager, compiled = shallow_pipe(), shallow_pipe()
    plain = train(eager, pictures, tmp_path / "1", max_train_steps=4)
    report = train(compiled, pictures, tmp_path / "2", max_train_steps=4, compile=True)
    assert report.losses == pytest.approx(plain.losses, rel=1e-4)
    torch.testing.assert_close(outputs(compiled), outputs(eager), rtol=1e-3, atol=1e-4)
