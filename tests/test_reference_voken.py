"""MiniGPT-5's checkpoints, in exactly the layout of its authors: written here by their own means, PEFT and torch."""

import argparse
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import SPECIAL_TOKENS, tiny_base, tiny_pictures, tiny_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
)

from transformers_liquid import VokenConfig, VokenDataCollator, VokenForConditionalGeneration, VokenProcessor
from transformers_liquid.models.voken.prompts import MINIGPT5_DIALOGUE_SYSTEM, STORY_PROMPTS
from transformers_liquid.models.voken.reference import load_minigpt5, save_minigpt5


TOKENS = [*(f"[IMG{index}]" for index in range(8)), "<ImageHere>"]
VOCABULARY = len(SPECIAL_TOKENS) + 256
WIDTH, LENGTH = 16, 5  # of the condition


class Reference(nn.Module):
    """The names of the reference's modules, whose `state_dict` its files hold."""

    def __init__(self, llama):
        super().__init__()
        self.model = nn.Module()
        self.model.llama_model = llama
        self.fc = nn.Sequential(nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.llm_to_t2i_mapping = nn.Transformer(WIDTH, 8, 4, 4, 24, dropout=0.0, norm_first=True, batch_first=True)
        self.t2i_decoder_prompt = nn.Parameter(torch.randn(1, LENGTH, WIDTH))

    def condition(self, states):
        return self.llm_to_t2i_mapping(src=self.fc(states), tgt=self.t2i_decoder_prompt.expand(len(states), -1, -1))


def trained(module):
    """What Lightning keeps: the tensors that have a gradient."""
    return {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A BLIP-2 with T5, a llama, and the three files; the reference model after each stage."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("minigpt5")
    reader = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = AutoConfig.for_model("t5", vocab_size=40, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=8, patch_size=4, **reader),
        qformer_config=Blip2QFormerConfig(vocab_size=30, encoder_hidden_size=16, **reader),
        text_config=t5,
        num_query_tokens=4,
    )
    blip = Blip2ForConditionalGeneration(config)
    blip.query_tokens.data.normal_()
    blip.save_pretrained(folder / "blip2")
    llama = tiny_base(tied=False, vocab_size=VOCABULARY)
    llama.save_pretrained(folder / "vicuna")
    tiny_tokenizer().save_pretrained(folder / "vicuna")
    images = BlipImageProcessorPil(size={"height": 8, "width": 8})
    Blip2Processor(images, tiny_tokenizer(), num_query_tokens=4).save_pretrained(folder / "blip2")
    projection = nn.Linear(16, 32)
    torch.save(
        {"model": {f"llama_proj.{name}": one for name, one in projection.state_dict().items()}}, folder / "proj.pth"
    )

    llama.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    llama.requires_grad_(False)
    for module in (llama.model.embed_tokens, llama.lm_head):
        module.requires_grad_(True).weight.data.normal_(std=0.2)
    first = Reference(llama)
    lightning = {"epoch": 1, "hyper_parameters": argparse.Namespace(lr=2e-5), "state_dict": trained(first)}
    torch.save(lightning, folder / "stage1.ckpt")

    second = copy.deepcopy(first)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    second.model.llama_model = get_peft_model(second.model.llama_model, lora).eval()
    second.fc.requires_grad_(False)
    second.t2i_decoder_prompt.requires_grad_(False)
    for one in second.parameters():
        if one.requires_grad:
            one.data += 0.1 * torch.randn_like(one)
    torch.save({"state_dict": trained(second)}, folder / "stage2.ckpt")
    return folder, first, second


def load(folder, *stages, base=None, **kwargs):
    """From the files in a folder, with BLIP-2 and Vicuna from another one if they are not in it."""
    base = base or folder
    arguments = {"projection": folder / "proj.pth", "vision_model": f"{base}/blip2", "language_model": f"{base}/vicuna"}
    return load_minigpt5(*(folder / f"{stage}.ckpt" for stage in stages), **arguments | kwargs)


@pytest.mark.parametrize("stages", [["stage1"], ["stage1", "stage2"]])
@pytest.mark.parametrize("merge", [True, False])
def test_what_the_reference_computes_is_what_the_loaded_model_computes(stages, merge, files):
    folder, *references = files
    reference = references[len(stages) - 1]
    model, processor = load(folder, *stages, merge=merge)
    assert processor.tokenizer.convert_tokens_to_ids(TOKENS) == [*range(VOCABULARY, VOCABULARY + 9)]
    assert model.config.voken_token_ids == [*range(VOCABULARY, VOCABULARY + 8)]
    ids, states = torch.tensor([[1, 20, 30, *range(VOCABULARY, VOCABULARY + 8)]]), torch.randn(2, 8, 32)
    # A BLIP-2 takes a picture whether or not its ids have places for it.
    inputs = {"input_ids": ids, "pixel_values": tiny_pictures()}
    with torch.no_grad():
        logits = (
            model.get_base_model().text_model(**inputs).logits
            if not merge and len(stages) > 1
            else model.text_model(**inputs).logits
        )
        torch.testing.assert_close(logits, reference.model.llama_model(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.feature_mapper(states).embeds, reference.condition(states), rtol=1e-6, atol=1e-6
        )


def test_minigpt4_is_the_picture_reader_of_blip2_the_linear_layer_and_vicuna(files):
    folder, first, _ = files
    base = load(folder, "stage1")[0].text_model
    source = Blip2ForConditionalGeneration.from_pretrained(folder / "blip2")
    for part in ("vision_model", "qformer"):
        for name, one in getattr(source, part).state_dict().items():
            assert torch.equal(getattr(base, part).state_dict()[name], one), name
    assert torch.equal(base.query_tokens, source.query_tokens)
    linear = torch.load(folder / "proj.pth")["model"]
    assert torch.equal(base.language_projection.weight, linear["llama_proj.weight"])
    assert torch.equal(base.language_projection.bias, linear["llama_proj.bias"])
    pictures, image_id = tiny_pictures(), VOCABULARY + 8
    ids = torch.tensor([[1, image_id, image_id, image_id, image_id, 9]])
    with torch.no_grad():
        read = source.qformer(source.query_tokens, encoder_hidden_states=source.vision_model(pictures)[0])[0]
        read = read @ linear["llama_proj.weight"].T + linear["llama_proj.bias"]
        embeds = first.model.llama_model.model.embed_tokens(ids)
        embeds[:, 1:5] = read
        expected = first.model.llama_model(inputs_embeds=embeds).logits
        torch.testing.assert_close(base(input_ids=ids, pixel_values=pictures).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_reference_s_layout_comes_back_to_the_bit(files, tmp_path):
    folder, *_ = files
    save_minigpt5(load(folder, "stage1")[0], tmp_path / "one")
    save_minigpt5(load(folder, "stage1", "stage2", merge=False)[0], tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["stage1.ckpt"]
    for name, place in (("stage1.ckpt", "one"), ("stage2.ckpt", "two")):
        before = torch.load(folder / name, weights_only=False)["state_dict"]
        after = torch.load(tmp_path / place / name)["state_dict"]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    # The pair that was written is whole by itself.
    (again, _), (before, _) = (
        load(tmp_path / "two", "stage1", "stage2", base=folder, projection=folder / "proj.pth"),
        load(folder, "stage1", "stage2"),
    )
    assert all(torch.equal(one, before.state_dict()[name]) for name, one in again.state_dict().items())


def test_names_of_former_peft_are_known(files, tmp_path):
    folder, *_ = files
    stored = torch.load(folder / "stage2.ckpt")["state_dict"]
    torch.save(
        {"state_dict": {key.replace(".default", ""): one for key, one in stored.items()}}, tmp_path / "stage2.ckpt"
    )
    torch.save(torch.load(folder / "stage1.ckpt", weights_only=False), tmp_path / "stage1.ckpt")
    old, _ = load(tmp_path, "stage1", "stage2", base=folder, projection=folder / "proj.pth")
    new, _ = load(folder, "stage1", "stage2")
    assert all(torch.equal(one, new.state_dict()[name]) for name, one in old.state_dict().items())


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("stage1", lambda tensors: tensors.pop("fc.2.bias"), "lacks 1 keys that are needed: fc.2.bias"),
        ("stage1", lambda tensors: tensors.update(more=torch.zeros(1)), "1 unknown keys: more"),
        ("stage1", lambda tensors: tensors.update({"fc.2.bias": torch.zeros(3)}), r"mlp.2.bias has shape \(3,\)"),
        (
            "stage1",
            lambda tensors: tensors.pop("t2i_decoder_prompt"),
            "lacks 1 keys that are needed: t2i_decoder_prompt",
        ),
        (
            "stage2",
            lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)),
            "lora_B.default.weight",
        ),
        (
            "stage2",
            lambda tensors: tensors.update({next(key for key in tensors if "lora_A" in key): torch.zeros(4, 32)}),
            r"\(4, 32\), but the other sizes ask for \(8, 32\)",
        ),
        ("stage2", lambda tensors: tensors.clear(), "stage2.ckpt lacks"),
        ("stage1", lambda tensors: tensors.update({"fc.0.weight": torch.zeros(3)}), r"2 dimensions, got \(3, 1, 2\)"),
        ("stage1", lambda tensors: tensors.update({"fc.2.bias": torch.zeros(16).long()}), "no weights: fc.2.bias"),
        ("stage1", lambda tensors: tensors.update({"fc.2.bias": "16"}), "no weights: fc.2.bias"),
        ("proj", lambda tensors: tensors.pop("llama_proj.bias"), "lacks 1 keys that are needed: llama_proj.bias"),
    ],
)
def test_a_key_that_is_missing_unknown_or_of_another_shape_is_named(file, change, message, files, tmp_path):
    folder, *_ = files
    for name in ("stage1.ckpt", "stage2.ckpt", "proj.pth"):
        stored = torch.load(folder / name, weights_only=False)
        if name.startswith(file):
            change(stored.get("state_dict", stored.get("model")))
        torch.save(stored, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "stage1", "stage2", base=folder)


