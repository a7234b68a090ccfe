"""Speculative decoding draws what the plain loop draws: picture by picture, and in distribution."""

import math

import pytest
import torch
from test_generation_liquid import (
    BOI,
    BOS,
    CODES,
    OFFSET,
    PROMPTS,
    UNCONDITIONAL_PROMPT,
    Forbid,
    Recorder,
    StopAfter,
    build,
    code_scores,
    draw,
    generators,
    left_padded,
)
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from transformers_liquid import EMOJI_CHECKPOINT, LiquidForCausalLM, LiquidProcessor
from transformers_liquid.generation import speculative as speculative_liquid


SIZE = {"height": 8, "width": 6}  # 12 codes
NUM_CODES = 12
# llama, sliding windows shorter than the picture (one with soft-capped logits), learned positions, experts.
BASES = ["llama", "gemma2", "mistral", "gemma3_text", "gpt2", "opt", "phi", "gpt_neox", "mixtral", "cohere"]
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 10, "top_p": 0.9}


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def emoji():
    return LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT), LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)


# --- the same pictures ---


@pytest.mark.parametrize("settings", [{"do_sample": False, "guidance_scale": 3.0}, SAMPLING], ids=["greedy", "noise"])
@pytest.mark.parametrize("base", BASES)
def test_the_pictures_are_those_of_the_plain_loop_for_every_window(base, settings):
    model = build(base)
    plain = draw(model, **settings, **SIZE, generator=generators(1, 2, 3))
    for window in (2, 3, 5, NUM_CODES):
        ids = draw(model, **settings, **SIZE, generator=generators(1, 2, 3), speculative=window)
        assert torch.equal(ids, plain), window


VARIANTS = {
    "no guidance": {"guidance_scale": 1.0},
    "min-p": {"guidance_min_p": 0.2},
    "static cache": {"cache_implementation": "static"},
    "one shared generator": {"generator": None},
    "two pictures of each prompt": {"num_return_sequences": 2, "generator": generators(*range(6))},
    "negative prompts": {
        "negative_prompt_ids": torch.tensor([[BOS, 33, BOI], [BOS, 34, BOI], [BOS, 35, BOI]]),
    },
}


