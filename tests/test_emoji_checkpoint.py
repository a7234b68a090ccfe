"""The trained checkpoint inside the package, drawn from and asked for names.

`emoji_codes.json` holds the codes that the checkpoint's codec gives 64 emoji of `emoji-datasource-google` (artwork: Noto
Emoji, Apache-2.0), 48 seen in training and 16 unseen compositions, as examples/emoji/evaluate.py computes them.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

from transformers_liquid import EMOJI_CHECKPOINT


CODES = json.loads((Path(__file__).parent / "emoji_codes.json").read_text(encoding="utf-8"))
SEEN, UNSEEN = list(CODES["seen"]), list(CODES["unseen_composition"])


@pytest.fixture(scope="module")
def pipe():
    return pipeline("text-to-image", progress_bar=False)  # the default: nothing but the package is needed


def nearest_names(pipe, pictures: torch.Tensor) -> list[str]:
    """The name of the emoji, of 64, whose reconstruction is nearest to each picture `(N, 3, 64, 64)` in [0, 1]."""
    codes = torch.tensor([*CODES["seen"].values(), *CODES["unseen_composition"].values()]).view(-1, 8, 8)
    known = (pipe.model.model.vq_model.decode_codes(codes).clamp(-1, 1) + 1) / 2
    names = SEEN + UNSEEN
    return [names[index] for index in torch.cdist(pictures.flatten(1), known.flatten(1)).argmin(1).tolist()]


def test_it_draws_what_it_is_asked_for(pipe):
    prompts = SEEN[::2]
    pictures = pipe(prompts, seed=0, output_type="pt")
    assert pictures.shape == (24, 3, 64, 64)
    right = sum(found == asked for found, asked in zip(nearest_names(pipe, pictures), prompts, strict=True))
    assert right >= 20  # chance: 0.4 of 24


def test_it_draws_compositions_that_it_never_saw(pipe):
    pictures = pipe(UNSEEN, seed=0, output_type="pt")
    right = sum(found == asked for found, asked in zip(nearest_names(pipe, pictures), UNSEEN, strict=True))
    assert right >= 8  # chance: 0.25 of 16


def test_it_draws_from_words_that_people_use(pipe):
    prompts = {
        "a picture of a bird": "bird",
        "cheese": "cheese wedge",
        "draw a mosquito please": "mosquito",
        "a trophy": "trophy",
        "the flag of senegal": "senegal flag",
        "show me an oil drum": "oil drum",
        "female artist": "woman artist",
        "a dark-skinned pregnant woman": "pregnant woman: dark skin tone",
        "french bread": "baguette bread",
        "a house": "house building",
    }
    pictures = pipe(list(prompts), seed=0, output_type="pt")
    right = sum(found == asked for found, asked in zip(nearest_names(pipe, pictures), prompts.values(), strict=True))
    assert right >= 7  # chance: 0.2 of 10


@pytest.mark.slow
def test_it_edits(pipe):
    asked = {name: name.rpartition(": ")[2] for name in SEEN if name.count("skin tone") == 1}
    source = {name: pipe(name.rpartition(": ")[0], seed=1)[0] for name in asked}
    pictures = torch.cat(
        [pipe(f"with {tone}", image=source[name], seed=0, output_type="pt") for name, tone in asked.items()]
    )
    right = sum(found == name for found, name in zip(nearest_names(pipe, pictures), asked, strict=True))
    assert right >= len(asked) / 2  # chance: one in 64


def test_it_tells_stories_with_pictures(pipe):
    inputs = pipe.processor(text=["once there was a bird."] * 4, generation_mode="interleaved")
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"max_images": 3, "max_new_tokens": 60, "do_sample": False, "generator": generators}
    output = pipe.model.generate(**inputs, generation_mode="interleaved", **options)
    stories = pipe.processor.post_process_multimodal_output(output, generation_mode="interleaved", output_type="pt")
    for parts in stories:
        kinds = [part["type"] for part in parts]
        assert kinds[:3] == ["image", "text", "image"] and parts[-1]["text"].strip() == "the end."
    first = torch.stack([parts[0]["image"] for parts in stories])
    assert nearest_names(pipe, first).count("bird") >= 2


def test_the_same_seed_draws_the_same_picture_whatever_the_batch(pipe):
    alone = pipe("red apple", seed=5)[0]
    assert alone.size == (64, 64)
    assert pipe("red apple", seed=5)[0].tobytes() == alone.tobytes()
    torch.testing.assert_close(
        pipe(["dog face", "red apple"], seed=[1, 5], output_type="pt")[1],
        pipe("red apple", seed=5, output_type="pt")[0],
    )


def test_it_names_pictures(pipe):
    prompts = torch.tensor([pipe.processor.caption_ids(CODES["seen"][name]) for name in SEEN])
    ids = pipe.model.generate(prompts, max_new_tokens=40)
    written = pipe.processor.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    assert sum(text == name for text, name in zip(written, SEEN, strict=True)) >= 40  # of 48


def test_the_auto_classes_load_it_whole():
    model = AutoModelForCausalLM.from_pretrained(EMOJI_CHECKPOINT)
    processor = AutoProcessor.from_pretrained(EMOJI_CHECKPOINT)
    processor.check_fits(model.config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert Path(EMOJI_CHECKPOINT, "model.safetensors").stat().st_size <= 24e6
