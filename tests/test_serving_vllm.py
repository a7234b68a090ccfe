"""Pictures as pairs of requests to an engine: with a plain loop in place of one, and with stock vLLM where it is there."""

import random

import pytest
import torch
from tiny import CODEBOOK_SIZE, EOI_ID, IMAGE_TOKEN_OFFSET, VOCAB_SIZE, tiny_model, tiny_processor
from transformers import GenerationConfig

from transformers_liquid import EMOJI_CHECKPOINT, LiquidImageGenerationPipeline
from transformers_liquid.serving.pair_requests import PairDrawer, PairedPicture, picture_requests


SETTINGS = {"guidance_scale": 3.0, "guidance_min_p": 0.1, "temperature": 0.7, "top_p": 0.9, "top_k": 12}
CODES = 16


@pytest.fixture(scope="module")
def pipe():
    return LiquidImageGenerationPipeline(model=tiny_model().eval(), processor=tiny_processor())


LAYOUT = {"image_token_offset": IMAGE_TOKEN_OFFSET, "codebook_size": CODEBOOK_SIZE, "eoi_token_id": EOI_ID}


@torch.no_grad()
def draw(pipe, requests, steps=CODES, begin=lambda index: 0):
    """What an engine does with requests, each of which begins at a step: forwards, the drawer, and the best id."""
    drawer, ids = PairDrawer(LAYOUT), [list(request["prompt_token_ids"]) for request in requests]
    pictures = [
        PairedPicture(request["sampling_params"]["extra_args"], request["prompt_token_ids"]) for request in requests
    ]
    prompts = [len(one) for one in ids]
    for step in range(steps):
        running = [index for index in range(len(ids)) if begin(index) <= step < begin(index) + CODES]
        logits = torch.stack([pipe.model(input_ids=torch.tensor([ids[index]])).logits[0, -1] for index in running])
        drawer(logits, {row: (pictures[index], len(ids[index]) - prompts[index]) for row, index in enumerate(running)})
        for index, token in zip(running, logits.argmax(-1).tolist(), strict=True):
            ids[index].append(token)
    return [one[length:] for one, length in zip(ids, prompts, strict=True)]


def codes_of(pipe, prompt, seed, **settings):
    inputs = pipe.processor(text=prompt, generation_mode="image", return_tensors="pt")
    generator = [torch.Generator().manual_seed(seed)]
    return pipe.model.generate(**inputs, generation_mode="image", generator=generator, **settings)[0].tolist()


def test_requests_in_any_order_and_at_any_step_draw_what_the_pipeline_draws(pipe):
    wanted = [("red apple", 3, SETTINGS), ("dog face", 4, SETTINGS), ("cat", 5, {"guidance_scale": 1.0, "top_k": None})]
    wanted.append(
        ("sun", 6, {"do_sample": False, "guidance_scale": 2.0, "temperature": None, "top_k": None, "top_p": None})
    )
    requests = [(number, one) for number, (prompt, seed, settings) in enumerate(wanted)
                for one in picture_requests(pipe.processor, prompt, seed, generation_config=pipe.model.generation_config, **settings)]  # fmt: skip
    random.Random(0).shuffle(requests)
    numbers = [number for number, _ in requests]
    drawn = draw(pipe, [one for _, one in requests], CODES + 9, lambda index: 3 * numbers[index])
    for ids, number in zip(drawn, numbers, strict=True):
        prompt, seed, settings = wanted[number]
        assert ids == codes_of(pipe, prompt, seed, **settings)


def test_the_checkpoints_settings_count_unless_others_are_given(pipe):
    config = GenerationConfig.from_pretrained(EMOJI_CHECKPOINT)
    first, second = picture_requests(pipe.processor, "cat", 1, generation_config=config, temperature=0.5)
    arguments, stored = first["sampling_params"]["extra_args"], config.image_generation_config
    assert arguments["liquid_guidance_scale"] == stored["guidance_scale"] and arguments["liquid_temperature"] == 0.5
    assert stored["caption_first"] and "liquid_caption_first" not in arguments  # of edits, which no engine draws
    assert second["sampling_params"] == first["sampling_params"]
    assert second["prompt_token_ids"] == arguments["liquid_unconditional"] != first["prompt_token_ids"]
    assert first["sampling_params"]["max_tokens"] == CODES


