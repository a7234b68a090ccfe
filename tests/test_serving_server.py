"""The server: OpenAI's own client against a real socket, pictures of the pipeline, and everything that can be wrong."""

import base64
import importlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from tiny import BOI_ID, tiny_checkpoint, tiny_processor
from transformers import set_seed

from transformers_liquid import LiquidConversation, LiquidForCausalLM, LiquidImageGenerationPipeline
from transformers_liquid.serving.engine import PictureEngine


httpx, openai, uvicorn = (pytest.importorskip(library) for library in ("httpx", "openai", "uvicorn"))
for library in ("fastapi", "prometheus_client", "python_multipart"):
    pytest.importorskip(library)
module = importlib.import_module("transformers_liquid.serving.server")


KEY = "a key"
SEED_OF_A_PICTURE = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = LiquidImageGenerationPipeline(LiquidForCausalLM.from_pretrained(checkpoint), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():  # it begins a picture more often
        pipe.model.get_input_embeddings().weight[BOI_ID] *= 8
    return pipe


class Running:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, pipe, **kwargs):
        self.engine = PictureEngine(pipe, **kwargs)
        self.server = module.Server(self.engine, "tiny", KEY)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, log_level="critical"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(60)


@pytest.fixture(scope="module")
def running(pipe):
    running = Running(pipe, slots=4, max_waiting=40)
    yield running
    running.stop()
    assert not running.engine.is_alive


def decoded(content):
    return Image.open(io.BytesIO(base64.b64decode(content)))


def png(image):
    image.save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def data_url(image):
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pictures_are_those_of_the_pipeline(running, pipe):
    settings = {"guidance_scale": 3.0, "negative_prompt": "b", "temperature": 0.9, "top_k": 5, "top_p": 0.9}
    result = running.client.images.generate(
        model="tiny", prompt="red", n=2, size="12x8", response_format="b64_json", extra_body={"seed": 3, **settings}
    )
    expected = pipe("red", num_images_per_prompt=2, width=12, height=8, seed=3, **settings)
    assert [decoded(one.b64_json).tobytes() for one in result.data] == [image.tobytes() for image in expected]
    assert [one.seed for one in result.data] == [3, 4] and result.size == "12x8" and result.output_format == "png"
    usage = result.usage
    length = len(pipe.processor.image_prompt_ids("red", 8, 12))
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (length, 48, length + 48)


def test_formats_are_what_they_are_called(running, pipe):
    for output_format in ("webp", "jpeg"):
        result = running.client.images.generate(prompt="red", output_format=output_format, extra_body={"seed": 1})
        assert decoded(result.data[0].b64_json).format.lower() == output_format


def test_previews_are_streamed_before_the_pictures(running, pipe):
    stream = running.client.images.generate(prompt="red", n=2, stream=True, partial_images=2, extra_body={"seed": 5})
    events = list(stream)
    expected = pipe("red", num_images_per_prompt=2, seed=5)
    for index in range(2):
        own = [event for event in events if event.index == index]
        assert [event.type.partition(".")[2] for event in own] == ["partial_image"] * 2 + ["completed"]
        assert [event.partial_image_index for event in own[:2]] == [0, 1]
        assert decoded(own[2].b64_json).tobytes() == expected[index].tobytes()
        assert own[2].usage.output_tokens == 16 and own[2].size == "8x8" and own[2].created_at > 0


def test_edits_are_those_of_the_pipeline(running, pipe):
    pictures = pipe("x", num_images_per_prompt=2, seed=8)
    files = [("a.png", png(pictures[0])), ("b.png", png(pictures[1]))]
    extra = {"seed": 2, "guidance_scale": 2.5, "image_guidance_scale": 1.5}
    result = running.client.images.edit(image=files, prompt="in blue", n=1, extra_body=extra)
    expected = pipe("in blue", image=[pictures], **extra)
    assert decoded(result.data[0].b64_json).tobytes() == expected[0].tobytes()
    assert result.usage.input_tokens_details.image_tokens == 32
    events = list(running.client.images.edit(image=files[0], prompt="in blue", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_chat_reads_pictures_and_writes_text(running, pipe):
    picture = pipe("x", seed=8)[0]
    question = {"type": "text", "text": "what?"}
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture)}}, question]}]
    greedy = {"temperature": 0, "max_tokens": 12}
    reply = running.client.chat.completions.create(model="tiny", messages=asked, **greedy)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
    ids = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    written = pipe.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert reply.choices[0].message.content == pipe.processor.decode(written, skip_special_tokens=True)
    assert reply.choices[0].finish_reason in ("stop", "length")
    chunks = list(running.client.chat.completions.create(model="tiny", messages=asked, stream=True, **greedy))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason is not None


