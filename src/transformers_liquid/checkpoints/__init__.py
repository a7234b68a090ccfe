"""The checkpoints inside the package."""

from pathlib import Path


# Trained on the pictures of an emoji font: the default of `pipeline("text-to-image")`, without any network.
EMOJI_CHECKPOINT = str(Path(__file__).parent / "liquid-emoji")
