"""The compiled step, noise, and the linear layers of few rows."""

import logging

import pytest
import torch
from test_generation_liquid import BOI, BOS, PROMPTS, Recorder, build, draw, generators
from torch import nn
from transformers.generation import CompileConfig

from transformers_liquid.generation import sampling as sampling_liquid
from transformers_liquid.generation.sampling import draw_codes, gumbel_noise
from transformers_liquid.models.liquid import modeling_liquid
from transformers_liquid.ops.few_rows import FewRowsLinear, few_rows_view


def compiling(backend="aot_eager") -> dict:
    """Settings that compile on a CPU too."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.fixture(autouse=True)
def forget_what_did_not_compile():
    yield
    sampling_liquid._NOT_COMPILABLE.clear()
    sampling_liquid._NOT_GROWING.clear()
    torch.compiler.reset()


SETTINGS = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 10, "top_p": 0.9, "height": 4, "width": 8}


# --- the compiled step ---


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("speculative", [{}, {"speculative": 3}])
def test_the_compiled_step_draws_the_same_pictures(base, speculative):
    model = build(base)
    plain = draw(model, **SETTINGS, generator=generators(1, 2, 3))
    compiled = draw(model, **SETTINGS, **compiling(), **speculative, generator=generators(1, 2, 3))
    assert torch.equal(compiled, plain)
    greedy = draw(model, **SETTINGS | {"do_sample": False, "top_k": None, "top_p": None}, **compiling(), **speculative)
    assert torch.equal(greedy, draw(model, **SETTINGS | {"do_sample": False, "top_k": None, "top_p": None}))


def test_a_step_is_one_graph_that_other_prompts_of_the_batch_size_share():
    model = build()
    torch._dynamo.utils.counters.clear()
    draw(model, **SETTINGS, **compiling(), generator=generators(1, 2, 3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    others = [[BOS, 31, BOI], [BOS, 32, 33, 34, 35, 36, 37, 38, 39, BOI], [BOS, 21, BOI]]
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = draw(model, others, **SETTINGS, **compiling(), generator=generators(4, 5, 6))
    assert torch.equal(compiled, draw(model, others, **SETTINGS, generator=generators(4, 5, 6)))


def test_without_a_working_compiler_pictures_are_drawn_all_the_same_and_it_is_said_once(caplog):
    attempts = []

    def broken_backend(graph, inputs):
        attempts.append(graph)
        raise RuntimeError("no compiler on this machine")

    model = build()
    plain = draw(model, **SETTINGS, generator=generators(1, 2, 3))
    transformers_logger = logging.getLogger("transformers")
    propagate, transformers_logger.propagate = transformers_logger.propagate, True
    try:
        for _ in range(2):
            ids = draw(model, **SETTINGS, **compiling(broken_backend), generator=generators(1, 2, 3))
            assert torch.equal(ids, plain)
    finally:
        transformers_logger.propagate = propagate
    warnings = [record.getMessage() for record in caplog.records if "did not compile" in record.getMessage()]
    assert len(warnings) == 1 and "disable_compile=True" in warnings[0] and "llama" in warnings[0]
    assert len(attempts) == 1


def test_a_step_that_returns_the_same_memory_every_time_draws_the_same_pictures(monkeypatch):
    model, memory, streamer = build(), torch.zeros(3, 1, dtype=torch.long), Recorder()
    plain = draw(model, **SETTINGS, generator=generators(1, 2, 3))
    plain_step = sampling_liquid.image_step

    def as_cuda_graphs_do(*args):
        codes, *others = plain_step(*args)
        return memory.copy_(codes), *others

    monkeypatch.setattr(torch, "compile", lambda step, **kwargs: as_cuda_graphs_do)
    streamer.put_codes = streamer.put
    ids = draw(model, **SETTINGS, **compiling(), generator=generators(1, 2, 3), streamer=streamer)
    assert torch.equal(ids, plain)
    assert torch.equal(model.config.image_layout.codes_to_ids(torch.cat(streamer.received[1:], dim=1)), plain)


def test_a_users_processor_or_recorded_output_is_not_compiled():
    model = build()

    def never(graph, inputs):
        raise AssertionError("compiled")

    options = {"return_dict_in_generate": True, "output_scores": True}
    output = draw(model, **SETTINGS, **compiling(never), **options, generator=generators(1, 2, 3))
    assert torch.equal(output.sequences, draw(model, **SETTINGS, generator=generators(1, 2, 3)))
    assert len(output.scores) == 8


# --- a cache that grows ---


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sampling_liquid, "CACHE_PIECE", 8)
    monkeypatch.setattr(sampling_liquid, "LARGE_CACHE", 0.0)


LONG = SETTINGS | {"height": 4, "width": 32}  # 32 codes behind a prompt of 7, so that 40 of 128 positions are used


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("speculative", [{}, {"speculative": 3}])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]])
def test_a_cache_read_in_part_draws_what_the_whole_does(base, speculative, prompts, small_pieces, monkeypatch):
    model, lengths = build(base), []
    whole = draw(model, prompts, **LONG, generator=generators(*range(len(prompts))))
    update = sampling_liquid.GrowingStaticLayer.update

    def recording(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        assert keys.shape == values.shape
        # Nothing that was written is left out.
        assert int(self.cumulative_length) <= keys.shape[2] and not self.keys[:, :, keys.shape[2] :].any()
        lengths.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(sampling_liquid.GrowingStaticLayer, "update", recording)
    options = {"cache_implementation": "static", "disable_compile": True, **speculative}
    ids = draw(model, prompts, **LONG, **options, generator=generators(*range(len(prompts))))
    assert torch.equal(ids, whole)
    assert {16, 24, 32, 40} <= set(lengths) and max(lengths[-2:]) < 128
    greedy = LONG | {"do_sample": False, "top_k": None, "top_p": None}
    assert torch.equal(draw(model, prompts, **greedy, **options), draw(model, prompts, **greedy))


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [{}, {"speculative": 3}])
def test_a_compiled_step_that_reads_in_part_is_two_graphs_however_many_the_lengths(speculative, small_pieces):
    model = build()
    torch._dynamo.utils.counters.clear()
    ids = draw(model, **LONG, **compiling(), **speculative, generator=generators(1, 2, 3))
    assert torch.equal(ids, draw(model, **LONG, generator=generators(1, 2, 3)))
    # Of the first length, and of any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        ids = draw(model, **LONG, **compiling(), **speculative, generator=generators(4, 5, 6))
    assert torch.equal(ids, draw(model, **LONG, generator=generators(4, 5, 6)))


@pytest.mark.slow
def test_where_a_part_of_the_cache_does_not_compile_the_whole_is_read(small_pieces):
    model, compiled = build(), []

    def of_whole_caches_only(graph, inputs):
        if len(compiled) == 1:  # the second length
            compiled.append(None)
            raise RuntimeError("no such length")
        compiled.append(graph)
        return graph

    ids = draw(model, **LONG, **compiling(of_whole_caches_only), generator=generators(1, 2, 3))
    assert torch.equal(ids, draw(model, **LONG, generator=generators(1, 2, 3)))
    assert {"llama"} == sampling_liquid._NOT_GROWING and not sampling_liquid._NOT_COMPILABLE
    again = draw(model, **LONG, **compiling(of_whole_caches_only), generator=generators(1, 2, 3))
    assert torch.equal(again, ids) and len(compiled) > 2


def test_short_pictures_and_caches_that_are_handed_back_are_read_whole(monkeypatch):
    def never(self, *args, **kwargs):
        raise AssertionError("grows")

    monkeypatch.setattr(sampling_liquid.GrowingStaticLayer, "update", never)
    options = {"cache_implementation": "static", "disable_compile": True}
    draw(build(), **LONG, **options, generator=generators(1, 2, 3))
    monkeypatch.setattr(sampling_liquid, "CACHE_PIECE", 8)
    output = draw(build(), **LONG, **options, generator=generators(1, 2, 3), return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape[2] == output.past_key_values.layers[0].max_cache_len
    draw(build("gemma2"), **LONG, **options, generator=generators(1, 2, 3))  # windows of sliding attention


def test_a_cache_grows_where_it_is_large_beside_the_weights(monkeypatch):
    monkeypatch.setattr(sampling_liquid, "CACHE_PIECE", 8)
    model, lengths = build(), []
    weights = sum(weight.nbytes for weight in model.model.text_model.parameters())
    update = sampling_liquid.GrowingStaticLayer.update

    def recording(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        lengths.append((keys.shape[2], len(model.model.text_model.base_model.layers) * 2 * self.keys.nbytes))
        return keys, values

    monkeypatch.setattr(sampling_liquid.GrowingStaticLayer, "update", recording)
    options = {"cache_implementation": "static", "disable_compile": True, "generator": generators(1, 2, 3)}
    draw(model, **LONG, **options)
    stored = lengths[-1][1]
    for share, grows in ((0.8, True), (1.2, False)):
        lengths.clear()
        monkeypatch.setattr(sampling_liquid, "LARGE_CACHE", share * stored / weights)
        draw(model, **LONG, **options)
        assert (len({length for length, _ in lengths}) > 2) == grows


# --- noise ---


def test_a_draw_has_the_probabilities_of_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -1.0])
    samples = 20_000
    noise = gumbel_noise(torch.Generator().manual_seed(0), 1, samples, 5, torch.device("cpu"))[0]
    codes, _ = draw_codes(scores.expand(samples, 1, 5), None, None, lambda ids, scores: scores, noise[:, None])
    counts = torch.bincount(codes.flatten(), minlength=5)
    expected = samples * scores.softmax(0)
    assert counts[3] == 0
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < 16.3  # the 99.9 % quantile for three degrees of freedom


@pytest.mark.parametrize("listed", [True, False])
def test_noise_in_blocks_is_the_noise_of_position_after_position(listed):
    def sources():
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return generators if listed else generators[0]

    cpu, one_by_one = torch.device("cpu"), sources()
    expected = torch.cat([gumbel_noise(one_by_one, 1, 3, 37, cpu) for _ in range(5)])
    assert torch.equal(gumbel_noise(sources(), 5, 3, 37, cpu), expected)


def test_noise_of_zero_and_of_nearly_one_never_draws_what_is_forbidden(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.tensor([0.0, 1 - 2**-24, 0.5]).expand(size))
    noise = gumbel_noise(None, 1, 1, 3, torch.device("cpu"))[0]
    assert noise[0, 0] == -torch.inf and torch.isfinite(noise[0, 1:]).all()
    scores = torch.tensor([[[-torch.inf, -torch.inf, 0.0]]])
    codes, _ = draw_codes(scores, None, None, lambda ids, scores: scores, noise[:, None])
    assert codes.item() == 2


# --- linear layers of few rows ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (3, 7)])
def test_a_few_rows_layer_computes_what_the_layer_computes(shape, bias):
    layer = nn.Linear(12, 20, bias=bias)
    view = few_rows_view(nn.Sequential(layer))[0]
    assert type(view) is FewRowsLinear and view.weight is layer.weight
    input = torch.randn(*shape, 12)
    torch.testing.assert_close(view(input), layer(input), rtol=0, atol=1e-5)
    assert view(input).is_contiguous()


@pytest.mark.parametrize("is_faster", [True, False])
def test_products_are_transposed_only_where_that_is_faster(is_faster, monkeypatch):
    monkeypatch.setattr(modeling_liquid, "is_transposed_faster", lambda: is_faster)
    view = build().image_head_view()
    assert any(isinstance(module, FewRowsLinear) for module in view.modules()) == is_faster


def test_a_view_of_few_rows_leaves_the_original_and_special_layers_alone():
    class Special(nn.Linear):
        pass

    tree = nn.ModuleDict(
        {
            "plain": nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]),
            "special": Special(4, 4),
            "in_half": nn.Linear(4, 4).bfloat16(),
            "other": nn.Sequential(nn.ReLU()),
        }
    )
    before = dict(tree.named_modules())
    view = few_rows_view(tree)
    assert dict(tree.named_modules()) == before
    assert type(tree["plain"][0]) is nn.Linear and type(view["plain"][0]) is FewRowsLinear
    for name in ("special", "in_half", "other"):
        assert view[name] is tree[name]
    view.register_forward_hook(lambda *args: None)
    view["plain"].register_forward_hook(lambda *args: None)
    assert not tree._forward_hooks and not tree["plain"]._forward_hooks


def test_hidden_states_are_recorded_once_however_often_pictures_are_drawn():
    model = build()
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False}
    for _ in range(3):
        output = draw(model, PROMPTS[:1], **options)
        assert len(output.hidden_states[0]) == 3
    assert len(model(torch.tensor(PROMPTS[:1]), output_hidden_states=True).hidden_states) == 3