@pytest.mark.parametrize("base", ["llama", "gemma2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_pictures_are_those_of_the_plain_loop_whatever_else_is_asked_for(base, name):
    model = build(base)

    def run(**speculative):
        variant = dict(VARIANTS[name])
        generator = variant.pop("generator", generators(1, 2, 3))
        generator = torch.Generator() if generator is None else generator
        for seed, one in enumerate([generator] if isinstance(generator, torch.Generator) else generator):
            one.manual_seed(seed)
        return draw(model, **SAMPLING | SIZE | variant, generator=generator, **speculative)

    assert torch.equal(run(speculative=4), run())


def test_the_trained_checkpoint_draws_the_same_in_fewer_steps(emoji):
    model, processor = emoji
    prompts = ["red apple", "dog face", "woman scientist: dark skin tone", "pizza", "snowman"]
    inputs = processor(text=prompts, generation_mode="image", return_tensors="pt")
    plain = model.generate(**inputs, generation_mode="image", generator=generators(*range(5)))
    output = model.generate(
        **inputs,
        generation_mode="image",
        generator=generators(*range(5)),
        speculative=16,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, plain)
    # 1.8 to 2.6 codes per step were measured; more than 1 is what speculation is for.
    assert output.codes_per_step > 1.5
    assert output.accepted_codes.sum(0).tolist() == [64] * 5
    # Pictures go at their own pace: they are not done at the same step.
    assert len({int((column > 0).sum()) for column in output.accepted_codes.T}) > 1
    assert ((output.accepted_codes >= 0) & (output.accepted_codes <= 16)).all()


def test_a_draft_that_is_right_is_accepted():
    model = build()
    # Always the same code: every guess is right, and a window advances as a whole.
    one = LogitsProcessorList([Forbid([code for code in range(CODES) if code != 3])])
    output = draw(model, do_sample=False, **SIZE, speculative=4, logits_processor=one, return_dict_in_generate=True)
    assert output.accepted_codes.tolist() == [[1] * 3, [4] * 3, [4] * 3, [3] * 3]
    assert output.codes_per_step == 3.0


# --- the right distribution ---


def joint_probabilities(model, codes: int, keep: int) -> dict[tuple[int, ...], float]:
    """The probability of every picture of `codes` codes, multiplied along the tree of all of them."""
    pictures = {(): 1.0}
    for _ in range(codes):
        longer = {}
        for drawn, probability in pictures.items():
            ids = [OFFSET + code for code in drawn]
            conditional, other = code_scores(model, PROMPTS[0] + ids), code_scores(model, UNCONDITIONAL_PROMPT + ids)
            scores = other + 1.5 * (conditional - other)
            scores[scores < scores.topk(keep).values[-1]] = -math.inf
            for code, part in enumerate(scores.softmax(0).tolist()):
                if part:
                    longer[(*drawn, code)] = probability * part
        pictures = longer
    return pictures


def chi_squared_per_degree(model, probabilities: dict[tuple[int, ...], float], samples: int) -> float:
    ids = torch.tensor(PROMPTS[0]).repeat(samples, 1)
    drawn = model.generate(
        ids,
        generation_mode="image",
        height=2,
        width=2 * len(next(iter(probabilities))),
        guidance_scale=1.5,
        temperature=1.0,
        top_k=3,
        top_p=1.0,
        speculative=3,
        generator=torch.Generator().manual_seed(0),
    )
    counts = dict.fromkeys(probabilities, 0)
    for picture in (drawn - OFFSET).tolist():
        if tuple(picture) not in counts:
            return math.inf
        counts[tuple(picture)] += 1
    common = {picture: share for picture, share in probabilities.items() if share * samples >= 5}
    statistic = sum((counts[picture] - share * samples) ** 2 / (share * samples) for picture, share in common.items())
    rare = 1 - sum(common.values())
    if rare * samples >= 5:
        seen = samples - sum(counts[picture] for picture in common)
        statistic += (seen - rare * samples) ** 2 / (rare * samples)
        return statistic / len(common)
    return statistic / (len(common) - 1)


@pytest.fixture(scope="module")
def exact(llama):
    probabilities = joint_probabilities(llama, codes=4, keep=3)
    assert len(probabilities) == 3**4
    assert math.isclose(sum(probabilities.values()), 1.0, rel_tol=1e-6)
    return probabilities


def test_joint_samples_have_the_exact_probabilities(llama, exact):
    # The 99.9 % quantile of chi-squared over its degrees of freedom is below 1.7 from 60 degrees on.
    assert chi_squared_per_degree(llama, exact, samples=4000) < 1.7


def test_the_test_of_probabilities_finds_noise_that_moves_with_the_window(llama, exact, monkeypatch):
    noise_of = speculative_liquid._noise_of
    moving = lambda noise, positions: noise_of(noise, positions - positions[:, :1])  # noqa: E731
    monkeypatch.setattr(speculative_liquid, "_noise_of", moving)
    assert chi_squared_per_degree(llama, exact, samples=4000) > 3


def test_the_test_of_probabilities_finds_a_draw_behind_a_wrong_draft(llama, exact, monkeypatch):
    num_final = speculative_liquid._num_final
    one_more = lambda drawn, drafts: (num_final(drawn, drafts) + 1).clamp(max=drawn.shape[1])  # noqa: E731
    monkeypatch.setattr(speculative_liquid, "_num_final", one_more)
    assert chi_squared_per_degree(llama, exact, samples=4000) > 3


# --- transformers' own options ---


def test_a_streamer_gets_every_position_once_in_order(llama):
    streamer = Recorder()
    ids = draw(llama, **SAMPLING, **SIZE, speculative=5, streamer=streamer, generator=generators(1, 2, 3))
    prompts, *steps = streamer.received
    assert torch.equal(prompts, left_padded(PROMPTS)["input_ids"])
    assert torch.equal(torch.stack(steps, dim=1), ids)
    assert streamer.ended == 1


def test_a_users_processor_sees_the_ids_before_every_draft(llama):
    class Alternate(LogitsProcessor):
        """Forbids the code before, so it depends on the ids."""

        def __call__(self, input_ids, scores):
            before = (input_ids[:, -1:] - OFFSET) % CODES
            return scores.scatter(1, before, -torch.inf)

    settings = SAMPLING | SIZE | {"logits_processor": LogitsProcessorList([Alternate()])}
    plain = draw(llama, **settings, generator=generators(1, 2, 3))
    assert (plain[:, 1:] != plain[:, :-1]).all()
    assert torch.equal(draw(llama, **settings, generator=generators(1, 2, 3), speculative=4), plain)


def test_a_users_stopping_criterion_ends_all_pictures_at_the_same_code(llama):
    criteria = StoppingCriteriaList([StopAfter(max(map(len, PROMPTS)) + 5)])
    stopped = draw(llama, do_sample=False, **SIZE, speculative=4, stopping_criteria=criteria)
    plain = draw(llama, do_sample=False, **SIZE)
    assert 5 <= stopped.shape[1] < NUM_CODES
    assert torch.equal(stopped, plain[:, : stopped.shape[1]])


def test_drafts_beyond_the_last_position_of_the_model_do_no_harm():
    model = build("gpt2")
    prompt = [[BOS] + [21] * 114 + [BOI]]  # 116 tokens and 12 codes are all 128 positions
    plain = draw(model, prompt, do_sample=False, **SIZE)
    assert torch.equal(draw(model, prompt, do_sample=False, **SIZE, speculative=7), plain)


def test_the_checkpoint_can_ask_for_it(llama):
    model = build()
    model.generation_config.image_generation_config = {"speculative": 3, "do_sample": False, "guidance_scale": 2.0}
    output = draw(model, **SIZE, return_dict_in_generate=True)
    assert output.accepted_codes.sum(0).tolist() == [NUM_CODES] * 3
    plain = draw(model, **SIZE, speculative=False)
    assert torch.equal(output.sequences, plain)


# --- bad input ---


@pytest.mark.parametrize("window", [1, 0, -3, NUM_CODES + 1, 2.5, "fast"])
def test_a_window_that_is_none_is_refused(llama, window):
    with pytest.raises(ValueError, match=rf"speculative must be True, or a window of 2 ... 12 codes .*got {window!r}"):
        draw(llama, **SIZE, speculative=window)


def test_true_is_a_window_for_any_picture(llama):
    settings = {"do_sample": False, "height": 2, "width": 4}
    assert torch.equal(draw(llama, **settings, speculative=True), draw(llama, **settings))
    one_code = {"do_sample": False, "height": 2, "width": 2}
    assert torch.equal(draw(llama, **one_code, speculative=True), draw(llama, **one_code))


def test_what_speculation_cannot_do_is_refused(llama):
    with pytest.raises(ValueError, match="needs the cache"):
        draw(llama, speculative=2, use_cache=False)
    with pytest.raises(ValueError, match="does not record output_scores"):
        draw(llama, speculative=2, return_dict_in_generate=True, output_scores=True)
    with pytest.raises(ValueError, match="takes back what it guessed wrong, and a cache with LinearAttentionLayer"):
        draw(build("mamba"), speculative=2)
