"""`transformers-liquid voken`: from a base and a diffusion model to stories, by way of both stages; files of data sets."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.utils import hub_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import error_of, run
from test_distributed import launch
from test_reference_voken import files  # noqa: F401 (a fixture)
from tiny import tiny_tokenizer
from tiny_vokens import VOKENS, _unet, tiny_base_processor, tiny_image_pipeline, tiny_voken_base, tiny_voken_pipeline
from transformers import TrainerCallback, trainer

from transformers_liquid.data.voken_records import load_voken_records
from transformers_liquid.training import voken_train


COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a llava, a diffusion model, and pictures and texts of all formats."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (16, 16), color).save(f"images/{name}.png")
    Path("pairs.tsv").write_text(
        "caption\timage_path\n" + "".join(f"A {name}: (one)!\t{name}.png\n" for name in COLORS)
    )
    scenes = [
        {"caption": f"then {name}.", "image_id": str(i), "sequence_index": 2 - i} for i, name in enumerate(COLORS)
    ]
    Path("train_cleaned.json").write_text(json.dumps({"a": scenes}))
    Path("train_image_mapping.json").write_text(json.dumps({str(i): f"{name}.png" for i, name in enumerate(COLORS)}))


def train(**options):
    write_config(**options)
    return run("voken train --config config.yaml")


def write_config(**options):
    defaults = {"learning_rate": 1e-2, "warmup_steps": 0, "total_batch_size": 2, "per_device_train_batch_size": 2}
    defaults |= {"image_folder": "images", "max_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    Path("config.yaml").write_text(yaml.safe_dump(defaults | options))


def test_from_a_base_and_a_diffusion_model_to_stories(capsys):
    tiny_voken_base("llava", vocab_size=VOKENS[0]).save_pretrained("base")
    tiny_base_processor("llava").save_pretrained("base")
    tiny_image_pipeline("sd-v").save_pretrained("diffusion")
    assert run("voken add base diffusion --output vokens") == 0
    assert f"vokens {VOKENS} for diffusion" in capsys.readouterr().out

    first = {"model": "vokens", "datasets": ["pairs.tsv"], "output_dir": "one", "save_steps": 1}
    assert train(stage=1, preview_prompts=["red"], preview_steps=2, **first) == 0
    assert [path.name for path in sorted(Path("one/previews").iterdir())] == ["step-000000.png", "step-000002.png"]
    log = json.loads(Path("one/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert {"loss", "text_loss", "image_loss", "caption_loss"} <= log[0].keys()
    # Going on, and with other settings
    assert train(stage=1, **first) == 0
    assert "learning_rate was 0.01 and is now 0.5" in error_of(
        "voken train --config config.yaml --learning-rate 0.5", capsys
    )

    second = {"model": "one", "datasets": ["train_cleaned.json"], "output_dir": "two", "save_strategy": "no"}
    assert train(stage=2, story_tasks=["multimodal", "text"], text_loss_weight=0.5, **second) == 0
    assert json.loads(Path("two/model/config.json").read_text())["text_loss_weight"] == 0.01  # that was of the run
    parts = ["vokens", "one", "two"]
    weights = [load_file(f"{part}/model/model.safetensors") for part in parts]
    for before, after, moves in zip(weights, weights[1:], ([], ["q_proj", "v_proj"]), strict=False):
        assert before.keys() == after.keys()
        moved = {name for name, one in before.items() if not torch.equal(one, after[name])}
        assert all(name.startswith(("text_model.", "feature_mapper.")) and "vision" not in name for name in moved)
        named = [name for name in moved if "layers" in name and "text_model" in name]
        assert all(any(move in name for move in moves) for name in named) and bool(named) == bool(moves)
    assert any("mlp" in name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name]))
    assert not [
        name for name in weights[1] if "mapper.mlp" in name and not torch.equal(weights[1][name], weights[2][name])
    ]

    beginning = "once a cat " + "met a dog " * 40  # longer than the name of a file can be
    rest = "--model two --scenes 2 --num-images 1 --max-new-tokens 10 --steps 2"
    story = f"voken story '{beginning}' images/red.png {rest}"
    assert run(f"{story} --seed 1 --device cpu --output told.md") == 0
    told = Path("told.md").read_text()
    assert told.startswith(beginning) and "![](told-0.png)" in told and "![](told-1.png)" in told
    assert Image.open("told-0.png").size == (16, 16)
    assert "new file that ends with .md" in error_of(f"{story} --output told.md", capsys)
    assert "Cannot read 'config.yaml' as a picture" in error_of("voken story config.yaml --model two", capsys)
    assert "which are those of pictures: no.png" in error_of("voken story once no.png --model two", capsys)


@pytest.mark.parametrize("flip_probability", [0.0, 0.5])
def test_a_stopped_run_goes_on_to_the_same_weights(flip_probability, monkeypatch):
    tiny_voken_pipeline().save_pretrained("vokens")
    for name in COLORS:
        (picture := Image.open(f"images/{name}.png")).paste((9, 99, 200), (0, 0, 5, 16))  # mirrored, it is another one
        picture.save(f"images/{name}.png")
    options = {"model": "vokens", "datasets": ["pairs.tsv"], "max_steps": 4, "save_steps": 2}
    options |= {"flip_probability": flip_probability, "total_batch_size": 1, "per_device_train_batch_size": 1}
    assert train(output_dir="whole", **options) == 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise OSError("no power")

    build = voken_train.build_voken_trainer

    def build_and_stop(*arguments):
        pipe, trainer = build(*arguments)
        trainer.add_callback(Stop())
        return pipe, trainer

    with monkeypatch.context() as patch:
        patch.setattr(voken_train, "build_voken_trainer", build_and_stop)
        assert train(output_dir="stopped", **options) == 2
    assert not Path("stopped/model").exists() and train(output_dir="stopped", **options) == 0
    whole, stopped = (load_file(f"{name}/model/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one, stopped[name]) for name, one in whole.items())


def test_what_is_pushed_is_the_whole_pipeline_and_no_checkpoint(monkeypatch, capsys):
    tiny_voken_pipeline().save_pretrained("vokens")
    asked, pushed = [], {}

    def create_repo(name, **settings):
        asked.append((name, settings["token"], settings["private"]))
        return type("Repository", (), {"repo_id": f"me/{name}".replace("me/me", "me")})

    def upload_folder(repo_id, folder_path, token, **_):
        asked.append((repo_id, token))
        there = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed.update({str(path.relative_to(folder_path)): path.read_bytes() for path in there})

    monkeypatch.setattr(trainer, "hf_api", lambda: type("Api", (), {"create_repo": staticmethod(create_repo)}))
    monkeypatch.setattr(hub_utils, "create_repo", create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    card = hub_utils.ModelCard("This model card has been automatically generated.")
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: card)
    options = {"model": "vokens", "datasets": ["pairs.tsv"], "output_dir": "one", "push_to_hub": True, "save_steps": 1}
    assert train(**options, hub_strategy="every_save") == 2
    assert "What is pushed is the whole pipeline, at the end" in capsys.readouterr().err and not asked
    assert train(**options, hub_model_id="red-things", hub_token="secret", hub_private_repo=True) == 0
    assert asked[0] == ("red-things", "secret", True)  # before training
    assert asked[-1] == ("me/red-things", "secret")
    assert "# red-things" in pushed["README.md"].decode()
    assert not [name for name in pushed if "checkpoint" in name or "adapter" in name]
    for name in ("model/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert pushed[name] == Path("one", name).read_bytes()


@pytest.mark.parametrize("stage, part", [(1, "query"), (1, "encoder_decoder.encoder"), (2, "encoder_decoder.encoder")])
def test_a_part_of_the_mapper_can_be_left_as_it_is(stage, part, capsys):
    tiny_voken_pipeline().save_pretrained("vokens")
    options = {"model": "vokens", "datasets": ["pairs.tsv"], "save_strategy": "no", "stage": stage}
    assert train(output_dir="no", frozen_mapper_parts=["encoder"], **options) == 2
    assert "The mapper has no encoder that could be frozen" in capsys.readouterr().err
    assert train(output_dir="out", frozen_mapper_parts=[part], **options) == 0
    before, after = (load_file(f"{name}/model/model.safetensors") for name in ("vokens", "out"))
    still = {
        name for name, one in before.items() if torch.equal(one, after[name]) and name.startswith("feature_mapper.")
    }
    named = {name for name in before if f"{name}.".startswith(f"feature_mapper.{part}.")}
    others = {name for name in still if stage == 1 or "encoder_decoder" in name} - named  # stage 2 leaves all else
    assert named and named <= still and all(name.endswith("bias") for name in others)  # some have no gradient at all
    assert any("encoder_decoder.decoder" in name for name in before.keys() - still)


def test_a_base_without_q_proj_is_trained_where_its_user_says(capsys):
    tiny_voken_pipeline("gpt2").save_pretrained("vokens")
    options = {"model": "vokens", "datasets": ["pairs.tsv"], "output_dir": "two", "stage": 2, "save_strategy": "no"}
    assert train(**options) == 2
    assert "no q_proj and v_proj: name the layers for LoRA in target_modules" in capsys.readouterr().err
    assert train(target_modules=r"text_model\..*\.c_attn", **options) == 0
    before, after = (load_file(f"{name}/model/model.safetensors") for name in ("vokens", "two"))
    moved = [name for name, one in before.items() if ".h." in name and not torch.equal(one, after[name])]
    assert moved and all("c_attn.weight" in name for name in moved)


def test_files_of_minigpt5_become_a_repository_that_draws_and_come_back(files, capsys):  # noqa: F811
    folder, *_ = files
    pipe = tiny_image_pipeline("sd")
    pipe.save_pretrained("narrow")
    pipe.register_modules(unet=_unet(cross_attention_dim=16))
    pipe.save_pretrained("diffusion")
    names = f"--projection {folder}/proj.pth --vision-model {folder}/blip2 --language-model {folder}/vicuna"
    command = f"voken convert {folder}/stage1.ckpt {names} --image-model"
    assert run(f"{command} narrow --output minigpt5") == 2
    assert "told what to draw by vectors of 8 (pooled: None), but this model was made for 16" in capsys.readouterr().err
    assert not list(Path("minigpt5").iterdir())
    assert run(f"{command} diffusion --output minigpt5") == 0
    story = "voken story once --model minigpt5 --num-images 1 --max-new-tokens 8 --steps 1 --device cpu"
    assert run(story) == 0 and Path("story-0.png").is_file()
    assert run("voken convert minigpt5 --output files") == 0
    before = torch.load(folder / "stage1.ckpt", weights_only=False)["state_dict"]
    after = torch.load("files/stage1.ckpt")["state_dict"]
    assert before.keys() == after.keys() and all(torch.equal(one, after[name]) for name, one in before.items())


def test_a_repository_becomes_files_of_minigpt5_or_says_why_not(capsys):
    tiny_voken_pipeline().save_pretrained("vokens")
    assert run("voken convert vokens --output files") == 2
    error = capsys.readouterr().err
    assert (
        "The reference cannot hold this model: its bases must be ['blip-2', 'llama'], got ['llama', 'llama']" in error
    )
    assert "need --projection" in error_of("voken convert config.json --output files --projection x.pth", capsys)


def test_options_of_the_other_stage_are_refused(capsys):
    command = "voken train --model vokens --datasets pairs.tsv --output-dir out --use-cpu --total-batch-size 8"
    assert "lora_r has no effect in stage 1" in error_of(f"{command} --lora-r 4", capsys)
    assert "caption_loss_weight has no effect in stage 2" in error_of(
        f"{command} --stage 2 --caption-loss-weight 1", capsys
    )


def test_a_diffusion_repository_that_is_none_is_named(capsys):
    Path("half").mkdir()
    Path("half/model_index.json").write_text("{}")
    assert "half is damaged, or not as its configuration says" in error_of("voken story a --model half", capsys)


@pytest.mark.parametrize("command", ["train --datasets pairs.tsv --output-dir out", "story once"])
def test_a_repository_that_is_not_there_is_named(command, capsys):
    assert "There is no 'nowhere' here, nor was it found on the Hub" in error_of(
        f"voken {command} --model nowhere", capsys
    )


def test_a_base_that_lacks_a_weight_gets_no_vokens(capsys):
    tiny_voken_base("llama", vocab_size=VOKENS[0]).save_pretrained("base")
    tiny_base_processor("llama").save_pretrained("base")
    weights = load_file("base/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    assert run("voken add base diffusion --output vokens") == 2
    assert "base has 1 missing keys: model.norm.weight" in capsys.readouterr().err


# Formats


def test_cc3m_is_read_as_the_reference_reads_it():
    records = load_voken_records("pairs.tsv", tiny_tokenizer(), "images")
    assert [record["text"] for record in records] == [
        "a red one",
        "draw this for me: a red one",
        "a green one",
        "a blue one",
    ]
    assert records[1]["captions"] == ["a red one"] and records[1]["image"] == "images/red.png"


def test_vist_is_read_in_its_order():
    (story,) = load_voken_records("train_cleaned.json", tiny_tokenizer(), "images")
    assert story["texts"] == ["then blue.", "then green.", "then red."]
    assert story["images"] == ["images/blue.png", "images/green.png", "images/red.png"]


def test_of_mmdialog_every_turn_is_learned_after_what_was_said():
    turns = [["hi"], ["look", "red.png"], ["nice"], ["and", "blue.png"], ["x" * 51], ["never"]]
    parts = [[{"__TEXT__": text}, *({"__MEDIA__": one} for one in media)] for text, *media in turns]
    line = {"conversation_id": 1, "conversation": [{"turn": part} for part in parts]}
    Path("dialogues.jsonl").write_text(json.dumps(line) + "\n")
    records = load_voken_records("dialogues.jsonl", tiny_tokenizer(), "images")
    texts = [[(turn["role"], turn["content"][0]["text"]) for turn in record["messages"]] for record in records]
    assert texts == [
        [("user", "hi"), ("assistant", "look ")],
        [("assistant", "hi"), ("user", "look "), ("assistant", "nice")],
        [("user", "hi"), ("assistant", "look "), ("user", "nice"), ("assistant", "and ")],
    ]
    assert records[2]["images"] == ["images/red.png", "images/blue.png"]


def test_a_line_of_json_and_a_file_of_windows_are_read():
    Path("a.jsonl").write_text('{"kind": "text", "text": "one\u2028line"}\n', encoding="utf-8")
    assert load_voken_records("a.jsonl", tiny_tokenizer())[0]["text"] == "one\u2028line"
    Path("a.tsv").write_bytes(b"\xef\xbb\xbfcaption\timage_path\r\na\tred.png\r\n")
    assert load_voken_records("a.tsv", tiny_tokenizer(), "images")[0]["image"] == "images/red.png"


READ = '{"type": "image", "image": "x.png"}'


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "x", "a.csv must be a .tsv of CC3M"),
        ("a.tsv", "caption\timage\na\tred.png\n", "Line 2 of a.tsv lacks 1 keys that are needed: image_path"),
        ("a.tsv", "caption\timage_path\na\tpurple.png\n", "2 of their pictures are not there: ['images/purple.png'"),
        ("a.tsv", "caption\timage_path\n", "a.tsv has 0 records"),
        ("a.jsonl", "{", "a.jsonl is damaged, or no JSON"),
        ("a.jsonl", '{"kind": "text_to_image", "text": "a", "image": "x.png"}', "are not there: ['images/x.png']"),
        ("a.jsonl", f'{{"kind": "conversation", "messages": [{{"content": [{READ}]}}]}}', "['images/x.png']"),
        ("a.jsonl", '{"conversation": [{"turns": []}]}', "A turn lacks 1 keys that are needed: turn"),
        ("a.jsonl", '{"conversation": []}\n{"text": "a"}', "A line of a.jsonl lacks 1 keys that are needed: kind"),
        ("a.jsonl", "7", "A line of a.jsonl lacks"),
        ("a.tsv", "caption\timage_path\na\n", "Line 2 of a.tsv lacks 1 keys that are needed: image_path"),
        ("a_cleaned.json", '{"one": [{"caption": "a"}]}', "A scene lacks 2 keys that are needed: image_id"),
        ("a_cleaned.json", '{"one": null}', "A scene lacks 3 keys that are needed: caption"),
        ("a.jsonl", '{"kind": "story", "texts": ["a"], "images": "red.png"}', "are paths, and images a list of these"),
        (
            "a.jsonl",
            '{"kind": "text_to_image", "text": "a", "image": 5}',
            "are paths, and images a list of these, got 5",
        ),
        ("a.jsonl", '{"kind": "story", "texts": ["a", ""], "images": ["red.png", "red.png"]}', "not empty, got ''"),
        ("a.jsonl", '{"conversation": [{"turn": "hi"}]}', "A turn is a list of {'__TEXT__': ...}"),
        ("a.jsonl", '{"conversation": null}', "A turn lacks 1 keys"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_one_line(name, content, message, capsys):
    tiny_voken_pipeline().save_pretrained("vokens")
    Path(name).write_text(content)
    Path("a_image_mapping.json").write_text("{}")
    options = (
        f"--datasets {name} --image-folder images --output-dir out --total-batch-size 1 --per-device-train-batch-size 1"
    )
    assert message in error_of(f"voken train --model vokens {options} --use-cpu", capsys)


def test_all_records_are_looked_at_before_training(capsys):
    tiny_voken_pipeline().save_pretrained("vokens")
    records = [{"kind": "text", "text": "a"}] * 8 + [{"kind": "poem", "text": "a"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"datasets": ["a.jsonl"], "output_dir": "out", "train_sampling_strategy": "sequential"}
    assert train(model="vokens", max_steps=1, **options) == 2
    assert "got 'poem'" in capsys.readouterr().err


# Two processes


@pytest.mark.slow
def test_two_processes_of_which_one_has_no_pictures_learn_what_one_does():
    pipe = tiny_voken_pipeline("llava")
    pipe.model.config.unconditional_probability = 0.0
    pipe.save_pretrained("vokens")
    draw = [{"kind": "text_to_image", "text": name, "image": f"{name}.png"} for name in COLORS]
    tell = [{"kind": "caption", "text": f"a picture of {name}", "image": f"{name}.png"} for name in COLORS]
    # Of two records at once the first is one process's, the second the other's.
    records = [one for pair in zip(draw, tell, strict=True) for one in pair] + draw[:1] + tell[:1]
    Path("records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Without noise, nothing is drawn by chance. Epsilon is large, since Adam makes a step of a rounding.
    options = {"model": "vokens", "datasets": ["records.jsonl"], "image_loss_weight": 0.0, "adam_epsilon": 1e-3}
    options |= {"train_sampling_strategy": "sequential", "total_batch_size": 4, "save_strategy": "no", "max_steps": 4}
    assert train(output_dir="one", per_device_train_batch_size=4, **options) == 0
    write_config(output_dir="two", per_device_train_batch_size=1, **options)
    launch("ddp.yaml", "-m", "transformers_liquid", "voken", "train", "--config", "config.yaml")
    one, two = (load_file(f"{name}/model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
    before = load_file("vokens/model/model.safetensors")
    assert any(not torch.equal(weight, before[name]) for name, weight in one.items())
