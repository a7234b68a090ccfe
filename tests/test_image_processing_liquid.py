"""Pictures in, pixels out, and back."""

import base64
import contextlib
import http.server
import io
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from transformers_liquid.models.liquid import image_processing_liquid
from transformers_liquid.models.liquid.image_processing_liquid import LiquidImageProcessor, load_image


@pytest.fixture
def processor():
    return LiquidImageProcessor(size=32, downsample_factor=16)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, file_format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def to_uint8(pixel_values):
    return ((pixel_values + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_pixels_run_from_minus_one_to_one_in_float32(processor):
    array = np.zeros((32, 32, 3), np.uint8)
    array[:, 16:] = 255
    array[0, 0] = (51, 0, 102)
    pixel_values = processor(PIL.Image.fromarray(array))["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    assert pixel_values.dtype == torch.float32
    assert pixel_values[0, :, 0, 0].tolist() == pytest.approx([-0.6, -1.0, -0.2])
    assert pixel_values[0, :, 1, 0].tolist() == [-1.0, -1.0, -1.0]
    assert pixel_values[0, :, 1, 31].tolist() == [1.0, 1.0, 1.0]


def test_crop_resizes_the_shorter_side_with_lanczos_and_keeps_the_centre(processor):
    image = PIL.Image.fromarray(noise(50, 131))
    expected = image.resize((round(131 * 32 / 50), 32), PIL.Image.Resampling.LANCZOS).crop((26, 0, 58, 32))
    assert np.array_equal(to_uint8(processor(image)["pixel_values"])[0], np.asarray(expected))


def test_crop_covers_a_target_that_is_not_square(processor):
    image = PIL.Image.fromarray(noise(64, 64))
    expected = image.resize((48, 48), PIL.Image.Resampling.LANCZOS).crop((0, 16, 48, 32))
    pixel_values = processor(image, height=16, width=48)["pixel_values"]
    assert np.array_equal(to_uint8(pixel_values)[0], np.asarray(expected))


def test_pad_centres_the_whole_picture_on_the_mean_colour_before_resizing(processor):
    array = noise(16, 32)
    pixel_values = processor(PIL.Image.fromarray(array), framing="pad")["pixel_values"]
    result = to_uint8(pixel_values)[0]
    assert np.array_equal(result[8:24], array)
    assert np.array_equal(
        np.unique(np.concatenate([result[:8], result[24:]]).reshape(-1, 3), axis=0), [[122, 116, 104]]
    )

    square = PIL.Image.new("RGB", (90, 90), (122, 116, 104))
    tall = PIL.Image.fromarray(noise(90, 41))
    square.paste(tall, (24, 0))
    expected = np.asarray(square.resize((32, 32), PIL.Image.Resampling.LANCZOS))
    assert np.array_equal(to_uint8(processor(tall, framing="pad")["pixel_values"])[0], expected)


def test_pad_follows_the_proportions_of_the_target(processor):
    array = noise(16, 16)
    result = to_uint8(processor(PIL.Image.fromarray(array), framing="pad", height=16, width=64)["pixel_values"])[0]
    assert np.array_equal(result[:, 24:40], array)
    assert (result[:, :24] == (122, 116, 104)).all()
    assert (result[:, 40:] == (122, 116, 104)).all()


def test_nested_lists_are_flattened_in_reading_order(processor):
    pictures = [PIL.Image.fromarray(noise(32, 32, seed=seed)) for seed in range(3)]
    pixel_values = processor([[pictures[0]], [pictures[1], pictures[2]]])["pixel_values"]
    assert np.array_equal(to_uint8(pixel_values), np.stack([np.asarray(picture) for picture in pictures]))


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: array,
        lambda array: array.transpose(2, 0, 1),
        lambda array: torch.from_numpy(array).permute(2, 0, 1),
        lambda array: torch.from_numpy(array).permute(2, 0, 1).float() / 255,
        lambda array: array.astype(np.uint16) * 257,
        lambda array: array[None],
        lambda array: encoded(PIL.Image.fromarray(array)),
        lambda array: "data:image/png;base64," + base64.b64encode(encoded(PIL.Image.fromarray(array))).decode(),
        lambda array: base64.b64encode(encoded(PIL.Image.fromarray(array))).decode(),
        lambda array: base64.encodebytes(encoded(PIL.Image.fromarray(array), "WEBP", lossless=True)).decode(),
        lambda array: datasets.Dataset.from_dict(
            {"image": [PIL.Image.fromarray(array)]}, features=datasets.Features({"image": datasets.Image()})
        )["image"],
        lambda array: np.fromiter([PIL.Image.fromarray(array)], dtype=object),
    ],
    ids=[
        *("numpy", "channels-first", "torch", "torch-float", "uint16", "batch", "bytes", "data-url"),
        *("base64", "base64-lines", "column", "objects"),
    ],
)
def test_every_form_of_a_picture_gives_the_same_pixels(processor, convert):
    array = noise(32, 32)
    assert np.array_equal(to_uint8(processor(convert(array))["pixel_values"])[0], array)


def test_paths_are_read_from_disk(processor, tmp_path):
    array = noise(32, 32)
    PIL.Image.fromarray(array).save(tmp_path / "picture.png")
    for path in (tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert np.array_equal(to_uint8(processor(path)["pixel_values"])[0], array)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "absent.png")


def palette_with_transparent_zero():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putdata([0, 1])
    return load_image(encoded(image, transparency=0))


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (lambda: load_image(PIL.Image.new("RGBA", (2, 1), (10, 20, 30, 0))), [[255, 255, 255]] * 2),
        (lambda: load_image(PIL.Image.new("RGBA", (2, 1), (0, 100, 255, 51))), [[204, 224, 255]] * 2),
        (lambda: load_image(PIL.Image.new("LA", (2, 1), (10, 0))), [[255, 255, 255]] * 2),
        (palette_with_transparent_zero, [[255, 255, 255], [10, 20, 30]]),
        (lambda: load_image(encoded(PIL.Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3))), [[255] * 3] * 2),
    ],
    ids=["rgba", "half", "la", "palette", "colour-key"],
)
def test_transparency_is_blended_on_white(load, expected):
    assert np.asarray(load())[0].tolist() == expected


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.new("L", (1, 1), 128),
        PIL.Image.fromarray(np.full((1, 1), 128 * 257, np.uint16)),
        PIL.Image.open(io.BytesIO(encoded(PIL.Image.fromarray(np.full((1, 1), 128 * 257, np.uint16))))),
        PIL.Image.open(io.BytesIO(encoded(PIL.Image.fromarray(np.full((1, 1), 128 * 257, np.uint16)), "PPM"))),
    ],
    ids=["8-bit", "16-bit", "16-bit-png", "16-bit-pgm"],
)
def test_grey_of_8_and_16_bits_has_the_same_brightness(image):
    assert load_image(image).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied():
    image = PIL.Image.fromarray(noise(4, 6))
    exif = image.getexif()
    exif[0x0112] = 6  # stored rotated: show it turned by 90 degrees clockwise
    loaded = load_image(encoded(image, exif=exif))
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(image), -1))