def test_a_half_alone_or_behind_gets_the_end_of_a_picture_so_that_it_fails(pipe):
    first, second = picture_requests(pipe.processor, "cat", 1, **SETTINGS)
    (alone,) = draw(pipe, [first], 1)
    assert alone == [EOI_ID]
    behind = draw(pipe, [first, second], 2, lambda index: index)
    assert behind == [[EOI_ID] * 2, [EOI_ID]]


def test_other_rows_stay_as_they_are(pipe):
    pair = picture_requests(pipe.processor, "cat", 1, **SETTINGS)
    logits = torch.randn(4, VOCAB_SIZE)
    before = logits.clone()
    pictures = [PairedPicture(one["sampling_params"]["extra_args"], one["prompt_token_ids"]) for one in pair]
    PairDrawer(LAYOUT)(logits, {3: (pictures[0], 0), 1: (pictures[1], 0)})
    assert torch.equal(logits[[0, 2]], before[[0, 2]]) and torch.equal(logits[1], logits[3])
    assert logits[1].isfinite().sum() == 1 and logits[1].argmax() >= IMAGE_TOKEN_OFFSET


def test_a_code_that_cannot_be_drawn_ends_the_picture(pipe):
    (request,) = picture_requests(pipe.processor, "cat", 1, guidance_scale=1.0)
    logits = torch.full((1, VOCAB_SIZE), torch.nan)
    PairDrawer(LAYOUT)(logits, {0: (PairedPicture(request["sampling_params"]["extra_args"], []), 0)})
    assert logits[0].argmax() == EOI_ID


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"liquid_seed": "7"}, "liquid_seed must be a whole number, got '7'"),
        ({"liquid_guidance_scale": 1.0}, "liquid_seed must be"),
        ({"liquid_seed": 7, "liquid_top_p": 2.0}, "top_p must be"),
        ({"liquid_seed": 7, "liquid_colour": "red"}, "liquid_colour is no setting"),
        ({"liquid_seed": 7, "liquid_guidance_scale": 3.0}, "a picture is two requests"),
        ({"liquid_seed": 7, "liquid_speculative": 12}, "speculative cannot be set"),
        ({"liquid_seed": 7, "liquid_max_new_tokens": 3, "liquid_num_beams": 2}, "num_beams"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_the_door(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairedPicture.check(arguments)
    assert PairedPicture.check({"other": 1}) is PairedPicture.check(None) is None


def test_requests_are_what_the_http_server_takes_and_mean_the_same_there(pipe):
    for settings in (SETTINGS, {"do_sample": False, "guidance_scale": 2.0, "temperature": None, "top_k": None}):
        config = pipe.model.generation_config
        first, _ = picture_requests(pipe.processor, "cat", 1, generation_config=config, **settings)
        arguments = first["sampling_params"]["extra_args"]
        # dict[str, str | int | float | list[str | int | float]], of which JSON and pydantic make this
        sent = {name: int(one) if isinstance(one, bool) else one for name, one in arguments.items()}
        assert all(isinstance(one, str | int | float | list) for one in sent.values())
        assert PairedPicture(sent, []).kind == PairedPicture(arguments, []).kind


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    vllm = pytest.importorskip("vllm")
    import os

    from transformers_liquid import LiquidForCausalLM, LiquidProcessor, export_base_model

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    model, folder = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT), tmp_path_factory.mktemp("exported")
    processor = LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)
    export_base_model(model, processor, folder)
    yield (
        vllm.LLM(
            str(folder),
            dtype="float32",
            max_model_len=256,
            max_num_seqs=8,
            block_size=32,
            num_gpu_blocks_override=20,
            enforce_eager=True,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
            scheduler_cls="transformers_liquid.serving.vllm.PairScheduler",
            logits_processors=["transformers_liquid.serving.vllm:LiquidLogitsProcessor"],
        ),
        LiquidImageGenerationPipeline(model=model, processor=processor),
    )


def ask(llm, requests):
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": one["prompt_token_ids"]} for one in requests]
    return [
        list(out.outputs[0].token_ids)
        for out in llm.generate(prompts, [SamplingParams(**one["sampling_params"]) for one in requests])
    ]


