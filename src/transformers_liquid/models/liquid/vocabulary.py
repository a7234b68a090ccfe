"""The tokens around images: what users write, what the reference calls them, what bases reserve."""

import re


# What users write in a text for an image, whatever the placeholder token of the tokenizer is called.
IMAGE_MARK = "<image>"

# What the reference's tokenizer calls the tokens of [`LiquidConfig`].
REFERENCE_TOKENS = {"boi_token_id": "<boi>", "eoi_token_id": "<eoi>", "uncond_token_id": "<unconditional>"}

# <unused0> (Gemma), <|reserved_special_token_0|> (Llama 3), <|extra_0|> (Qwen), <SPECIAL_20> (Mistral), ...
RESERVED_TOKEN = re.compile(
    r"[<\[]\|?(unused|reserved|reserved_special_token|reserved_token|extra|extra_id|special|placeholder|dummy)_?\d+\|?[>\]]",
    re.IGNORECASE,
)
