"""The measures of MiniGPT-5 (arXiv 2310.02239, section 4.2) for texts and pictures by turns.

Encoders are those of transformers, by name. The paper's are `openai/clip-vit-large-patch14` for CLIP-I and CLIP-T,
`openai/clip-vit-base-patch32` for MM-Relevance, `sentence-transformers/all-MiniLM-L6-v2` for S-BERT, and torchvision's
Inception for FID, whose features [`story_fid`] takes from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from .pictures import frechet_distance


class ClipEncoder:
    """Texts and pictures as vectors of length 1, by a CLIP of transformers.

    Args:
        name (`str`): A folder or a name on the Hub.
    """

    def __init__(self, name: str) -> None:
        self.model, self.processor = AutoModel.from_pretrained(name).eval(), AutoProcessor.from_pretrained(name)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        inputs = self.processor(images=list(images), return_tensors="pt")
        return normalize(self.model.get_image_features(**inputs).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self.processor(text=list(texts), padding=True, truncation=True, return_tensors="pt")
        return normalize(self.model.get_text_features(**inputs).pooler_output)


class SentenceEncoder:
    """Texts as vectors of length 1, the mean over the last states of their tokens, as S-BERT's.

    Args:
        name (`str`): A folder or a name on the Hub.
    """

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        return normalize((self.model(**inputs).last_hidden_state * mask).sum(1))


def mean_similarity(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """CLIP-I of pictures drawn and true, CLIP-T of pictures and texts, S-BERT of texts: the mean cosine of pairs (N, d)."""
    return cosine_similarity(drawn, true).mean().item()


def story_fid(stories: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The paper's FID of VIST: that of each story's few pictures, drawn and true, and the mean over stories."""
    return sum(frechet_distance(*story) for story in stories) / len(stories)


def rouge_l(written: str, true: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004); case and punctuation do not count."""
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (written, true))
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = lengths
        lengths = [0]
        for index, match in enumerate(other):
            lengths.append(before[index] + 1 if word == match else max(before[index + 1], lengths[-1]))
    return 2 * lengths[-1] / (len(one) + len(other)) if one and other else 0.0


def mm_relevance(
    dialogues: Sequence[Sequence[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]]],
) -> dict[str, float]:
    """MM-Relevance (MMDialog, arXiv 2211.05719): are texts and pictures there where they should be, and alike?

    Args:
        dialogues: For each turn of each dialogue what was answered and what is true: vectors of length 1 by `"text"`
            and `"image"`, of what there is.

    Returns:
        `dict`: `precision`, the similarity of what was answered, 0 where nothing was asked for; `recall`, of what is true,
        0 where it is missing; and `f1`; each the mean over dialogues.
    """
    scores = []
    for turns in dialogues:
        pairs = [(answered.get(kind), true.get(kind)) for answered, true in turns for kind in ("text", "image")]
        total = sum(float(one @ other) for one, other in pairs if one is not None and other is not None)
        answered, asked = (sum(pair[side] is not None for pair in pairs) for side in (0, 1))
        precision, recall = (total / number if number else 0.0 for number in (answered, asked))
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        scores.append((precision, recall, f1))
    return dict(zip(("precision", "recall", "f1"), torch.tensor(scores).mean(0).tolist(), strict=True))
