"""The usage examples that circulate for these four systems, run as written with only the import changed.

Downloads are replaced by small random models of the same classes; nothing else of the examples is touched.
"""

from __future__ import annotations

import doctest
import textwrap

import pytest
import torch
from cases import randomize, relative_error
from modelcases import adapted_layers
from smallmodels import bert, clip, gpt2, llama, opt, output_of, picture, stable_diffusion, tokens
from torch import nn

import lycoris_diff


@pytest.fixture
def offline(monkeypatch):
    """from_pretrained of the classes the examples load gives a small random model."""
    import diffusers
    import transformers

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *a, **k: stable_diffusion())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **k: BY_NAME[name]())
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda name, **k: bert())


BY_NAME = {"facebook/opt-125m": lambda: opt(128), "gpt2": gpt2, "meta-llama/Llama-2-7b-hf": llama}


def as_written(source: str) -> dict:
    names: dict = {}
    exec(compile(source.replace("from peft import", "from lycoris_diff import"), "example", "exec"), names)
    return names


def docstring_example(class_name: str) -> str:
    """The example in PEFT's docstring of a model class."""
    peft = pytest.importorskip("peft")
    text = textwrap.dedent(getattr(peft, class_name).__doc__)
    return "".join(e.source for e in doctest.DocTestParser().get_examples(text.replace("```", "")))


@pytest.mark.parametrize("name", ["LoKrModel", "LoHaModel", "MissModel"])
def test_docstring_examples_on_a_pipeline(name, offline):
    source = docstring_example(name)
    assert "StableDiffusionPipeline" in source and "unet" in source
    model = as_written(source)["model"]
    plain = stable_diffusion()
    assert isinstance(model.unet, getattr(lycoris_diff, name))
    assert isinstance(model.text_encoder, getattr(lycoris_diff, name))
    assert relative_error(picture(model), picture(plain)) < 1e-5
    randomize(model.unet, std=0.2)
    randomize(model.text_encoder, std=0.2)
    changed = picture(model)
    assert torch.isfinite(changed).all() and relative_error(changed, picture(plain)) > 1e-3
    te, denoiser = adapted_layers(model.text_encoder), adapted_layers(model.unet)
    assert len(te) == 3 * 6 and len(denoiser) == 4 * 12
    with model.unet.disable_adapter(), model.text_encoder.disable_adapter():
        assert torch.equal(picture(model), picture(plain))


def test_docstring_example_of_shira(offline):
    model = as_written(docstring_example("ShiraModel"))["model"]
    assert {n.split(".")[-1] for n in adapted_layers(model)} == {"q_proj", "v_proj"}
    assert relative_error(output_of(model, tokens()), output_of(opt(128), tokens())) == 0


def test_lora_alpha_spelling_sets_the_strength(offline):
    model = as_written(docstring_example("LoKrModel"))["model"]
    assert model.unet.peft_config["default"].alpha == 32
    assert {s for layer in adapted_layers(model.unet).values() for s in layer.scaling.values()} == {4.0}


