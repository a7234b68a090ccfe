"""Drawing: every step is recomputed here by hand, one row at a time, without cache, padding or transformers' filters."""

import copy
import json
import math
import threading

import numpy as np
import pytest
import torch
from tiny import BOI_ID as BOI
from tiny import BOS_ID as BOS
from tiny import CODEBOOK_SIZE as CODES
from tiny import IMAGE_TOKEN_OFFSET as OFFSET
from tiny import UNCOND_ID as UNCONDITIONAL
from tiny import VOCAB_SIZE, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from transformers_liquid.generation.guidance import (
    GuidanceLogitsProcessor,
    ImageTokenLogitsProcessor,
    SuppressImageTokensLogitsProcessor,
)
from transformers_liquid.generation.settings import DEFAULT_IMAGE_GENERATION_CONFIG
from transformers_liquid.models.liquid.modeling_liquid import LiquidForCausalLM


VOCABULARY = VOCAB_SIZE + 8  # eight text rows follow the image rows
BASES = ["llama", "gemma2", "gpt2"]  # gemma2: windows and soft-capped logits; gpt2: learned positions
UNCONDITIONAL_PROMPT = [BOS, UNCONDITIONAL, BOI]
PROMPTS = [[BOS, 21, 22, BOI], [BOS, 23, 24, 25, 26, 27, BOI], [BOS, BOI]]