@pytest.mark.slow
def test_vllm_draws_what_the_pipeline_draws_beside_texts_that_are_preempted(engine):
    llm, pipe = engine
    config, names = pipe.model.generation_config, ["red apple", "dog face", "cat", "sun", "pizza", "moon"]
    requests = [
        request
        for seed, name in enumerate(names)
        for request in picture_requests(pipe.processor, name, seed, generation_config=config, guidance_scale=2.0)
    ]
    text = {"temperature": 0.0, "max_tokens": 150, "ignore_eos": True, "detokenize": False}
    texts = [{"prompt_token_ids": [1, 10 + number, 20], "sampling_params": text} for number in range(4)]
    order = [*texts, *requests]
    random.Random(1).shuffle(order)
    drawn = ask(llm, order)
    for name, ids in ((order[index], ids) for index, ids in enumerate(drawn)):
        assert len(ids) == name["sampling_params"]["max_tokens"]
    for seed, name in enumerate(names):
        expected = codes_of(pipe, name, seed, guidance_scale=2.0)
        halves = [drawn[order.index(request)] for request in requests[2 * seed : 2 * seed + 2]]
        assert halves == [expected, expected]


@pytest.mark.slow
def test_a_half_whose_partner_never_comes_ends_early(engine, monkeypatch):
    llm, pipe = engine
    from transformers_liquid.serving import vllm as plug_in

    monkeypatch.setattr(plug_in, "PATIENCE", 0.5)
    first, _ = picture_requests(pipe.processor, "cat", 1, guidance_scale=2.0)
    assert ask(llm, [first]) == [[pipe.model.config.eoi_token_id]]


@pytest.mark.slow
def test_vllm_refuses_what_cannot_be_drawn(engine):
    llm, pipe = engine
    first, second = picture_requests(pipe.processor, "cat", 1, guidance_scale=2.0)
    for changed, message in (
        ({"n": 2, "temperature": 1.0}, "n must be 1: each picture"),
        ({"extra_args": {"liquid_seed": "x"}}, "whole number"),
    ):
        wrong = [one | {"sampling_params": one["sampling_params"] | changed} for one in (first, second)]
        with pytest.raises(ValueError) as error:
            ask(llm, wrong)
        assert message in f"{error.value} {error.value.__cause__}"  # vLLM's own around ours


@pytest.mark.slow
def test_a_cancelled_half_ends_the_other_and_leaves_nothing_behind(engine):
    llm, pipe = engine
    from vllm import SamplingParams

    requests = picture_requests(pipe.processor, "cat", 1, guidance_scale=2.0)
    for name, request in zip(("first", "second"), requests, strict=True):
        prompt = {"prompt_token_ids": request["prompt_token_ids"]}
        llm.llm_engine.add_request(name, prompt, SamplingParams(**request["sampling_params"]))
    for _ in range(5):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["second"])
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [out for out in llm.llm_engine.step() if out.finished]
    assert [(out.request_id, out.outputs[0].finish_reason) for out in finished] == [("first", "stop")]
    assert len(finished[0].outputs[0].token_ids) < 10


def test_the_second_runner_draws_the_same(pipe):
    pytest.importorskip("vllm")
    from types import SimpleNamespace

    import numpy as np

    from transformers_liquid.serving.vllm import LiquidLogitsProcessor

    requests = picture_requests(pipe.processor, "cat", 1, **SETTINGS)
    params = [SimpleNamespace(extra_args=one["sampling_params"]["extra_args"], n=1) for one in requests]
    prompts = [one["prompt_token_ids"] for one in requests]
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(liquid_layout=LAYOUT)))
    ids = torch.zeros(4, 64, dtype=torch.long)
    lengths = np.array([0, len(prompts[0]), 0, len(prompts[1])])
    for slot, prompt in zip((1, 3), prompts, strict=True):
        ids[slot, : len(prompt)] = torch.tensor(prompt)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=lengths), all_token_ids=SimpleNamespace(gpu=ids))
    second, first = LiquidLogitsProcessor(config, states), LiquidLogitsProcessor(config, "cpu", False)
    assert [second.add_request(slot, one) for slot, one in zip((1, 3), params, strict=True)] == [True, True]
    assert not second.add_request(0, SimpleNamespace(extra_args=None))
    so_far = [], []
    added = [(row, one, prompt, so_far[row]) for row, (one, prompt) in enumerate(zip(params, prompts, strict=True))]
    first.update_state(SimpleNamespace(removed=(), added=added, moved=()))
    for step in range(3):
        logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(step))
        context = SimpleNamespace(idx_mapping_np=np.array([3, 1]), seq_lens_upper_bound_np=lengths[[3, 1]] + step)
        ours = first.apply(logits.clone())
        assert torch.equal(second.apply(logits.flip(0), context).flip(0), ours)
        for one in so_far:
            one.append(int(ours[0].argmax()))
