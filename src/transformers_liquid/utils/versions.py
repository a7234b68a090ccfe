"""What differs between the versions of transformers that are admitted.

The internals of transformers on which this package leans are listed, and checked, in `tests/test_versions.py`.
"""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast


# How forwards, generate() and outputs call the cache. From transformers 5.24 on all say `cache`; before, mamba's say
# `cache_params`.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