@pytest.mark.parametrize("mode", [True, "mini", "bat"])
def test_miss_on_gpt2(mode, tmp_path):
    from lycoris_diff import MissConfig, PeftModel, get_peft_model

    model = gpt2()
    config = MissConfig(
        r=8,
        mini_r=8 if mode == "mini" else 1,
        target_modules=["c_attn", "c_proj"],
        init_weights=mode,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    batch = {**tokens(), "labels": tokens()["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = None
    for _ in range(10):
        loss = model(**batch).loss
        start = loss.item() if start is None else start
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < start
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert torch.equal(output_of(loaded, tokens()), output_of(model, tokens()))
    expected = output_of(model, tokens())
    assert relative_error(output_of(model.merge_and_unload(), tokens()), expected) < 1e-4


def test_miss_on_a_bert_classifier(offline, tmp_path):
    source = """
    from transformers import AutoModelForSequenceClassification
    from peft import MissConfig, TaskType, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)
    config = MissConfig(
        task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = get_peft_model(model, config)
    """
    source = textwrap.dedent(source)
    if not hasattr(lycoris_diff, "TaskType"):
        source = source.replace("MissConfig, TaskType,", "MissConfig,").replace("TaskType.SEQ_CLS", '"SEQ_CLS"')
    model = as_written(source)["model"]
    assert {n.split(".")[-1] for n in adapted_layers(model)} == {"query", "value"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(**tokens(), labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again = lycoris_diff.PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(output_of(again, tokens()), output_of(model, tokens()))


def test_causal_language_model_through_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    from lycoris_diff import MissConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 20, (16, 8))]
    model = get_peft_model(llama(), MissConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_config.json").exists()
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    model.eval()
    again = PeftModel.from_pretrained(llama(), tmp_path / "final")
    assert torch.equal(output_of(again, tokens()), output_of(model, tokens()))
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        PeftModel.from_pretrained(llama(), checkpoint)


def block_mask(base_layer, r, **kwargs):
    """A square-ish block in the top left corner, of r * (in + out) entries."""
    shape = base_layer.weight.shape
    count = r * (shape[0] + shape[1])
    mask = torch.zeros(shape).view(-1)
    mask[:count] = 1.0
    return mask.view(shape).to(base_layer.weight)


def test_shira_on_opt_with_a_seed():
    from lycoris_diff import ShiraConfig, get_peft_model

    make = lambda seed: get_peft_model(opt(), ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], random_seed=seed))
    first, second, other = make(42), make(42), make(7)
    for a, b, c in zip(*(adapted_layers(m).values() for m in (first, second, other))):
        assert torch.equal(a.adapters["default"].shira_indices, b.adapters["default"].shira_indices)
        assert not torch.equal(a.adapters["default"].shira_indices, c.adapters["default"].shira_indices)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shira_on_opt_with_a_block_mask(tmp_path):
    from lycoris_diff import PeftModel, ShiraConfig, get_peft_model

    config = ShiraConfig(r=2, mask_type="block", target_modules=["q_proj", "v_proj"], fan_in_fan_out=True)
    config.mask_fn = block_mask
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(opt(), config)
    randomize(model, std=0.2)
    for layer in adapted_layers(model).values():
        change = layer.get_delta_weight("default").flatten()
        assert (change[:128] != 0).all() and not change[128:].any()
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(PeftModel.from_pretrained(opt(), tmp_path), tokens()), output_of(model, tokens()))


def test_two_adapters_switched():
    from lycoris_diff import LoHaConfig, get_peft_model

    model = get_peft_model(clip(), LoHaConfig(r=2, target_modules=["q_proj"]), adapter_name="cat")
    model.add_adapter("dog", LoHaConfig(r=4, target_modules=["q_proj", "fc1"]))
    randomize(model, std=0.2)
    model.set_adapter("cat")
    cat = output_of(model, tokens())
    model.set_adapter("dog")
    dog = output_of(model, tokens())
    assert not torch.equal(cat, dog)
    model.set_adapter("cat")
    assert torch.equal(output_of(model, tokens()), cat)


def test_one_system_here_and_another_there():
    from lycoris_diff import LoHaConfig, LoKrConfig, LoKrModel

    pipe = stable_diffusion()
    plain = picture(pipe)
    pipe.unet = LoKrModel(pipe.unet, LoKrConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), "attention")
    pipe.unet.add_adapter("convolutions", LoHaConfig(r=2, target_modules=["conv1", "conv2"], use_effective_conv2d=True))
    assert torch.equal(picture(pipe), plain)
    randomize(pipe.unet, std=0.2)
    pipe.unet.set_adapter(["attention", "convolutions"])
    both = picture(pipe)
    pipe.unet.set_adapter("attention")
    assert not torch.equal(picture(pipe), both)
    pipe.unet.set_adapter(["convolutions", "attention"])
    pipe.unet = pipe.unet.merge_and_unload()
    assert relative_error(picture(pipe), both) < 1e-3
    assert all(not isinstance(m, lycoris_diff.AdaptedLayer) for m in pipe.unet.modules())


def test_low_cpu_mem_usage_as_peft_shows_it(tmp_path):
    from lycoris_diff import LoKrConfig, LoKrModel, PeftModel

    model = LoKrModel(clip(), LoKrConfig(r=2, target_modules=["q_proj"]), "default", low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lokr_" in n} == {"meta"}
    trained = LoKrModel(clip(), LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False), "default")
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(clip(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(output_of(loaded, tokens()), output_of(trained, tokens()))


def test_generate_through_the_wrapper():
    from lycoris_diff import LoKrConfig, get_peft_model

    model = get_peft_model(gpt2(), LoKrConfig(r=2, target_modules=["c_attn"], init_weights=False, task_type="CAUSAL_LM"))
    out = model.generate(**tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[0] == 2 and out.shape[1] > 7
    assert isinstance(model, nn.Module)