def test_an_animation_of_one_frame_is_a_picture_and_of_two_is_refused():
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert load_image(encoded(frames[0], "GIF")).size == (4, 4)
    with pytest.raises(ValueError, match="2 frames"):
        load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_camera_files_with_a_second_picture_inside_give_the_first():
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    red, _, blue = load_image(data).getpixel((4, 4))
    assert red > 200 > 50 > blue


def test_broken_pictures_raise_naming_the_file(tmp_path):
    data = encoded(PIL.Image.fromarray(noise(64, 64)), "JPEG")
    for content in (b"", b"no picture", data[: len(data) // 2]):
        (tmp_path / "broken.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.jpg"):
            load_image(tmp_path / "broken.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="Downscale"):
        load_image(bomb)


def test_files_that_are_no_whole_picture_are_named(tmp_path):
    path, whole = tmp_path / "picture.png", io.BytesIO()
    noise = PIL.Image.effect_noise((64, 64), 50)
    noise.save(whole, format="PNG")
    for content, message in [(b"", "is corrupt"), (b"no", "is corrupt"), (whole.getvalue()[:-2000], "truncated")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"Cannot read '.*picture.png' as a picture: .*{message}"):
            load_image(path)
    noise.save(path.with_suffix(".gif"), save_all=True, append_images=[PIL.Image.effect_noise((64, 64), 50)])
    with pytest.raises(ValueError, match=r"picture.gif' as a picture: it has 2 frames"):
        load_image(path.with_suffix(".gif"))


def bytes_per_pixel(data, pixels, result):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    LiquidImageProcessor(size=64)(data)
    result.value = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / pixels


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "P", "LA", "RGB", "RGBA"])
def test_a_picture_takes_no_gigabytes_whatever_its_mode(mode):
    """The largest one that is read has 2**27 pixels."""
    data = encoded(PIL.Image.new(mode, (4000, 4000)), compress_level=1)
    context = multiprocessing.get_context("fork")
    result = context.Value("d", 0)
    process = context.Process(target=bytes_per_pixel, args=(data, 4000**2, result))
    process.start()
    process.join()
    assert 0 < result.value < 13


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    image = PIL.Image.new("1", (12_000, 12_000))
    for picture in (image, encoded(image)):
        with pytest.raises(ValueError, match=r"12000 x 12000 pixels, more than 134,217,728\. Downscale it first"):
            load_image(picture)


def test_a_large_transparent_picture_is_blended_as_a_small_one():
    pixels = noise(3000, 1500, 4)
    image = PIL.Image.fromarray(pixels)
    expected = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(expected))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=f"Cannot read '{path}' as a picture: it is no regular file"):
            load_image(path)


