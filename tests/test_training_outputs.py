"""What a run leaves behind: files that this library, PEFT, LyCORIS and diffusers read as what was trained, or nothing."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_outputs import CASES, CONVS, PROMPT, answer, config_for, facts_for, fresh_pipeline, trained_pipeline

import lycoris_diff.tiny
from lycoris_diff import AdapterError, ConfigError, LoraConfig, MissConfig, get_peft_model, load_adapter
from lycoris_diff.files import CONFIG_NAME, WEIGHTS_NAME
from lycoris_diff.training import load_trained, outputs, publish
from lycoris_diff.training.card import model_card
from lycoris_diff.training.outputs import check_outputs, save_outputs, upload
from lycoris_diff.training.previews import preview_name
from lycoris_diff.training.settings import read_settings

#: what a kohya file cannot say
NO_KOHYA = ("shira",)
#: written to a kohya file in other factors, so equal up to rounding only
REWRITTEN = ("miss",)
#: PEFT has no such thing
NO_PEFT = ("lokr-dora", "lokr-full", "miss-conv")


@pytest.fixture
def saved(tmp_path):
    """A run that was saved: pipeline, config and what was written."""

    def save(algorithm: str, folder: str = "run", **changes):
        config = config_for(tmp_path / folder, algorithm, **changes)
        pipe = trained_pipeline(config)
        return pipe, config, save_outputs(pipe, config, facts_for(config))

    return save


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestReaders:
    @pytest.mark.parametrize("name", CASES)
    def test_loaded_back_by_this_library(self, name, saved):
        pipe, config, written = saved(name)
        trained, base = answer(pipe), answer(fresh_pipeline())
        assert (trained - base).abs().max() > 1e-3, "the adapter does nothing, the test shows nothing"
        by_directories, by_trainer = fresh_pipeline(), fresh_pipeline()
        load_adapter(by_directories, config.output)
        # the same values; some processors add up in another order where memory is aligned otherwise
        same = lambda loaded: torch.testing.assert_close(answer(loaded), trained, rtol=1e-5, atol=1e-6)
        same(by_directories)
        assert set(load_trained(by_trainer, config.output)) == {"unet", "text_encoder"}
        same(by_trainer)
        assert ("kohya" in written) == (name not in NO_KOHYA) == config.adapter_file.is_file()
        if name not in NO_KOHYA:
            by_file = fresh_pipeline()
            report = load_adapter(by_file, written["kohya"])
            assert not report.problems and {m.component for m in report.matched} == {"unet", "text_encoder"}
            if name in REWRITTEN:
                torch.testing.assert_close(answer(by_file), trained, rtol=1e-4, atol=1e-5)
            else:
                same(by_file)

    @pytest.mark.parametrize("name", CASES)
    def test_loaded_by_peft(self, name, saved):
        peft = pytest.importorskip("peft")
        pipe, config, written = saved(name)
        plan = check_outputs(pipe, config)
        assert plan.peft == (() if name in NO_PEFT else ("unet", "text_encoder"))
        assert any("PEFT itself cannot read unet" in note for note in plan.notes) == (name in NO_PEFT)
        theirs = fresh_pipeline()
        for component in plan.peft:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = peft.PeftModel.from_pretrained(getattr(theirs, component), written[component])
            setattr(theirs, component, model)
        if plan.peft:
            torch.testing.assert_close(answer(theirs), answer(pipe), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", [n for n in CASES if n not in NO_KOHYA])
    def test_loaded_by_lycoris(self, name, saved, monkeypatch):
        kohya = pytest.importorskip("lycoris.kohya")
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        pipe, _, written = saved(name)
        theirs = fresh_pipeline()
        names = ("UNET_TARGET_REPLACE_MODULE", "UNET_TARGET_REPLACE_NAME", "TEXT_ENCODER_TARGET_REPLACE_MODULE")
        for attribute in names:  # a preset is kept on the class; the stock one names a layer of diffusers' UNets twice
            monkeypatch.setattr(kohya.LycorisNetworkKohya, attribute, [])
        encoder = nn.Module()  # files have the names of transformers before version 5, with a level more
        encoder.text_model = theirs.text_encoder
        network, _ = kohya.create_network_from_weights(1.0, str(written["kohya"]), None, encoder, theirs.unet)
        network.apply_to(encoder, theirs.unet, True, True)
        network.eval().requires_grad_(False)
        assert {lora.lora_name for lora in network.loras} == {key.partition(".")[0] for key in load_file(written["kohya"])}
        torch.testing.assert_close(answer(theirs), answer(pipe), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ["lora", "lora alone", "miss alone", "lokr", "shira"])
    def test_the_cards_code_runs(self, name, saved, monkeypatch):
        """Every way of loading that the card names draws what the trained pipeline draws."""
        algorithm, _, alone = name.partition(" ")
        make, targets = CASES[algorithm]
        pipe, config, _ = saved(algorithm, **({"adapters": {"unet": make(targets)}} if alone else {}))
        want = _drawn(pipe)
        card = (config.output / "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == (3 if alone else 2) and ("diffusers alone" in card) == bool(alone)
        monkeypatch.chdir(config.output)
        monkeypatch.setattr(lycoris_diff.tiny, "load_pipeline", fresh_pipeline)
        call = f"pipe({PROMPT!r})"
        for block in blocks:
            assert call in block
            scope: dict = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(block.replace(call, f"{call[:-1]}, num_inference_steps=1)"), scope)
            with torch.no_grad():
                got = _drawn(scope["pipe"])
            assert np.abs(got.astype(int) - want.astype(int)).max() <= 1, block

    def test_save_dtype(self, saved):
        pipe, config, written = saved("loha", save_dtype="float16")
        for path in (written["kohya"], written["unet"] / WEIGHTS_NAME):
            assert {t.dtype for k, t in load_file(path).items() if not k.endswith("alpha")} == {torch.float16}
        back = fresh_pipeline()
        load_adapter(back, written["kohya"])
        torch.testing.assert_close(answer(back), answer(pipe), rtol=1e-2, atol=1e-2)
        _, config, written = saved("shira", save_dtype="bfloat16", folder="other")
        kinds = {t.dtype for t in load_file(written["unet"] / WEIGHTS_NAME).values()}
        assert torch.bfloat16 in kinds and torch.float32 not in kinds and any(not k.is_floating_point for k in kinds)
        load_adapter(fresh_pipeline(), config.output)


def _drawn(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.array(pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])


def on_meta(config):
    """The same pipeline with its adapters, without values."""
    pipe = fresh_pipeline()
    for component, adapter in config.adapters.items():
        model = getattr(pipe, component)
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
        setattr(pipe, component, get_peft_model(copy.deepcopy(model, memo), copy.deepcopy(adapter)))
    return pipe


class TestCheck:
    @pytest.mark.parametrize("name", [*CASES, "miss-conv", "partly"])
    def test_same_on_meta_and_before_and_after_training(self, name, tmp_path):
        if name == "miss-conv":
            config = config_for(tmp_path, adapters={"unet": MissConfig(r=8, target_modules=CONVS)})
        elif name == "partly":
            config = config_for(tmp_path, "shira")
            config.adapters = {"unet": config.adapters["unet"], "text_encoder": LoraConfig(r=2, target_modules=["q_proj"])}
        else:
            config = config_for(tmp_path, name)
        plan = check_outputs(trained_pipeline(config), config)
        assert check_outputs(on_meta(config), config) == plan
        untrained = fresh_pipeline()
        for component, adapter in config.adapters.items():
            setattr(untrained, component, get_peft_model(getattr(untrained, component), adapter))
        assert check_outputs(untrained, config) == check_outputs(fresh_pipeline(), config) == plan
        kohya = name not in (*NO_KOHYA, "miss-conv", "partly")
        assert plan.formats == (("kohya", "peft") if kohya else ("peft",))
        assert any("no " + config.adapter_file.name in note for note in plan.notes) == (not kohya)
        assert not plan.diffusers  # which does not read all of a text encoder's
        assert not list(tmp_path.iterdir())

    def test_only_a_format_that_cannot_say_it(self, tmp_path):
        config = config_for(tmp_path, "shira", formats=("kohya",))
        with pytest.raises(ConfigError, match=r'"kohya" cannot say these adapters.*SHiRA.*add "peft"'):
            check_outputs(trained_pipeline(config), config)

    def test_module_trained_in_full(self, tmp_path):
        config = config_for(tmp_path, adapters={"unet": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"])})
        plan = check_outputs(trained_pipeline(config), config)
        assert plan.formats == ("peft",) and "conv_in" in plan.notes[0]

    def test_settings_that_name_nothing(self, tmp_path):
        for name in ("float17", "int8"):
            with pytest.raises(ConfigError, match=f"save_dtype is '{name}'"):
                config_for(tmp_path, save_dtype=name).validate()
        config = config_for(tmp_path, push_to_hub="a/b/c")
        with pytest.raises(ConfigError, match="a/b/c"):
            check_outputs(fresh_pipeline(), config)

    def test_component_without_adapter(self, tmp_path):
        config = config_for(tmp_path)
        pipe = trained_pipeline(config_for(tmp_path, adapters={"unet": config.adapters["unet"]}))
        with pytest.raises(AdapterError, match="no adapter 'default' on its text_encoder"):
            save_outputs(pipe, config, facts_for(config))
        assert not list(tmp_path.iterdir())

    def test_adapters_of_another_run(self, saved, tmp_path):
        _, config, _ = saved("lora")
        alone = config_for(config.output, adapters={"unet": config.adapters["unet"]})
        with pytest.raises(ConfigError, match="'text_encoder' of another run"):
            check_outputs(trained_pipeline(alone), alone)
        shira = config_for(config.output, "shira")
        with pytest.raises(ConfigError, match=r"'run.safetensors' of another run"):
            check_outputs(trained_pipeline(shira), shira)
        again = config_for(config.output, "lokr")
        check_outputs(trained_pipeline(again), again)


class TestAllOrNothing:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value, saved):
        pipe, config, _ = saved("lora")
        before = files(config.output)
        with torch.no_grad():
            next(p for p in pipe.text_encoder.parameters() if p.requires_grad).view(-1)[3] = value
        with pytest.raises(AdapterError, match=r"text_encoder.*lora_A"):
            save_outputs(pipe, config, facts_for(config))
        assert files(config.output) == before

    def test_too_large_for_the_dtype(self, saved):
        pipe, config, _ = saved("lora", save_dtype="float16")
        before = files(config.output)
        with torch.no_grad():
            next(p for p in pipe.unet.parameters() if p.requires_grad).view(-1)[0] = 1e6
        with pytest.raises(AdapterError, match=r"unet.*lora_A.*1e\+06, too large for save_dtype torch.float16"):
            save_outputs(pipe, config, facts_for(config))
        assert files(config.output) == before

    def test_too_small_for_the_dtype_is_told(self, tmp_path):
        config = config_for(tmp_path, save_dtype="float16")
        pipe = trained_pipeline(config)
        with torch.no_grad():
            next(p for p in pipe.unet.parameters() if p.requires_grad).view(-1)[:3] = 1e-9
        notes: list[str] = []
        save_outputs(pipe, config, facts_for(config), notes.append)
        assert len(notes) == 1 and notes[0].startswith("3 of ") and "saved as 0" in notes[0]
        assert notes[0] in ModelCard.load(tmp_path / "README.md").text.replace("\\_", "_")

    def test_failure_before_all_is_written(self, saved, monkeypatch):
        _, config, _ = saved("lora")
        before = files(config.output)
        monkeypatch.setattr(outputs, "model_card", _fail)
        with pytest.raises(OSError, match="no space"):
            save_outputs(trained_pipeline(config, seed=2), config, facts_for(config))
        assert files(config.output) == before

    @pytest.mark.parametrize("moment", range(1, 11))
    def test_failure_while_files_take_their_places(self, moment, saved, monkeypatch):
        """Five entries, two moves each; whichever fails, the earlier run's files are all there."""
        _, config, _ = saved("lora")
        before, calls = files(config.output), []

        def replace(source, target):
            if Path(target).parent in (config.output, _before(config.output)):
                calls.append(target)
                if len(calls) == moment:
                    raise OSError("no space left")
            os.rename(source, target)

        pipe = trained_pipeline(config, seed=2)
        monkeypatch.setattr(outputs.os, "replace", replace)
        with pytest.raises(OSError, match="no space"):
            save_outputs(pipe, config, facts_for(config))
        assert files(config.output) == before

    def test_replaced_as_a_whole_and_leftovers_of_a_killed_run_go(self, saved):
        _, config, _ = saved("lora")
        before = files(config.output)
        (config.output / ".writing-abc" / "unet").mkdir(parents=True)
        pipe = trained_pipeline(config, seed=2)
        save_outputs(pipe, config, facts_for(config))
        after = files(config.output)
        assert after.keys() == before.keys() and not list(config.output.glob(".writing-*"))
        assert all(after[name] != before[name] for name in after if name.endswith(".safetensors"))


