"""Several codes a position: embeddings, the head, drawing, reading, training, and what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from test_convert_unitok import Oracle
from tiny import (
    BOI_ID,
    BOS_ID,
    EOI_ID,
    EOS_ID,
    IMAGE_ID,
    TINY_UNITOK_CONFIG,
    UNCOND_ID,
    tiny_config,
    tiny_model,
    tiny_model_of_several_codes,
    tiny_pictures,
    tiny_processor,
    tiny_processor_of_several_codes,
    tiny_text_config,
)
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from transformers_liquid import (
    ImageStreamer,
    LiquidConversation,
    LiquidDataCollator,
    LiquidForCausalLM,
    LiquidImageGenerationPipeline,
    LiquidProcessor,
    export_base_model,
    liquid_rows_config,
    partial_pictures,
    tokenize_dataset,
)
from transformers_liquid.evaluation.benchmarks import Sample
from transformers_liquid.evaluation.judges import measure_losses
from transformers_liquid.generation.sampling import gumbel_noise
from transformers_liquid.serving.engine import PictureEngine
from transformers_liquid_cli import main


K, N, V = 4, 16, 16


@pytest.fixture(scope="module")
def model():
    return tiny_model_of_several_codes()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor_of_several_codes()


def embedded(model, codes):
    """The embeddings of whole pictures, from the names that UniTok's language model gives its weights."""
    tensors = {}
    for name, tensor in model.model.code_embedder.state_dict().items():
        place, _, rest = name.partition(".")
        renamed = {"codebooks": f"quantizer.codebooks.{rest}.codebook.weight", "projection": f"attn_projection.{rest}"}
        tensors[renamed.get(place, name)] = tensor
    tensors["attn_projection.attn.zero_k_bias"] = torch.zeros_like(tensors["attn_projection.attn.q_bias"])
    oracle = Oracle(tensors)
    x = oracle.projection("attn_projection", oracle.vectors(codes), 4, causal=True)
    return oracle.linear("mlp.3", F.gelu(oracle.linear("mlp.1", oracle.norm("mlp.0", x))))