def build(base: str = "llama") -> LiquidForCausalLM:
    model = tiny_model(base, vocab_size=VOCABULARY)
    model.config.image_size = 4  # 2 x 2 codes of 2 x 2 pixels
    return model


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(params=BASES, scope="module")
def model(request):
    return build(request.param)


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    # The pad is an id that changes everything if it is attended to.
    return {
        "input_ids": torch.tensor([[30] * (length - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def draw(model, prompts=PROMPTS, **kwargs):
    return model.generate(**left_padded(prompts), generation_mode="image", **kwargs)


@torch.no_grad()
def code_scores(model, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, OFFSET : OFFSET + CODES].double()


def oracle(
    model,
    prompt,
    noise=None,
    unconditional=UNCONDITIONAL_PROMPT,
    codes=4,
    guidance_scale=7.0,
    guidance_min_p=None,
    temperature=1.0,
    top_k=CODES,
    top_p=1.0,
):
    """One picture: two forwards per code over everything so far; greedy without noise."""
    drawn = []
    for step in range(codes):
        conditional = code_scores(model, prompt + drawn)
        scores = conditional
        if unconditional is not None:
            other = code_scores(model, unconditional + drawn)
            scores = other + guidance_scale * (conditional - other)
        candidates = range(CODES)
        if guidance_min_p is not None:
            support = conditional.softmax(0)
            candidates = [code for code in candidates if support[code] >= guidance_min_p * support.max()]
        candidates = sorted(candidates, key=lambda code: -scores[code])
        if noise is None:
            drawn.append(OFFSET + candidates[0])
            continue
        candidates = candidates[:top_k]
        weights = {code: math.exp((scores[code] - scores[candidates[0]]) / temperature) for code in candidates}
        kept, mass = [], 0.0
        for code in candidates:
            if mass < top_p * sum(weights.values()):
                kept.append(code)
            mass += weights[code]
        drawn.append(OFFSET + max(kept, key=lambda code: scores[code] / temperature + noise[step][code]))
    return drawn


def gumbel(seed: int, steps: int = 4) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [[-math.log(-math.log(number)) for number in torch.rand(CODES, generator=generator)] for _ in range(steps)]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the loop against the oracle ---


def test_each_cfg_row_attends_only_its_own_prompt(model):
    together = draw(model, do_sample=False, guidance_scale=3.0).tolist()
    assert together == [oracle(model, prompt, guidance_scale=3.0) for prompt in PROMPTS]
    assert together == [draw(model, [prompt], do_sample=False, guidance_scale=3.0)[0].tolist() for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) == len(PROMPTS)


SAMPLING = [
    {"guidance_scale": 3.0, "temperature": 0.99, "top_k": 10, "top_p": 0.96},
    {"guidance_scale": 1.5, "temperature": 2.0, "top_k": 5, "top_p": 1.0},
    {"guidance_scale": 1.5, "temperature": 1.7, "top_k": CODES, "top_p": 0.5},
    {"guidance_scale": 2.0, "temperature": 1.0, "top_k": CODES, "top_p": 1.0, "guidance_min_p": 0.1},
]


@pytest.mark.parametrize("settings", SAMPLING)
def test_sampling_takes_the_best_noisy_score_of_the_guided_and_filtered_codes(model, settings):
    ids = draw(model, **settings, generator=generators(1, 2, 3))
    expected = [oracle(model, prompt, gumbel(seed), **settings) for seed, prompt in enumerate(PROMPTS, 1)]
    assert ids.tolist() == expected


def test_one_generator_draws_for_the_rows_of_a_step_in_order(llama):
    settings = SAMPLING[1]
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([-(-torch.rand(3, CODES, generator=generator).log()).log() for _ in range(4)])
    expected = [oracle(llama, prompt, noise[:, row].tolist(), **settings) for row, prompt in enumerate(PROMPTS)]
    assert draw(llama, **settings, generator=torch.Generator().manual_seed(5)).tolist() == expected


def test_without_a_generator_the_global_seed_decides(llama):
    torch.manual_seed(3)
    first = draw(llama, temperature=2.0, guidance_scale=1.0)
    assert not torch.equal(first, draw(llama, temperature=2.0, guidance_scale=1.0))
    torch.manual_seed(3)
    assert torch.equal(first, draw(llama, temperature=2.0, guidance_scale=1.0))


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_the_kind_of_cache_does_not_change_the_picture(model, cache):
    settings = {"guidance_scale": 2.0, "temperature": 1.5}
    expected = draw(model, **settings, generator=generators(1, 2, 3))
    assert torch.equal(draw(model, **settings, **cache, generator=generators(1, 2, 3)), expected)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 8), (10, 2), (6, 6)])
def test_a_picture_has_exactly_rows_times_columns_image_ids(llama, height, width):
    codes = (height // 2) * (width // 2)
    ids = draw(llama, height=height, width=width, do_sample=False, guidance_scale=2.0)
    assert ids.tolist() == [oracle(llama, prompt, codes=codes, guidance_scale=2.0) for prompt in PROMPTS]
    assert ids.dtype == torch.int64
    assert llama.decode_image_tokens(ids, height, width).shape == (3, 3, height, width)


def test_an_end_of_text_id_within_the_codes_does_not_end_a_picture():
    model = build()
    greedy = draw(model, do_sample=False, guidance_scale=1.0)
    model.generation_config.eos_token_id = greedy.unique().tolist()
    model.generation_config.max_new_tokens = 1
    assert torch.equal(draw(model, do_sample=False, guidance_scale=1.0), greedy)


# --- prompts and rows ---


def test_a_negative_prompt_takes_the_place_of_the_unconditional_one(llama):
    negative = [[BOS, 33, BOI], [BOS, 34, 35, 36, 37, 38, 39, 20, BOI], [BOS, 31, 32, BOI]]
    padded = left_padded(negative)
    names = {"negative_prompt_ids": padded["input_ids"], "negative_prompt_attention_mask": padded["attention_mask"]}
    ids = draw(llama, do_sample=False, guidance_scale=3.0, **names)
    assert ids.tolist() == [
        oracle(llama, prompt, unconditional=other, guidance_scale=3.0)
        for prompt, other in zip(PROMPTS, negative, strict=True)
    ]
    shared = draw(llama, do_sample=False, guidance_scale=3.0, negative_prompt_ids=torch.tensor(negative[1:2]))
    assert shared.tolist() == [
        oracle(llama, prompt, unconditional=negative[1], guidance_scale=3.0) for prompt in PROMPTS
    ]
    with pytest.raises(ValueError, match=r"must be one sequence or 3 \(the prompts\), got 2"):
        draw(llama, negative_prompt_ids=torch.tensor([UNCONDITIONAL_PROMPT] * 2))


def test_prompts_without_bos_get_an_unconditional_prompt_without_bos(llama):
    ids = draw(llama, [[21, 22, BOI]], do_sample=False, guidance_scale=3.0)
    without = oracle(llama, [21, 22, BOI], unconditional=[UNCONDITIONAL, BOI], guidance_scale=3.0)
    assert ids.tolist() == [without]
    assert without != oracle(llama, [21, 22, BOI], guidance_scale=3.0)


def test_num_return_sequences_keeps_the_pictures_of_a_prompt_together(llama):
    settings = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": CODES, "top_p": 1.0}
    ids = draw(llama, **settings, num_return_sequences=2, generator=generators(*range(6)))
    expected = [oracle(llama, PROMPTS[seed // 2], gumbel(seed), **settings) for seed in range(6)]
    assert ids.tolist() == expected
    assert len({tuple(picture) for picture in expected}) > 3


def test_a_generator_of_its_own_gives_the_same_picture_in_any_batch(llama):
    settings = {"guidance_scale": 2.0, "temperature": 1.5}
    together = draw(llama, **settings, generator=generators(7, 8, 9))
    assert torch.equal(draw(llama, PROMPTS[::-1], **settings, generator=generators(9, 8, 7)), together.flip(0))
    for row, seed in enumerate((7, 8, 9)):
        assert torch.equal(draw(llama, [PROMPTS[row]], **settings, generator=generators(seed)), together[row : row + 1])


def test_guidance_1_runs_no_unconditional_rows(llama):
    output = draw(llama, do_sample=False, guidance_scale=1.0, return_dict_in_generate=True, output_logits=True)
    assert output.logits[0].shape == (3, CODES)
    assert output.past_key_values.layers[0].keys.shape[0] == 3
    assert output.sequences.tolist() == [oracle(llama, prompt, unconditional=None) for prompt in PROMPTS]
    ignored = draw(llama, do_sample=False, guidance_scale=1.0, negative_prompt_ids=torch.tensor([[33, BOI]]))
    assert torch.equal(ignored, output.sequences)


@pytest.mark.parametrize("settings", [{"guidance_scale": 3.0}, {"guidance_scale": 1.0}])
def test_a_picture_can_begin_where_a_running_cache_ends(llama, settings):
    inputs = left_padded(PROMPTS)
    context = {name: value[:, :-1] for name, value in inputs.items()}
    positions = (context["attention_mask"].cumsum(1) - 1).clamp(min=0)
    settings = settings | {"temperature": 1.5, "height": 6, "width": 8}
    expected = draw(llama, **settings, generator=generators(1, 2, 3))
    for speculative in (None, 4):
        cache = DynamicCache(config=llama.config.text_config)
        with torch.no_grad():
            llama(**context, position_ids=positions, past_key_values=cache)
        lengths = []
        hook = llama.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, lengths=lengths: lengths.append(args[0].shape[1])
        )
        try:
            ids = draw(llama, **settings, generator=generators(1, 2, 3), past_key_values=cache, speculative=speculative)
        finally:
            hook.remove()
        assert torch.equal(ids, expected)
        # Only the begin-of-image token, or as much as the unconditional prompt has, is read.
        assert lengths[0] == (1 if settings["guidance_scale"] == 1.0 else len(UNCONDITIONAL_PROMPT))


def test_equal_prompts_run_once_and_an_unconditional_prompt_too(llama):
    rows_of_forwards = []
    hook = llama.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: rows_of_forwards.append(tuple(args[0].shape))
    )
    settings = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": CODES, "top_p": 1.0}
    try:
        ids = draw(llama, PROMPTS[:2], **settings, num_return_sequences=4, generator=generators(*range(8)))
    finally:
        hook.remove()
    assert rows_of_forwards == [(3, 7), *[(16, 1)] * 3]
    assert ids.tolist() == [oracle(llama, PROMPTS[seed // 4], gumbel(seed), **settings) for seed in range(8)]


# --- transformers' own options ---


class Recorder(BaseStreamer):
    def __init__(self):
        self.received, self.ended = [], 0

    def put(self, value):
        self.received.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompts_then_the_ids_of_every_step(llama):
    streamer = Recorder()
    ids = draw(llama, streamer=streamer, do_sample=False)
    prompts, *steps = streamer.received
    assert torch.equal(prompts, left_padded(PROMPTS)["input_ids"])
    assert torch.equal(torch.stack(steps, dim=1), ids)
    assert streamer.ended == 1


class Forbid(LogitsProcessor):
    def __init__(self, code):
        self.code, self.seen = code, []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores.index_fill(1, torch.tensor(self.code), -torch.inf)


def test_a_users_logits_processor_sees_guided_scores_of_the_codes_and_is_obeyed(llama):
    free = draw(llama, do_sample=False, guidance_scale=2.0)
    forbid = Forbid(int(free[0, 0]) - OFFSET)
    ids = draw(llama, do_sample=False, guidance_scale=2.0, logits_processor=LogitsProcessorList([forbid]))
    assert not (ids == free[0, 0]).any()
    assert len(forbid.seen) == 4
    for step, (input_ids, scores) in enumerate(forbid.seen):
        assert torch.equal(input_ids[:, -step - 1], torch.tensor([BOI] * 3))
        assert torch.equal(input_ids[:, input_ids.shape[1] - step :], ids[:, :step])
        for row, prompt in enumerate(PROMPTS):
            drawn = ids[row, :step].tolist()
            conditional = code_scores(llama, prompt + drawn)
            unconditional = code_scores(llama, UNCONDITIONAL_PROMPT + drawn)
            expected = unconditional + 2.0 * (conditional - unconditional)
            torch.testing.assert_close(scores[row].double(), expected, atol=1e-4, rtol=1e-5)


class AddInPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.add_(torch.arange(CODES))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_recorded_logits_are_the_models_whatever_a_users_processor_does(llama, guidance_scale):
    output = draw(
        llama,
        do_sample=False,
        guidance_scale=guidance_scale,
        logits_processor=LogitsProcessorList([AddInPlace()]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = torch.stack([code_scores(llama, prompt) for prompt in PROMPTS])
    torch.testing.assert_close(output.logits[0][:3].double(), expected, atol=1e-4, rtol=1e-5)


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_users_stopping_criterion_is_obeyed(llama):
    criteria = StoppingCriteriaList([StopAfter(max(map(len, PROMPTS)) + 3)])
    stopped = draw(llama, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(stopped, draw(llama, do_sample=False)[:, :3])


def test_return_dict_holds_what_was_asked_for(llama):
    names = ("scores", "logits", "attentions", "hidden_states")
    llama.set_attn_implementation("eager")
    try:
        output = draw(
            llama,
            generator=generators(1, 2, 3),
            guidance_scale=3.0,
            top_k=5,
            return_dict_in_generate=True,
            **{f"output_{name}": True for name in names},
        )
        plain = draw(llama, generator=generators(1, 2, 3), guidance_scale=3.0, top_k=5)
    finally:
        llama.set_attn_implementation("sdpa")
    assert torch.equal(output.sequences, plain)
    assert all(len(output[name]) == 4 for name in names)
    length = max(map(len, PROMPTS))
    for step in range(4):
        queries = length if step == 0 else 1
        assert output.logits[step].shape == (6, CODES)
        assert output.scores[step].shape == (3, CODES)
        assert [tuple(layer.shape) for layer in output.attentions[step]] == [(6, 4, queries, length + step)] * 2
        assert [tuple(layer.shape) for layer in output.hidden_states[step]] == [(6, queries, 32)] * 3
        assert ((output.scores[step] > -torch.inf).sum(-1) <= 5).all()
    expected = torch.stack([code_scores(llama, prompt) for prompt in [*PROMPTS, *[UNCONDITIONAL_PROMPT] * 3]])
    torch.testing.assert_close(output.logits[0].double(), expected, atol=1e-4, rtol=1e-5)
    assert output.past_key_values.get_seq_length() == length + 3


def test_only_what_was_asked_for_is_recorded(llama):
    output = draw(llama, return_dict_in_generate=True)
    assert output.scores is None
    assert output.logits is None
    assert output.attentions is None


# --- settings ---


def first_step(model, **kwargs):
    """(temperature, guidance, number of codes kept) read back from the first step's logits and scores."""
    output = draw(
        model, PROMPTS[:1], height=2, width=2, return_dict_in_generate=True, output_scores=True, output_logits=True,
        **kwargs,
    )  # fmt: skip
    scores, logits = output.scores[0][0].double(), output.logits[0].double()
    kept = scores > -torch.inf
    conditional, unconditional = logits[:, kept]
    # scores * temperature = unconditional + guidance * (conditional - unconditional)
    columns = torch.stack([scores[kept], unconditional - conditional], dim=1)
    temperature, guidance = torch.linalg.lstsq(columns, unconditional).solution.tolist()
    return round(temperature, 3), round(guidance, 3), int(kept.sum())


def test_settings_are_defaults_then_the_models_then_the_configs_then_keywords():
    model = build()
    all_kept = {"top_p": 1.0}
    assert first_step(model, **all_kept) == (0.99, 7.0, CODES)
    model.generation_config.temperature = 0.1  # says something about text, nothing about images
    model.generation_config.image_generation_config = {"temperature": 3.0, "guidance_scale": 4.0, "top_k": 10}
    assert first_step(model, **all_kept) == (3.0, 4.0, 10)
    config = GenerationConfig(temperature=2.0, guidance_scale=5.0)
    assert first_step(model, **all_kept, generation_config=config) == (2.0, 5.0, 10)
    assert first_step(model, **all_kept, generation_config=config, guidance_scale=1.5) == (2.0, 1.5, 10)


def test_a_config_with_image_settings_of_its_own_speaks_through_them():
    model = build()
    model.generation_config.image_generation_config = {"temperature": 3.0, "guidance_scale": 4.0}
    # What pipelines pass: a copy of the model's config, text settings and all.
    config = GenerationConfig(temperature=0.1, do_sample=True, max_new_tokens=1)
    config.image_generation_config = {"guidance_scale": 2.0}
    assert first_step(model, top_p=1.0, generation_config=config) == (3.0, 2.0, CODES)


def test_the_models_image_settings_survive_saving(tmp_path):
    model = build()
    model.generation_config.image_generation_config = {"do_sample": False, "guidance_scale": 2.0}
    model.generation_config.save_pretrained(tmp_path)
    other = build()
    other.generation_config = GenerationConfig.from_pretrained(tmp_path)
    assert draw(other).tolist() == [oracle(model, prompt, guidance_scale=2.0) for prompt in PROMPTS]


def test_the_models_image_settings_outlive_a_config_without_any(tmp_path):
    model = build()
    stored = {"do_sample": False, "guidance_scale": 2.0}
    model.generation_config.image_generation_config = stored
    expected = [oracle(model, prompt, guidance_scale=2.0) for prompt in PROMPTS]
    # Beside what says something about text alone, for one call and for all.
    assert draw(model, generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=2)).tolist() == expected
    replacement = GenerationConfig(max_new_tokens=3, temperature=0.1, do_sample=True)
    model.generation_config = replacement
    assert draw(model).tolist() == expected
    assert model.generation_config.max_new_tokens == 3
    assert not hasattr(replacement, "image_generation_config")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["image_generation_config"] == stored
    assert draw(LiquidForCausalLM.from_pretrained(tmp_path)).tolist() == expected
    model.generation_config = GenerationConfig(image_generation_config=stored | {"guidance_scale": 1.0})
    assert draw(model).tolist() == [oracle(model, prompt, unconditional=None) for prompt in PROMPTS]


def test_a_model_made_of_a_saved_configuration_alone_draws_as_its_repository_does(tmp_path):
    model = build()
    model.generation_config.image_generation_config = {"do_sample": False, "guidance_scale": 2.0}
    model.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    made.load_state_dict(model.state_dict())
    assert draw(made).tolist() == draw(model).tolist()
    # What stands in a repository's generation_config.json outranks it.
    model.generation_config.image_generation_config = {"do_sample": False, "guidance_scale": 4.0}
    model.generation_config.save_pretrained(tmp_path)
    assert draw(LiquidForCausalLM.from_pretrained(tmp_path)).tolist() == draw(model).tolist()


def test_a_stored_setting_without_a_meaning_is_refused():
    model = build()
    model.generation_config.image_generation_config = {"guidence_scale": 2.0}
    with pytest.raises(ValueError, match=r"guidence_scale=2\.0 has no meaning for images"):
        draw(model)


def test_a_stored_size_is_the_size_of_pictures():
    model = build()
    model.generation_config.image_generation_config = {"height": 6, "do_sample": False}
    assert draw(model).shape == (3, 6)
    assert draw(model, width=2).shape == (3, 3)


def test_the_default_settings_are_the_references():
    # Liquid evaluation/sample.py: --cfg 7.0, --temperature 0.99, --top_k 4096, --top_p 0.96.
    reference = {"guidance_scale": 7.0, "do_sample": True, "temperature": 0.99, "top_k": 4096, "top_p": 0.96}
    assert reference == DEFAULT_IMAGE_GENERATION_CONFIG


# --- processors, alone and in stock generate() ---


def test_guidance_extrapolates_from_unconditional_to_conditional_rows():
    scores = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 1.0]])
    guided = torch.tensor([[-5.0, 6.0, -2.0]])
    assert torch.equal(GuidanceLogitsProcessor(3.0)(None, scores), guided.repeat(2, 1))
    assert torch.equal(GuidanceLogitsProcessor(1.0)(None, scores), scores[:1].repeat(2, 1))
    with pytest.raises(ValueError, match="equal number, got 3 sequences"):
        GuidanceLogitsProcessor(3.0)(None, torch.zeros(3, 4))


def test_guidance_min_p_removes_codes_that_the_conditional_row_does_not_support():
    conditional = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    unconditional = torch.tensor([[0.5, 0.3, 0.1999, 0.0001]]).log()
    guided = GuidanceLogitsProcessor(3.0)(None, torch.cat([conditional, unconditional]))
    assert guided[0].argmax() == 3
    limited = GuidanceLogitsProcessor(3.0, 0.2)(None, torch.cat([conditional, unconditional]))
    assert torch.equal(limited[:, :3], guided[:, :3])
    assert (limited[:, 3] == -torch.inf).all()
    only_best = GuidanceLogitsProcessor(3.0, 1.0)(None, torch.cat([conditional, unconditional]))
    assert (only_best[0] > -torch.inf).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("guidance_min_p", "guidance_first"), [(None, True), (None, False), (0.3, False)])
def test_stock_generate_with_our_processors_draws_the_same_picture(model, guidance_min_p, guidance_first):
    settings = {"guidance_scale": 2.0, "guidance_min_p": guidance_min_p}
    rows = left_padded([*PROMPTS, *[UNCONDITIONAL_PROMPT] * len(PROMPTS)])
    processors = [GuidanceLogitsProcessor(**settings), ImageTokenLogitsProcessor(model.config)]
    processors = processors if guidance_first else processors[::-1]
    stock = model.generate(
        **rows,
        do_sample=False,
        max_new_tokens=4,
        logits_processor=LogitsProcessorList(processors),
        suppress_image_tokens=False,
    )[:, -4:]
    assert torch.equal(stock[:3], stock[3:])
    assert torch.equal(stock[:3], draw(model, do_sample=False, **settings))
    assert stock[:3].tolist() == [oracle(model, prompt, **settings) for prompt in PROMPTS]


def test_image_and_text_restrictions_leave_the_other_scores_alone(llama):
    scores = torch.randn(2, VOCABULARY)
    before = scores.clone()
    image = ImageTokenLogitsProcessor(llama.config)(None, scores)
    assert torch.equal(image[:, OFFSET : OFFSET + CODES], scores[:, OFFSET : OFFSET + CODES])
    assert (image == -torch.inf).sum(-1).tolist() == [VOCABULARY - CODES] * 2

    text = SuppressImageTokensLogitsProcessor(llama.config)(None, scores)
    removed = [*range(3, 7), *range(OFFSET, OFFSET + CODES)]
    assert (text[:, removed] == -torch.inf).all()
    kept = [index for index in range(VOCABULARY) if index not in removed]
    assert torch.equal(text[:, kept], scores[:, kept])
    assert torch.equal(scores, before)


def test_text_mode_emits_image_ids_only_when_asked_to(llama):
    prompts = torch.randint(20, 40, (16, 3), generator=torch.Generator().manual_seed(0))
    free = llama.generate(prompts, do_sample=False, max_new_tokens=5, eos_token_id=None, suppress_image_tokens=False)
    text = llama.generate(prompts, do_sample=False, max_new_tokens=5, eos_token_id=None)[:, 3:]
    is_image = (free[:, 3:] >= OFFSET) & (free[:, 3:] < OFFSET + CODES)
    assert is_image.any()
    assert not ((text >= OFFSET) & (text < OFFSET + CODES)).any()
    assert not torch.isin(text, torch.arange(3, 7)).any()


# --- the view on the image head ---


def test_the_image_head_is_a_view_and_the_model_stays_as_it_is(model):
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    view = model.image_head_view()
    sliced = view.get_output_embeddings()
    assert sliced.weight.shape == (CODES, 32)
    assert sliced.weight.data_ptr() == head.weight[OFFSET].data_ptr()
    assert sliced.weight.untyped_storage().data_ptr() == head.weight.untyped_storage().data_ptr()
    assert model.get_output_embeddings() is head
    assert head.weight.shape == (VOCABULARY, 32)
    assert head.weight.requires_grad
    assert dict(model.named_modules()) == modules

    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        torch.testing.assert_close(view(ids).logits, model(ids).logits[..., OFFSET : OFFSET + CODES])


def test_drawing_leaves_settings_and_head_of_the_model_untouched(llama):
    head, settings = llama.get_output_embeddings(), llama.generation_config.to_dict()
    draw(llama, temperature=0.5)
    assert llama.get_output_embeddings() is head
    assert llama.generation_config.to_dict() == settings


def test_threads_that_draw_and_write_with_one_model_do_not_disturb_each_other(llama):
    text = torch.tensor([[BOS, 21, 22]])
    jobs = {
        "image": lambda: draw(llama, height=6, width=6, do_sample=False, guidance_scale=2.0).tolist(),
        "text": lambda: llama.generate(text, do_sample=False, max_new_tokens=9, eos_token_id=None).tolist(),
    }
    expected = {name: job() for name, job in jobs.items()}
    results = {name: [] for name in jobs}
    threads = [
        threading.Thread(target=lambda name=name: results[name].extend(jobs[name]() for _ in range(5))) for name in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [expected[name]] * 5 for name in jobs}


# --- bad input ---


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_guidance_that_is_no_guidance_is_refused(llama, scale):
    with pytest.raises(ValueError, match=rf"guidance_scale must be a finite number >= 1 .*, got {scale}"):
        draw(llama, guidance_scale=scale)


@pytest.mark.parametrize("min_p", [0.0, -0.1, 1.1, math.nan])
def test_guidance_min_p_that_is_no_fraction_is_refused(llama, min_p):
    with pytest.raises(ValueError, match=rf"guidance_min_p must be in \(0, 1\], got {min_p}"):
        draw(llama, guidance_min_p=min_p)


@pytest.mark.parametrize(
    "setting", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"min_new_tokens": 3}, {"eos_token_id": 2}]
)
def test_settings_without_a_meaning_for_pictures_are_refused(llama, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name}={value} has no meaning for images.*height, width"):
        draw(llama, **setting)


def test_a_keyword_that_nobody_knows_is_refused(llama):
    with pytest.raises(ValueError, match="gudance_scale"):
        draw(llama, gudance_scale=3.0)


def test_a_prompt_that_does_not_begin_an_image_is_refused(llama):
    with pytest.raises(ValueError, match=rf"begin-of-image token \({BOI}\); prompt 1 ends with 25"):
        draw(llama, [[BOS, 21, BOI], [BOS, 21, 25]])


@pytest.mark.parametrize("input_ids", [None, torch.zeros(1, 0, dtype=torch.long), torch.tensor([BOI])])
def test_an_empty_prompt_is_refused(llama, input_ids):
    with pytest.raises(ValueError, match=r"needs input_ids of shape \(batch, length\)"):
        llama.generate(input_ids, generation_mode="image")


def test_a_prompt_that_leaves_no_room_for_the_picture_is_refused(llama):
    fits = [[BOS] + [21] * 122 + [BOI]]
    assert draw(llama, fits, do_sample=False).shape == (1, 4)
    message = "The prompt has 125 tokens and the picture 4 codes, together more than the model's 128 positions"
    with pytest.raises(ValueError, match=message):
        draw(llama, [[BOS] + [21] * 123 + [BOI]])
    with pytest.raises(ValueError, match=message):
        draw(llama, PROMPTS, negative_prompt_ids=torch.tensor([[BOS] + [21] * 123 + [BOI]]))
    with pytest.raises(ValueError, match="the picture 400 codes"):
        draw(llama, height=40, width=40)


@pytest.mark.parametrize(("count", "copies"), [(2, 1), (3, 2)])
def test_a_wrong_number_of_generators_is_refused(llama, count, copies):
    with pytest.raises(ValueError, match=f"one for each of the {3 * copies} pictures, got {count}"):
        draw(llama, generator=generators(*range(count)), num_return_sequences=copies)


@pytest.mark.parametrize("size", [{"height": 0}, {"width": 5}, {"height": -2}, {"height": 4, "width": 1}])
def test_a_size_that_is_no_multiple_of_the_factor_is_refused(llama, size):
    with pytest.raises(ValueError, match=r"positive multiples of 2 pixels \(the codec's factor\), got height="):
        draw(llama, **size)


@pytest.mark.parametrize("top_p", [0.0, 1.5])
def test_top_p_that_is_no_fraction_is_refused(llama, top_p):
    with pytest.raises(ValueError, match=rf"top_p must be in \(0, 1\], got {top_p}"):
        draw(llama, top_p=top_p)


def test_an_unknown_mode_and_image_settings_for_text_are_refused(llama):
    with pytest.raises(ValueError, match=r"generation_mode must be 'text', 'image' or 'interleaved', got 'picture'"):
        llama.generate(torch.tensor([[BOS]]), generation_mode="picture")
    with pytest.raises(ValueError, match=r"not used by the model.*height.*guidance_min_p"):
        llama.generate(torch.tensor([[BOS]]), height=8, guidance_min_p=0.1)


def test_decoding_says_which_id_is_wrong_and_where(llama):
    ids = torch.full((2, 4), OFFSET)
    assert llama.decode_image_tokens(ids).shape == (2, 3, 4, 4)
    torch.testing.assert_close(llama.decode_image_tokens(ids[0]), llama.decode_image_tokens(ids)[:1])
    ids[1, 2] = OFFSET + CODES
    with pytest.raises(ValueError, match=rf"Id {OFFSET + CODES} at position 1, 2 is outside of the codebook"):
        llama.decode_image_tokens(ids)
    with pytest.raises(ValueError, match=r"2 x 2 codes needs 4 image ids, got 3"):
        llama.decode_image_tokens(ids[:, :3])
    with pytest.raises(ValueError, match=r"2 x 3 codes needs 6 image ids, got 4"):
        llama.decode_image_tokens(ids, width=6)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_drawing_and_writing_while_training_with_gradient_checkpointing_is_refused(mode):
    model = tiny_model()
    prompt, settings = (
        torch.tensor([[BOS, 10, BOI]]),
        {"generation_mode": mode, "max_new_tokens": 4, "do_sample": False},
    )
    if mode == "image":
        settings = {"generation_mode": mode, "generator": torch.Generator().manual_seed(0)}
    expected = model.generate(prompt, **settings)
    model.gradient_checkpointing_enable()  # under the name that every version knows
    with pytest.raises(ValueError, match=r"call `model.eval\(\)` before `generate`"):
        model.train().generate(prompt, **settings)
    if mode == "image":
        settings["generator"].manual_seed(0)
    assert torch.equal(model.eval().generate(prompt, **settings), expected)
    model.gradient_checkpointing_disable()
    model.train().generate(prompt, **settings)


def test_a_cache_that_the_configuration_turns_off_is_not_returned():
    model = tiny_model()
    assert model(torch.tensor([[BOS, 10]])).past_key_values is not None
    model.config.use_cache = False
    assert model(torch.tensor([[BOS, 10]])).past_key_values is None
    assert model(torch.tensor([[BOS, 10]]), use_cache=True).past_key_values is not None


def masks(**changes):
    """The prompts' masks with something changed."""
    mask = left_padded(PROMPTS)["attention_mask"]
    return {
        "too short": mask[:, 1:],
        "too long": torch.cat([mask, mask], dim=1),
        "of fewer prompts": mask[:1],
        "in four dimensions": mask[:, None, None],
        "of zeros": torch.zeros_like(mask),
        "that hides the end": torch.cat([mask[:, :-1], torch.zeros(3, 1, dtype=mask.dtype)], dim=1),
        "of other numbers": mask * 2,
        "of fractions": mask * 0.5,
        "of biases": torch.where(mask == 1, 0.0, -torch.inf),
    }


@pytest.mark.parametrize("name", list(masks()))
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_attention_masks_that_do_not_fit_are_refused(llama, name, guidance_scale):
    inputs = left_padded(PROMPTS) | {"attention_mask": masks()[name]}
    with pytest.raises(ValueError, match="The attention mask of input_ids must hold 1 for what is attended to"):
        llama.generate(**inputs, generation_mode="image", guidance_scale=guidance_scale)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_attention_masks_of_any_type_mean_the_same(llama, dtype):
    inputs = left_padded(PROMPTS)
    expected = llama.generate(**inputs, generation_mode="image", do_sample=False)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert torch.equal(llama.generate(**inputs, generation_mode="image", do_sample=False), expected)


@pytest.mark.parametrize(
    ("negative", "message"),
    [
        ({"ids": torch.tensor([[BOS, UNCONDITIONAL, 40]])}, "negative_prompt_ids must end with the begin-of-image"),
        ({"ids": torch.tensor([[BOS, 3, BOI]])}, "negative_prompt_ids holds 3, an image placeholder"),
        ({"ids": torch.tensor([[BOS, VOCABULARY, BOI]])}, f"no id of the vocabulary of {VOCABULARY}"),
        ({"ids": torch.tensor([[BOS, -1, BOI]])}, "negative_prompt_ids holds -1"),
        ({"ids": torch.tensor([BOS, BOI])}, r"needs negative_prompt_ids of shape \(batch, length\), got \(2,\)"),
        ({"ids": torch.tensor([[1.0, BOI]])}, "needs negative_prompt_ids of shape .*float32"),
        ({"ids": torch.tensor([[BOS, BOI]] * 2)}, "must be one sequence or 3"),
        ({"ids": [[BOS, BOI]]}, "needs negative_prompt_ids of shape"),
        ({"ids": torch.tensor([[BOS, BOI]]), "attention_mask": torch.ones(1, 5)}, "mask of negative_prompt_ids"),
        ({"ids": torch.tensor([[BOS, BOI]]), "attention_mask": torch.zeros(1, 2)}, "mask of negative_prompt_ids"),
        ({"attention_mask": torch.ones(1, 3)}, "negative_prompt_attention_mask needs negative_prompt_ids"),
    ],
)
def test_negative_prompts_that_begin_no_picture_are_refused(llama, negative, message):
    with pytest.raises(ValueError, match=message):
        draw(llama, **{f"negative_prompt_{name}": value for name, value in negative.items()})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
        ({"generator": [1, 2, 3]}, "generator must be a torch.Generator"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number of at least 1, got 0"),
        ({"num_return_sequences": 1.5}, "num_return_sequences must be a whole number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number"),
        (
            {"prefix_allowed_tokens_fn": lambda batch, ids: [0, 1]},
            "prefix_allowed_tokens_fn=.* has no meaning for images",
        ),
        ({"assistant_model": "a model"}, "assistant_model=a model has no meaning for images"),
        ({"custom_generate": "a/repository"}, "custom_generate=a/repository has no meaning for images"),
        ({"suppress_image_tokens": False}, "A picture is made of image tokens"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3 has no meaning for images"),
        ({"generation_config": GenerationConfig(repetition_penalty=9.0)}, "repetition_penalty=9.0 has no meaning"),
        (
            {"generation_config": GenerationConfig(image_generation_config={"num_beams": 2})},
            "num_beams=2 has no meaning",
        ),
    ],
)
def test_arguments_that_would_be_without_effect_are_refused(llama, argument, message):
    with pytest.raises(ValueError, match=message):
        draw(llama, **argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"image_generation_config": {"tempurature": 9}}, "holds tempurature, which has no meaning for images"),
        ({"image_generation_config": "greedy"}, "must be a dictionary of settings, got 'greedy'"),
        ({"guidance_scale": 1, "guidance_min_p": 0.1}, "guidance_min_p acts through guidance"),
        ({"guidance_scale": 1, "guidance_context": "images"}, "guidance_context acts through guidance"),
        ({"do_sample": "False"}, "do_sample must be True or False, got 'False'"),
        ({"do_sample": 2}, "do_sample must be True or False, got 2"),
    ],
)
def test_settings_that_say_nothing_are_refused(llama, argument, message):
    with pytest.raises(ValueError, match=message):
        draw(llama, **argument)