def test_a_file_of_too_many_bytes_is_not_read_whole(tmp_path):
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"large\.png' as a picture: it has more than 268,435,456 bytes"):
        load_image(tmp_path / "large.png")


class Web(http.server.BaseHTTPRequestHandler):
    """Pictures, errors, a body without an end, and one that comes byte by byte."""

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        self.send_response(int(self.path[1:]) if self.path[1:].isdecimal() else 200)
        self.end_headers()
        body = encoded(PIL.Image.fromarray(noise(4, 4)))
        with contextlib.suppress(OSError):
            self.wfile.write(body if self.path == "/picture" else b"")
            while self.path in ("/endless", "/slow"):
                self.wfile.write(b"0" * (2**20 if self.path == "/endless" else 1))
                time.sleep(0 if self.path == "/endless" else 0.02)

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(image_processing_liquid, "MAX_FILE_BYTES", 2**22)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_web_has_limits_of_size_and_time_and_says_what_is_not_there(web, monkeypatch):
    for path in ("picture", "moved"):
        assert np.array_equal(np.asarray(load_image(f"{web}/{path}")), noise(4, 4))
    with pytest.raises(ValueError, match="endless' as a picture: it has more than 4,194,304 bytes"):
        load_image(f"{web}/endless")
    with monkeypatch.context() as patch:
        patch.setattr(image_processing_liquid, "MAX_WEB_SECONDS", 0.3)
        with pytest.raises(ConnectionError, match="slow' now: it takes longer than"):
            load_image(f"{web}/slow")
    with pytest.raises(ValueError, match="404' as a picture: the web says 404"):
        load_image(f"{web}/404")
    for status in ("503", "429"):
        with pytest.raises(ConnectionError, match=f"Cannot fetch .*{status}' now"):
            load_image(f"{web}/{status}")
    with pytest.raises(ConnectionError, match=r"Cannot fetch 'http://127\.0\.0\.1:9/x' now"):
        load_image("http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,no base64!", "data:image/png,%89PNG", "iVBORw0KGgo!", "/9j/abc"]
)
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match=r"Cannot read '.*' as a picture: it is no base64|is corrupt"):
        load_image(text)


