import pytest
import transformers
from huggingface_hub import ModelCard
from tiny import CODEBOOK_SIZE, IMAGE_TOKEN_OFFSET, tiny_model, tiny_processor

from transformers_liquid import LiquidImageGenerationPipeline


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
