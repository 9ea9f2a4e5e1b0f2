"""Every family is trained as its own pipeline draws: prompts, sizes, latents, noise levels and the denoiser's call."""

from __future__ import annotations

import copy
import inspect

import pytest
import smallpipelines
import torch
from accelerate import Accelerator
from diffusers import EDMEulerScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from familycases import KINDS, family, pipeline, short_run
from PIL import Image
from trainingcases import draw

from lycoris_diff import AdapterError, LoraConfig
from lycoris_diff.errors import ConfigError
from lycoris_diff.training import train_dreambooth
from lycoris_diff.training.components import adapters_on, prepared
from lycoris_diff.training.data.buckets import Bucket, place
from lycoris_diff.training.families import FAMILIES, Flux, StableDiffusionXL, family_of
from lycoris_diff.training.loop import Loop
from lycoris_diff.training.prepare import batches_of, buckets_of, find_data, prepare_data

PROMPTS = ["a cat", "", "dog " * 12]  # the last is longer than the CLIP encoders take


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(params=KINDS)
def pipe(request):
    return pipeline(request.param)


def parts(pipe):
    return {name: getattr(pipe, name) for name in family(pipe).components}


def encoded_by_pipeline(pipe, prompts):
    """What the pipeline makes of prompts, under the names of the denoiser's arguments."""
    more = {f"prompt_{i}": None for i in (2, 3) if f"prompt_{i}" in inspect.signature(pipe.encode_prompt).parameters}
    if not isinstance(pipe, FluxPipeline):
        more["do_classifier_free_guidance"] = False
    given = [value for value in pipe.encode_prompt(prompt=list(prompts), **more)[:3] if value is not None]
    pooled = "text_embeds" if hasattr(pipe, "unet") else "pooled_projections"
    return {"encoder_hidden_states": given[0], pooled: given[1]}


def arguments_of(call, denoiser, *args, **kwargs):
    """Tensors that `call` hands to the denoiser in its first call, by the names of its arguments."""
    seen = []
    handle = denoiser.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    try:
        result = call(*args, **kwargs)
    finally:
        handle.remove()
    bound = inspect.signature(denoiser.forward).bind(*seen[0][0], **seen[0][1]).arguments
    flat = bound | (bound.get("added_cond_kwargs") or {})
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}, result


class TestKinds:
    @pytest.mark.parametrize("name", KINDS)
    def test_each_pipeline_has_one(self, name):
        pipe = pipeline(name)
        assert [kind for kind in FAMILIES if kind.matches(pipe)] == [KINDS[name]]
        assert set(family_of(pipe).components) == {n for n in pipe.components if n.startswith(("unet", "transf", "text_e"))} - (
            {"text_encoder_3"} if name == "sd3" else set()
        )

    @pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
    def test_a_part_that_is_missing(self, name):
        pipe = pipeline(name)
        pipe.text_encoder_2 = None
        with pytest.raises(AdapterError, match="cannot be trained; expected a pipeline of Stable Diffusion 1"):
            family_of(pipe)

    @pytest.mark.parametrize(("name", "channels", "has"), [("sdxl", 9, 4), ("flux", 96, 4)])
    def test_a_denoiser_that_is_told_of_other_pictures(self, name, channels, has):
        pipe = pipeline(name)
        smallpipelines.denoiser(pipe).register_to_config(in_channels=channels)
        takes = channels if name == "sdxl" else channels // 4
        with pytest.raises(AdapterError, match=f"takes {takes} channels and the VAE's latents have {has}"):
            family_of(pipe)

    def test_a_component_of_another_family(self, pictures, tmp_path):
        pipe = pipeline("flux")
        config = short_run(pipe, pictures, tmp_path, adapters={"unet": LoraConfig()})
        with pytest.raises(ConfigError, match=r"'unet'; Flux\.1 has transformer, text_encoder, text_encoder_2"):
            train_dreambooth(pipe, config)