def head_logits(model, hidden, codes):
    """Logits of the next code of a position, with llama's equations written out."""
    head, config = model.code_head, model.config.text_config
    weights = {name: tensor.double() for name, tensor in head.state_dict().items()}
    x = torch.stack(
        [hidden.double()] + [weights[f"codebooks.{k}.weight"][codes[:, k]] for k in range(codes.shape[1])], 1
    )

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    dim = config.head_dim
    frequencies = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    angles = torch.arange(x.shape[1]).double()[:, None] * frequencies
    turn = torch.cat([angles, angles], -1)

    def rope(one):
        half = torch.cat([-one[..., dim // 2 :], one[..., : dim // 2]], -1)
        return one * turn.cos() + half * turn.sin()

    for layer in range(3):
        name = f"body.layers.{layer}"
        y = norm(f"{name}.input_layernorm", x)
        q, k, v = (
            (y @ weights[f"{name}.self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, dim)).transpose(1, 2)
            for part in "qkv"
        )
        q, k = rope(q), rope(k)
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        scores = q @ k.transpose(-1, -2) / dim**0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attended @ weights[f"{name}.self_attn.o_proj.weight"].T
        y = norm(f"{name}.post_attention_layernorm", x)
        gate, up, down = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm("body.norm", x) @ weights["output.weight"].T + weights["output.bias"]


def random_codes(number=1, seed=0):
    return torch.randint(V, (number, K, N), generator=torch.Generator().manual_seed(seed))


def drawn(model, processor, texts=("red apple",), seeds=(0,), **kwargs):
    inputs = processor(text=list(texts), generation_mode="image", return_tensors="pt")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return model.generate(**inputs, generation_mode="image", generator=generators, **kwargs)


class TestParts:
    def test_one_embedding_a_position(self, model):
        codes = random_codes(3)
        torch.testing.assert_close(
            model.model.code_embedder(codes).double(), embedded(model, codes), atol=1e-4, rtol=1e-4
        )

    def test_the_last_positions_know_the_others(self, model):
        codes = random_codes(2)
        for last in (1, 5):
            torch.testing.assert_close(
                model.model.code_embedder(codes, last),
                model.model.code_embedder(codes)[:, -last:],
                atol=1e-5,
                rtol=1e-4,
            )
        alone = model.model.code_embedder(codes[..., -1:])
        assert not torch.allclose(alone, model.model.code_embedder(codes, 1), atol=1e-2)

    @pytest.mark.parametrize("known", range(K))
    def test_a_code_is_drawn_from_those_before_it(self, model, known):
        hidden, codes = torch.randn(3, 32), random_codes(3)[:, :known, 0]
        logits = model.code_head(hidden, codes)
        assert logits.shape == (3, known + 1, V)
        torch.testing.assert_close(logits.double(), head_logits(model, hidden, codes), atol=1e-4, rtol=1e-4)

    def test_codes_have_no_rows_of_the_vocabulary(self, model):
        layout = model.config.image_layout
        assert len(layout.image_token_range) == 0 and layout.num_codebooks == K
        assert layout.sequence_ids(random_codes(2)).tolist() == [[IMAGE_ID] * N] * 2
        assert torch.equal(layout.codes_to_ids(random_codes()), random_codes())

    def test_it_is_saved_and_loaded_whole(self, model, processor, tmp_path):
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again = LiquidForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(again.state_dict()[name], one) for name, one in model.state_dict().items())
        LiquidProcessor.from_pretrained(tmp_path).check_fits(again.config)
        assert f"{K} codes" in (tmp_path / "README.md").read_text()
        assert torch.equal(drawn(again, processor), drawn(model, processor))

    @pytest.mark.parametrize("base", ["qwen3", "gemma", "mistral"])
    def test_other_bases_draw_too(self, base, processor):
        model = tiny_model_of_several_codes(base)
        cached = drawn(model, processor)
        assert torch.equal(cached, drawn(model, processor, use_cache=False))


class TestDrawing:
    def test_pictures_are_those_of_a_plain_loop(self, model, processor):
        """All that was drawn is read again at each step; the scores, guidance and noise are written out."""
        prompt = processor.image_prompt_ids("red apple")
        sides = [prompt, [BOS_ID, UNCOND_ID, BOI_ID]]
        noise = gumbel_noise([torch.Generator().manual_seed(5)], N, 1, K * V, torch.device("cpu"))[:, 0].view(N, K, V)
        codes, embed = torch.zeros(1, K, 0, dtype=torch.long), model.get_input_embeddings()
        for position in range(N):
            hidden = []
            for ids in sides:
                embeds = embed(torch.tensor([ids]))
                if position:
                    embeds = torch.cat([embeds, embedded(model, codes).float()], 1)
                hidden.append(model.model.text_model.model(inputs_embeds=embeds).last_hidden_state[:, -1])
            new = torch.zeros(1, 0, dtype=torch.long)
            for codebook in range(K):
                conditional, unconditional = (head_logits(model, one, new)[:, -1] for one in hidden)
                scores = (unconditional + 3.0 * (conditional - unconditional)) / 0.9
                new = torch.cat([new, (scores + noise[position, codebook]).argmax(-1)[:, None]], 1)
            codes = torch.cat([codes, new[..., None]], -1)
        settings = {"guidance_scale": 3.0, "temperature": 0.9, "top_k": None, "top_p": None}
        assert torch.equal(drawn(model, processor, seeds=[5], **settings), codes)

    def test_cached_uncached_and_static_draw_the_same(self, model, processor):
        texts, seeds = ["red apple", "a"], [1, 2]
        cached = drawn(model, processor, texts, seeds)
        assert cached.shape == (2, K, N)
        assert torch.equal(cached, drawn(model, processor, texts, seeds, use_cache=False))
        assert torch.equal(cached, drawn(model, processor, texts, seeds, cache_implementation="static"))

    def test_a_picture_does_not_depend_on_its_batch(self, model, processor):
        together = drawn(model, processor, ["red apple", "a", "dog"], [1, 2, 3])
        for index, text in enumerate(["red apple", "a", "dog"]):
            assert torch.equal(drawn(model, processor, [text], [index + 1])[0], together[index])

    def test_greedy_is_without_noise(self, model, processor):
        assert torch.equal(
            drawn(model, processor, do_sample=False), drawn(model, processor, seeds=[7], do_sample=False)
        )

    def test_scores_are_of_each_codebook(self, model, processor):
        output = drawn(model, processor, do_sample=False, return_dict_in_generate=True, output_scores=True)
        assert len(output.scores) == N and output.scores[0].shape == (1, K, V)
        assert torch.equal(torch.stack(output.scores, -1).argmax(2), output.sequences)

    def test_streamers_and_previews_see_the_codes(self, model, processor):
        seen = []

        class Previews(ImageStreamer):
            def on_finalized_images(self, images, num_codes, stream_end=False):
                seen.append((images[0], num_codes))

        codes = drawn(model, processor, streamer=Previews(model))
        assert [number for _, number in seen] == [4, 8, 12, 16]
        finished = processor.post_process_multimodal_output(model.decode_image_tokens(codes), generation_mode="image")
        assert np.array_equal(seen[-1][0], finished[0])
        assert np.array_equal(partial_pictures(model, codes[..., :8])[0], seen[1][0])
        with pytest.raises(ValueError, match="got"):
            partial_pictures(model, codes[0])

    def test_the_pipeline_draws(self, model, processor):
        steps = []
        pipe = LiquidImageGenerationPipeline(model=model, processor=processor)
        images = pipe(
            ["red apple", "dog"],
            seed=3,
            num_images_per_prompt=2,
            callback_on_step_end=lambda pipe, step, left, kwargs: steps.append(
                (step, left, kwargs["image_tokens"].shape)
            ),
        )
        assert len(images) == 4 and images[0].size == (64, 64)
        assert steps[-1] == (15, 0, (4, K, 16))
        expected = model.decode_image_tokens(drawn(model, processor, ["dog"], [5]))
        assert np.array_equal(images[2], processor.post_process_multimodal_output(expected, generation_mode="image")[0])

    def test_logits_processors_see_the_codes_of_a_codebook(self, model, processor):
        class Forbid(LogitsProcessor):
            def __call__(self, input_ids, scores):
                assert scores.shape == (1, V)
                return scores.index_fill(1, torch.arange(8), -torch.inf)

        codes = drawn(model, processor, logits_processor=LogitsProcessorList([Forbid()]))
        assert codes.min() >= 8

    def test_weights_that_overflow_are_found(self, processor):
        model = tiny_model_of_several_codes()
        model.code_head.output.weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="picture 0 of the batch at position 0 are NaN"):
            drawn(model, processor)


class TestReading:
    def test_a_picture_is_read_where_its_placeholders_are(self, model, processor):
        pixel_values = tiny_pictures(1, 64, 64)
        inputs = processor(text="<image> What?", images=(pixel_values[0] + 1) / 2)
        assert (inputs["input_ids"] == IMAGE_ID).sum() == N
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        codes = model.model.vq_model.encode_codes(inputs["pixel_values"]).flatten(2)
        embeds[inputs["input_ids"] == IMAGE_ID] = embedded(model, codes)[0].float()
        expected = model.model.text_model(inputs_embeds=embeds).logits
        logits = {
            "pixel_values": model(**inputs).logits,
            "image_codes": model(input_ids=inputs["input_ids"], image_codes=codes).logits,
            "inputs_embeds": model(
                inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), pixel_values=inputs["pixel_values"]
            ).logits,
        }
        for one in logits.values():
            torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-3)

    def test_answers_are_cached_as_uncached_and_alone_as_in_a_batch(self, model, processor):
        pictures = [(one + 1) / 2 for one in tiny_pictures(2, 64, 64)]
        texts = ["<image> What?", "What is in <image> here?"]
        inputs = processor(text=texts, images=pictures)
        settings = {"max_new_tokens": 6, "do_sample": False}
        cached = model.generate(**inputs, **settings)
        assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
        for index in range(2):
            alone = model.generate(**processor(text=texts[index], images=pictures[index]), **settings)
            assert torch.equal(alone[0, -6:], cached[index, -6:])
        assert not (cached[:, -6:] == IMAGE_ID).any()

    def test_pictures_and_placeholders_must_match(self, model):
        ids = torch.tensor([[BOS_ID, BOI_ID, *[IMAGE_ID] * N, EOI_ID]])
        with pytest.raises(ValueError, match=r"codes of shape \(3, 16\), but the model has 4 a position"):
            model(input_ids=ids, image_codes=random_codes()[:, :3])
        with pytest.raises(ValueError, match=r"has 15 codes, but its place .* has 16 placeholders"):
            model(input_ids=ids, image_codes=random_codes()[..., :15])
        with pytest.raises(ValueError, match="room for 1 images, but 2"):
            model(input_ids=ids, image_codes=random_codes(2))
        with pytest.raises(ValueError, match="image_codes stand beside input_ids for codecs of several codes"):
            tiny_model()(input_ids=ids, image_codes=random_codes())


def records():
    codes = random_codes(4).numpy()
    return [
        {"kind": "text_to_image", "text": "red apple", "codes": codes[0], "index": 0},
        {"kind": "caption", "text": "a dog", "codes": codes[1].reshape(K, 4, 4), "index": 1},
        {"kind": "text", "text": "only words", "index": 2},
        {"kind": "edit", "text": "<image> in blue", "images": [codes[2]], "codes": codes[3], "index": 3},
    ]


class TestTraining:
    def test_the_loss_is_the_mean_over_texts_and_codes(self, model, processor):
        collator = LiquidDataCollator(processor, unconditional_probability=0.0, edit_dropout=0.0)
        batch = collator(records())
        assert batch["image_codes"].shape == (4, K, N)
        model.config.max_z_loss_coef = 1e-2
        outputs = model(**batch)
        model.config.max_z_loss_coef = 0.0
        hidden = model.model(batch["input_ids"], image_codes=batch["image_codes"]).last_hidden_state
        text, image, greatest, right = [], [], [], 0
        order = {0: [0], 1: [1], 2: [], 3: [2, 3]}
        for sequence in range(4):
            picture, before = -1, None
            for position, (token, label) in enumerate(
                zip(batch["input_ids"][sequence].tolist(), batch["labels"][sequence].tolist(), strict=True)
            ):
                picture += token == BOI_ID
                before = 0 if token == BOI_ID else before
                if token == IMAGE_ID:
                    codes = batch["image_codes"][order[sequence][picture]][:, before]
                    before += 1
                if label == -100:
                    continue
                state = hidden[sequence, position - 1][None]
                if token != IMAGE_ID:
                    logits = model.get_output_embeddings()(state)[0]
                    text.append(F.cross_entropy(logits, torch.tensor(label)))
                    continue
                logits = head_logits(model, state, codes[None, :-1])[0]
                image.append(F.cross_entropy(logits, codes, reduction="sum").float())
                greatest.append(logits.amax(-1).square().sum())
                right += (logits.argmax(-1) == codes).sum()
        assert len(image) == 2 * N
        number = len(text) + K * len(image)
        expected = (sum(text) + sum(image) + 1e-2 * sum(greatest)) / number
        torch.testing.assert_close(outputs.loss, expected.float(), atol=1e-4, rtol=1e-4)
        assert outputs.token_stats[:, 2].sum() == number
        assert outputs.token_stats[1, 1] >= right

    def test_every_weight_learns_with_pictures_and_without(self, processor):
        model = tiny_model_of_several_codes().train()
        collator = LiquidDataCollator(processor)
        for batch in (records(), records()[2:3]):
            model.zero_grad()
            model(**collator(batch)).loss.backward()
            left_out = [name for name, one in model.named_parameters() if one.grad is None and "vq_model" not in name]
            assert left_out == []

    def test_packed_records_have_the_same_loss(self, model, processor):
        plain, packed = LiquidDataCollator(processor), LiquidDataCollator(processor, packing=True)
        torch.testing.assert_close(
            model(**packed(records())).loss, model(**plain(records())).loss, atol=1e-5, rtol=1e-5
        )

    def test_dropped_images_are_dropped_with_their_codes(self, processor):
        collator = LiquidDataCollator(processor, edit_dropout=1 / 3)
        for index in range(12):
            record = records()[3] | {"index": index}
            batch = collator([record])
            assert (batch["input_ids"] == IMAGE_ID).sum() == N * len(batch["image_codes"])
            assert torch.equal(batch["image_codes"][-1], random_codes(4)[3])

    def test_pictures_of_several_sizes_stand_in_a_list(self, model, processor):
        wide = {"kind": "text_to_image", "text": "dog", "codes": random_codes().numpy()[0, :, :8].reshape(K, 2, 4)}
        batch = LiquidDataCollator(processor)([records()[0], wide])
        assert [one.shape for one in batch["image_codes"]] == [(K, N), (K, 8)]
        assert model(**batch).loss.isfinite()

    def test_codes_of_another_codec_are_refused(self, processor):
        collator = LiquidDataCollator(processor)
        with pytest.raises(ValueError, match=r"shape \(3, 16\) do not begin with the 4 codes of each position"):
            collator([{"kind": "caption", "text": "dog", "codes": random_codes().numpy()[0, :3]}])
        with pytest.raises(ValueError, match="no image of 4 x 4 codes"):
            collator([{"kind": "caption", "text": "dog", "codes": random_codes().numpy()[0, :, :15]}])
        with pytest.raises(ValueError, match="Code 16 at position 1, 0"):
            processor.codes_to_ids(np.array([[0], [16], [0], [0]]))

    def test_pictures_are_tokenized_trained_on_and_measured(self, model, processor, tmp_path):
        model.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        pictures = processor.image_processor.postprocess(tiny_pictures(4, 64, 64))
        lines = []
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / f"{index}.png")
            lines.append({"image": f"{index}.png", "edited_image": f"{index}.png", "edit_prompt": "dog", "text": "dog"})
        file = tmp_path / "pictures.jsonl"
        file.write_text("".join(json.dumps(one | {"input_image": one["image"]}) + "\n" for one in lines))
        source = {"model": str(tmp_path / "base"), "dataset": "json", "data_files": str(file)}
        for kind in ("text_to_image", "edit"):
            tokenize_dataset(**source, output=str(tmp_path / kind), kind=kind, framing="pad")
        pixels = processor.image_processor(pictures, framing="pad")["pixel_values"]
        codes = model.model.vq_model.encode_codes(pixels).flatten(2)
        (file,) = (tmp_path / "edit").rglob("*.parquet")
        rows = datasets.Dataset.from_parquet(str(file))
        assert sorted(rows["codes"]) == sorted(codes.tolist())
        assert all(row["images"][0]["codes"] == row["codes"] for row in rows)

        options = f"--model {tmp_path / 'base'} --datasets {tmp_path / 'text_to_image'} {tmp_path / 'edit'} --use_cpu"
        options += " --max_steps 2 --per_device_train_batch_size 2 --learning_rate 0.01 --report_to none"
        for trainable in ("full", "lora"):
            pytest.importorskip("peft")
            output = tmp_path / trainable
            assert main([*f"train {options} --output_dir {output} --trainable {trainable}".split()]) == 0
            trained = LiquidForCausalLM.from_pretrained(output)
            moved = trained.code_head.output.weight - model.code_head.output.weight
            assert moved.abs().max() > 0 and not torch.equal(drawn(trained, processor), drawn(model, processor))
        pipe = LiquidImageGenerationPipeline(model=model, processor=processor)
        losses = measure_losses(pipe, Sample("x", None, "dog"), tmp_path / "0.png")
        assert losses["image_labels"] == K * N + 2 and losses["text_labels"] == 4

    def test_labels_of_pictures_need_their_codes(self, model):
        ids = torch.tensor([[BOS_ID, BOI_ID, IMAGE_ID, EOI_ID, EOS_ID]])
        with pytest.raises(ValueError, match="need its codes"):
            model(input_ids=ids, labels=ids)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"speculative": True}, "several codes a position.* leave out speculative"),
            ({"generation_mode": "interleaved"}, "drawn from text alone"),
            ({"pixel_values": tiny_pictures(1, 64, 64)}, "drawn from text alone"),
        ],
    )
    def test_what_is_there_for_one_code_alone(self, model, processor, settings, message):
        inputs = processor(text=["dog"], generation_mode="image", return_tensors="pt")
        with pytest.raises(ValueError, match=message):
            model.generate(**{**inputs, "generation_mode": "image"} | settings)

    def test_pictures_in_the_context_of_a_drawing(self, model, processor):
        picture = processor.image_processor.postprocess(tiny_pictures(1, 64, 64))[0]
        pipe = LiquidImageGenerationPipeline(model=model, processor=processor)
        with pytest.raises(ValueError, match="drawn from text alone"):
            pipe("<image> in blue", image=picture)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "dog"}]
        for told in ("once", [{"role": "user", "content": content}]):
            with pytest.raises(ValueError, match="drawn from text alone"):
                LiquidConversation(model, processor)(told)

    def test_a_processor_of_one_code(self, model):
        with pytest.raises(ValueError, match="num_codebooks is 1 in the processor, 4 in the model"):
            tiny_processor().check_fits(model.config)

    def test_a_plain_base_has_no_head_for_codes(self, model, processor, tmp_path):
        with pytest.raises(
            ValueError,
            match=r"several codes a position \(here 4\), a plain causal language model has no place for the head",
        ):
            export_base_model(model, processor, tmp_path / "base")
        assert not (tmp_path / "base").exists()

    def test_an_engine_whose_pictures_join_a_batch(self, model, processor):
        with pytest.raises(ValueError, match="do not join a batch that runs"):
            PictureEngine(LiquidImageGenerationPipeline(model=model, processor=processor))

    def test_rows_alone(self, model):
        pytest.importorskip("peft")
        with pytest.raises(ValueError, match="no rows of the vocabulary to train alone"):
            liquid_rows_config(model)

    def test_rows_for_codes(self):
        with pytest.raises(ValueError, match="image_token_offset must be 0, got 5"):
            tiny_config(vq_config=TINY_UNITOK_CONFIG, image_token_offset=5)
        with pytest.raises(ValueError, match="final_logit_softcapping"):
            tiny_config(tiny_text_config("gemma2"), vq_config=TINY_UNITOK_CONFIG, image_token_offset=0)

    def test_a_codec_without_its_head(self, model):
        weights = {name: one for name, one in model.state_dict().items() if not name.startswith("code_head")}
        with pytest.raises(ValueError, match="missing keys: code_head"):
            LiquidForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)

    def test_a_head_without_its_codec(self, tmp_path):
        model = tiny_model()
        weights = model.state_dict() | {"code_head.output.bias": torch.zeros(16)}
        with pytest.raises(ValueError, match=r"unexpected keys: code_head.output.bias"):
            LiquidForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
