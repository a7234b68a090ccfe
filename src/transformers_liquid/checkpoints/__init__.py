"""The checkpoints inside the package."""

from pathlib import Path


# Trained on the pictures of an emoji font: the default of `pipeline("text-to-image")`, without any network.
EMOJI_CHECKPOINT = str(Path(__file__).parent / "liquid-emoji")
# Of the same pictures, with vokens and a diffusion model: for `InterleavedVokenPipeline.from_pretrained`.
VOKEN_EMOJI = str(Path(__file__).parent / "voken-emoji")


def find_checkpoint(name: str | None) -> str:
    """What a command line calls a model: liquid-emoji for `None`, an embedded one for its name, unless that is a path here."""
    if name is None:
        return EMOJI_CHECKPOINT
    embedded = {Path(one).name: one for one in (EMOJI_CHECKPOINT, VOKEN_EMOJI)}
    return name if Path(name).exists() else embedded.get(name, name)
