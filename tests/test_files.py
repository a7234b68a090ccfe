"""Files are whole or not there whoever writes them, those that cannot be read are named, and a folder has one writer."""

import errno
import json
import multiprocessing
import os
import resource
import signal

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from transformers_liquid.codecs.taming import load_taming_config
from transformers_liquid.data.records import read_manifest
from transformers_liquid.training.arguments import parse_arguments
from transformers_liquid.utils.files import alone_in, read_json, read_text, whole, write_json, write_text
from transformers_liquid_cli import main


SIZES = (10, 900)


def write_half(path):
    with whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt


def write_parquet(path):
    with whole(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.table({"a": list(range(100_000))}), unfinished)


def write_picture(path):
    with whole(path) as unfinished:
        Image.effect_noise((300, 300), 50).save(unfinished, format="PNG")


@pytest.mark.parametrize("before", [None, "before"])
def test_what_is_broken_off_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize("write", [write_parquet, write_picture, lambda path: write_text(path, "a" * 100_000)])
def test_a_full_disk_reads_as_such_and_names_the_file(tmp_path, write):
    # A limit of the size of files is the disk that a test can fill up; what is written beyond gives EFBIG.
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/a\.bin'$") as caught:
            write(tmp_path / "a.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG and not any(tmp_path.iterdir())


def write_often(path, length):
    for _ in range(150):
        write_json(path, {"a": "a" * length})


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": ""})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, length)) for length in SIZES]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(read_json(path)["a"]) in (0, *SIZES)
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == ["a.json"]


def hold(folder, is_in, may_go):
    with alone_in(folder):
        is_in.set()
        may_go.wait(30)


def test_a_folder_has_one_writer_until_it_ends_or_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    for end in (lambda process, may_go: may_go.set(), lambda process, may_go: process.kill()):
        is_in, may_go = context.Event(), context.Event()
        process = context.Process(target=hold, args=(tmp_path, is_in, may_go))
        process.start()
        is_in.wait(30)
        with pytest.raises(ValueError, match="Another process is writing"), alone_in(tmp_path):
            pass
        end(process, may_go)
        process.join()
        with alone_in(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "a"
    path.write_text('{"a": "b"}', encoding="utf-8-sig")
    assert read_text(path) == '{"a": "b"}' and read_json(path) == {"a": "b"}


READERS = {
    "liquid_codes.json": lambda path: read_manifest(path.parent),
    "train.yaml": lambda path: parse_arguments(["--config", str(path)]),
    "vqgan.yaml": lambda path: load_taming_config(path.parent, path),
}


@pytest.mark.parametrize("content", [b"", b"{oops", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a": "\xff"}'])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        READERS[name](path)


def test_prompts_have_no_byte_order_mark(tmp_path):
    for name, encoding in (("plain", "utf-8"), ("windows", "utf-8-sig")):
        (tmp_path / f"{name}.txt").write_text("red apple\n", encoding=encoding)
        assert main(["generate", "--prompts-file", f"{tmp_path}/{name}.txt", "--output-dir", f"{tmp_path}/{name}"]) == 0
    records = [
        json.loads(Image.open(path).info["transformers_liquid"])["prompt"] for path in sorted(tmp_path.glob("*/*.png"))
    ]
    assert records == ["red apple", "red apple"]
