"""`transformers-liquid env`"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import options


LIBRARIES = ["transformers-liquid", "torch", "transformers", "diffusers", "accelerate", "safetensors"]
LIBRARIES += ["huggingface-hub", "tokenizers", "typer", "peft", "datasets", "lm-eval", "gradio"]


def env(as_json: options.Json = False) -> None:
    """Prints versions, devices, free memory and the cache, for reports of bugs.

    \b
    Example:
      transformers-liquid env
    """
    import psutil  # accelerate brings it
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    facts = {"python": f"{platform.python_version()} ({sys.executable})", "platform": platform.platform()}
    for library in LIBRARIES:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            facts[library] = "not installed"
    memory, devices = psutil.virtual_memory(), range(torch.cuda.device_count())
    places = {
        f"cuda:{index}": (torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index)) for index in devices
    }
    places["cpu"] = (f"{platform.machine()}, {torch.get_num_threads()} threads", memory.available, memory.total)
    for device, (name, free, total) in places.items():
        facts[device] = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    facts |= {"accelerator": str(torch.accelerator.current_accelerator(check_available=True)).lower()}
    facts |= {"cache": HF_HUB_CACHE, "offline": HF_HUB_OFFLINE}
    (options.tell if as_json else options.tell_lines)(facts)
