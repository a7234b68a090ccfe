import pytest
import transformers
from huggingface_hub import ModelCard
from tiny import CODEBOOK_SIZE, IMAGE_TOKEN_OFFSET, tiny_base, tiny_model, tiny_processor
from transformers.integrations.peft import MIN_PEFT_VERSION

from transformers_liquid import (
    EMOJI_CHECKPOINT,
    LiquidForCausalLM,
    LiquidImageGenerationPipeline,
    liquid_lora_config,
)


def test_a_saved_repository_carries_a_correct_card(tmp_path):
    model = tiny_model("qwen2", tied=True)
    model.generation_config.image_generation_config = {"guidance_scale": 2.5, "do_sample": False}
    model.save_pretrained(tmp_path / "my-liquid")
    card = ModelCard.load(tmp_path / "my-liquid" / "README.md")
    assert card.data.library_name == "transformers_liquid"
    assert card.data.pipeline_tag == "text-to-image"
    for fact in (
        "# my-liquid",
        "`qwen2`",
        f"{CODEBOOK_SIZE} codes",
        f"{IMAGE_TOKEN_OFFSET} … {IMAGE_TOKEN_OFFSET + CODEBOOK_SIZE - 1}",
        f"begin of image {model.config.boi_token_id}",
        "`guidance_scale=2.5`",
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        'pipeline("text-to-image"',
    ):
        assert fact in card.text, fact
    assert "$" not in card.text


def test_a_base_from_the_hub_is_named(tmp_path):
    model = tiny_model("llama", tied=True)
    model.config.text_config.name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/base"


def test_a_card_written_by_hand_is_never_replaced(tmp_path):
    (tmp_path / "README.md").write_text("by hand")
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "by hand"


def _adapted(base):
    from peft import get_peft_model

    return get_peft_model(base, liquid_lora_config(base, r=4))


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("../my-liquid", "`../my-liquid`"),
        ("../../elsewhere/secret/my-liquid", "`my-liquid`"),
        ("org/name", "`org/name`"),
    ],
)
def test_the_card_of_an_adapter_names_its_base_and_no_path_of_this_machine(base, told, tmp_path):
    model = tiny_model()
    folder = tmp_path / "made" / "my-lora"
    model.name_or_path = base if base == "org/name" else str((folder / base).resolve())
    _adapted(model).save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert f"An adapter of the Liquid model {told} (" in card.text
    assert card.data.base_model == ("org/name" if base == "org/name" else None)
    assert "# my-lora" in card.text and ": LORA." in card.text
    assert str(tmp_path) not in card.content and "secret" not in card.content and "$" not in card.content


def test_the_card_of_an_adapter_of_the_embedded_checkpoint_names_it(tmp_path):
    model = tiny_model()
    model.name_or_path = EMOJI_CHECKPOINT
    _adapted(model).save_pretrained(tmp_path / "my-lora")
    assert "Liquid model `liquid-emoji` (" in (tmp_path / "my-lora" / "README.md").read_text()


def test_an_adapter_that_is_loaded_and_saved_again_has_the_card_of_an_adapter(tmp_path):
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # transformers 5.24 asks for one that is not out yet
    tiny_model().save_pretrained(tmp_path / "base")
    _adapted(LiquidForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "my-lora")
    LiquidForCausalLM.from_pretrained(tmp_path / "my-lora").save_pretrained(tmp_path / "again")
    (tmp_path / "my-lora" / "README.md").write_text("by hand")
    assert "An adapter of the Liquid model `../base`" in (tmp_path / "again" / "README.md").read_text()
    _adapted(LiquidForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "my-lora")
    assert (tmp_path / "my-lora" / "README.md").read_text() == "by hand"


def test_adapters_of_other_models_have_the_card_that_peft_writes(tmp_path):
    from peft import LoraConfig, get_peft_model

    _adapted(tiny_model())
    get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "Liquid" not in (tmp_path / "README.md").read_text()


class Hub:
    """What is asked of the Hub when something is pushed; nothing leaves this machine."""

    def __init__(self):
        self.cards = []

    def create_repo(self, repo_id, **kwargs):
        return type("Repository", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            if operation.path_in_repo == "README.md":
                with open(operation.path_or_fileobj, encoding="utf-8") as file:
                    self.cards.append(file.read())

    create_branch = create_repo


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda: hub)
    return hub


def push_model(tmp_path, **kwargs):
    tiny_model().push_to_hub("someone/my-liquid", **kwargs)


def push_while_saving(tmp_path, **kwargs):
    tiny_model().save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/my-liquid")
    assert "# my-liquid" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def push_body(tmp_path, **kwargs):
    tiny_model().model.push_to_hub("someone/my-liquid", **kwargs)


def push_pipeline(tmp_path, **kwargs):
    pipe = LiquidImageGenerationPipeline(model=tiny_model(), processor=tiny_processor())
    pipe.push_to_hub("someone/my-liquid", **kwargs)


@pytest.mark.parametrize("push", [push_model, push_while_saving, push_body, push_pipeline])
def test_what_is_pushed_carries_the_card_of_what_is_saved(tmp_path, hub, push):
    push(tmp_path)
    assert hub.cards
    for text in hub.cards:
        card = ModelCard(text)
        assert card.data.library_name == "transformers_liquid"
        assert "# my-liquid" in text and "More Information Needed" not in text


@pytest.mark.parametrize("push", [push_model, push_pipeline])
def test_tags_of_a_push_stand_in_the_card(tmp_path, hub, push):
    push(tmp_path, tags=["emoji", "liquid"])
    tags = ModelCard(hub.cards[-1]).data.tags
    assert tags.count("emoji") == tags.count("liquid") == 1
