"""The diffusion models that vokens condition: losses by hand, drawing by diffusers, for every family."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from tiny_vokens import FAMILIES, tiny_image_pipeline
from torch import nn

from transformers_liquid import VokenCondition, VokenImageDecoder
from transformers_liquid.models.voken.image_decoder import TEXT_ENCODERS


POOLED = ["sdxl", "sd3"]


def condition_of(decoder, number=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pooled = None if decoder.pooled_dim is None else torch.randn(number, decoder.pooled_dim, generator=generator)
    return VokenCondition(embeds=torch.randn(number, 6, decoder.condition_dim, generator=generator), pooled=pooled)


def predicted_by(family, denoiser, noisy, timesteps, condition):
    """What each denoiser is called with in diffusers' own training scripts."""
    c, p = condition.embeds, condition.pooled
    if family.startswith("sd-") or family == "sd":
        return denoiser(noisy, timesteps, c).sample
    if family == "sdxl":
        ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(len(noisy), 1)
        return denoiser(noisy, timesteps, c, added_cond_kwargs={"text_embeds": p, "time_ids": ids}).sample
    if family == "sd3":
        return denoiser(noisy, c, p, timesteps).sample
    mask = torch.ones(c.shape[:2])
    if family == "sana":
        return denoiser(noisy, c, timesteps, encoder_attention_mask=mask).sample
    nothing = {"resolution": None, "aspect_ratio": None}
    both = denoiser(noisy, c, timesteps, added_cond_kwargs=nothing, encoder_attention_mask=mask).sample
    return both[:, :4]


