"""`transformers-liquid env`"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import options


LIBRARIES = (
    "transformers-liquid",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
)
LIBRARIES += ("tokenizers", "typer", "peft", "datasets", "lm-eval", "gradio")


def env(as_json: options.Json = False) -> None:
    """Prints versions, devices, free memory and the cache, for reports of bugs.

    \b
    Example:
      transformers-liquid env
    """
    import psutil
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    def version_of(library: str) -> str | None:
        try:
            return version(library)
        except PackageNotFoundError:
            return None

    memory = psutil.virtual_memory()
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    devices = [{"device": "cpu", "name": name, "free_bytes": memory.available, "total_bytes": memory.total}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append({"device": f"cuda:{index}", "name": name, "free_bytes": free, "total_bytes": total})
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        **{library: version_of(library) for library in LIBRARIES},
        "accelerator": getattr(torch.accelerator.current_accelerator(check_available=True), "type", None),
        "devices": devices,
        "cache": HF_HUB_CACHE,
        "offline": HF_HUB_OFFLINE,
    }
    if as_json:
        options.tell(facts)
        return
    for one in facts.pop("devices"):
        told = f"{one['name']}, {one['free_bytes'] / 1e9:.1f} of {one['total_bytes'] / 1e9:.1f} GB free"
        facts[one["device"]] = told
    options.tell_lines({name: "none" if value is None else value for name, value in facts.items()})