def test_chat_writes_and_draws_by_turns(running, pipe):
    asked = [{"role": "user", "content": "draw"}]
    settings = {"max_images": 1, "do_sample": True, "temperature": 0.9}
    set_seed(SEED_OF_A_PICTURE)
    expected = LiquidConversation(pipe.model, pipe.processor)(
        asked, seed=SEED_OF_A_PICTURE, max_new_tokens=16, **settings
    )
    body = {"messages": asked, "modalities": ["text", "image"], "seed": SEED_OF_A_PICTURE, "temperature": 0.9}
    body |= {"max_tokens": 16, "max_images": 1}
    choice = running.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    kinds = [part["type"] for part in expected]
    assert "image" in kinds and [part["type"] for part in choice["parts"]] == kinds
    (image,) = (part["image"] for part in expected if part["type"] == "image")
    assert decoded(choice["images"][0]["image_url"]["url"].partition(",")[2]).tobytes() == image.tobytes()
    assert choice["content"] == "".join(part.get("text", "") for part in expected)
    lines = running.http.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert [one for delta in deltas for one in delta.get("images", [])] == choice["images"] and lines[
        -2
    ] == "data: [DONE]"


def test_it_says_what_it_is_and_does(running):
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").owned_by == "transformers-liquid"
    assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
    running.client.images.generate(prompt="a")
    text = running.http.get("/metrics").text
    numbers = dict(line.split(" ") for line in text.splitlines() if line.startswith("liquid_") and "{" not in line)
    assert float(numbers["liquid_codes_total"]) >= 16 and float(numbers["liquid_steps_total"]) >= 15
    assert float(numbers["liquid_pictures_total"]) >= 1 and numbers["liquid_pictures_running"] == "0.0"


def bomb():
    """A small file of 10 gigapixels."""
    content = png(Image.new("1", (8, 8)))
    return content[:16] + (100_000).to_bytes(4, "big") * 2 + content[24:]