def signal(family, timesteps):
    """alpha-bar of every time step, computed from the noise schedule of the family."""
    if family == "pixart":
        betas = np.linspace(0.0001, 0.02, 1000)
    else:
        start, end = (0.0001, 0.02) if family == "sdxl" else (0.00085, 0.012)
        betas = np.linspace(start**0.5, end**0.5, 1000) ** 2
    return torch.tensor(np.cumprod(1 - betas)[timesteps.numpy()]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_formula(family, gamma):
    decoder = VokenImageDecoder(tiny_image_pipeline(family))
    latents, noise = torch.randn(2, 3, *decoder.latent_shape())
    condition = condition_of(decoder)
    if family in ("sd3", "sana"):
        sigma = torch.tensor([0.1, 0.5, 0.999])
        timesteps = sigma * 1000
        noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
        target, weight = noise - latents, torch.ones(3)
    else:
        timesteps = torch.tensor([0, 400, 999])
        a = signal(family, timesteps)
        noisy = (a.sqrt() * latents + (1 - a).sqrt() * noise).float()
        snr = (a / (1 - a)).flatten()
        least = snr.clamp(max=5)
        target, weight = noise, least / snr
        if family == "sd-v":
            target, weight = (a.sqrt() * noise - (1 - a).sqrt() * latents).float(), least / (snr + 1)
        elif family == "sd-x0":
            target, weight = latents, least
    with torch.no_grad():
        predicted = predicted_by(family, decoder.denoiser, noisy, timesteps, condition)
        loss = decoder.loss(latents, condition, gamma, noise, timesteps)
    expected = (predicted - target).square().mean((1, 2, 3)) * (1 if gamma is None else weight)
    torch.testing.assert_close(loss, expected.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_the_frozen_denoiser_into_the_condition(family):
    decoder = VokenImageDecoder(tiny_image_pipeline(family))
    condition = condition_of(decoder)
    for one in condition.values():
        one.requires_grad_()
    decoder.loss(torch.randn(3, *decoder.latent_shape()), condition).mean().backward()
    assert all(one.grad.abs().sum() > 0 for one in condition.values())
    parts = [one for one in decoder.pipe.components.values() if isinstance(one, nn.Module)]
    assert all(one.grad is None and not one.requires_grad for part in parts for one in part.parameters())
    assert not any(part.training for part in parts)


def test_time_steps_are_drawn_as_each_family_was_trained():
    decoder = VokenImageDecoder(tiny_image_pipeline("sd"))
    seen = []
    decoder._denoise = lambda noisy, timesteps, condition: (seen.append(timesteps), noisy)[1]
    condition = VokenCondition(embeds=torch.zeros(4000, 6, 8))
    decoder.loss(torch.zeros(4000, 4, 2, 2), condition)
    assert seen[0].min() < 10 and seen[0].max() > 989 and 480 < seen[0].float().mean() < 520
    # SD3: logit-normal, then shifted: its median is where sigma is 3 / 4.
    flow = VokenImageDecoder(tiny_image_pipeline("sd3"))
    flow._denoise = decoder._denoise
    flow.loss(torch.zeros(4000, 4, 2, 2), condition)
    assert 730 < seen[1].median() < 770 and seen[1].min() > 0 and seen[1].max() <= 1000


def test_min_snr_of_noise_from_nothing_but_noise_is_refused():
    pipe = tiny_image_pipeline("sd")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    decoder = VokenImageDecoder(pipe)
    latents = torch.randn(3, *decoder.latent_shape())
    with pytest.raises(ValueError, match="snr_gamma=None"):
        decoder.loss(latents, condition_of(decoder), 5.0)
    assert decoder.loss(latents, condition_of(decoder)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_diffusers_draws_from_the_same_embeddings_and_needs_no_text_encoder(family):
    whole = tiny_image_pipeline(family)
    decoder = VokenImageDecoder.from_components(**whole.components | dict.fromkeys(TEXT_ENCODERS))
    assert decoder.pipe.text_encoder is None
    target = VokenImageDecoder(whole)
    condition, nothing = (target.caption_condition(texts, 6) for texts in (["ab", "cd"], [""]))
    drawn = decoder.draw(
        condition,
        nothing,
        [torch.Generator().manual_seed(seed) for seed in (3, 4)],
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="np",
    )
    assert drawn.shape == (2, *[32 if family == "sana" else 16] * 2, 3)
    if family in ("pixart", "sana"):  # diffusers masks the padding of prompts, all of a condition is attended to
        return
    size = {"height": 16, "width": 16}
    more = {"max_sequence_length": 3} if family == "sd3" else {}
    if family == "sdxl":  # which by default leads away from zeros where there is no negative prompt
        more["negative_prompt"] = ["", ""]
    expected = whole(
        ["ab", "cd"],
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="np",
        **size,
        **more,
    ).images
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_encoded_to_the_length_of_the_condition(family):
    decoder = VokenImageDecoder(tiny_image_pipeline(family))
    condition = decoder.caption_condition(["ab", ""], 6)
    assert condition.embeds.shape == (2, 6, decoder.condition_dim)
    assert (condition.pooled is None) == (family not in POOLED)
    if family in POOLED:
        assert condition.pooled.shape == (2, decoder.pooled_dim)
    with pytest.raises(ValueError, match="caption_loss_weight=0"):
        VokenImageDecoder(tiny_image_pipeline(family, text=False)).caption_condition(["ab"])
    if family in ("sd", "sdxl"):
        with pytest.raises(ValueError, match="give 6 vectors, the condition has 5"):
            decoder.caption_condition(["ab"], 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_scaled_and_shifted_as_the_family_does(family):
    pipe = tiny_image_pipeline(family)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = VokenImageDecoder(pipe).encode(pictures, torch.Generator().manual_seed(1))
    encoded = pipe.vae.encode(pictures)
    if family == "sana":
        expected = encoded.latent * 0.41407
    else:
        sample = encoded.latent_dist.sample(torch.Generator().manual_seed(1))
        expected = (sample - 0.06) * 1.5 if family == "sd3" else sample * 0.5
    torch.testing.assert_close(latents, expected.detach())


def test_drawing_does_not_change_training():
    decoder = VokenImageDecoder(tiny_image_pipeline("sd"))
    condition, latents = condition_of(decoder), torch.randn(3, 4, 8, 8)
    before = decoder.loss(latents, condition, 5.0, generator=torch.Generator().manual_seed(1))
    decoder.draw(condition, condition_of(decoder, 1), num_inference_steps=3)
    assert torch.equal(before, decoder.loss(latents, condition, 5.0, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", ["sd", "sd3", "sana"])
def test_an_image_decoder_is_loaded_from_its_diffusers_repository(family, tmp_path):
    pipe = tiny_image_pipeline(family)
    pipe.save_pretrained(tmp_path)
    loaded = VokenImageDecoder.from_pretrained(str(tmp_path), torch_dtype=torch.float32)
    for name, weight in VokenImageDecoder(pipe).denoiser.state_dict().items():
        assert torch.equal(weight, loaded.denoiser.state_dict()[name])
    assert loaded.caption_condition(["ab"], 6).embeds.shape[1] == 6


def test_what_cannot_be_conditioned_is_refused():
    pipe = tiny_image_pipeline("sd")
    parts = {**pipe.components, "unet": None}
    with pytest.raises(ValueError, match="a unet or a transformer, these parts have 0"):
        VokenImageDecoder.from_components(**parts)
    parts["unet"] = diffusers.UNet2DModel(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                                          up_block_types=("UpBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"UNet2DModel is no denoiser that vokens can condition\. Known are: UNet2DCond"
    ):
        VokenImageDecoder.from_components(**parts)
    odd = copy.deepcopy(pipe)
    odd.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels, the VAE gives 4"):
        VokenImageDecoder(odd)
    odd = copy.deepcopy(pipe)
    odd.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type"):
        VokenImageDecoder(odd)


@pytest.mark.parametrize(
    ("family", "told"), [("pixart", {"use_additional_conditions": True}), ("sana", {"guidance_embeds": True})]
)
def test_denoisers_that_are_told_more_than_texts_are_refused(family, told):
    pipe = tiny_image_pipeline(family)
    config = {name: one for name, one in pipe.transformer.config.items() if not name.startswith("_")}
    pipe.register_modules(transformer=type(pipe.transformer)(**config | told))
    with pytest.raises(ValueError, match=r"Model \((sizes|guidance)\) is no denoiser that vokens can condition"):
        VokenImageDecoder(pipe)


def test_pipelines_that_draw_from_pictures_are_refused_and_their_parts_are_not():
    parts = tiny_image_pipeline("sd").components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="Img2ImgPipeline draws from more than texts"):
        VokenImageDecoder(pipe)
    assert VokenImageDecoder.from_components(**pipe.components).condition_dim == 8


def test_settings_that_a_pipeline_does_not_know_are_refused():
    decoder = VokenImageDecoder(tiny_image_pipeline("sd"))
    condition = condition_of(decoder)
    with pytest.raises(ValueError, match="takes no guidance"):
        decoder.draw(condition, condition_of(decoder, 1), guidance=3.0)
    with pytest.raises(ValueError, match="takes no prompt"):
        decoder.draw(condition, condition_of(decoder, 1), prompt="a cat")
    with pytest.raises(ValueError, match="multiples of 2"):
        decoder.draw(condition, condition_of(decoder, 1), height=17)