def test_a_dictionary_of_settings_stands_between_the_models_and_single_keywords():
    model = build()
    model.generation_config.image_generation_config = {"temperature": 3.0, "guidance_scale": 4.0, "top_p": 1.0}
    own = {"temperature": 2.0, "guidance_scale": 5.0}
    assert first_step(model, image_generation_config=own) == (2.0, 5.0, CODES)
    assert first_step(model, image_generation_config=own, guidance_scale=1.5) == (2.0, 1.5, CODES)


def test_what_a_copy_of_the_models_config_has_otherwise_counts():
    model = build()
    model.generation_config.temperature = 0.1  # of text
    model.generation_config.image_generation_config = {"guidance_scale": 2.0, "temperature": 3.0, "top_p": 1.0}
    config = copy.deepcopy(model.generation_config)
    assert first_step(model, generation_config=config) == (3.0, 2.0, CODES)
    config.temperature = 2.0
    assert first_step(model, generation_config=config) == (2.0, 2.0, CODES)
    config.do_sample, config.temperature = False, 0.1
    assert draw(model, generation_config=config).tolist() == draw(model, do_sample=False).tolist()


def test_a_stored_setting_of_guidance_is_nothing_against_a_call_without_guidance():
    model = build()
    model.generation_config.image_generation_config = {"guidance_scale": 2.0, "guidance_min_p": 0.1}
    assert draw(model, guidance_scale=1).shape == (3, 4)


