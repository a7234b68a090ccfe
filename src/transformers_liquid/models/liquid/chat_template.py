"""The chat template of a base, for messages with images."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase


def default_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    """The chat template of a tokenizer, extended to messages with image and text parts.

    Most bases know only messages whose content is a string: the parts of each message are written into one, an image on
    its own line. Without a template of its own, a Gemma tokenizer gets the reference's conversation and others plain
    lines.
    """
    # Ends with empty output, which keeps the white space at the beginning of the base's template.
    parts_to_text, template = read_template("parts_to_text"), tokenizer.chat_template
    if isinstance(template, dict):
        return {name: parts_to_text + content for name, content in template.items()}
    if template is None:
        template = read_template("gemma" if "<start_of_turn>" in tokenizer.get_vocab() else "plain")
    return parts_to_text + template


def read_template(name: str, family: str = "liquid") -> str:
    """A template of the `chat_templates/` of a family of models on one line, as they are stored."""
    file = Path(__file__).parents[1] / family / "chat_templates" / f"{name}.jinja"
    return "".join(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
