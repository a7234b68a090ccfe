"""The checkpoints inside the package."""

from pathlib import Path


# Trained on the pictures of an emoji font: the default of `pipeline("text-to-image")`, without any network.
EMOJI_CHECKPOINT = str(Path(__file__).parent / "liquid-emoji")


def find_checkpoint(name: str | None) -> str:
    """What a command line calls a model: the embedded checkpoint for `None` and for its name, unless that is a path here."""
    embedded = Path(EMOJI_CHECKPOINT)
    return EMOJI_CHECKPOINT if name is None or (name == embedded.name and not Path(name).exists()) else name
