"""A model behind OpenAI's HTTP API: pictures, edits and chat with text and pictures, in one process.

What is asked for is checked and refused in the words of the library. Nothing is ever fetched: pictures come as data.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.utils import logging

from ..models.liquid.image_processing_liquid import load_image
from ..pipelines.conversation import Cancelled, LiquidConversation, add_event
from .engine import EngineFullError, PictureEngine, PictureEvent, PictureRequest


logger = logging.get_logger(__name__)

# Of one request.
MOST_PICTURES, MOST_PARTIAL, MOST_CHARACTERS, MOST_MESSAGES = 10, 3, 32_000, 256
MOST_BODY_BYTES = 2**26
# A picture that is sent may have so many pixels, and one that is drawn so many times those of the model's size.
MOST_PIXELS, LARGEST = 2**25, 4
# Chats that may wait; of connections the server holds no more than this.
MOST_CHATS, MOST_CONNECTIONS = 16, 512

IGNORED = Field(None, description="Accepted from OpenAI's clients, of no effect.")
Text = Field(max_length=MOST_CHARACTERS)


class _Body(BaseModel):
    """What is not known is refused, and so is text in place of numbers, but for forms, which have nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    user: str | None = IGNORED
    seed: int | None = Field(None, ge=0, lt=2**32 - MOST_PICTURES)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    stream: bool | None = False