@pytest.mark.parametrize("framing", ["crop", "pad"])
def test_a_picture_that_framing_would_blow_up_is_refused(processor, framing):
    with pytest.raises(ValueError, match="elongated"):
        processor(PIL.Image.new("L", (20_000_000 if framing == "crop" else 20_000, 1)), framing=framing)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one array"),
        (PIL.Image.new("RGB", (0, 4)), "no pixels"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.full((4, 4, 3), 255.0), r"\[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (PIL.Image.new("F", (4, 4)), "'F'"),
        (PIL.Image.new("I", (4, 4)), "'I'"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), "shape"),
    ],
)
def test_unusable_pictures_raise(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)


def test_other_objects_raise_type_errors(processor):
    for images in (None, 3, [None]):
        with pytest.raises(TypeError, match=r"os\.PathLike"):
            processor(images)


@pytest.mark.parametrize("size", [{"height": 20}, {"width": 0}, {"height": -16}, {"width": 16.0}])
def test_sizes_off_the_grid_raise(processor, size):
    with pytest.raises(ValueError, match="positive multiples of 16"):
        processor(PIL.Image.new("RGB", (32, 32)), **size)
    with pytest.raises(ValueError, match="positive multiples of 16"):
        LiquidImageProcessor(size=next(iter(size.values())))


def test_unknown_framing_raises(processor):
    with pytest.raises(ValueError, match="stretch"):
        processor(PIL.Image.new("RGB", (32, 32)), framing="stretch")
    with pytest.raises(ValueError, match="stretch"):
        LiquidImageProcessor(framing="stretch")


def test_postprocess_undoes_preprocess(processor):
    array = noise(32, 32)
    pixel_values = processor(array)["pixel_values"]
    (picture,) = processor.postprocess(pixel_values)
    assert np.array_equal(np.asarray(picture), array)
    as_numpy = processor.postprocess(pixel_values, output_type="np")
    assert as_numpy.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(as_numpy[0], array / 255, atol=1e-6)
    as_torch = processor.postprocess(pixel_values, output_type="pt")
    assert torch.equal(as_torch.permute(0, 2, 3, 1), torch.from_numpy(as_numpy))


def test_postprocess_clamps_and_takes_half_precision(processor):
    pixel_values = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert processor.postprocess(pixel_values)[0].getpixel((0, 0)) == (0, 128, 255)


def test_postprocess_refuses_what_is_no_picture(processor):
    with pytest.raises(ValueError, match="NaN"):
        processor.postprocess(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="shape"):
        processor.postprocess(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="latent"):
        processor.postprocess(torch.zeros(1, 3, 2, 2), output_type="latent")


def test_settings_survive_a_round_trip_through_a_directory(tmp_path):
    LiquidImageProcessor(size=64, downsample_factor=8, framing="pad").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == {
        "image_processor_type": "LiquidImageProcessor",
        "size": 64,
        "downsample_factor": 8,
        "framing": "pad",
    }
    loaded = LiquidImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved
    assert LiquidImageProcessor.from_pretrained(tmp_path, framing="crop").framing == "crop"


@pytest.mark.slow
def test_auto_image_processor_finds_it_without_torchvision(tmp_path):
    LiquidImageProcessor(size=64).save_pretrained(tmp_path)
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import transformers_liquid\n"
        "from transformers import AutoImageProcessor\n"
        "print(AutoImageProcessor.from_pretrained(sys.argv[1]).to_json_string())"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == LiquidImageProcessor(size=64).to_dict()
