from huggingface_hub import ModelCard
from tiny import CODEBOOK_SIZE, IMAGE_TOKEN_OFFSET, tiny_model


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
