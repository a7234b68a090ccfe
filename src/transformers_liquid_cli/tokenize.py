"""`transformers-liquid tokenize`"""

import re
from pathlib import Path
from typing import Annotated, Literal

from typer import BadParameter, Option

from . import options


def _parse_grids(grids: list[str] | None) -> list[tuple[int, int]] | list[str] | None:
    if grids == ["common"]:
        return grids
    for grid in grids or ():
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", grid):
            raise BadParameter(f"expected HEIGHTxWIDTH such as 32x32, or common alone, got {grid!r}")
    return grids and [tuple(map(int, grid.split("x"))) for grid in grids]


Grids = Annotated[
    list[str] | None,
    Option(
        callback=_parse_grids,
        help="HEIGHTxWIDTH in codes, such as 32x32; a picture takes the closest. common: from 16:9 to 9:16.",
    ),
]


def tokenize(
    dataset: Annotated[
        str, Option(help="A folder of pictures, a file, a name on the Hub, or what else load_dataset takes.")
    ],
    model: Annotated[str, Option(help="Whose codec: a folder or a name on the Hub.")],
    output: Annotated[Path, Option(help="A new folder, or an interrupted one.")],
    dataset_config_name: Annotated[str | None, Option(help="For a data set that has several.")] = None,
    data_dir: Annotated[str | None, Option(help="The folder of the pictures, or of what names them.")] = None,
    data_files: Annotated[list[str] | None, Option(help="As in load_dataset; may be given again.")] = None,
    split: Annotated[str, Option(help="Of the data set.")] = "train",
    streaming: Annotated[bool, Option("--streaming", help="Read without a copy in the cache.")] = False,
    image_column: Annotated[str | None, Option(help="Unless given: image, image_path, or one of pictures.")] = None,
    text_column: Annotated[str | None, Option(help="Unless given: text, caption or txt.")] = None,
    source_columns: Annotated[
        list[str] | None,
        Option(
            help="Of --kind edit: what is edited; may be given again. Unless given: input_image, original_image or "
            "source_img; the text is then edit_prompt or instruction, the image edited_image or target_img."
        ),
    ] = None,
    grids: Grids = None,
    framing: options.Framing = "crop",
    kind: Annotated[Literal["text_to_image", "caption", "edit"], Option(help="Of the records.")] = "text_to_image",
    batch_size: Annotated[int, Option(min=1, help="Pictures encoded together.")] = 16,
    num_workers: Annotated[int, Option(min=1, help="Workers that read pictures, at most one a core.")] = 8,
    records_per_shard: Annotated[int, Option(min=1, help="Records in a file.")] = 1000,
    allow_outside: Annotated[
        bool, Option("--allow-outside", help="Read what records name outside of the folder of the data, too.")
    ] = False,
) -> None:
    """Turns a data set of pictures with texts into codes to train on. An interrupted call goes on where it stopped.

    \b
    Example:
      transformers-liquid tokenize --dataset photos --model path/to/liquid --output codes
    """
    given = dict(locals())
    options.session.after_interrupt = options.GOES_ON
    from accelerate import PartialState

    from transformers_liquid.checkpoints import find_checkpoint
    from transformers_liquid.data.tokenize import SKIPPED_NAME, tokenize_dataset
    from transformers_liquid.models.liquid.reference import adapter_base

    from .models import silence_libraries

    silence_libraries()
    model = find_checkpoint(model)
    given["grids"] = "common" if grids == ["common"] else grids
    # The codec of an adapter is its base's.
    manifest = tokenize_dataset(**given | {"model": adapter_base(model) or model})
    if PartialState().is_main_process:
        skipped = f", {manifest['num_skipped']:,} skipped (see {SKIPPED_NAME})" if manifest["num_skipped"] else ""
        print(f"{output}: {manifest['num_records']:,} pictures as codes{skipped}.")
