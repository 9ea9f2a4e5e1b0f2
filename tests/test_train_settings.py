"""Settings of a training command: what YAML and flags mean, what is refused, and that everything is documented."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lycoris_diff import ConfigError, LoHaConfig, LoKrConfig, LoraConfig
from lycoris_diff.adapters import ADAPTERS
from lycoris_diff.cli.train import split_arguments
from lycoris_diff.training import settings as settings_module
from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.families import Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lycoris_diff.training.given import FlagError, split_flags
from lycoris_diff.training.settings import TrainSettings, read_settings
from lycoris_diff.training.settings_help import documentation, list_adapter_fields, list_settings
from lycoris_diff.training.state import MAY_DIFFER
from lycoris_diff.training.values import convert, parse_flag, parse_yaml, resolve

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "training.md"
NEEDED = ["--model", "tiny", "--instance_data_dir", "pictures", "--output_dir", "out"]
#: what PyYAML writes and reads unchanged
TEXT = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))
LOKR = [*NEEDED, "--adapter", "lokr"]


def read(*flags: str) -> DreamBoothConfig:
    return read_settings(None, [*LOKR, *flags]).config


def read_text(tmp_path, text: str, *flags: str) -> TrainSettings:
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\ninstance_data_dir: pictures\noutput_dir: out\n" + textwrap.dedent(text), encoding="utf-8")
    return read_settings(path, flags)


class TestFile:
    def test_every_kind_of_setting(self, tmp_path):
        text = """
            adapters:
              unet: {type: lokr, r: 8, alpha: 4, target_modules: attention, learning_rate: 1e-3}
              text_encoder: {type: dora, r: 4, target_modules: [q_proj, v_proj]}
            learning_rate: 1e-4
            mixed_precision: no
            random_flip: yes
            name: 2026-01-01
            instance_prompt: "a photo of sks: dog"
            class_prompt: ~
            optimizer_args: {betas: [0.9, 0.99], weight_decay: 1e-2, fused: false, mode: "1"}
            preview_prompts: [a sks dog, "a sks dog, in snow"]
            target_params: 5e6
            seed: 0x10
        """
        config = read_text(tmp_path, text).config
        assert config.adapters["unet"] == LoKrConfig(r=8, alpha=4, target_modules="attention")
        assert config.adapters["text_encoder"] == LoraConfig(r=4, target_modules=["q_proj", "v_proj"], weight_decompose=True)
        assert (config.learning_rate, config.learning_rates) == (1e-4, {"unet": 1e-3})
        assert isinstance(config.learning_rate, float)
        assert (config.mixed_precision, config.random_flip, config.name) == ("no", True, "2026-01-01")
        assert (config.instance_prompt, config.class_prompt) == ("a photo of sks: dog", None)
        assert config.optimizer_args == {"betas": [0.9, 0.99], "weight_decay": 0.01, "fused": False, "mode": "1"}
        assert config.preview_prompts == ("a sks dog", "a sks dog, in snow")
        assert config.target_params == 5_000_000 and type(config.target_params) is int
        assert config.seed == 16

    def test_flags_win(self, tmp_path):
        text = "adapter: lokr\nr: 8\nlearning_rate: 1\noptimizer_args: {betas: [0, 0], eps: 1e-5}\nformats: [peft]\n"
        flags = ["--r", "4", "--learning-rate=2e-3", "--optimizer_args.eps", "1e-6", "--formats", "[kohya]"]
        config = read_text(tmp_path, text, *flags).config
        assert config.adapters == {"unet": LoKrConfig(r=4)}
        assert (config.learning_rate, config.formats) == (2e-3, ("kohya",))
        assert config.optimizer_args == {"betas": [0, 0], "eps": 1e-6}
        assert read_text(tmp_path, text, "--optimizer_args", "{weight_decay: 0}").config.optimizer_args == {"weight_decay": 0}

    def test_a_learning_rate_by_any_name(self, tmp_path):
        text = "adapters: {unet: {type: lokr, learning_rate: 1}}\n"
        assert read_text(tmp_path, text, "--learning_rates.unet", "2").config.learning_rates == {"unet": 2}
        text = "adapters: {unet: lokr}\nlearning_rates: {unet: 1}\n"
        assert read_text(tmp_path, text, "--unet.learning_rate", "2").config.learning_rates == {"unet": 2}
        with pytest.raises(ConfigError, match="are both given"):
            read_text(tmp_path, text.replace("unet: lokr", "unet: {type: lokr, learning_rate: 3}"))

    def test_anchors_and_a_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        text = "adapters:\n  unet: &a {type: loha, r: 4}\n  text_encoder:\n    <<: *a\n    r: 2\ncache_dir: ~/cache\n"
        config = read_text(tmp_path, text).config
        assert config.adapters == {"unet": LoHaConfig(r=4), "text_encoder": LoHaConfig(r=2)}
        assert config.cache_dir == str(tmp_path / "cache")

    @pytest.mark.parametrize(
        "text, words",
        [
            ("learning_rate: fast", ["learning_rate is 'fast'", "a number"]),
            ("resolution: 64.5", ["resolution is '64.5'", "a whole number"]),
            ("resolution:", ["resolution is empty"]),
            ("class_prompt: None", ["class_prompt is None", "null"]),
            ("random_flip: 2", ["random_flip is '2'", "true or false"]),
            ("name: [a]", ["name is ['a']", "text"]),
            ("preview_prompts: {a: b}", ["preview_prompts", "a list"]),
            ("optimizer_args: 3", ["optimizer_args is '3'", "a mapping"]),
            ("learning_rates: {unet: x}", ["learning_rates.unet is 'x'"]),
            ("lerning_rate: 1", ["no setting 'lerning_rate'", "'learning_rate'"]),
            ("rank: 4", ["no setting 'rank'", "called 'r' here"]),
            ("seed: 1\nseed: 2", ["run.yaml", "line 6", "'seed' is there twice"]),
            ("seed: [1", ["run.yaml", "line"]),
            ("seed: 1\n---\nseed: 2", ["run.yaml"]),
            ("seed: !!python/object:os.system x", ["run.yaml"]),
            ("dtype: float64", ["dtype is 'float64'", "bfloat16"]),
            ("revision: main", ["'tiny'", "revisions"]),
            ("repeats: 0", ["repeats is 0"]),
            ("adapters: [unet]", ["adapters is ['unet']", "a mapping"]),
            ("adapters: {unet: {r: 4}}", ["adapters.unet has no type"]),
            ("adapters: {unet: {}}", ["adapters.unet says nothing"]),
            ("adapters: {unet: lorka}", ["adapters.unet.type is 'lorka'", "lokr"]),
            ("adapters: {unet: {type: lokr, rnak: 4}}", ["lokr has no field 'rnak'"]),
            ("adapters: {unet: {type: lokr, r: many}}", ["adapters.unet.r is 'many'", "whole number"]),
            ("adapters: {unet: {type: lokr, alpha: 1, lora_alpha: 2}}", ["adapters.unet", "disagree"]),
            ("adapters: {unet: {type: dora, weight_decompose: false}}", ["dora", "weight_decompose"]),
            ("adapters: {unet: lokr, transformer: lokr}\nr: 4", ["which component", "transformer"]),
        ],
    )
    def test_refused(self, tmp_path, text, words):
        with pytest.raises(ConfigError) as caught:
            read_text(tmp_path, ("" if "adapter" in text else "adapters: {unet: lokr}\n") + text)
        assert not isinstance(caught.value, FlagError)
        for word in words:
            assert word in str(caught.value)
        one = text.startswith(("dtype", "revision", "repeats", "adapters: {unet: {}}", "adapters: {unet: lokr, t"))
        assert one != str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")  # a fault of one line names the file

    @pytest.mark.parametrize("missing", ["model", "instance_data_dir", "output_dir"])
    def test_missing(self, missing):
        at = LOKR.index(f"--{missing}")
        with pytest.raises(ConfigError, match=f"{missing} is missing; give --{missing}"):
            read_settings(None, LOKR[:at] + LOKR[at + 2 :])

    def test_not_a_file_of_settings(self, tmp_path):
        with pytest.raises(OSError):
            read_settings(tmp_path / "none.yaml", LOKR)
        (tmp_path / "list.yaml").write_text("- model\n")
        with pytest.raises(ConfigError, match="a line `name: value`"):
            read_settings(tmp_path / "list.yaml", LOKR)
        (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff")
        with pytest.raises(ConfigError, match="no YAML"):
            read_settings(tmp_path / "picture.yaml", LOKR)
        (tmp_path / "empty.yaml").write_text("# nothing yet\n")
        assert read_settings(tmp_path / "empty.yaml", LOKR).model == "tiny"


class TestFlags:
    def test_values(self):
        config = read(
            *("--instance-prompt", "a photo of [sks] dog: null, {x}", "--class_prompt", "[class] of #1", "--random_flip"),
            *("--aspect_buckets", "true", "--learning_rate=1e-4", "--min_snr_gamma", "null", "--bucket_upscale", "no"),
            *("--preview_prompts", "a dog, two", "--preview_prompts", "b: c", "--trackers", "[a, b]", "--formats", "peft"),
            *("--name=--x", "--optimizer_args.betas", "[0.9, 1e-1]", "--optimizer-args.eps", "1e-5", "--resume"),
        )
        assert config.instance_prompt == "a photo of [sks] dog: null, {x}"
        assert config.class_prompt == "[class] of #1"
        assert (config.random_flip, config.aspect_buckets, config.bucket_upscale) == (True, True, False)
        assert (config.learning_rate, config.min_snr_gamma) == (1e-4, None)
        assert config.preview_prompts == ("a dog, two", "b: c") and config.trackers == ("a", "b")
        assert (config.formats, config.name, config.resume) == (("peft",), "--x", "latest")
        assert config.optimizer_args == {"betas": [0.9, 0.1], "eps": 1e-5}
        assert read("--instance_prompt", "").instance_prompt == ""
        assert read("--resume", "out/checkpoint-000010", "--seed", "1", "--seed", "2").seed == 2

    def test_fields_of_the_adapter(self):
        config = read("--r", "16", "--lora-alpha", "4", "--target_modules", ".*attn[12].*", "--decompose_factor", "-1")
        assert config.adapters == {"unet": LoKrConfig(r=16, alpha=4, target_modules=".*attn[12].*", decompose_factor=-1)}
        config = read(
            "--target_modules", "[to_q, to_k]", "--init_weights", "lycoris", "--full-matrix", "--rank_pattern.to_q", "4"
        )
        expected = {"init_weights": "lycoris", "full_matrix": True, "rank_pattern": {"to_q": 4}}
        assert config.adapters == {"unet": LoKrConfig(target_modules=["to_q", "to_k"], **expected)}
        assert read("--init_weights", "false").adapters == {"unet": LoKrConfig(init_weights=False)}
        assert read("--adapters.unet", "{type: loha, r: 2}", "--unet.r=3").adapters == {"unet": LoHaConfig(r=3)}

    def test_text_encoders(self):
        field = ("--r", "16", "--target_modules", "attention")
        unet = LoKrConfig(r=16, target_modules="attention")
        same = {"unet": unet, "text_encoder": LoKrConfig(r=16)}
        assert read(*field, "--train_text_encoder").adapters == same
        assert read(*field, "--train_text_encoder", "--text_encoder.r", "2").adapters == same | {
            "text_encoder": LoKrConfig(r=2)
        }
        assert read(*field, "--text_encoder.r", "2").adapters == same | {"text_encoder": LoKrConfig(r=2)}
        other = read(*field, "--train_text_encoder", "--text-encoder.type", "loha", "--text-encoder.learning-rate", "1e-5")
        assert other.adapters == {"unet": unet, "text_encoder": LoHaConfig()}
        assert other.learning_rates == {"text_encoder": 1e-5}

    def test_text_encoders_left_alone(self, tmp_path):
        text = "adapters: {unet: lokr, text_encoder: lokr}\nlearning_rates: {unet: 1, text_encoder: 2}\n"
        config = read_text(tmp_path, text, "--train_text_encoder", "false").config
        assert config.adapters == {"unet": LoKrConfig()} and config.learning_rates == {"unet": 1}

    def test_components_of_a_model(self, tmp_path):
        """A transformer with three text encoders, one of them absent."""
        index = '{"_class_name": "X", "_diffusers_version": "0", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"],'
        index += '"text_encoder": ["t", "C"], "text_encoder_2": ["t", "C"], "text_encoder_3": [null, null], "shift": 3}'
        (tmp_path / "model_index.json").write_text(index)
        flags = ["--model", str(tmp_path), *LOKR[2:], "--r", "2", "--train-text-encoder"]
        assert list(read_settings(None, flags).config.adapters) == ["transformer", "text_encoder", "text_encoder_2"]

    def test_the_model_is_asked_only_where_needed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(settings_module, "components_of", lambda *_: pytest.fail("the model was looked up"))
        flags = ["--model", "owner/name", *NEEDED[2:], "--transformer.type", "lokr"]
        assert read_settings(None, [*flags, "--r", "2"]).config.adapters == {"transformer": LoKrConfig(r=2)}
        text = "adapters: {unet: loha}\nmodel: owner/other\nrevision: v1\nvariant: fp16\ndtype: float16\n"
        path = tmp_path / "run.yaml"
        path.write_text(text + "instance_data_dir: a\noutput_dir: b\n")
        found = read_settings(path, ["--adapter", "lora"])
        assert found.config.adapters == {"unet": LoraConfig()}
        assert (found.model, found.revision, found.variant, found.dtype) == ("owner/other", "v1", "fp16", "float16")

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--resolution", "many"], ["--resolution", "'many'", "a whole number"]),
            (["--resolution"], ["--resolution", "no value", "a whole number"]),
            (["--resolution", "--seed", "1"], ["--resolution", "no value"]),
            (["--random_flip", "run.yaml"], ["'run.yaml'", "true or false"]),
            (["--lerning_rate", "1"], ["no setting 'lerning_rate'", "'learning_rate'"]),
            (["--pretrained_model_name_or_path", "x"], ["called 'model' here"]),
            (["--unet_lr", "1"], ["called 'unet.learning_rate' here"]),
            (["--seed.x", "1"], ["--seed.x", "nothing inside"]),
            (["--adapter"], ["--adapter", "no value"]),
            (["--class_prompt", "None"], ["--class_prompt", "null"]),
            (["--unet.rnak", "4"], ["--unet.rnak", "no field 'rnak'"]),
            (["--sig_type", "last"], ["--sig_type", "lokr has no field 'sig_type'"]),
            (["--r", "x"], ["--r", "adapters.unet.r is 'x'"]),
            (["--text_encoder", "lorka"], ["--text_encoder", "'lorka'"]),
            (["--adapters.unet", "{type: lokr, r: x}"], ["adapters.unet.r", "'x'"]),
            (["--optimizer_args", "{a"], ["--optimizer_args"]),
            (["--optimizer_args", "3"], ["--optimizer_args", "a mapping"]),
            (["run.yaml"], ["unexpected argument 'run.yaml'", "--name value"]),
            (["-r", "4"], ["unexpected argument '-r'"]),
        ],
    )
    def test_bad_usage(self, flags, words):
        with pytest.raises(FlagError) as caught:
            read(*flags)
        for word in words:
            assert word in str(caught.value)

    def test_refused_values_are_no_bad_usage(self):
        for flags in (["--repeats", "0"], ["--dtype", "float64"], ["--r", "0"]):
            with pytest.raises(ConfigError) as caught:
                read(*flags)
            assert not isinstance(caught.value, FlagError)
        with pytest.raises(ConfigError, match="adapters is empty"):
            read_settings(None, NEEDED)
        with pytest.raises(ConfigError, match=r"adapters.unet has no type; give .* or --adapter"):
            read_settings(None, [*NEEDED, "--r", "4"])

    def test_split(self):
        arguments = ["--a-b", "1", "--c=--2", "--d", "--e", "-3", "--f.g-h="]
        assert list(split_flags(arguments)) == [("a_b", "1"), ("c", "--2"), ("d", None), ("e", "-3"), ("f.g_h", "")]


class TestAgain:
    """What `to_dict` says, written as YAML or as flags, is read as the same settings."""

    @pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"COMBINED"}))
    def test_every_adapter(self, name, tmp_path):
        adapters = {"unet": ADAPTERS[name].config_class(r=5, target_modules=["to_q"]), "text_encoder": LoKrConfig()}
        config = DreamBoothConfig("in", "out", "no", adapters, learning_rates={"unet": 1e-5}, preview_prompts=["1", "~"])
        first = TrainSettings("owner/name", "float16", config, "main", "fp16")
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(first.to_dict(), sort_keys=False))
        again = read_settings(tmp_path / "settings.yaml")
        assert again.to_dict() == first.to_dict()
        assert again.config.adapters == adapters

    @hypothesis_settings(deadline=None)  # the machine may be busy
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "instance_prompt": st.none() | st.text(TEXT, max_size=12),
                "learning_rate": st.floats(0, 10),
                "lr_scheduler_args": st.dictionaries(
                    st.text(TEXT, max_size=5), st.integers() | st.booleans() | st.none(), max_size=2
                ),
                "preview_prompts": st.lists(st.text(TEXT, max_size=8), max_size=3),
                "random_flip": st.booleans(),
                "min_snr_gamma": st.none() | st.floats(0, 10),
                "resolution": st.integers(1, 10**6),
                "name": st.none() | st.text(TEXT, max_size=8),
            },
        )
    )
    def test_any_values(self, values):
        config = DreamBoothConfig("in", "out", adapters={"unet": LoKrConfig()}, **values)
        text = yaml.safe_dump(TrainSettings("tiny", "auto", config).to_dict(), allow_unicode=True)
        plain = parse_yaml(text, "settings")
        kinds = settings_module.kinds_of(DreamBoothConfig)
        for name, value in values.items():
            found = convert(plain[name], kinds[name], name)
            assert (list(found) if isinstance(found, tuple) else found) == value

    def test_values_that_look_like_others(self, tmp_path):
        for text in ("null", "true", "1e-4", "1", "~", "", "[a]", "{a: b}", "a: b", "# a", "2026-01-01", "- a", "=", "<<"):
            config = DreamBoothConfig("in", "out", text, {"unet": LoKrConfig()}, preview_prompts=[text])
            (tmp_path / "settings.yaml").write_text(yaml.safe_dump(TrainSettings("tiny", "auto", config).to_dict()))
            found = read_settings(tmp_path / "settings.yaml").config
            assert (found.instance_prompt, found.preview_prompts) == (text, (text,))


class TestValues:
    @pytest.mark.parametrize(
        "text, kind, value",
        [
            ("1e-4", float, 1e-4),
            ("1", float, 1.0),
            (".5", float, 0.5),
            ("5e6", int, 5_000_000),
            ("1_000", int, 1000),
            ("-1", int, -1),
            ("off", bool, False),
            ("True", bool, True),
            ("007", str, "007"),
            ("null", str, "null"),
            ("null", str | None, None),
            ("true", bool | str, True),
            ("mini", bool | str, "mini"),
            ("3", list[int] | int | None, 3),
            ("[3, 4]", list[int] | int | None, [3, 4]),
            ("[3, 4]", tuple[int, int] | None, [3, 4]),
            ("[a]", list[str] | set[str] | str | None, ["a"]),
            ("[a-z]+", list[str] | set[str] | str | None, "[a-z]+"),
            ("a", Sequence[str], ("a",)),
            ("{a: 4}", Mapping[str, float], {"a": 4.0}),
            ("{a: [1, 1.5, x, null, '2']}", Any, {"a": [1, 1.5, "x", None, "2"]}),
            ("0o17", Any, 15),
            ("-.inf", Any, float("-inf")),
            ("1.5.2", Any, "1.5.2"),
        ],
    )
    def test_texts(self, text, kind, value):
        found = convert(parse_flag(text, kind), kind, "x")
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        "text, kind",
        [
            ("1.5", int),
            ("nan", float),
            ("true", int),
            ("1", bool),
            ("[x]", list[int]),
            ("[1]", int),
            ("null", int),
            ("a", dict),
        ],
    )
    def test_refused(self, text, kind):
        with pytest.raises(ConfigError, match="expected"):
            convert(parse_flag(text, kind), kind, "x")

    @hypothesis_settings(deadline=None)  # the machine may be busy
    @given(
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False), lambda x: st.lists(x, max_size=3))
    )
    def test_plain_values(self, value):
        assert resolve(parse_yaml(yaml.safe_dump(value), "x")) == value
        assert resolve(value) == value

    @hypothesis_settings(deadline=None)  # the machine may be busy
    @given(st.text(max_size=20))
    def test_any_text(self, text):
        """Nothing but a value or a refusal comes out."""
        for kind in (int, float, bool | str, str | None, Sequence[str], Mapping[str, float], Any):
            try:
                convert(parse_flag(text, kind), kind, "x")
            except ConfigError:
                assert kind is not str
        try:
            resolve(parse_yaml(text, "x"))
        except ConfigError as error:
            assert str(error).startswith("x:")


class TestDocumentation:
    def test_every_field_is_documented(self):
        documented = documentation(DreamBoothConfig)
        assert set(documented) == {field.name for field in dataclasses.fields(DreamBoothConfig)}
        assert all(text.endswith(".") and "  " not in text for text in documented.values())
        assert documented["class_data_dir"].endswith("null takes `output_dir/class`.")

    def test_the_list_has_everything(self):
        settings = {setting.name: setting for setting in list_settings()}
        own = [field.name for field in dataclasses.fields(TrainSettings) if field.name != "config"]
        assert {*own, *documentation(DreamBoothConfig), "adapter", "train_text_encoder"} == set(settings)
        assert all(setting.kind and setting.help for setting in settings.values())
        for setting in settings.values():
            if setting.default and hasattr(DreamBoothConfig, setting.name):  # the default as shown is the default
                kind = settings_module.kinds_of(DreamBoothConfig)[setting.name]
                found = convert(parse_flag(setting.default, kind), kind, setting.name)
                assert found == getattr(DreamBoothConfig, setting.name)
        for name in ("model", "instance_data_dir", "output_dir"):
            assert settings[name].default == ""

    def test_every_algorithm_has_a_name_in_the_help(self):
        text = next(setting.help for setting in list_settings() if setting.name == "adapter")
        names = text.split(": ")[1].rstrip(".").split(", ")
        for name in names:
            assert read_settings(None, [*NEEDED, "--adapter", name]).config.adapters["unet"] is not None
        assert {"lokr", "loha", "miss", "shira", "lora", "dora", "oft", "boft"} <= set(names)
        assert len({*names} - {"dora"}) == len(set(ADAPTERS) - {"COMBINED"})

    def test_fields_of_adapters(self):
        fields = {field.name: field for field in list_adapter_fields()}
        assert {"r", "alpha", "target_modules", "decompose_factor", "full_matrix", "weight_decompose", "mask_type"} <= set(
            fields
        )
        assert not {"peft_type", "revision", "rows"} & set(fields)
        assert fields["r"].help.startswith("rank") and fields["decompose_factor"].help.startswith("lokr: wanted size")
        assert fields["alpha"].help.startswith("glora, loha, lokr, lora, tlora: ") and fields["alpha"].default == "8"


class TestDocument:
    """docs/training.md says what the code does."""

    def test_the_tables_are_up_to_date(self):
        spec = importlib.util.spec_from_file_location("make_training_settings", ROOT / "scripts" / "make_training_settings.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        assert script.main(["--check"]) == 0, "run python scripts/make_training_settings.py"
        for setting in (*list_settings(), *list_adapter_fields()):
            assert f"| `{setting.name}` |" in DOCUMENT.read_text(encoding="utf-8")

    def test_files_and_commands_are_understood(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        text = DOCUMENT.read_text(encoding="utf-8")
        files = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        commands = re.findall(r"^lycoris-diff train (.*?[^\\])$", text, re.MULTILINE | re.DOTALL)
        assert len(files) == 4 and len(commands) >= 4
        for file, kind in zip(files, (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)):
            Path("run.yaml").write_text(file)
            assert read_settings("run.yaml").config.adapters.keys() <= {kind.denoiser, *kind.tokenizers}
        Path("run.yaml").write_text(files[0])
        assert read_settings("run.yaml").config.learning_rates == {"unet": 1e-3, "text_encoder": 1e-4}
        for command in commands:
            path, flags, _ = split_arguments(shlex.split(command.replace("\\\n", " ")))
            assert read_settings(path, flags).model == "tiny"

    def test_what_may_differ(self):
        text = DOCUMENT.read_text(encoding="utf-8").split("<!-- may differ: begin -->")[1].split("<!-- may differ: end -->")[0]
        assert set(re.findall(r"`(\w+)`", text)) == MAY_DIFFER

    def test_settings_that_are_named_exist(self):
        """Whatever looks like a setting in the prose and in the tables is one."""
        names = {setting.name for setting in (*list_settings(), *list_adapter_fields())}
        text = re.sub(r"```.*?```", "", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = text.split("## Settings")[0]
        start = text.split("## Where to start")[1]
        for name in re.findall(r"^\| (?:LoKr's )?`(\w+)", start, re.MULTILINE):
            assert name in names
        for name in re.findall(r"`([a-z]+_[a-z_]+)(?:: \w+)?`", text):
            assert name in names | {"settings", "text_encoder", "load_adapter"}, name