def chat_with(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (IMAGES, b"{", 400, "JSON"),
        (IMAGES, b"[]", 400, "dictionary"),
        (IMAGES, {}, 400, "prompt: Field required"),
        (IMAGES, {"prompt": 3}, 400, "prompt: Input should be a valid string"),
        (IMAGES, {"prompt": " "}, 400, "empty"),
        (IMAGES, {"prompt": "a" * 10**6}, 400, "prompt: String should have at most 32000 characters"),
        (IMAGES, {"prompt": "a" * 1000}, 400, "positions"),
        (IMAGES, {"prompt": "a <boi> b"}, 400, "reserved for images"),
        (IMAGES, {"prompt": "a", "n": 0}, 400, "n: Input should be greater than or equal to 1"),
        (IMAGES, {"prompt": "a", "n": 100}, 400, "n: Input should be less than or equal to 10"),
        (IMAGES, {"prompt": "a", "n": "2"}, 400, "n: Input should be a valid integer"),
        (IMAGES, {"prompt": "a", "n": True}, 400, "n: Input should be a valid integer"),
        (IMAGES, {"prompt": "a", "size": "8"}, 400, "size"),
        (IMAGES, {"prompt": "a", "size": "7x8"}, 400, "multiple"),
        (IMAGES, {"prompt": "a", "size": "80x80"}, 400, "larger than the 256 pixels"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, 400, "response_format"),
        (IMAGES, {"prompt": "a", "partial_images": 4}, 400, "partial_images"),
        (IMAGES, {"prompt": "a", "guidance_scale": 0.5}, 400, "guidance_scale must be"),
        (IMAGES, b'{"prompt": "a", "guidance_scale": NaN}', 400, "guidance_scale"),
        (IMAGES, {"prompt": "a", "seed": -1}, 400, "seed"),
        (IMAGES, {"prompt": "a", "steps": 3}, 400, "steps: Extra inputs are not permitted"),
        (IMAGES, {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
        ("/v1/images", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
        ("/v1/images/edits", {}, 400, "image: send"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "content"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": []}, 400, "tools: Extra inputs"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "positions"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}]},
            400,
            "text or image_url",
        ),
        (CHAT, chat_with("http://127.0.0.1:1/a.png"), 400, "nothing is fetched"),
        (CHAT, chat_with("file:///etc/passwd"), 400, "nothing is fetched"),
        (CHAT, chat_with("data:image/png;base64,!!!"), 400, "image_url"),
        (CHAT, chat_with("data:image/png;base64,AAAA"), 400, "image_url: A picture must be a PNG"),
        (CHAT, chat_with(f"data:image/png;base64,{base64.b64encode(bomb()).decode()}"), 400, "of a usual size"),
    ],
)
def test_bad_input_gets_its_status_and_one_sentence(running, path, body, status, said):
    drawn = running.engine.num_codes
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = running.http.post(path, content=content, headers={"Content-Type": "application/json"})
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and said in message and "\n" not in message and len(message) < 1100, message
    assert running.engine.num_codes == drawn


def test_bad_forms_are_refused(running):
    picture = ("a.png", png(Image.new("RGB", (8, 8))), "image/png")
    for files, data, said in [
        ({"image": picture, "mask": picture}, {"prompt": "a"}, "leave the mask out"),
        ({"image": ("a.png", b"no picture")}, {"prompt": "a"}, "must be a PNG"),
        ({"image": ("a.png", bomb())}, {"prompt": "a"}, "of a usual size"),
        ({"image": picture}, {"prompt": "a", "n": "many"}, "n: Input should be a valid integer"),
        ({"image": picture}, {}, "prompt: Field required"),
        ({"other": picture}, {"prompt": "a"}, "image: send one or several pictures"),
    ]:
        answer = running.http.post("/v1/images/edits", files=files, data=data)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_without_the_key_nothing_is_told_and_nothing_is_read(running):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer \xe9"}):
        for method, path in (("POST", IMAGES), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
            answer = httpx.request(
                method, running.url + path, headers={k: v.encode("latin-1") for k, v in headers.items()}
            )
            assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).images.generate(prompt="a")


@pytest.mark.parametrize("is_declared", [True, False])
def test_bodies_that_are_too_large_are_not_kept(running, is_declared, monkeypatch):
    monkeypatch.setattr(module, "MOST_BODY_BYTES", 10_000)
    content = b"a" * 50_000 if is_declared else (b"a" * 1000 for _ in range(50))
    try:
        answer = running.http.post(IMAGES, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "bytes" in answer.json()["error"]["message"]
    except httpx.WriteError:  # it hung up while we were sending
        assert is_declared


def test_a_client_that_goes_away_frees_its_slots(running):
    for stream in (True, False):
        body = {"prompt": "a", "n": 10, "size": "16x16", "stream": stream, "partial_images": 3}
        done = running.engine.num_pictures
        with (
            httpx.Client(base_url=running.url, headers=running.http.headers) as client,
            pytest.raises(httpx.ReadTimeout),
        ):
            client.post(IMAGES, json=body, timeout=0.3) if not stream else read_slowly(client, body)
        wait_for(lambda: not running.engine.running and not running.engine.waiting)
        assert running.engine.num_pictures - done < 10


def read_slowly(client, body):
    with client.stream("POST", IMAGES, json=body) as answer:
        next(answer.iter_lines())
        raise httpx.ReadTimeout("enough")


def test_who_reads_slowly_holds_up_nobody(running):
    body = {"prompt": "a", "n": 10, "stream": True, "partial_images": 3}
    with running.http.stream("POST", IMAGES, json=body) as answer:
        assert len(running.client.images.generate(prompt="b", n=3).data) == 3
        wait_for(lambda: not running.engine.running)
        names = [line for line in answer.iter_lines() if line.startswith("event: ")]
    assert sorted(names) == ["event: image_generation.completed"] * 10 + ["event: image_generation.partial_image"] * 30


def test_a_full_queue_says_when_to_come_again(pipe):
    running = Running(pipe, slots=1, max_waiting=2)
    goes_on, step = threading.Event(), running.engine._step
    running.engine._step = lambda: goes_on.wait(60) and step()
    with ThreadPoolExecutor(2) as others:
        first = others.submit(running.client.images.generate, prompt="a")
        wait_for(lambda: running.engine.running)
        second = others.submit(running.client.images.generate, prompt="a", n=2)
        wait_for(lambda: len(running.engine.waiting) == 2)
        with pytest.raises(openai.RateLimitError, match="2 pictures are waiting already") as caught:
            running.client.images.generate(prompt="a")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        goes_on.set()
        assert len(first.result().data) == 1 and len(second.result().data) == 2
    running.stop()


def test_chats_beyond_those_that_may_wait_are_told_to_come_again(running, monkeypatch):
    monkeypatch.setattr(running.server, "chats", module.MOST_CHATS + 1)
    answer = running.http.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_it_asks_no_other_host(running, pipe):
    hosts, is_watched = set(), True

    def watch(name, arguments):
        if is_watched and name in ("socket.connect", "socket.getaddrinfo"):
            address = arguments[1] if name == "socket.connect" else arguments
            hosts.add(address[0])

    sys.addaudithook(watch)  # for good: hooks cannot be taken off
    fresh = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    fresh.images.generate(prompt="red", n=2)
    fresh.images.edit(image=("a.png", png(pipe("x", seed=8)[0])), prompt="in blue")
    fresh.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=4)
    running.http.post(CHAT, json=chat_with("http://example.com/a.png"))
    is_watched = False
    assert hosts == {"127.0.0.1"}


def load_of(running, pipe, number, clients, seed=0):
    """So many requests of all kinds by so many clients at once, some of which go away; how many were answered."""
    chance = random.Random(seed)
    sizes = ("auto", "8x8", "12x4", "4x8")
    asked = [
        {"prompt": chance.choice(("a", "red", "a longer prompt")), "n": chance.choice((1, 1, 2)), "seed": index}
        | {"size": chance.choice(sizes), "guidance_scale": chance.choice((1.0, 2.0, 5.0))}
        | {"temperature": chance.choice((0.5, 1.0)), "stream": chance.random() < 0.3}
        for index in range(number)
    ]

    def ask(index):
        body = asked[index]
        if index % 10 == 9:  # goes away
            large = body | {"n": 10, "size": "16x16", "stream": False}
            with pytest.raises(httpx.ReadTimeout):
                while running.http.post(IMAGES, json=large, timeout=0.05).status_code == 429:
                    time.sleep(0.05)
            return None
        if index % 10 == 8:
            return running.http.post(IMAGES, json=body | {"n": 0}).status_code
        while True:
            answer = running.http.post(IMAGES, json=body)
            if answer.status_code != 429:
                break
            time.sleep(0.05)
        assert answer.status_code == 200, answer.text
        if not body["stream"]:
            return [decoded(one["b64_json"]).tobytes() for one in answer.json()["data"]]
        messages = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        return [decoded(one["b64_json"]).tobytes() for one in sorted(messages, key=lambda one: one["index"])]

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(number)))
    for index in chance.sample([one for one in range(number) if one % 10 < 8], number // 5):
        body = dict(asked[index])
        size, number_of, _ = body.pop("size"), body.pop("n"), body.pop("stream")
        width, height = (None, None) if size == "auto" else map(int, size.split("x"))
        expected = pipe(body.pop("prompt"), num_images_per_prompt=number_of, width=width, height=height, **body)
        assert answers[index] == [image.tobytes() for image in expected], asked[index]
    assert all(answers[index] == 400 for index in range(8, number, 10))
    wait_for(lambda: not running.engine.running and not running.engine.waiting)
    return sum(isinstance(answer, list) for answer in answers)


def test_a_mixed_load_is_answered_right_and_none_is_lost(running, pipe):
    assert load_of(running, pipe, number=60, clients=8) == 48


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads what Linux says of memory")
def test_memory_is_flat_under_a_long_load(running, pipe):
    load_of(running, pipe, number=50, clients=16, seed=1)
    before = resident()
    assert load_of(running, pipe, number=200, clients=16, seed=2) == 160
    assert resident() - before < 30e6


@pytest.mark.slow
def test_sigterm_finishes_what_runs(checkpoint):
    command = [sys.executable, "-m", "transformers_liquid", "serve", checkpoint, "--device", "cpu", "--port", "0"]
    environment = os.environ | {"TRANSFORMERS_LIQUID_API_KEY": KEY}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url, _, said = process.stdout.readline().partition("/v1 ")
            assert said.startswith("serves ")
            client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

            def is_there():
                try:
                    return client.get("/health").status_code == 200
                except httpx.ConnectError:
                    return False

            wait_for(is_there, 60)
            with ThreadPoolExecutor(1) as other:
                answer = other.submit(client.post, IMAGES, json={"prompt": "a", "n": 10, "size": "16x16"})
                wait_for(lambda: client.get("/health").json()["running"])
                process.send_signal(signal.SIGTERM)
                assert len(answer.result().json()["data"]) == 10
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