def test_files_and_parts_of_another_kind_are_refused(files):
    folder, *_ = files
    with pytest.raises(ValueError, match=r"stage1\.ckpt lacks"):
        load(folder, "stage1", "stage1")
    for change in ({"vision_model": str(folder / "vicuna")}, {"language_model": str(folder / "blip2")}):
        with pytest.raises(ValueError, match="made of a blip-2 and a llama, got"):
            load(folder, "stage1", **change)


def test_a_system_turn_may_be_in_parts(files):
    _, processor = load(files[0], "stage1")
    asked = {"role": "user", "content": "a"}
    contents = "be kind", [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]
    prompts = [
        processor.apply_chat_template([{"role": "system", "content": one}, asked], tokenize=False) for one in contents
    ]
    assert prompts[0] == prompts[1] == "<s>be kind###Human: a ###"


class Pickled:
    pass


def test_pickled_objects_are_refused_and_never_made(files, tmp_path):
    folder, *_ = files
    torch.save({"state_dict": {}, "hyper_parameters": Pickled()}, tmp_path / "stage1.ckpt")
    with pytest.raises(ValueError, match="holds pickled Python objects, which are never executed"):
        load(tmp_path, "stage1", base=folder, projection=folder / "proj.pth")


def test_another_language_model_is_told_before_weights_are_loaded(files, tmp_path, monkeypatch):
    folder, *_ = files
    tiny_tokenizer(extra_tokens=["<more>"]).save_pretrained(tmp_path)
    AutoConfig.from_pretrained(folder / "vicuna").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"trained with {VOCABULARY} tokens before the vokens, and .* has {VOCABULARY + 1}"
    ):
        load(folder, "stage1", language_model=str(tmp_path))