class TestConditioning:
    @torch.no_grad()
    def test_prompts_are_the_pipelines_own(self, pipe):
        ours = family(pipe)
        expected = encoded_by_pipeline(pipe, PROMPTS)
        found = ours.encode(parts(pipe), ours.tokenize(PROMPTS))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    @torch.no_grad()
    def test_the_denoiser_is_told_what_the_pipeline_tells_it(self, pipe):
        """All tensors of one step of the pipeline's own call, and the answer, on latents that are no square."""
        ours, denoiser = family(pipe), smallpipelines.denoiser(pipe)
        placement = place((41, 67), [Bucket(16, 24)])
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 24, "width": 16, "output_type": "latent"}
        if isinstance(ours, StableDiffusionXL):
            height, width, top, left, target_height, target_width = placement.size_ids()
            assert (height, width, top, left) == (67, 41, 1, 0)
            call |= {"original_size": (height, width), "crops_coords_top_left": (top, left)}
            call |= {"target_size": (target_height, target_width)}
        generator = torch.Generator().manual_seed(0)
        expected, _ = arguments_of(pipe, denoiser, "a cat", generator=generator, **call)
        noisy = next(iter(expected.values()))  # the denoiser's first argument
        if isinstance(ours, Flux):
            noisy = FluxPipeline._unpack_latents(noisy, 24, 16, pipe.vae_scale_factor)
        time = expected["timestep"].reshape(1) * (1000 if isinstance(ours, Flux) else 1)
        conditioning = ours.encode(parts(pipe), ours.tokenize(["a cat"])) | ours.sizes([placement])
        found, answer = arguments_of(ours.predict, denoiser, denoiser, noisy, time, conditioning)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name].reshape(value.shape), value), name
            assert found[name].dtype == value.dtype, name
        assert answer.shape == noisy.shape

    @pytest.mark.parametrize("name", ["sd3", "flux"])
    @torch.no_grad()
    def test_the_answer_is_the_pipelines_step(self, name):
        """From the first noise to the last latents of one step: the sign, the scale and the packing of the answer."""
        pipe = pipeline(name)
        ours = family(pipe)
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 24, "width": 16, "output_type": "latent"}
        channels = pipe.vae.config.latent_channels
        noise = torch.randn(1, channels, 12, 8, generator=torch.Generator().manual_seed(0))
        drawn = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images
        if isinstance(ours, Flux):
            drawn = FluxPipeline._unpack_latents(drawn, 24, 16, pipe.vae_scale_factor)
        conditioning = ours.encode(parts(pipe), ours.tokenize(["a cat"]))
        answer = ours.predict(ours.pipe.transformer, noise, torch.tensor([1000.0]), conditioning)
        torch.testing.assert_close(noise - answer, drawn, rtol=1e-5, atol=1e-5)  # from noise level 1 to 0

    def test_sizes_of_mirrored_and_scaled_pictures(self):
        pipe = pipeline("sdxl")
        placements = [place((41, 67), [Bucket(16, 24)]), place((1000, 16), [Bucket(16, 16)])]
        found = family(pipe).sizes(placements)["time_ids"]
        assert found.tolist() == [[67, 41, 1, 0, 24, 16], [16, 1000, 0, 492, 16, 16]]
        expected = pipe._get_add_time_ids((67, 41), (1, 0), (24, 16), torch.float32, text_encoder_projection_dim=32)
        assert torch.equal(found[:1], expected) and found.dtype == expected.dtype