@pytest.mark.parametrize("number", [np.float32, np.int64, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(llama, number):
    settings = {"guidance_scale": 2, "speculative": 2, "num_return_sequences": 2}
    expected = draw(llama, **settings, generator=generators(*range(6)))
    given = {name: np.int64(value) for name, value in settings.items()}
    given |= {"guidance_scale": number(2), "do_sample": np.bool_(True)}
    assert torch.equal(draw(llama, **given, generator=generators(*range(6))), expected)


def test_a_tuple_of_generators_is_one_each(llama):
    assert torch.equal(draw(llama, generator=tuple(generators(1, 2, 3))), draw(llama, generator=generators(1, 2, 3)))


@pytest.mark.parametrize("stored", [{"guidance_min_p": 0.9}, {"top_k": 1}, {"min_p": 0.9}, {"top_p": 0.01}])
def test_a_stored_filter_can_be_turned_off(stored):
    ((name, _),) = stored.items()
    model = build()
    settings = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": None, "top_p": None}
    model.generation_config.image_generation_config = settings
    free = draw(model, generator=generators(1, 2, 3))
    model.generation_config.image_generation_config = settings | stored
    assert not torch.equal(draw(model, generator=generators(1, 2, 3)), free)
    assert torch.equal(draw(model, generator=generators(1, 2, 3), **{name: None}), free)


# --- numbers that break ---


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "unguided": {"guidance_scale": 1.0},
    "guidance_min_p": {"guidance_min_p": 0.3},
    "speculative": {"speculative": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
    "without cache": {"use_cache": False},
    "recorded": {"return_dict_in_generate": True, "output_scores": True},
    "processors": {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_named_by_picture_and_position(way, value):
    settings = {"height": 8, "width": 8, "guidance_scale": 2.0} | WAYS[way]
    model = tiny_model(tied=False)
    drawn = draw(model, generator=generators(1, 2, 3), **settings)
    codes = (drawn if isinstance(drawn, torch.Tensor) else drawn.sequences) - OFFSET
    # The first code of one picture that is new to all: whatever reads it breaks from there on.
    picture, position = next(
        (picture, position)
        for position in range(3, 14)
        for picture in range(3)
        if not (codes[:, :position] == codes[picture, position]).any()
        and (codes[:, position] == codes[picture, position]).sum() == 1
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[OFFSET + codes[picture, position]] = value
    later = [
        (other, int(where[0]) + 1)
        for other in range(3)
        if len(where := (codes[other] == codes[picture, position]).nonzero()) and int(where[0]) + 1 < 16
    ]
    first, step = min(later)
    where = f"picture {first} of the batch at position {step}"
    if way == "speculative":  # a draft can be the code that breaks
        where = "picture . of the batch at position"
    message = f"The scores of {where}.* NaN or infinite"
    with pytest.raises(ValueError, match=message):
        draw(model, generator=generators(1, 2, 3), **settings)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45])
def test_a_temperature_under_which_scores_overflow_is_told(llama, temperature):
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(llama, temperature=temperature)


def test_what_forbids_every_code_is_told(llama):
    nothing = LogitsProcessorList([NoBadWordsLogitsProcessor([[OFFSET + code] for code in range(CODES)])])
    with pytest.raises(ValueError, match="nothing to choose from"):
        draw(llama, logits_processor=nothing)


# --- hooks and processors of users ---


def hooked(head):
    return head.register_forward_hook(lambda module, args, output: output * -1.0)


def pre_hooked(head):
    return head.register_forward_pre_hook(lambda module, args: (args[0] * -1.0,))


def parametrized(head):
    class Negative(torch.nn.Module):
        def forward(self, weight):
            return -weight

    torch.nn.utils.parametrize.register_parametrization(head, "weight", Negative())


def replaced(head):
    forward = head.forward
    head.forward = lambda hidden_states: -forward(hidden_states)


def wrapped(head):
    head.__class__ = type(
        "Negative", (torch.nn.Linear,), {"forward": lambda self, x: -torch.nn.Linear.forward(self, x)}
    )


@pytest.mark.parametrize("change", [hooked, pre_hooked, parametrized, replaced, wrapped])
@pytest.mark.parametrize("speculative", [None, 3])
def test_whatever_users_do_to_the_head_acts_on_pictures(change, speculative):
    model, expected = tiny_model(tied=False), tiny_model(tied=False)
    settings = {"do_sample": False, "guidance_scale": 2.0, "speculative": speculative}
    draw(model, **settings)
    change(model.get_output_embeddings())
    with torch.no_grad():
        expected.get_output_embeddings().weight.mul_(-1)
    assert torch.equal(draw(model, **settings), draw(expected, **settings))


@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize("where", ["layers.0", "layers.0.mlp", "layers.1.self_attn.q_proj", "embed_tokens", ""])
@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_whatever_users_do_to_the_body_acts_on_pictures(where, how, is_faster, monkeypatch):
    monkeypatch.setattr("transformers_liquid.models.liquid.modeling_liquid.is_transposed_faster", lambda: is_faster)
    model, calls = tiny_model(), []
    module = model.model.text_model.model.get_submodule(where)
    if how == "hook":
        module.register_forward_hook(lambda *args: calls.append(args))
    else:
        forward = module.forward
        module.forward = lambda *args, **kwargs: (calls.append(args), forward(*args, **kwargs))[1]
    draw(model, do_sample=False, height=4, width=4)
    assert len(calls) == 4


class Wrapped(LogitsProcessor):
    sees_vocabulary = True

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, input_ids, scores):
        return self.processor(input_ids, scores)


@pytest.mark.parametrize("speculative", [None, 3])
@pytest.mark.parametrize("wrap", [lambda processor: processor, Wrapped])
def test_processors_that_look_for_ids_find_them(llama, wrap, speculative):
    settings = {"do_sample": False, "guidance_scale": 1.0, "height": 8, "width": 8, "speculative": speculative}
    free = draw(llama, **settings)
    first = [[int(free[0, 0])]]
    forbidding = LogitsProcessorList([wrap(NoBadWordsLogitsProcessor(first))])
    assert torch.equal(
        draw(llama, **settings, logits_processor=forbidding),
        draw(llama, **settings, logits_processor=LogitsProcessorList([Forbid(int(free[0, 0]) - OFFSET)])),
    )
    penalty = LogitsProcessorList([wrap(RepetitionPenaltyLogitsProcessor(1e6))])
    penalized = draw(llama, **settings, logits_processor=penalty)
    for picture, prompt in zip(penalized.tolist(), PROMPTS, strict=True):
        for step, drawn in enumerate(picture):
            scores = code_scores(llama, prompt + picture[:step])
            seen = torch.tensor([code - OFFSET for code in picture[:step]], dtype=torch.long)
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1e6, scores[seen] / 1e6)
            assert scores[drawn - OFFSET] >= scores.max() - 1e-4
