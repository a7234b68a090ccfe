"""The paper's measures, on cases that are small enough to be done by hand."""

import math

import pytest
import torch
from PIL import Image
from tiny import tiny_tokenizer
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from transformers_liquid.evaluation.voken_measures import (
    ClipEncoder,
    SentenceEncoder,
    frechet_distance,
    mean_similarity,
    mm_relevance,
    rouge_l,
    story_fid,
)


EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
BETWEEN = torch.tensor([0.6, 0.8])


def test_similarity_is_the_mean_cosine_of_pairs():
    drawn, true = torch.stack([EAST, 3 * NORTH, BETWEEN]), torch.stack([5 * EAST, EAST, EAST])
    assert mean_similarity(drawn, true) == pytest.approx((1 + 0 + 0.6) / 3)


def test_the_distance_of_gaussians_is_that_of_their_means_and_spreads():
    one = torch.tensor([[-1.0], [1.0]])  # mean 0, variance 2
    other = torch.tensor([[1.0], [5.0]])  # mean 3, variance 8
    assert frechet_distance(one, other) == pytest.approx(9 + 2 + 8 - 2 * math.sqrt(16))
    # Axes apart: each adds its own.
    square = torch.tensor([[-1.0, -2.0], [-1.0, 2.0], [1.0, -2.0], [1.0, 2.0]])  # variances 4/3 and 16/3
    wide = square * torch.tensor([3.0, 1.0]) + torch.tensor([0.0, 1.0])
    assert frechet_distance(square, wide) == pytest.approx(1 + 4 / 3 * (1 + 9 - 6), rel=1e-6)
    assert frechet_distance(square, square) == pytest.approx(0, abs=1e-6)
    # Few pictures of many features, as five of a story, and a mean over stories
    few = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(few, few + 1) == pytest.approx(20, rel=1e-4)
    assert story_fid([(one, other), (square, square)]) == pytest.approx((19 - 8) / 2)


@pytest.mark.parametrize(
    "written, true, expected",
    [
        ("the cat sat", "The cat sat!", 1.0),
        ("the cat", "the big cat sat", 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),
        ("sat cat the", "the cat sat", 1 / 3),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_rouge_l_is_of_the_longest_common_subsequence(written, true, expected):
    assert rouge_l(written, true) == pytest.approx(expected)


def test_relevance_counts_what_is_alike_against_what_was_answered_and_what_was_asked():
    # Turn 1: text alike by 0.6, a picture that is missing. Turn 2: a text the same, a picture that nobody asked for.
    first = [({"text": BETWEEN}, {"text": EAST, "image": NORTH}), ({"text": EAST, "image": EAST}, {"text": EAST})]
    precision, recall = 1.6 / 3, 1.6 / 3
    second = [({"image": EAST}, {"text": EAST})]  # nothing is right
    scores = mm_relevance([first, second])
    assert scores["precision"] == pytest.approx(precision / 2) and scores["recall"] == pytest.approx(recall / 2)
    third = [({"text": EAST}, {"text": EAST, "image": EAST})]
    assert mm_relevance([third]) == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3})


def test_encoders_are_those_of_transformers(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 300, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = small | {"image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    clip.save_pretrained(tmp_path / "clip")
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = CLIPProcessor(images, tiny_tokenizer(model_max_length=20))
    processor.save_pretrained(tmp_path / "clip")
    encoder, picture, words = ClipEncoder(tmp_path / "clip"), Image.new("RGB", (8, 8), "red"), ["a cat</s>", "dog</s>"]
    inputs = processor(text=words, images=[picture] * 2, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(**inputs)
    torch.testing.assert_close(encoder.texts(words), expected.text_embeds)
    torch.testing.assert_close(encoder.images([picture] * 2), expected.image_embeds)

    bert = BertModel(BertConfig(vocab_size=300, **small)).eval()
    bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer(model_max_length=20).save_pretrained(tmp_path / "bert")
    encoder = SentenceEncoder(tmp_path / "bert")
    with torch.no_grad():
        alone = bert(**tiny_tokenizer()("dog", return_tensors="pt")).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder.texts(["a long cat", "dog"])[1], alone / alone.norm(), rtol=1e-4, atol=1e-5)