def _before(output: Path) -> Path | None:
    return next((path / "before" for path in output.glob(".writing-*")), None)


def _fail(*_, **__):
    raise OSError("no space left")


class TestRecords:
    def test_settings_repeat_the_run(self, saved):
        _, config, written = saved("lokr", learning_rates={"text_encoder": 5e-5}, optimizer_args={"betas": [0.9, 0.95]}, seed=3)
        read = read_settings(written["settings"], [])
        assert (read.model, read.dtype) == ("tiny", "auto")
        assert read.config.to_dict() == config.to_dict()
        resumed = config_for(config.output, "lokr", resume="latest")
        save_outputs(trained_pipeline(resumed), resumed, facts_for(resumed, revision="main", model="a/b"))
        values = yaml.safe_load(written["settings"].read_text())
        assert values["resume"] is None and values["revision"] == "main" and values["model"] == "a/b"

    def test_metadata(self, tmp_path):
        config = config_for(
            tmp_path / "run",
            "lokr",
            learning_rates={"text_encoder": 5e-5},
            repeats=4,
            instance_data_dir=tmp_path / "secret" / "sks",
        )
        facts = facts_for(
            config, started=1_700_000_000.0, seconds=30.0, model=str(tmp_path / "secret" / "base"), versions={"a": "1"}
        )
        written = save_outputs(trained_pipeline(config), config, facts)
        with safe_open(written["kohya"], "pt") as file:
            said = file.metadata()
        assert said["ss_network_module"] == "lycoris.kohya" and json.loads(said["ss_network_args"])["algo"] == "lokr"
        assert said["ss_unet_lr"] == "0.0001" and said["ss_text_encoder_lr"] == "5e-05" and said["ss_steps"] == "20"
        assert json.loads(said["ss_dataset_dirs"]) == {"sks": {"n_repeats": 4, "img_count": 3}}
        assert said["ss_num_train_images"] == "12" and said["ss_training_finished_at"] == "1700000030.000"
        assert said["modelspec.trigger_phrase"] == "a sks circle" and said["modelspec.date"] == "2023-11-14T22:13:50"
        assert said["modelspec.architecture"].endswith("/lokr") and said["modelspec.title"] == "run"
        assert said["ss_sd_model_name"] == "base" and said["lycoris_diff.dataset"] == "ab" * 32
        settings = json.loads(said["lycoris_diff.settings"])
        assert settings["instance_data_dir"] == "sks" and settings["adapters"]["unet"]["type"] == "lokr"
        assert json.loads(said["lycoris_diff.versions"]) == {"a": "1"}
        assert not any("secret" in value for value in said.values())
        assert len(said["sshs_model_hash"]) == 64

    def test_card(self, tmp_path):
        prompts = ("a *red* | <b>circle</b>", 'it\'s "two"\nlines', "```")
        config = config_for(tmp_path / "run", "dora", preview_prompts=prompts, push_to_hub="me/sks", preview_steps=1)
        config.instance_prompt = "a sks: circle"
        pipe = trained_pipeline(config)
        drawn = [_picture(config.output, step, index) for step in (0, 10, 20, 30, 40, 50) for index in range(3)]
        facts = facts_for(config, model="owner/base", previews=tuple(drawn), parameters={"unet": 1234}, losses=(2.0, 1.0))
        written = save_outputs(pipe, config, facts)
        card = ModelCard.load(written["card"])
        assert card.data.base_model == "owner/base" and card.data.instance_prompt == "a sks: circle"
        assert "lora-dora" in card.data.tags and card.data.library_name == "diffusers"
        assert [w["text"] for w in card.data.to_dict()["widget"]] == list(prompts)
        table = next(line for line in card.text.splitlines() if line.startswith("| prompt"))
        assert re.findall(r"step (\d+)", table) == ["0", "20", "30", "50"]
        links = re.findall(r"!\[\]\((.*?)\)", card.text)
        assert len(links) == 12 and all((config.output / link).is_file() for link in links)
        row = next(line for line in card.text.splitlines() if "circle&lt;/b&gt;" in line)
        assert row.count("|") == table.count("|") and r"a \*red\* &#124; &lt;b&gt;" in row
        assert "load_adapter(pipe, 'me/sks', weight_name='run.safetensors')" in card.text
        assert "PeftModel.from_pretrained(pipe.unet, 'me/sks', subfolder='unet')" in card.text
        assert "load_lora_weights" not in card.text and "1,234 parameters" in card.text and "| 1.0000 |" in card.text
        for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
            compile(block, "card", "exec")


