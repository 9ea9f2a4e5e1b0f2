"""What is minimised: targets and weights against diffusers' formulas, prior preservation against two losses by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from PIL import Image
from trainingcases import SIDE, draw, short_run, small_pipe

from lycoris_diff.errors import AdapterError, ConfigError
from lycoris_diff.training.components import adapters_on, forked_rng
from lycoris_diff.training.data.pictures import find_pictures
from lycoris_diff.training.dreambooth import _make_accelerator, _ready
from lycoris_diff.training.families import family_of
from lycoris_diff.training.losses import dreambooth_loss, sample_losses
from lycoris_diff.training.objective import Diffusion, Flow, objective_of
from lycoris_diff.training.prepare import encode_data

T = 1000


def schedule(**changes):
    return DDIMScheduler(num_train_timesteps=T, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **changes)


class TestObjective:
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_noised_latents_and_target(self, prediction):
        objective = objective_of(schedule(prediction_type=prediction))
        latents, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
        timesteps = torch.tensor([0, 500, T - 1])
        alpha = objective.scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        torch.testing.assert_close(objective.noised(latents, noise, timesteps), noised, rtol=1e-6, atol=1e-6)
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        target = objective.target(latents, noise, timesteps)
        torch.testing.assert_close(target, velocity if prediction == "v_prediction" else noise, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("gamma", [1.0, 5.0])
    def test_min_snr_weights_are_those_of_diffusers_scripts(self, prediction, gamma):
        objective = objective_of(schedule(prediction_type=prediction), gamma)
        timesteps = torch.arange(T)
        snr = compute_snr(objective.scheduler, timesteps)
        least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        expected = least / snr if prediction == "epsilon" else least / (snr + 1)
        torch.testing.assert_close(objective.weights(timesteps), expected, rtol=1e-4, atol=1e-6)
        assert objective_of(schedule(prediction_type=prediction)).weights(timesteps) is None

    def test_weights_without_signal_are_finite(self):
        objective = Diffusion(DDPMScheduler(rescale_betas_zero_snr=True), min_snr_gamma=5.0)
        assert objective.weights(torch.tensor([T - 1])).tolist() == [1.0]

    def test_every_timestep_is_equally_likely(self):
        timesteps = objective_of(schedule()).timesteps((torch.arange(4 * T) + 0.5) / (4 * T))
        assert torch.equal(timesteps.bincount(), torch.full((T,), 4))

    def test_flow(self):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0)
        objective = objective_of(scheduler)
        latents, noise = torch.randn(2, 5, 4, 4, 4)
        timesteps = objective.timesteps(torch.tensor([0.0, 0.1, 0.5, 0.9, 0.9999999]))
        assert ((timesteps > 0) & (timesteps <= T)).all() and (timesteps.diff() < 0).all()
        by_time = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
        sigma = torch.tensor([by_time[t] for t in timesteps.tolist()]).view(-1, 1, 1, 1)
        torch.testing.assert_close(objective.noised(latents, noise, timesteps), (1 - sigma) * latents + sigma * noise)
        torch.testing.assert_close(objective.target(latents, noise, timesteps), noise - latents)
        assert objective.weights(timesteps) is None

    def test_flow_noise_levels_are_distributed_as_in_diffusers(self):
        objective = Flow(FlowMatchEulerDiscreteScheduler(num_train_timesteps=T))
        ours = objective.timesteps(torch.rand(20000, generator=torch.Generator().manual_seed(0)))
        density = compute_density_for_timestep_sampling(
            "logit_normal", 20000, 0.0, 1.0, generator=torch.Generator().manual_seed(1)
        )
        theirs = objective.scheduler.timesteps[(density * T).long()]
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):  # of 20000 draws: standard error below 1 % of the range
            assert abs(ours.quantile(quantile) - theirs.quantile(quantile)) < 20

    def test_refusals(self):
        with pytest.raises(AdapterError, match="'sample'"):
            objective_of(schedule(prediction_type="sample"))
        with pytest.raises(ConfigError, match="min_snr_gamma"):
            objective_of(FlowMatchEulerDiscreteScheduler(), 5.0)


class TestSampleLosses:
    def test_without_masks_it_is_the_mean_squared_error(self):
        prediction, target = torch.randn(2, 3, 4, 6, 6)
        expected = torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)])
        torch.testing.assert_close(sample_losses(prediction, target), expected)

    def test_masks_choose_what_counts(self):
        prediction, target = torch.randn(2, 2, 4, 6, 6)
        masks = torch.zeros(2, 1, 6, 6)
        masks[0, :, :2] = 1
        losses = sample_losses(prediction, target, masks)
        torch.testing.assert_close(losses[0], F.mse_loss(prediction[0, :, :2], target[0, :, :2]))
        assert losses[1] == 0  # nothing counts
        torch.testing.assert_close(sample_losses(prediction, target, torch.ones_like(masks)), sample_losses(prediction, target))

    def test_half_precision_is_compared_in_float32(self):
        prediction = torch.full((1, 2, 2, 2), 300.0, dtype=torch.float16)
        assert sample_losses(prediction, torch.zeros_like(prediction)).tolist() == [90000.0]  # above float16's largest


@pytest.fixture
def run(tmp_path):
    """Loops over the small pipeline with class pictures: `run(batch, captions, **settings)`."""
    stack = []

    def start(batch, captions, **changes):
        pictures, classes = draw(tmp_path / "own", 4), draw(tmp_path / "class", 3)
        if captions:
            for folder, words in ((pictures, "abc"), (classes, "def")):
                for index, path in enumerate(sorted(folder.glob("*.png"))):
                    path.with_suffix(".txt").write_text(words[index % 3])
        pipe = small_pipe()
        config = short_run(
            pictures, tmp_path / "out", train_batch_size=batch, class_data_dir=classes, class_prompt="c",
            prior_loss_weight=0.7, **changes,
        )  # fmt: skip
        family, accelerator = family_of(pipe), _make_accelerator(config)
        found = find_pictures(pictures, config.instance_prompt, masked=config.masked_loss)
        data = encode_data(family, config, found, find_pictures(classes, "c"), 0, tmp_path / "cache", lambda *_: None)
        ready = _ready(family, config, data, accelerator)
        stack.append(ready)
        return pipe, ready.__enter__(), data

    yield start
    for ready in stack:
        ready.__exit__(None, None, None)


class TestPriorPreservation:
    @pytest.mark.parametrize("captions", [False, True], ids=["prompts", "captions"])
    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_equals_two_losses_by_hand(self, batch, captions, run):
        pipe, loop, data = run(batch, captions)
        loop.set_training(False)  # dropout would draw anew
        for number in range(3):
            made = loop.batches.batch(number)
            assert made.instances == batch and len(made.latents) == 2 * batch
            known = {shown.caption for shown in data.instances}, {shown.caption for shown in data.classes}
            assert set(made.captions[:batch]) <= known[0] and set(made.captions[batch:]) <= known[1]
            by_hand = []
            for rows in (slice(0, batch), slice(batch, None)):
                losses = []
                for latents, noise, timestep, caption in zip(
                    made.latents[rows], made.noise[rows], made.timesteps[rows], made.captions[rows], strict=True
                ):
                    tokens = pipe.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
                    text = pipe.text_encoder(tokens)[0]
                    noisy = loop.objective.scheduler.add_noise(latents[None], noise[None], timestep[None])
                    losses.append(F.mse_loss(pipe.unet(noisy, timestep[None], text).sample, noise[None]))
                by_hand.append(sum(losses) / batch)
            torch.testing.assert_close(loop.loss(made), by_hand[0] + 0.7 * by_hand[1], rtol=1e-5, atol=1e-6)

    def test_gradient_is_that_of_the_two_losses(self, run):
        _, loop, _ = run(2, True)
        loop.set_training(False)
        batch = loop.batches.batch(0)
        loop.loss(batch).backward()
        together = [parameter.grad.clone() for parameter in loop.parameters]
        for parameter in loop.parameters:
            parameter.grad = None
        losses = loop.sample_losses(batch)
        (losses[:2].mean() + 0.7 * losses[2:].mean()).backward()
        for parameter, gradient in zip(loop.parameters, together, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_weights_go_to_their_samples(self):
        losses, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.5, 0.1, 0.2])
        assert dreambooth_loss(losses, weights, 2, 2.0) == pytest.approx((1 + 1) / 2 + 2 * (0.3 + 0.8) / 2)
        assert dreambooth_loss(losses, None, 4, 2.0) == 2.5


class TestBatches:
    def test_chance_depends_on_the_sample_alone(self, run):
        _, loop, _ = run(2, False, random_flip=True, caption_dropout=0.5, noise_offset=0.3)
        first = loop.batches.batch(3)
        torch.randn(10)
        again = loop.batches.batch(3)
        assert torch.equal(first.noise, again.noise) and torch.equal(first.latents, again.latents)
        assert first.captions == again.captions
        assert not torch.equal(first.noise, loop.batches.batch(4).noise)

    def test_two_processes_see_what_one_sees(self, run):
        from dataclasses import replace

        from lycoris_diff.training.prepare import batches_of

        _, loop, data = run(1, False, caption_dropout=0.3)
        pair = [batches_of(loop.family, loop.objective, loop.config, data, rank, 2) for rank in (0, 1)]
        one = batches_of(loop.family, loop.objective, replace(loop.config, train_batch_size=2), data)
        for number in range(5):
            whole, parts = one.batch(number), [batches.batch(number) for batches in pair]
            order = [(0, 0), (1, 0), (0, 1), (1, 1)]  # the subject's of both processes first, then the class's
            assert torch.equal(whole.noise, torch.stack([parts[p].noise[i] for p, i in order]))
            assert torch.equal(whole.latents, torch.stack([parts[p].latents[i] for p, i in order]))
            assert torch.equal(whole.timesteps, torch.stack([parts[p].timesteps[i] for p, i in order]))
            assert whole.captions == [parts[p].captions[i] for p, i in order]

    def test_caption_dropout(self, run):
        _, loop, _ = run(3, True, caption_dropout=0.4)
        captions = [caption for number in range(60) for caption in loop.batches.batch(number).captions]
        assert 0.3 < captions.count("") / len(captions) < 0.5  # 360 samples: three standard errors are 0.08

    def test_noise_offset(self, run):
        _, loop, _ = run(2, False, noise_offset=2.0)
        means = torch.cat([loop.batches.batch(number).noise.mean((2, 3)).flatten() for number in range(30)])
        assert 1.6 < means.std() < 2.4  # without an offset 1/8: the mean of 64 values

    def test_flips_are_encoded_and_both_shown(self, run):
        _, loop, data = run(2, False, random_flip=True)
        for shown in data.instances:
            ((plain, mirrored),) = shown.latents.values()
            assert not torch.equal(plain.mean, mirrored.mean)
        seen = {id(s) for n in range(12) for s in _pictures(loop.batches, n)}
        assert len(seen) == 2 * len(data.instances)

    def test_masks_reach_the_loss(self, run, tmp_path):
        for index in range(4):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[: SIDE // 2] = 255
            (tmp_path / "own").mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / "own" / f"{index}.mask.png")
        _, loop, _ = run(2, False, masked_loss=True)
        batch = loop.batches.batch(0)
        assert batch.masks is not None and batch.masks.shape == (4, 1, 8, 8)
        assert batch.masks[:2, :, :4].min() == 1 and batch.masks[:2, :, 4:].max() == 0
        assert batch.masks[2:].min() == 1  # class pictures have none: all of them counts
        loop.set_training(False)
        predicted = {}
        handle = loop.models["unet"].register_forward_hook(lambda *call: predicted.update(made=call[-1].sample))
        with torch.no_grad():
            losses = loop.sample_losses(batch)
        handle.remove()
        half = (predicted["made"] - batch.noise)[:2, :, :4].square().mean((1, 2, 3))
        torch.testing.assert_close(losses[:2], half)

    def test_pictures_of_a_batch_share_a_bucket_with_the_class(self, tmp_path):
        pictures = draw(tmp_path / "own", 6, ((16, 16), (32, 16), (16, 32)))
        classes = draw(tmp_path / "class", 2)
        config = short_run(
            pictures, tmp_path / "out", aspect_buckets=True, bucket_step=4, class_data_dir=classes, class_prompt="c"
        )
        pipe = small_pipe()
        family = family_of(pipe)
        data = encode_data(
            family, config, find_pictures(pictures, "a"), find_pictures(classes, "c"), 0, tmp_path / "cache", lambda *_: None
        )
        with forked_rng(0), adapters_on(pipe, config.adapters, keep=False):
            from lycoris_diff.training.prepare import batches_of

            batches = batches_of(family, family.objective(None), config, data)
            shapes = {tuple(batches.batch(number).latents.shape) for number in range(9)}
        assert len(shapes) == 3 and all(shape[0] == 4 for shape in shapes)


def _pictures(batches, number):
    """The encoded pictures that a batch shows of the subject."""
    from lycoris_diff.training.batches import INSTANCE

    drawn = batches.instance_stream.batch(number)
    return [batches._sample(INSTANCE, batches.instances, draw, drawn.bucket).picture for draw in drawn.draws]