class Drawing(_Body):
    """The body of `/v1/images/generations`, and the form of `/v1/images/edits`."""

    prompt: str = Text
    n: int | None = Field(1, ge=1, le=MOST_PICTURES)
    size: str | None = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    partial_images: int | None = Field(0, ge=0, le=MOST_PARTIAL)
    quality: Literal["auto"] | None = "auto"
    background: Literal["auto", "opaque"] | None = "auto"
    moderation: str | None = IGNORED
    negative_prompt: str | None = Field(None, max_length=MOST_CHARACTERS)
    guidance_scale: float | None = None
    guidance_min_p: float | None = None
    image_guidance_scale: float | None = None
    top_k: int | None = Field(None, ge=1)

    def settings(self) -> dict[str, Any]:
        """What the engine is asked for."""
        names = (
            "negative_prompt",
            "guidance_scale",
            "guidance_min_p",
            "image_guidance_scale",
            "top_k",
            "top_p",
            "seed",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.temperature is not None:
            given |= {"temperature": self.temperature} if self.temperature else {"do_sample": False}
        if self.size not in (None, "auto"):
            given["width"], given["height"] = map(int, self.size.split("x"))
        return given | {"num_images_per_prompt": self.n or 1, "partial_images": self.partial_images or 0}


class Chat(_Body):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    n: Literal[1] | None = 1
    modalities: list[Literal["text", "image"]] | None = None
    max_images: int | None = Field(None, ge=1, le=MOST_PICTURES)


class Server:
    """The routes around one model.

    Args:
        engine ([`PictureEngine`]): Draws; it is closed with the server.
        name (`str`): What clients call the model.
        api_key (`str`, *optional*): What they must know.
    """

    def __init__(self, engine: PictureEngine, name: str, api_key: str | None = None) -> None:
        self.engine, self.name, self.pipe = engine, name, engine.pipe
        self.converse = LiquidConversation(self.pipe.model, self.pipe.processor)
        self.layout = self.pipe.model.config.image_layout
        self.created, self.chats, self.chatting = int(time.time()), 0, asyncio.Lock()
        self.answers: set[asyncio.Task] = set()  # else they might be collected
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.seconds = Histogram(
            "liquid_request_seconds", "From the request to its last byte", ["route"], registry=self.registry
        )
        app = FastAPI(title="transformers-liquid", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/images/generations")(self.generations)
        app.post("/v1/images/edits")(self.edits)
        app.post("/v1/chat/completions")(self.chat)
        for kind in (RequestValidationError, StarletteHTTPException, EngineFullError, ValueError, OSError, Exception):
            app.add_exception_handler(kind, _answer_error)
        self.app = _Gate(app, api_key)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)

    # About itself

    async def health(self) -> dict[str, Any]:
        if not self.engine.is_alive:
            raise HTTPException(503, "The picture engine has ended.")
        return {"status": "ok", "running": len(self.engine.running), "waiting": len(self.engine.waiting)}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "transformers-liquid"}

    async def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def collect(self) -> list[Any]:
        """The engine's numbers, for prometheus."""
        engine = self.engine
        return [
            GaugeMetricFamily("liquid_pictures_running", "Pictures that are drawn now", len(engine.running)),
            GaugeMetricFamily("liquid_pictures_waiting", "Pictures that wait for a slot", len(engine.waiting)),
            GaugeMetricFamily("liquid_chats", "Chats that are answered or wait", self.chats),
            CounterMetricFamily("liquid_codes", "Codes drawn", engine.num_codes),
            CounterMetricFamily("liquid_steps", "Forwards of one code of each running picture", engine.num_steps),
            CounterMetricFamily("liquid_pictures", "Pictures drawn", engine.num_pictures),
            CounterMetricFamily(
                "liquid_picture_seconds", "Seconds they took, from slot to picture", engine.num_seconds
            ),
        ]

    # Pictures

    async def generations(self, body: Drawing, http: Request) -> Response:
        return await self._draw(body, http, "image_generation")

    async def edits(self, http: Request) -> Response:
        async with http.form(max_files=MOST_PICTURES, max_fields=64) as form:
            if "mask" in form:
                raise ValueError("mask: the whole picture is drawn anew from the prompt; leave the mask out.")
            files = [*form.getlist("image"), *form.getlist("image[]")]
            if not files or not all(isinstance(file, UploadFile) for file in files):
                raise ValueError("image: send one or several pictures as files.")
            pictures = [_picture(await file.read()) for file in files]
            fields = {name: value for name, value in form.items() if name not in ("image", "image[]")}
        body = Drawing.model_validate(fields, strict=False)
        return await self._draw(body, http, "image_edit", image=[pictures])

    async def _draw(self, body: Drawing, http: Request, kind: str, **context: Any) -> Response:
        """`kind` is how events are called."""
        self._check_model(body.model)
        settings, told = body.settings(), _Told(http)
        most = LARGEST * self.layout.image_size**2
        if settings.get("width", 1) * settings.get("height", 1) > most:
            raise ValueError(f"size: a picture of {body.size} is larger than the {most:,} pixels that are drawn here.")
        begin = time.monotonic()
        asked = await asyncio.to_thread(self.engine.submit, body.prompt, tell=told.put, **settings, **context)
        height, width = self.layout.size(self.layout.grid(settings.get("height"), settings.get("width")))
        shown = {"size": f"{width}x{height}", "quality": "auto", "background": "opaque"}
        shown["output_format"] = body.output_format or "png"

        async def events() -> AsyncIterator[tuple[PictureEvent, dict[str, Any]]]:
            try:
                left, partial = asked.num_pictures, {}
                while left:
                    event = await told.next()
                    if event.error is not None:
                        raise HTTPException(500, f"The picture could not be drawn: {event.error}")
                    content = await asyncio.to_thread(_encoded, event.image, shown["output_format"], body)
                    made = {"b64_json": content, "index": event.index, "seed": asked.seeds[event.index]}
                    if event.type == "partial":
                        made["partial_image_index"] = partial[event.index] = partial.get(event.index, -1) + 1
                    left -= event.type == "image"
                    yield event, made
                self.seconds.labels(kind).observe(time.monotonic() - begin)
            finally:
                asked.cancel()

        if not body.stream:
            made = sorted(
                [made async for event, made in events() if event.type == "image"], key=lambda one: one["index"]
            )
            usage = self._usage(asked, asked.num_pictures)
            return JSONResponse({"created": int(time.time()), "data": made, "usage": usage, **shown, "quality": None})

        async def messages() -> AsyncIterator[dict[str, Any]]:
            async for event, made in events():
                name = "partial_image" if event.type == "partial" else "completed"
                usage = {"usage": self._usage(asked, 1)} if event.type == "image" else {}
                yield {"type": f"{kind}.{name}", **made, "created_at": int(time.time()), **shown, **usage}

        return await _stream(messages())

    def _usage(self, asked: PictureRequest, number: int) -> dict[str, Any]:
        length, drawn = asked.prompt_ids.numel(), asked.num_codes * number
        images = int(self.layout.is_image_token(asked.prompt_ids).sum())
        details = {"text_tokens": length - images, "image_tokens": images}
        counts = {"input_tokens": length, "output_tokens": drawn, "total_tokens": length + drawn}
        return counts | {"input_tokens_details": details}

    # Chat

    async def chat(self, body: Chat, http: Request) -> Response:
        self._check_model(body.model)
        if self.chats > MOST_CHATS:
            raise EngineFullError(f"{self.chats} chats", 5.0)
        told = _Told(http)
        messages = await asyncio.to_thread(lambda: [_message(one) for one in body.messages])
        events = self._chat_events(body, messages, told)
        known = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        reasons = {"eos": "stop", "stopped": "stop"}
        if not body.stream:
            parts: list[dict[str, Any]] = []
            async for event in events:
                add_event(parts, event)
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if images := [part["image"] for part in parts if part["type"] == "image"]:
                message["images"] = images
                message["parts"] = [
                    part if part["type"] == "text" else {"type": "image", "index": part["image"]["index"]}
                    for part in parts
                ]
            choice = {"index": 0, "message": message, "finish_reason": reasons.get(event["reason"], "length")}
            return JSONResponse({**known, "object": "chat.completion", "choices": [choice | {"logprobs": None}]})

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            async for event in events:
                reason = reasons.get(event["reason"], "length") if event["type"] == "end" else None
                if event["type"] == "text":
                    delta |= {"content": event["text"]}
                elif event["type"] == "image":
                    delta |= {"images": [event["image"]]}
                if delta or reason:
                    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
                    yield {**known, "object": "chat.completion.chunk", "choices": [choice]}
                delta = {}

        return await _stream(chunks(), is_named=False)

    async def _chat_events(
        self, body: Chat, messages: list[dict[str, Any]], told: _Told
    ) -> AsyncIterator[dict[str, Any]]:
        """The reply as it comes, pictures as OpenAI's parts."""
        begin, cancelled = time.monotonic(), Cancelled()
        settings = self._chat_settings(body) | {"stopping_criteria": [cancelled], "seed": body.seed}

        def answer() -> None:
            try:
                if body.seed is not None:
                    torch.manual_seed(body.seed)
                for event in self.converse.stream(messages, **settings):
                    told.put(event)
            except Exception as error:
                told.put(error)

        async def work() -> None:
            async with self.chatting:  # one at a time, however slowly the others are read
                if not cancelled.is_set():
                    await asyncio.to_thread(answer)

        self.chats += 1
        self.answers.add(task := asyncio.create_task(work()))
        task.add_done_callback(self.answers.discard)
        try:
            event: dict[str, Any] = {"type": ""}
            while event["type"] != "end":
                if isinstance(event := await told.next(), Exception):
                    raise event
                if event["type"] == "image":
                    content = await asyncio.to_thread(_encoded, event["image"], "png")
                    url = {"url": f"data:image/png;base64,{content}"}
                    part = {"type": "image_url", "index": event["index"], "image_url": url}
                    event = {"type": "image", "image": part}
                yield event
            self.seconds.labels("chat").observe(time.monotonic() - begin)
        finally:
            cancelled.set()
            self.chats -= 1

    def _chat_settings(self, body: Chat) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if body.temperature is not None:
            settings = {"do_sample": body.temperature > 0}
            settings |= {"temperature": body.temperature} if body.temperature else {}
        if body.top_p is not None:
            settings |= {"top_p": body.top_p} | ({} if settings else {"do_sample": True})
        if (most := body.max_completion_tokens or body.max_tokens) is not None:
            settings["max_new_tokens"] = most
        if body.stop:
            settings |= {"stop_strings": body.stop, "tokenizer": self.pipe.processor.tokenizer}
        if "image" in (body.modalities or ()):
            return settings | ({} if body.max_images is None else {"max_images": body.max_images})
        no_picture = SuppressTokensLogitsProcessor([self.layout.boi_token_id], device=self.pipe.model.device)
        return settings | {"max_images": 1, "logits_processor": LogitsProcessorList([no_picture])}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise HTTPException(404, f"There is no model {name!r} here, only {self.name!r}.")


