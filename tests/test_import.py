"""Importing the package costs what it must."""

import json
import subprocess
import sys


# What the package derives its classes from and registers them with.
NEEDED = """
import PIL.Image
from diffusers import DiffusionPipeline, VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import AutoImageProcessor, AutoModelForMultimodalLM, AutoProcessor, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.processing_utils import ProcessorMixin
"""


def run(script: str) -> list[str]:
    command = [sys.executable, "-c", f"import json, sys\n{script}"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_importing_the_package_imports_nothing_but_itself_on_top_of_what_it_derives_from():
    new = {
        *run(
            f"{NEEDED}\nneeded = {{*sys.modules}}\nimport transformers_liquid\nprint(json.dumps([*{{*sys.modules}} - needed]))"
        )
    }
    assert "transformers_liquid.models.liquid.modeling_liquid" in new
    assert {name for name in new if not name.startswith("transformers_liquid")} == set()
    # The Trainer and what only the command line needs.
    assert not new & {f"transformers_liquid.{name}" for name in ("training.trainer", "ops.packed_attention")}
    assert "transformers_liquid_cli" not in new


def test_importing_the_package_registers_models_processors_and_the_pipeline():
    registered = run(
        "import transformers_liquid\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor\n"
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "config = type(AutoConfig.for_model('liquid'))\n"
        "classes = AutoModelForCausalLM._model_mapping[config], PROCESSOR_MAPPING[config]\n"
        "pipeline = PIPELINE_REGISTRY.check_task('text-to-image')[1]['impl']\n"
        "print(json.dumps([one.__name__ for one in (*classes, pipeline)]))"
    )
    assert registered == ["LiquidForCausalLM", "LiquidProcessor", "LiquidImageGenerationPipeline"]


def test_the_trainer_is_a_public_name_that_is_imported_when_it_is_used():
    script = (
        "import transformers_liquid\n"
        "before = 'transformers.trainer' in sys.modules\n"
        "print(json.dumps([before, transformers_liquid.LiquidTrainer.__name__]))"
    )
    assert run(script) == [False, "LiquidTrainer"]
