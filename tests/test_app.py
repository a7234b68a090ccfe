"""The page of `transformers-liquid app`: what its tabs do, and all of it in a browser."""

import os
import time

import pytest
from PIL import Image
from transformers import set_seed

from transformers_liquid import LiquidConversation
from transformers_liquid_cli.models import load
from transformers_liquid_cli.pictures import read_metadata


pytest.importorskip("gradio")

import gradio

from transformers_liquid_cli.page import Page


CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def page():
    return Page(load(None, "cpu", "float32"), None)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return str(path)


def test_pictures_grow_and_are_those_of_the_pipeline_with_their_records(page):
    *partial, (files, seed) = page.draw("red apple", 3, 2, {"guidance_scale": 3.0, "top_k": None})
    expected = page.pipe("red apple", seed=3, num_images_per_prompt=2, guidance_scale=3.0)
    grey = [images[0].tobytes().count(bytes([128] * 24)) for images, _ in partial]
    assert seed == 3 and len(partial) >= 7 and grey == sorted(grey, reverse=True) and grey[0] > grey[-1]
    assert [Image.open(file).tobytes() for file in files] == [image.tobytes() for image in expected]
    record = read_metadata(files[1])
    assert (record["prompt"], record["seed"], record["settings"]["guidance_scale"]) == ("red apple", 4, 3.0)


def test_another_seed_is_drawn_where_none_is_kept(page):
    seeds = {[*page.draw("cat", None, 1, {})][-1][1] for _ in range(3)}
    assert len(seeds) == 3


def test_a_picture_is_edited_as_the_pipeline_edits_it(page, picture):
    ((file,), _) = [*page.draw("in blue", 0, 1, {}, picture)][-1]
    assert Image.open(file).tobytes() == page.pipe("in blue", image=picture, seed=0)[0].tobytes()


def test_answers_grow_to_what_describe_prints(page, picture, capsys):
    from transformers_liquid_cli import main

    for question in ("", "what colour?"):
        *_, answer = page.ask(picture, question)
        main(["describe", picture, *([question] if question else [])])
        assert answer == capsys.readouterr().out.strip()


def test_a_story_is_that_of_a_conversation_and_goes_on(page, picture):
    begin = {"text": "once there was a cat.", "files": [picture]}
    set_seed(0)
    *_, (messages, shown, field) = page.tell(begin, [], [], 1)
    asked = messages[0]
    set_seed(0)
    reply = LiquidConversation(page.pipe.model, page.pipe.processor)([asked], max_images=1, max_new_tokens=256)
    kinds = [part["type"] for part in messages[1]["content"]]
    assert field is None and kinds == [part["type"] for part in reply]
    assert [part.get("text") for part in messages[1]["content"]] == [part.get("text") for part in reply]
    assert [bubble["role"] for bubble in shown] == ["user", "user", *["assistant"] * len(kinds)]
    *_, (messages, longer, _) = page.tell({"text": "and a dog.", "files": []}, messages, shown, 1)
    assert [message["role"] for message in messages[:3]] == ["user", "assistant", "user"]
    assert longer[: len(shown)] == shown and longer[len(shown)]["content"] == "and a dog."


def test_what_is_wrong_is_said_before_anything_is_drawn(page, picture):
    def check(work, message):
        with pytest.raises(ValueError, match=message):
            next(work)

    check(page.draw("", 0, 1, {}), "empty")
    check(page.draw("cat", 0, 1, {"guidance_scale": -1.0}), "guidance_scale must be")
    check(page.draw("cat", 0, 1, {"height": 33}), "multiples of 8")
    check(page.draw("cat", 0, 1, {}, None), "Choose the picture")
    check(page.ask(None, "what?"), "Choose the picture")
    check(page.tell({"text": " ", "files": []}, [], [], 1), "Write how it begins")
    check(page.tell({"text": "a <boi> cat", "files": []}, [], [], 1), "boi")


def test_closing_a_drawing_stops_the_model_within_a_step(page):
    steps = []
    hook = page.pipe.model.model.text_model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.01)))
    drawing = page.draw("cat", 0, 1, {})
    next(drawing)
    drawing.close()
    number = len(steps)
    time.sleep(0.3)
    hook.remove()
    assert number == len(steps) < 40


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="no Chromium")
def test_the_page_draws_in_a_browser_stops_and_asks_no_other_host(page):
    api = pytest.importorskip("playwright.sync_api")
    steps, hosts, complaints = [], set(), []
    hook = page.pipe.model.model.text_model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.15)))
    _, url, _ = page.launch("127.0.0.1", 0, prevent_thread_lock=True, quiet=True)
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page()
            tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            tab.on("console", lambda message: complaints.extend([message.text] * (message.type == "error")))
            tab.goto(url)
            tab.get_by_label("What to draw").fill("red apple")
            tab.get_by_role("button", name="Draw", exact=True).click()
            tab.locator("button img").first.wait_for()
            first = tab.locator("button img").first.get_attribute("src")
            tab.wait_for_function("src => document.querySelector('button img')?.src != src", arg=first)  # it grows
            tab.get_by_role("button", name="Stop", exact=True).first.click()
            number = -1
            while number < len(steps):
                number = len(steps)
                tab.wait_for_timeout(1000)
            assert number < 60
            tab.get_by_label("What to draw").fill("")
            tab.get_by_role("button", name="Draw", exact=True).click()
            tab.get_by_text("prompt 0 is empty").wait_for()
            browser.close()
    finally:
        hook.remove()
        gradio.close_all()
    assert hosts == {url.split("/")[2]} and not complaints