class _Told:
    """What threads tell of a request, as long as its client is there."""

    def __init__(self, http: Request) -> None:
        self.loop, self.queue, self.http = asyncio.get_running_loop(), asyncio.Queue(), http
        self.gone: asyncio.Task | None = None

    def put(self, event: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is there
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def next(self) -> Any:
        self.gone = self.gone or asyncio.create_task(self._until_gone())
        event = asyncio.create_task(self.queue.get())
        try:
            await asyncio.wait({event, self.gone}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise HTTPException(499, "The client has gone.")
            return event.result()
        finally:
            event.cancel()

    async def _until_gone(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass


class _Gate:
    """In front of everything: who has no key, or sends too much, is answered before anything is read or kept."""

    def __init__(self, app: FastAPI, api_key: str | None) -> None:
        self.app, self.expected = app, None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, length = Headers(scope=scope), 0
        given = headers.get("authorization", "").encode("latin-1")
        if self.expected is not None and scope["path"] != "/health" and not hmac.compare_digest(given, self.expected):
            return await _error(401, "The API key is missing or wrong: send `Authorization: Bearer KEY`.")(
                scope, receive, send
            )
        too_much = _error(413, f"A request may have {MOST_BODY_BYTES:,} bytes.")
        if (declared := headers.get("content-length", "0")).isdigit() and int(declared) > MOST_BODY_BYTES:
            return await too_much(scope, receive, send)

        async def receive_limited() -> dict[str, Any]:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > MOST_BODY_BYTES:
                raise HTTPException(413, f"A request may have {MOST_BODY_BYTES:,} bytes.")
            return message

        return await self.app(scope, receive_limited, send)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """In OpenAI's shape."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": " ".join(message.split()), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


async def _answer_error(http: Request | None, error: Exception) -> JSONResponse:
    """One sentence, and the status that is meant."""
    if isinstance(error, RequestValidationError | ValidationError):
        first = error.errors()[0]
        where = ".".join(str(one) for one in first["loc"] if one != "body" and first["type"] != "json_invalid")
        return _error(400, f"{where}: {first['msg']}." if where else f"{first['msg']}.")
    if isinstance(error, StarletteHTTPException):
        return _error(error.status_code, str(error.detail), error.headers)
    if isinstance(error, EngineFullError):
        return _error(429, str(error), {"Retry-After": f"{error.retry_after:.0f}"})
    if isinstance(error, ValueError | OSError):
        return _error(400, str(error)[:1000])
    return _error(503 if isinstance(error, RuntimeError) else 500, f"{type(error).__name__}: {str(error)[:200]}")


async def _stream(messages: AsyncIterator[dict[str, Any]], is_named: bool = True) -> StreamingResponse:
    """Server-sent events. What fails before the first is answered with its status."""
    first = await anext(messages)

    def line(message: dict[str, Any]) -> str:
        name = f"event: {message['type']}\n" if is_named else ""
        return f"{name}data: {json.dumps(message)}\n\n"

    async def lines() -> AsyncIterator[str]:
        try:
            yield line(first)
            async for message in messages:
                yield line(message)
            yield "" if is_named else "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already
            yield f"event: error\ndata: {(await _answer_error(None, error)).body.decode()}\n\n"
        finally:
            await messages.aclose()

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _encoded(image: Image.Image, output_format: str, body: Drawing | None = None) -> str:
    file, quality = io.BytesIO(), {}
    if body is not None and body.output_compression is not None and output_format != "png":
        quality = {"quality": body.output_compression}
    image.save(file, format=output_format, **quality)
    return base64.b64encode(file.getvalue()).decode()


def _picture(content: bytes) -> Image.Image:
    """A picture that was sent, looked at before it is decoded."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError("A picture must be a PNG, JPEG, WebP, GIF or BMP of a usual size.") from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"A picture may have {MOST_PIXELS:,} pixels, got {image.width} x {image.height}.")
    return load_image(image)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message of OpenAI's as one of ours: pictures as data, never as addresses."""
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {"role": message.get("role"), "content": content}


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind != "image_url":
        raise ValueError(f"A part of a message must be of type text or image_url, got {str(part)[:80]!r}.")
    url = part["image_url"].get("url") if isinstance(part.get("image_url"), dict) else None
    data = re.match(r"data:image/[\w.+-]+;base64,", url) if isinstance(url, str) else None
    if data is None:
        raise ValueError("image_url: pictures are taken as data:image/...;base64, URLs alone; nothing is fetched.")
    try:
        return {"type": "image", "image": _picture(base64.b64decode(url[data.end() :], validate=True))}
    except ValueError as error:
        raise ValueError(f"image_url: {error}") from error


def serve(engine: PictureEngine, name: str, listening: socket.socket, api_key: str | None = None) -> None:
    """Serves until the process is asked to end (SIGTERM, Ctrl-C); what runs then is finished.

    Args:
        engine ([`PictureEngine`]): Draws.
        name (`str`): What clients call the model.
        listening (`socket.socket`): Where they come.
        api_key (`str`, *optional*): What they must send.
    """
    app = Server(engine, name, api_key).app
    config = uvicorn.Config(app, limit_concurrency=MOST_CONNECTIONS, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])
