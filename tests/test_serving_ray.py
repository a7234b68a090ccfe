"""The server by Ray Serve and pictures by Ray Data, in two processes on a CPU; skipped where there is no Ray."""

import base64
import io
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from tiny import tiny_checkpoint

from transformers_liquid import LiquidForCausalLM, LiquidImageGenerationPipeline, LiquidProcessor


ray, httpx, openai = (pytest.importorskip(library) for library in ("ray", "httpx", "openai"))
serve, data = pytest.importorskip("ray.serve"), pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow
KEY = "a key"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    model, processor = LiquidForCausalLM.from_pretrained(checkpoint), LiquidProcessor.from_pretrained(checkpoint)
    pipe = LiquidImageGenerationPipeline(model, processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cluster():
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}  # of a busy machine
    new = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
    ray.init(**({} if "RAY_ADDRESS" in os.environ else new))  # or a cluster that runs already
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster, checkpoint):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    from transformers_liquid.serving.ray import app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    # As the command `serve run` has them.
    arguments = {"model": checkpoint, "num_replicas": "2", "slots": "4", "max_waiting": "12", "api_key": KEY}
    serve.run(build(app, arguments))
    return f"http://127.0.0.1:{port}"


def client_of(url, **kwargs):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120, **kwargs)


def pictures_of(answer):
    return [Image.open(io.BytesIO(base64.b64decode(one.b64_json))).tobytes() for one in answer.data]


def drawn_by(pipe, **settings):
    return [image.tobytes() for image in pipe("red", **settings)]


def processes():
    from ray._private.state import actors

    found = (one for one in actors().values() if "ServeReplica" in one["ActorClassName"] and one["State"] == "ALIVE")
    return {one["Pid"] for one in found}


def test_two_replicas_answer_as_one_server_does(url, pipe):
    client = client_of(url)

    def ask(seed):
        return pictures_of(client.images.generate(prompt="red", n=2, size="8x12", extra_body={"seed": seed}))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(0, 32, 2)))
    for index in (0, 5, 15):
        assert answers[index] == drawn_by(pipe, num_images_per_prompt=2, width=8, height=12, seed=2 * index)
    assert len(processes()) == 2
    events = list(client.images.generate(prompt="red", stream=True, partial_images=2, extra_body={"seed": 1}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).images.generate(prompt="red")
    with pytest.raises(openai.BadRequestError, match="n: Input should be"):
        client.images.generate(prompt="red", n=100)


def test_what_a_killed_replica_was_asked_for_is_asked_for_again(url, pipe):
    before, sent = processes(), []
    http_client = httpx.Client(event_hooks={"request": [lambda request: sent.append(request)]})
    client = client_of(url, http_client=http_client, max_retries=20)

    def ask(seed):
        return pictures_of(client.images.generate(prompt="red", size="16x16", extra_body={"seed": seed}))

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, seed) for seed in range(48)]
        asked[4].result()
        os.kill(min(before), signal.SIGKILL)
        answers = [one.result() for one in asked]
    assert answers == [drawn_by(pipe, width=16, height=16, seed=seed) for seed in range(48)]
    assert min(before) not in processes()


def test_a_data_set_is_drawn_in_batches(cluster, checkpoint, pipe):
    from transformers_liquid.serving.ray import DrawBatch

    records = [{"prompt": "red", "seed": seed, "kept": seed * 2} for seed in range(12)]
    pool = data.ActorPoolStrategy(size=2)
    options = {"fn_constructor_args": [checkpoint], "fn_constructor_kwargs": {"guidance_scale": 2.0}}
    drawn = data.from_items(records).map_batches(DrawBatch, batch_size=4, compute=pool, **options).take_all()
    for record in sorted(drawn, key=lambda one: one["seed"]):
        image = Image.open(io.BytesIO(record["image"]))
        assert [image.tobytes()] == drawn_by(pipe, seed=record["seed"], guidance_scale=2.0)
        assert record["kept"] == 2 * record["seed"]
    with pytest.raises(ValueError, match="Each record needs a seed"):
        DrawBatch(checkpoint)({"prompt": ["red"]})