class TestLatents:
    def test_scale_and_shift_are_undone_by_the_pipelines_decoder(self, pipe):
        ours = family(pipe)
        pixels = torch.rand(2, 3, 16, 24) * 2 - 1
        mean, std = ours.posterior(pixels)
        config = pipe.vae.config
        with torch.no_grad():
            raw = pipe.vae.encode(pixels).latent_dist
        torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, raw.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, raw.std * config.scaling_factor)
        assert mean.shape[-2:] == (16 // ours.latent_factor, 24 // ours.latent_factor)

    @pytest.mark.parametrize(("name", "factor"), [("sdxl", 2), ("sd3", 4), ("flux", 4)])
    def test_edges_that_the_denoiser_cannot_take(self, name, factor, pictures, tmp_path):
        pipe = pipeline(name)
        assert family(pipe).edge_factor == factor
        config = short_run(pipe, pictures, tmp_path, resolution=16 + factor // 2)
        with pytest.raises(ConfigError, match=f"resolution is {16 + factor // 2}; this model needs multiples of {factor}"):
            buckets_of(config, family(pipe).edge_factor)

    def test_a_vae_that_overflows_in_float16_is_used_in_float32(self):
        pipe = pipeline("sdxl")
        pixels = torch.rand(1, 3, 16, 16) * 2 - 1
        half = copy.deepcopy(pipe.vae).half()
        pipe.vae = copy.deepcopy(half).float()
        expected = family(pipe).posterior(pixels)[0]
        pipe.vae = half
        assert torch.equal(family(pipe).posterior(pixels)[0], expected)
        assert pipe.vae.dtype == torch.float16
        pipe.vae.register_to_config(force_upcast=False)
        assert not torch.equal(family(pipe).posterior(pixels)[0], expected)


class TestObjective:
    @pytest.mark.parametrize(("name", "scheme"), [("sd3", "logit_normal"), ("flux", "none")])
    def test_noise_levels_are_those_of_diffusers_scripts(self, name, scheme):
        pipe = pipeline(name)
        objective = family(pipe).objective(None)
        ours = objective.timesteps(torch.rand(20000, generator=torch.Generator().manual_seed(0)))
        density = compute_density_for_timestep_sampling(scheme, 20000, 0.0, 1.0, generator=torch.Generator().manual_seed(1))
        theirs = pipe.scheduler.timesteps[(density * 1000).long()]
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):  # of 20000 draws: standard error below 1 % of the range
            assert abs(ours.quantile(quantile) - theirs.quantile(quantile)) < 20

    @pytest.mark.parametrize("name", ["sd3", "flux"])
    def test_noised_is_the_schedulers(self, name):
        pipe = pipeline(name)
        objective = family(pipe).objective(None)
        latents, noise = torch.randn(2, 64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        times = objective.timesteps(torch.linspace(0, 0.999, 64))
        expected = pipe.scheduler.scale_noise(latents, times, noise)
        torch.testing.assert_close(objective.noised(latents, noise, times), expected, rtol=1e-6, atol=1e-6)
        # one Euler step along the target from any noise level ends at the latents
        sigma = pipe.scheduler.sigmas[[pipe.scheduler.index_for_timestep(t) for t in times]].view(-1, 1, 1, 1)
        torch.testing.assert_close(expected - sigma * objective.target(latents, noise, times), latents, rtol=1e-5, atol=1e-5)

    def test_schedulers_that_scale_latents_are_refused(self):
        pipe = pipeline("sdxl")
        pipe.scheduler = EDMEulerScheduler()
        with pytest.raises(AdapterError, match="EDMEulerScheduler"):
            family(pipe).objective(None)

    def test_flow_has_no_snr(self):
        with pytest.raises(ConfigError, match="min_snr_gamma"):
            family(pipeline("sd3")).objective(5.0)


class TestLoss:
    def test_equals_the_pipelines_own_parts(self, pipe, tmp_path):
        """Subject and class, one of them masked, in a bucket that is no square: by hand from what diffusers offers."""
        folder, classes = draw(tmp_path / "p", 2, ((24, 36),)), draw(tmp_path / "c", 2, ((30, 20),))
        Image.new("L", (24, 36), 0).save(folder / "0.mask.png")
        white = Image.new("L", (24, 36), 255)
        white.paste(0, (0, 18, 24, 36))
        white.save(folder / "0.mask.png")
        ours = family(pipe)
        own = {"aspect_buckets": True, "bucket_step": 4, "masked_loss": True, "prior_loss_weight": 0.7, "random_flip": True}
        config = short_run(pipe, folder, tmp_path / "out", class_data_dir=classes, **own)
        config.adapters = {ours.denoiser: config.adapters[ours.denoiser]}
        accelerator = Accelerator()
        data = prepare_data(ours, config, find_data(config), accelerator, tmp_path / "cache", lambda *_: None)
        objective = ours.objective(None)
        batch = batches_of(ours, objective, config, data).batch(0)
        assert batch.latents.shape[-2] != batch.latents.shape[-1] and batch.masks is not None
        with adapters_on(pipe, config.adapters, keep=False), prepared(ours, config, accelerator) as models:
            loop = Loop(ours, objective, config, data, accelerator, models)
            loop.set_training(False)
            with torch.no_grad():
                found = loop.loss(batch)
        with torch.no_grad():
            errors = [_error(pipe, batch, i) for i in range(4)]
        masks = [torch.ones(1, 1, 1, 1) if batch.masks is None else batch.masks[i][None] for i in range(4)]
        losses = [(error * mask).sum() / mask.expand_as(error).sum() for error, mask in zip(errors, masks)]
        expected = (losses[0] + losses[1]) / 2 + 0.7 * (losses[2] + losses[3]) / 2
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _error(pipe, batch, i):
    """Squared error of one sample, its noise by the scheduler, the denoiser called as the pipeline does it."""
    latents, noise, time = batch.latents[i : i + 1], batch.noise[i : i + 1], batch.timesteps[i : i + 1]
    told = encoded_by_pipeline(pipe, [batch.captions[i]])
    if hasattr(pipe, "unet"):
        signal = pipe.scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        added = {"text_embeds": told.pop("text_embeds"), "time_ids": batch.sizes["time_ids"][i : i + 1]}
        return (pipe.unet(noisy, time, added_cond_kwargs=added, **told).sample - noise).square()
    noisy = pipe.scheduler.scale_noise(latents, time, noise)
    if not isinstance(pipe, FluxPipeline):
        return (pipe.transformer(noisy, timestep=time, **told).sample - (noise - latents)).square()
    height, width = latents.shape[-2:]
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    answer = pipe.transformer(
        FluxPipeline._pack_latents(noisy, 1, noisy.shape[1], height, width),
        timestep=time / 1000,
        guidance=torch.ones(1),
        txt_ids=torch.zeros(told["encoder_hidden_states"].shape[1], 3),
        img_ids=ids,
        **told,
    ).sample
    factor = pipe.vae_scale_factor
    return (FluxPipeline._unpack_latents(answer, height * factor, width * factor, factor) - (noise - latents)).square()