def test_what_the_reference_cannot_hold_is_not_written(files, tmp_path):
    model, _ = load(files[0], "stage1")
    model.config.mapper_num_heads = 4
    with pytest.raises(ValueError, match="cannot hold this model: mapper_num_heads must be 8, got 4"):
        save_minigpt5(model, tmp_path / "new")
    model.config.mapper_num_heads = 8
    wide = VokenForConditionalGeneration(VokenConfig(**model.config.to_dict() | {"mapper_hidden_size": 24}))
    with pytest.raises(ValueError, match=r"has no place for \['feature_mapper.projection.bias'"):
        save_minigpt5(wide, tmp_path / "new")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=r"text_model\.language_model\..*\.[qk]_proj")
    with pytest.raises(ValueError, match=r"has no place for .*k_proj"):
        save_minigpt5(get_peft_model(model, lora), tmp_path / "new")
    assert not (tmp_path / "new").exists()


SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide it to "
    "you. Please understanding images and generate story."
)


def test_prompts_are_put_as_the_checkpoints_were_trained(files, tmp_path):
    _, processor = load(files[0], "stage1")
    processor.save_pretrained(tmp_path)
    processor = VokenProcessor.from_pretrained(tmp_path)
    told, picture = lambda text: {"type": "text", "text": text}, {"type": "image", "image": Image.new("RGB", (8, 8))}
    begun = [told("text0"), picture, told("text1"), picture]
    history = "text0<Img><ImageHere></Img>text1<Img><ImageHere></Img>\n"
    shown = [told(STORY_PROMPTS["text"]), picture]
    user = lambda *content: [{"role": "user", "content": [*content]}]  # noqa: E731
    # (arXiv 2310.02239, the released `dataloader.py`: a story's tasks at the first and at a later scene, and a dialogue)
    prompts = {
        f"{SYSTEM}###Human: Generate an image with the scene description: a cat ###Assistant:": user(
            told(STORY_PROMPTS["image"].format(text="a cat"))
        ),
        f"{SYSTEM}###Human:{history} Tell me the next scene with image. ###Assistant:": user(
            *begun, told(STORY_PROMPTS["multimodal"])
        ),
        f"{SYSTEM}###Human:{history} Tell me the next scene description by this image: <Img><ImageHere></Img> "
        "###Assistant:": user(*begun, *shown),
        f"{MINIGPT5_DIALOGUE_SYSTEM}###Human: hi ###Assistant: yes <Img><ImageHere></Img> ###Human: and? ###Assistant:": [
            {"role": "system", "content": MINIGPT5_DIALOGUE_SYSTEM},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [told("yes "), picture]},
            {"role": "user", "content": "and?"},
        ],
    }
    for expected, messages in prompts.items():
        assert processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "<s>" + expected
    # Where a picture is read there are as many places as queries of the Q-Former, and a target ends with ###.
    inputs = processor.apply_chat_template(
        user(*begun, *shown), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert (inputs["input_ids"] == VOCABULARY + 8).sum() == 3 * 4 and len(inputs["pixel_values"]) == 3
    collator = VokenDataCollator(processor)
    ids = collator([{"kind": "text_to_image", "text": "a", "image": picture["image"]}])["input_ids"][0]
    assert ids[-12:].tolist() == [*range(VOCABULARY, VOCABULARY + 8), *processor.tokenizer(" ###").input_ids]
