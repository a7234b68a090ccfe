"""What every command promises: one line for whatever is wrong, nothing that steers the terminal, results of their content."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_cli import environment, error_of, run
from tiny import (
    EOS_ID,
    IMAGE_TOKEN_OFFSET,
    TINY_VQ_CONFIG,
    tiny_base,
    tiny_codec,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_tokenizer,
)

from transformers_liquid import (
    LiquidForCausalLM,
    LiquidProcessor,
    export_base_model,
    liquid_lora_config,
    liquid_rows_config,
)
from transformers_liquid.data.records import read_manifest
from transformers_liquid_cli import main
from transformers_liquid_cli.models import load
from transformers_liquid_cli.options import VisibleStream, visible
from transformers_liquid_cli.pictures import METADATA_KEY, read_metadata


FROM_FILE = "generate --prompts-file prompts.txt --output-dir drawn"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a checkpoint, `ours`, two pictures and some prompts."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.generation_config.image_generation_config = {"guidance_scale": 1.5, "do_sample": True, "top_k": 12}
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained("ours")
    tiny_processor().save_pretrained("ours")
    Image.new("RGB", (20, 10), "red").save("a.png")
    Image.new("RGB", (20, 10), "blue").save("b.png")
    Path("prompts.txt").write_text("red apple\ndog\na longer prompt\n")


def edit(file, change):
    values = json.loads(Path(file).read_text())
    change(values)
    Path(file).write_text(json.dumps(values))


def edit_weights(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def with_half_its_pixels(png):
    """The PNG with half the data of its pixels, and a checksum that says that all is well."""
    kind = png.index(b"IDAT")
    length = int.from_bytes(png[kind - 4 : kind], "big")
    data = png[kind : kind + 4 + length // 2]
    rest = png[kind + 4 + length + 4 :]
    return png[: kind - 4] + (length // 2).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big") + rest


def times():
    return {path.name: path.stat().st_mtime_ns for path in Path("drawn").iterdir()}


# One line, and exit code 2


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(image_token_offset="263"),
        lambda config: config.update(vq_config={}),
        lambda config: config.update(vq_config=None),
        lambda config: config.update(text_config=["llama"]),
        lambda config: config["text_config"].update(num_attention_heads=3),
        lambda config: config["text_config"].update(hidden_size="wide"),
    ],
    ids=["offset", "no codec", "codec null", "a list", "heads", "a word"],
)
@pytest.mark.parametrize("command", ["generate a", "info", "describe a.png"])
def test_a_configuration_that_is_damaged_is_one_line(command, change, capsys):
    edit("ours/config.json", change)
    error_of(f"{command} --model ours", capsys)


@pytest.mark.parametrize("settings", ["x", ["x"], 3])
@pytest.mark.parametrize("command", ["generate a", "info"])
def test_settings_of_another_kind_are_one_line(command, settings, capsys):
    edit("ours/generation_config.json", lambda config: config.update(image_generation_config=settings))
    error_of(f"{command} --model ours", capsys)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_file_of_a_checkpoint_that_is_no_json_is_one_line(file, content, capsys):
    Path("ours", file).write_bytes(content)
    if run("generate a --model ours --device cpu --output x.png") != 0:  # transformers takes some for empty
        capsys.readouterr()
        error_of("generate a --model ours --device cpu --output x.png", capsys)


@pytest.mark.parametrize(
    "command",
    [
        "generate a --model {}",
        "describe a.png --model {}",
        "chat --model {}",
        "info --model {}",
        "convert {} --output new",
        "expand {} --codec codec --output new",
        "tokenize --dataset imagefolder --data-dir . --model {} --output new",
        "train --datasets texts.jsonl --output-dir new --model {}",
    ],
)
@pytest.mark.parametrize("name", ["nowhere", "no/where", "no/where/at/all", "./nowhere", "''"])
def test_a_model_that_is_not_there_is_named(command, name, capsys):
    tiny_codec().save_pretrained("codec")
    Path("texts.jsonl").write_text('{"text": "a"}\n')
    error = error_of(command.format(name), capsys)
    assert f"There is no {name if name == repr('') else repr(name)} here, nor was it found on the Hub" in error


@pytest.mark.parametrize("device", ["meta", "''", "cuda:99", "nothing"])
def test_a_device_that_cannot_compute_is_named(device, capsys):
    assert f"--device {device.strip(chr(39))}" in error_of(f"generate a --model ours --device {device}", capsys)


@pytest.mark.parametrize("wrong", [MemoryError, RecursionError, KeyError("x"), AssertionError()])
def test_whatever_goes_wrong_is_one_line_with_its_name(wrong, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise wrong

    monkeypatch.setattr("transformers_liquid_cli.pictures.save_png", fail)
    name = wrong.__name__ if isinstance(wrong, type) else type(wrong).__name__
    assert run("generate a --model ours --device cpu --seed 0") == 1  # a failure, no wrong use
    assert capsys.readouterr().err.startswith(f"transformers-liquid: error: {name}:")


@pytest.mark.slow
@pytest.mark.parametrize("output", ["/dev/full", "&-"])
def test_an_output_that_takes_nothing_leaves_no_traceback(output):
    command = f"{sys.executable} -m transformers_liquid info --model ours >{output}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert done.returncode == (2 if "full" in output else 0) and done.stderr.count("\n") == done.returncode // 2


# What is printed


@pytest.mark.parametrize(
    "character",
    [*"\x1b\x07\x08\r\x00\x7f\x9b\x85\u202a\u202e\u2066\u2069\u200e\u200f\u061c\u2028\u2029\u200b\ufeff\ud800"],
)
def test_characters_that_steer_a_terminal_are_written_out(character, capsys):
    written = visible(f"a{character}b")
    assert written.isprintable() and json.loads(f'"{written}"') == f"a{character}b"
    print(f"a{character}b", file=VisibleStream(sys.stdout))
    assert capsys.readouterr().out == f"{written}\n"


def test_all_scripts_and_emoji_stay_as_they_are():
    text = "Ünï ελ עב عر 中文 \u200c \u200d 👩\u200d🚀 \n\tnext"
    assert visible(text) == text


def test_cards_and_records_of_pictures_cannot_steer_the_terminal(capsys):
    hostile = "\x1b]0;owned\x07\x9b31m\u202e"
    Path("ours/README.md").write_text(f"{hostile} card\n", encoding="utf-8")
    assert run("info --model ours") == 0
    record = {"prompt": hostile}
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    Image.new("RGB", (8, 8)).save("hostile.png", pnginfo=metadata)
    out = capsys.readouterr().out
    assert "owned" in out and not set(hostile[0] + hostile[-5:]) & set(out) - set("31m")
    assert run("info hostile.png") == 0
    out = capsys.readouterr().out
    assert json.loads(out) == record and all(line.isprintable() for line in out.splitlines())
    assert not set(hostile) & set(error_of(["info", f"{hostile}.png"], capsys)) - set("31m]0;owned")


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "3", "{", '{"settings": 3}', '{"prompt": "dog"}'])
def test_records_of_another_kind_are_one_line(content, capsys):
    Path("drawn").mkdir()
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(METADATA_KEY, content)
    Image.new("RGB", (8, 8)).save("drawn/000002-dog.png", pnginfo=metadata)
    assert "drawn/000002-dog.png" in error_of(f"{FROM_FILE} --model ours --device cpu", capsys)


# Adapters


@pytest.fixture
def adapter():
    """Saves a trained adapter of `ours`, without a processor, as `adapter`."""
    from peft import get_peft_model

    def save(config=liquid_lora_config, base="ours"):
        model = LiquidForCausalLM.from_pretrained("ours")
        model = get_peft_model(model, config(model))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        model.save_pretrained("adapter")
        edit("adapter/adapter_config.json", lambda config: config.update(base_model_name_or_path=base))
        return model.merge_and_unload()

    return save


IDS = torch.tensor([[1, 20, 30, 270]])


@pytest.mark.parametrize("config", [liquid_lora_config, liquid_rows_config])
@pytest.mark.parametrize("layout", ["ours", "reference"])
def test_an_adapter_draws_on_top_of_its_base_in_either_layout(config, layout, adapter):
    export_base_model(LiquidForCausalLM.from_pretrained("ours"), LiquidProcessor.from_pretrained("ours"), "reference")
    expected = adapter(config, base=layout)
    assert run("generate apple --model adapter --device cpu --output apple.png --seed 1") == 0
    with torch.no_grad():
        torch.testing.assert_close(load("adapter", "cpu", "auto").model(IDS).logits, expected(IDS).logits)
    assert run("describe a.png --model adapter --device cpu --max-new-tokens 2") == 0


@pytest.mark.parametrize("layout", ["", "--to-base"])
def test_convert_merges_an_adapter(layout, adapter):
    expected = adapter()
    assert run(f"convert adapter --output merged {layout} --device cpu") == 0
    with torch.no_grad():
        merged = LiquidForCausalLM.from_pretrained("merged")(IDS).logits
        torch.testing.assert_close(merged, expected(IDS).logits)
    assert run("generate apple --model merged --device cpu --output apple.png") == 0


@pytest.mark.parametrize("config", [liquid_lora_config, liquid_rows_config])
def test_merge_writes_a_model_that_draws_what_the_adapter_draws(config, adapter):
    adapter(config)
    assert run("generate apple --model adapter --device cpu --output apple.png --seed 1") == 0
    assert run("merge adapter --output merged --device cpu") == 0
    assert run("generate apple --model merged --device cpu --output merged.png --seed 1") == 0
    assert run("generate apple --model ours --device cpu --output ours.png --seed 1") == 0
    assert np.array_equal(Image.open("apple.png"), Image.open("merged.png"))
    assert not np.array_equal(Image.open("apple.png"), Image.open("ours.png"))
    assert {"model.safetensors", "processor_config.json", "README.md"} <= {
        file.name for file in Path("merged").iterdir()
    }
    assert not list(Path("merged").glob("adapter*"))


def test_merge_says_where_it_looks_for_a_base_that_was_moved(adapter, capsys):
    adapter()
    shutil.move("ours", "moved")
    error = error_of("merge adapter --output merged", capsys)
    assert "an adapter of ours, as its adapter_config.json says. There is no 'ours' here" in error
    assert not Path("merged/config.json").exists()


@pytest.mark.parametrize("other", ["gpt2", "wider", "fewer rows"])
def test_merge_refuses_a_base_that_the_adapter_was_not_trained_on(other, adapter, capsys):
    adapter()
    text_config = tiny_text_config("gpt2" if other == "gpt2" else "llama")
    if other == "wider":
        text_config.intermediate_size *= 2
    config = tiny_config(text_config)
    if other == "fewer rows":
        text_config.vocab_size = IMAGE_TOKEN_OFFSET + 8
        config = tiny_config(text_config, vq_config=TINY_VQ_CONFIG | {"num_vq_embeddings": 8})
    LiquidForCausalLM(config).save_pretrained("other")
    shutil.copytree("ours", "other", ignore=lambda *_: ["config.json", "model.safetensors"], dirs_exist_ok=True)
    edit("adapter/adapter_config.json", lambda config: config.update(base_model_name_or_path="other"))
    error = error_of("merge adapter --output new", capsys)
    assert "The adapter adapter does not fit other" in error
    assert not Path("new/config.json").exists()


def test_merge_takes_adapters_alone_and_overwrites_nothing(adapter, capsys):
    adapter()
    assert "ours is no adapter" in error_of("merge ours --output new", capsys)
    assert "nowhere is no adapter" in error_of("merge nowhere --output new", capsys)
    assert "ours is not empty" in error_of("merge adapter --output ours", capsys)


def test_info_tells_an_adapters_base(adapter, capsys):
    adapter()
    assert run("info --model adapter") == 0
    said = capsys.readouterr().out
    assert "adapter (adapter of ours, liquid layout)" in said and "279 rows, image ids 263 ... 278" in said


@pytest.mark.parametrize(
    "command", ["generate a --model adapter", "info --model adapter", "convert adapter --output new"]
)
@pytest.mark.parametrize("base, message", [("gone", "There is no 'gone' here"), (None, "does not say of which model")])
def test_an_adapter_without_its_base_says_so(command, base, message, adapter, capsys):
    adapter()
    edit("adapter/adapter_config.json", lambda config: config.update(base_model_name_or_path=base))
    assert message in error_of(command, capsys)


def test_an_adapter_reads_pictures_as_its_base(adapter):
    adapter()
    Path("photos").mkdir()
    shutil.copy("a.png", "photos")
    Path("photos/metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n')
    manifests = []
    for model in ("adapter", "ours"):
        assert run(f"tokenize --dataset imagefolder --data-dir photos --model {model} --output {model}-codes") == 0
        manifests.append(read_manifest(f"{model}-codes"))
    assert manifests[0]["codec"] == manifests[1]["codec"]


def test_an_adapter_cannot_be_expanded(adapter, capsys):
    adapter()
    tiny_codec().save_pretrained("codec")
    error = error_of("expand adapter --codec codec --output new --device cpu", capsys)
    assert "adapter is an adapter: merge it into its base" in error


def test_a_base_that_lacks_a_weight_is_not_expanded(capsys):
    tiny_codec().save_pretrained("codec")
    tiny_base().save_pretrained("base")
    tiny_tokenizer(special_tokens=["<pad>", "<s>", "</s>"]).save_pretrained("base")
    edit_weights("base/model.safetensors", lambda weights: weights.pop("model.norm.weight"))
    error = error_of("expand base --codec codec --output new --device cpu", capsys)
    assert "base has 1 missing keys: model.norm.weight" in error


@pytest.mark.parametrize("command", ["generate a", "describe a.png", "convert ours --output new"])
@pytest.mark.parametrize("key", ["norm.weight", "q_proj", "embed_tokens", "quantize"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_all_that_need_it(command, key, capsys):
    weights = "ours/model.safetensors"
    edit_weights(weights, lambda weights: weights.pop(next(name for name in weights if key in name)))
    model = "" if "convert" in command else "--model ours"
    assert key in error_of(f"{command} {model} --device cpu", capsys)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "trainable_tokens"])
@pytest.mark.parametrize("command", ["generate a --model adapter", "convert adapter --output new"])
def test_an_adapter_that_lacks_a_weight_is_refused(command, part, adapter, capsys):
    adapter()
    weights = "adapter/adapter_model.safetensors"
    edit_weights(weights, lambda weights: weights.pop(next(name for name in weights if part in name)))
    assert part in error_of(f"{command} --device cpu", capsys)


@pytest.mark.parametrize(
    "change",
    [{"target_modules": ["q_proj"]}, {"trainable_token_indices": None}, {}],
    ids=["other layers", "no rows", "a tensor more"],
)
@pytest.mark.parametrize("command", ["generate a --model adapter", "convert adapter --output new"])
def test_an_adapter_with_weights_that_its_configuration_does_not_use_is_refused(command, change, adapter, capsys):
    adapter()
    edit("adapter/adapter_config.json", lambda config: config.update(change))
    if not change:
        edit_weights("adapter/adapter_model.safetensors", lambda weights: weights.update(more=torch.zeros(1)))
    assert "The adapter adapter has" in (error := error_of(f"{command} --device cpu", capsys)), error
    assert "unexpected keys" in error


@pytest.mark.parametrize("command", ["generate a --model adapter --output a.png", "convert adapter --output new"])
def test_an_adapter_without_trained_rows_loads(command, adapter):
    from peft import LoraConfig

    adapter(lambda model: LoraConfig(r=2, target_modules=["q_proj"]))
    assert run(f"{command} --device cpu") == 0


def test_without_peft_an_adapter_says_what_it_needs(adapter, monkeypatch, capsys):
    adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    error = error_of("generate a --model adapter", capsys)
    assert "adapter is an adapter: that needs peft" in error and "pip install peft" in error


# Paths


@pytest.mark.parametrize(
    "second", ["b.png", "none.JPG", "https://example.org/b", "prompts.txt", "data:image/png;base64,xx"]
)
def test_describe_takes_no_second_picture_for_a_question(second, capsys, monkeypatch):
    monkeypatch.setattr("transformers_liquid.models.liquid.image_processing_liquid._fetch", lambda url: b"no picture")
    if second == "b.png":
        assert run("describe a.png b.png --model ours --device cpu --max-new-tokens 2") == 0
        assert "a.png: " in (said := capsys.readouterr().out) and "b.png: " in said
    else:
        assert second[:12] in error_of(f"describe a.png {second} --model nowhere", capsys)


@pytest.mark.parametrize(
    "options",
    [
        "a --output same.png --grid same.png",
        "a --output same.png --sheet ./same.png",
        "a --output same.png --sheet link.png",
        "a b --output same.png --sheet same-1.png",
        "a b --output drawn --sheet drawn/1-b.png",
        "--prompts-file prompts.txt --output-dir drawn --sheet drawn/000002-dog.png",
        "--prompts-file prompts.png --output prompts.png",
    ],
)
def test_what_would_be_written_over_is_named_before_drawing(options, capsys):
    Path("link.png").symlink_to("same.png")
    Path("prompts.png").write_text("a\n")
    assert "which is another file of this command" in error_of(f"generate {options} --model ours --device cpu", capsys)
    assert not Path("same.png").exists() and not Path("same-1.png").exists()
    assert Path("prompts.png").read_text() == "a\n" and not list(Path("drawn").glob("*.png"))


# Pictures that count as drawn


@pytest.mark.parametrize(
    "change",
    [
        lambda: edit_weights(
            "ours/model.safetensors", lambda weights: weights["model.vq_model.quantize.embedding.weight"].neg_()
        ),
        lambda: edit_weights(
            "ours/model.safetensors",
            lambda weights: next(one for name, one in weights.items() if "q_proj" in name)[0, :2].copy_(
                torch.tensor([1.0, 2.0])
            ),
        ),
        lambda: edit_weights(
            "ours/model.safetensors",
            lambda weights: next(one for name, one in weights.items() if "embed" in name).copy_(
                next(one for name, one in weights.items() if "embed" in name).flip(0)
            ),
        ),
        lambda: edit("ours/config.json", lambda config: config["text_config"].update(rms_norm_eps=0.1)),
        lambda: edit("ours/tokenizer.json", lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"})),
    ],
    ids=["codec", "two numbers", "rows in another order", "configuration", "tokenizer"],
)
def test_pictures_of_other_content_of_the_same_name_are_named(change, capsys):
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0
    before = times()
    Path("drawn/000002-dog.png").unlink()
    change()
    assert "was drawn by other weights or with another tokenizer" in error_of(
        f"{FROM_FILE} --model ours --device cpu", capsys
    )
    assert times().items() <= before.items()


def test_an_adapter_that_was_trained_on_is_another_one(adapter, capsys):
    adapter()
    assert run(f"{FROM_FILE} --model adapter --device cpu") == 0
    assert run(f"{FROM_FILE} --model adapter --device cpu") == 0
    edit("adapter/adapter_config.json", lambda config: config.update(lora_alpha=3))
    assert "was drawn by other weights" in error_of(f"{FROM_FILE} --model adapter --device cpu", capsys)


def test_the_same_content_saved_again_goes_on(capsys):
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0
    before = times()
    model, processor = LiquidForCausalLM.from_pretrained("ours"), LiquidProcessor.from_pretrained("ours")
    shutil.rmtree("ours")
    model.save_pretrained("ours", max_shard_size="10KB")
    processor.save_pretrained("ours")
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0
    assert times() == before


@pytest.mark.parametrize("damage", ["empty", "head", "half", "end", "flipped", "text", "cut"])
def test_a_picture_that_is_not_whole_is_drawn_again(damage, capsys):
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0
    before, path = times(), Path("drawn/000002-dog.png")
    whole, pixels = path.read_bytes(), np.asarray(Image.open(path))
    content = {
        "empty": b"",
        "head": whole[:20],
        "half": whole[: -len(whole) // 4],
        "end": whole[:-12],
        "flipped": whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:],
        "text": b"no picture",
        "cut": with_half_its_pixels(whole),
    }[damage]
    path.write_bytes(content)
    capsys.readouterr()
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0
    said = capsys.readouterr()
    assert said.out == "drawn: 3 pictures, 1 of them drawn now.\n" and "000002-dog.png is damaged" in said.err
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    assert {name for name, time in times().items() if time != before[name]} == {"000002-dog.png"}


def test_a_second_run_in_the_folder_is_refused(capsys):
    Path("drawn").mkdir()
    script = "import sys; from pathlib import Path; from transformers_liquid.utils.files import alone_in\n"
    script += "with alone_in(Path('drawn')): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    assert "Another process is writing to drawn" in error_of(f"{FROM_FILE} --model ours --device cpu", capsys)
    other.communicate()
    assert run(f"{FROM_FILE} --model ours --device cpu") == 0 and len(times()) == 3


@pytest.mark.parametrize(
    "dtype, batch_size, may_differ", [("float32", 3, False), ("bfloat16", 1, False), ("bfloat16", 3, True)]
)
def test_a_record_says_whether_its_command_draws_the_same(dtype, batch_size, may_differ):
    run(f"{FROM_FILE} --model ours --device cpu --dtype {dtype} --batch-size {batch_size} --sheet sheet.png")
    for record in (read_metadata("drawn/000002-dog.png"), *read_metadata("sheet.png")):
        assert record["batch_size"] == batch_size and ("note" in record) == may_differ


def test_the_command_of_a_batch_in_float32_draws_the_very_picture():
    import shlex

    run(f"{FROM_FILE} --model ours --device cpu --batch-size 3")
    command = shlex.split(read_metadata("drawn/000002-dog.png")["command"])[1:]
    assert main([*command, "--output", "again.png"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("drawn/000002-dog.png")))
