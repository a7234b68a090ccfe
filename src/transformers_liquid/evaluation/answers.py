"""What an answer to a question about a picture is worth, by the rules of each benchmark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
# With all apostrophes. Each stands also for what it is without one of them.
_CONTRACTIONS = Path(__file__).with_name("contractions.txt").read_text(encoding="utf-8").split()
_APOSTROPHES = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS
    for index, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, as in the official table


def _without_marks(text: str) -> str:
    """Punctuation of VQA: away where the original has it beside a space, or a comma between digits; else a space."""
    has_comma, out = re.search(r"\d,\d", text) is not None, text
    for mark in _MARKS:
        is_loose = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if is_loose or has_comma else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official call gives a flag, 32, where the count belongs


def _plain_words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _in_a_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
    """The mean over people of min(1, how many of the *others* gave this answer / 3)."""
    same = sum(one == answer for one in given)
    return (same * min(1, (same - 1) / 3) + (len(given) - same) * min(1, same / 3)) / len(given)


def vqa_v2(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy by the official script (GT-Vision-Lab/VQA, `vqaEval.py`).

    Numbers, articles and contractions of the answer alone are made uniform, and the punctuation of the people's answers
    only where these differ: ten times "two" is no match for any answer.

    Args:
        answer (`str`): The model's.
        given (sequence of `str`): Those of ten people.
    """
    if len(set(given)) > 1:
        given = [_without_marks(one) for one in given]
    return soft_accuracy(_plain_words(_without_marks(_in_a_line(answer))), given)


def eval_ai(answer: str, given: Sequence[str]) -> float:
    """VQA accuracy as TextVQA's evaluation has it (`EvalAIAnswerProcessor` of facebookresearch/mmf): all eleven answers are
    made uniform alike. Arguments as in [`vqa_v2`]."""

    def uniform(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        return _plain_words(_without_marks(_in_a_line(text)))

    return soft_accuracy(uniform(answer), [uniform(one) for one in given])


def gqa_right(answer: str, true: str) -> bool:
    """The same words, but for case and a full stop at the end (LLaVA's conversion, then the official `eval.py`)."""
    return answer.rstrip(".").lower() == true


def pope_says_yes(answer: str) -> bool:
    """POPE's rule: whatever does not say no in its first sentence says yes (AoiDragon/POPE, `evaluate.py`)."""
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & {*words}


def mme_says(answer: str) -> str:
    """MME's rule: `"yes"`, `"no"`, or `"other"`, which is wrong whatever was asked."""
    text = answer.strip().lower().replace(".", "")
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")
