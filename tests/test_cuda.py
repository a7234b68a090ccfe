"""What is promised on a GPU; `benchmarks/cuda/run.sh correct` runs this file alone. Skipped without CUDA."""

from __future__ import annotations

import copy
import json
import os
import warnings

import numpy as np
import pytest
import test_interleaved_liquid as by_turns
import test_voken_trainer as vokens
import torch
from peft import get_peft_model
from tiny import tiny_model
from tiny_vokens import FAMILIES, tiny_voken_model, tiny_voken_pipeline
from torch._dynamo.utils import counters

from transformers_liquid import EMOJI_CHECKPOINT, LiquidDataCollator, LiquidForCausalLM, LiquidProcessor
from transformers_liquid.ops.packed_attention import use_packed_attention
from transformers_liquid.training.adapters import voken_lora_config, voken_stage1_config


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore"),
]
PROMPTS = ["red apple", "dog face", "rocket", "woman firefighter: dark skin tone"]
SETTINGS = {"guidance_scale": 2.0, "guidance_min_p": 0.2, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
WAYS = {
    "plain": {"disable_compile": True},
    "compiled": {},
    "speculative": {"speculative": True, "disable_compile": True},
    "speculative, compiled": {"speculative": True},
}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def compiled_anew():
    """After eight compilations of one function torch runs it uncompiled, and tests of compiled steps would say nothing."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(scope="module")
def processor():
    return LiquidProcessor.from_pretrained(EMOJI_CHECKPOINT)


@pytest.fixture(scope="module", params=DTYPES)
def model(request):
    return LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype=request.param).to("cuda").eval()


@pytest.fixture
def exact_model():
    return LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype="float32").to("cuda").eval()


@pytest.fixture
def fact(request):
    """Writes down a measured fact where `run.sh` asks for it."""

    def write(**values):
        print(request.node.name, values)
        if path := os.environ.get("FACTS"):
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name} | values) + "\n")

    return write


def draw(model, processor, prompts=PROMPTS, seed=0, **options):
    inputs = processor(text=prompts, generation_mode="image", return_tensors="pt").to(model.device)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    ids = model.generate(**inputs, generation_mode="image", generator=generators, **SETTINGS | options)
    return ids.cpu()


def same(one, other):
    """Share of equal pictures, and of equal codes."""
    equal = one == other
    return {"pictures": equal.all(1).float().mean().item(), "codes": equal.float().mean().item()}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_draws_the_picture_of_its_seed(model, processor, way, batch, fact):
    plain = draw(model, processor, PROMPTS[:batch], **WAYS["plain"])
    shares = same(draw(model, processor, PROMPTS[:batch], **WAYS[way]), plain)
    graphs = counters["stats"]["unique_graphs"]
    fact(dtype=str(model.dtype), way=way, batch=batch, graphs=graphs, **shares)
    assert (graphs > 0) == ("compiled" in way)
    assert model.config.image_token_range.start <= plain.min() <= plain.max() < model.config.image_token_range.stop
    # In half precision other kernels round otherwise, and a draw that is nearly a tie falls to the other side.
    assert shares["pictures"] == 1 or model.dtype != torch.float32


def test_a_batch_draws_what_each_picture_is_alone(model, processor, fact):
    together = draw(model, processor, disable_compile=True)
    alone = [draw(model, processor, [one], seed=row, disable_compile=True) for row, one in enumerate(PROMPTS)]
    shares = same(torch.cat(alone), together)
    fact(dtype=str(model.dtype), **shares)
    assert shares["pictures"] == 1 or model.dtype != torch.float32


def test_the_cpu_draws_the_same_pictures(exact_model, processor, fact):
    on_gpu = draw(exact_model, processor, disable_compile=True)
    on_cpu = draw(copy.deepcopy(exact_model).cpu(), processor)
    shares = same(on_gpu, on_cpu)
    fact(**shares)
    assert shares["pictures"] >= 0.75  # ties in rounding


@pytest.mark.parametrize("batch", [1, 4])
def test_nothing_is_compiled_or_recorded_after_the_first_picture(exact_model, processor, batch, fact, monkeypatch):
    from torch._inductor import cudagraph_trees

    recorded = []
    record = cudagraph_trees.CUDAGraphNode.__init__

    def counting(self, *args, **kwargs):
        recorded.append(1)
        return record(self, *args, **kwargs)

    monkeypatch.setattr(cudagraph_trees.CUDAGraphNode, "__init__", counting)
    seen = []
    for seed in range(6):
        ids = draw(exact_model, processor, PROMPTS[:batch], seed=seed)
        exact_model.decode_image_tokens(ids.cuda())
        seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), len(recorded)))
    fact(batch=batch, graphs_breaks_recordings=seen)
    assert seen[0][0] == 1 and seen[0][1] == 0  # one graph, no break
    assert seen[-1][:2] == seen[0][:2]
    assert seen[-1][2] == seen[1][2]


def test_no_step_waits_for_the_device(exact_model, processor, fact):
    """A wait per code would expose what the host does between the forwards."""
    inputs = processor(text=PROMPTS[:1], generation_mode="image", return_tensors="pt").to("cuda")
    options = {"generation_mode": "image", "generator": [torch.Generator().manual_seed(0)], **SETTINGS}
    exact_model.generate(**inputs, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            exact_model.generate(**inputs, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchronizing" in str(one.message)]
    fact(waits=len(waits))
    assert len(waits) < 32, f"{len(waits)} waits for a picture of 64 codes"


def test_the_codec_is_the_cpus(exact_model, fact):
    codec = exact_model.model.vq_model
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = codec.encode_codes(pixels.cuda()).cpu()
    decoded = codec.decode_codes(codes.cuda()).cpu()
    on_cpu = copy.deepcopy(codec).cpu()
    share = (codes == on_cpu.encode_codes(pixels)).float().mean().item()
    difference = (decoded - on_cpu.decode_codes(codes)).abs().max().item()
    fact(same_codes=share, largest_difference=difference)
    assert share > 0.98 and difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codec_encodes_in_fp32_whatever_the_model_is(dtype):
    exact = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype="float32").to("cuda")
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype=dtype).to("cuda")
    pixels = torch.rand(4, 3, 64, 64, device="cuda") * 2 - 1
    with torch.autocast("cuda", dtype=dtype):
        codes = model.model.vq_model.encode_codes(pixels)
    assert torch.equal(codes, exact.model.vq_model.encode_codes(pixels))


@pytest.mark.parametrize("attention", ["packed_sdpa", "eager", "flex_attention", "flash_attention_2"])
def test_packed_records_are_kept_apart(processor, attention, fact):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype=dtype).to("cuda").train()
    records = [{"kind": "text_to_image", "text": text, "codes": list(range(64)), "index": 0} for text in PROMPTS]
    options = {"unconditional_probability": 0.0}
    padded = {k: v.cuda() for k, v in LiquidDataCollator(processor, **options)(records).items()}
    packed = {k: v.cuda() for k, v in LiquidDataCollator(processor, packing=True, **options)(records).items()}
    expected = model(**padded).loss
    if attention == "packed_sdpa":
        use_packed_attention(model)
    else:
        model.set_attn_implementation(attention)
    loss = model(**packed).loss
    loss.backward()
    fact(attention=attention, padded=expected.item(), packed=loss.item())
    torch.testing.assert_close(loss, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_trains_and_its_loss_is_the_cpus(processor, dtype, fact):
    records = [{"kind": "text_to_image", "text": text, "codes": list(range(64)), "index": 0} for text in PROMPTS]
    batch = LiquidDataCollator(processor, unconditional_probability=0.0)(records)
    cpu = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype="float32").train()
    expected = cpu(**batch).loss.item()
    model = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype="float32").to("cuda").train()
    batch = {name: values.cuda() for name, values in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        with torch.autocast("cuda", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    fact(dtype=dtype, cpu=expected, losses=losses)
    assert losses[0] == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_draw_and_the_codec_stays_fp32(processor, bits, fact):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = LiquidForCausalLM.from_pretrained(
        EMOJI_CHECKPOINT, quantization_config=quantization, dtype=torch.bfloat16, device_map="cuda"
    )
    assert {weight.dtype for weight in model.model.vq_model.parameters()} == {torch.float32}
    ids = draw(model, processor)
    exact = LiquidForCausalLM.from_pretrained(EMOJI_CHECKPOINT, dtype="float32").to("cuda")
    fact(bits=bits, **same(ids, draw(exact, processor)))
    assert model.decode_image_tokens(ids.cuda()).isfinite().all()


def test_text_is_written_in_half_precision(model, processor):
    inputs = processor(text="<image>What is this?", images=torch.rand(3, 64, 64), return_tensors="pt").to("cuda")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_text_and_pictures_by_turns_are_the_cpus(guidance_scale, fact):
    model = tiny_model()
    model.config.image_size = 4  # 2 x 2 codes
    options = {"prompts": by_turns.PROMPTS, "seeds": [0, 1, 2], "guidance_scale": guidance_scale}
    expected = by_turns.run(model, **options).sequences
    ids = by_turns.run(model.to("cuda"), **options).sequences.cpu()
    fact(guidance_scale=guidance_scale, same=torch.equal(ids, expected))
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_vokens_draw_what_they_draw_on_the_cpu(family, fact):
    pipe = tiny_voken_pipeline("llava", family)
    options = {"num_images": 1, "max_new_tokens": 24, "num_inference_steps": 2, "do_sample": False, "seed": 0}
    expected = pipe(["a cat", "a red dog"], **options).segments
    replies = pipe.to("cuda")(["a cat", "a red dog"], **options).segments
    largest = 0
    for parts, on_cpu in zip(replies, expected, strict=True):
        assert [type(part) for part in parts] == [type(part) for part in on_cpu]
        for one, other in zip(parts, on_cpu, strict=True):
            if isinstance(one, str):
                assert one == other
            else:
                largest = max(largest, int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()))
    fact(family=family, largest_difference_of_255=largest)
    assert largest <= 2


@pytest.mark.parametrize("config", [voken_stage1_config, voken_lora_config])
def test_vokens_train_on_the_gpu_and_the_first_loss_is_the_cpus(config, tmp_path, fact):
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny_voken_model("llama", "sd-v")
        model.attach(vokens.SteadyDecoder(model.image_decoder.pipe))
        model = get_peft_model(model, config(model))
        records = [vokens.record(index) for index in range(8)]
        trainer = vokens.trained(model, tmp_path / device, records, max_steps=4, use_cpu=device == "cpu")
        losses[device] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    fact(config=config.__name__, **losses)
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=2e-2)  # the noise of a picture is drawn by its sum