def _picture(output: Path, step: int, index: int) -> Path:
    path = output / "previews" / preview_name(step, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


class Hub:
    """In the place of `HfApi`: keeps what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.created, self.commits = error, [], []

    def __call__(self):
        return self

    def create_repo(self, repository, private, exist_ok):
        self.created.append((repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def create_commit(self, repository, operations, commit_message):
        if self.error:
            raise self.error
        self.commits.append((repository, {op.path_in_repo: op for op in operations}, commit_message))


class TestUpload:
    def test_what_is_uploaded(self, tmp_path, monkeypatch):
        config = config_for(tmp_path / "secret" / "run", push_to_hub="me/sks", instance_data_dir=tmp_path / "secret" / "sks")
        pipe = trained_pipeline(config)
        pipe.unet.get_base_model().register_to_config(_name_or_path=str(tmp_path / "secret" / "base" / "unet"))
        drawn = [_picture(config.output, 20, index) for index in range(2)]
        facts = facts_for(config, previews=drawn, model=str(tmp_path / "secret" / "base"))
        written = save_outputs(pipe, config, facts)
        assert "secret" in (written["unet"] / CONFIG_NAME).read_text() and "secret" in written["settings"].read_text()
        for name in ("cache/a.safetensors", "checkpoint-000010/state.json", "class/a.png", "sks/me.png", "previews/mine.png"):
            (config.output / name).parent.mkdir(exist_ok=True)
            (config.output / name).write_bytes(b"secret")
        hub = Hub()
        monkeypatch.setattr(publish, "HfApi", hub)
        done = upload(config)
        assert done.error is None and done.url == "https://huggingface.co/me/sks"
        assert hub.created == [("me/sks", True, True)]
        ((repository, sent, _),) = hub.commits
        assert repository == "me/sks"
        components = [f"{c}/{f}" for c in ("unet", "text_encoder") for f in (CONFIG_NAME, WEIGHTS_NAME)]
        previews = [f"previews/{p.name}" for p in drawn]
        assert sorted(sent) == sorted(["README.md", "settings.yaml", "run.safetensors", *components, *previews])
        contents = {name: _content(operation) for name, operation in sent.items()}
        assert not any(b"secret" in content for content in contents.values())
        assert json.loads(contents[f"unet/{CONFIG_NAME}"])["base_model_name_or_path"] == "base"
        assert yaml.safe_load(contents["settings.yaml"])["instance_data_dir"] == "sks"
        assert contents["settings.yaml"].startswith(b"# Repeats the run")
        (tmp_path / "copy" / "previews").mkdir(parents=True)
        for name, content in contents.items():
            (tmp_path / "copy" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(content)
        back = fresh_pipeline()
        load_adapter(back, tmp_path / "copy")
        assert torch.equal(answer(back), answer(pipe))

    def test_failure_is_told_and_loses_nothing(self, saved, monkeypatch):
        _, config, _ = saved("lora", push_to_hub="me/sks")
        before = files(config.output)
        monkeypatch.setattr(publish, "HfApi", Hub(ConnectionError("no network")))
        done = upload(config)
        assert done.url is None and done.error == "ConnectionError: no network" and done.repository == "me/sks"
        assert files(config.output) == before

    def test_without_repository(self, saved):
        _, config, _ = saved("lora")
        with pytest.raises(ConfigError, match="push_to_hub"):
            upload(config)


def _content(operation) -> bytes:
    held = operation.path_or_fileobj
    return held if isinstance(held, bytes) else Path(held).read_bytes()


def test_the_card_never_loads_a_model_by_a_name_that_is_none(tmp_path):
    config = config_for(tmp_path)
    for model, start in (("tiny", "pipe = load_pipeline()"), ("unknown", "pipe = ...")):
        text = model_card(config, facts_for(config, model=model), True, ("unet", "text_encoder"), True).text
        assert text.count(start) == 3 and "from_pretrained('" not in text.replace("PeftModel.from_pretrained", "")
