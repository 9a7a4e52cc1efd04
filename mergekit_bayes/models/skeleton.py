"""A model without its numbers: names, shapes and order of its parameters, as they are in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.errors import CheckpointError, ConfigError, shown
from mergekit_bayes.libraries import call
from mergekit_bayes.models.limits import ADAPTER_CONFIG, CONFIG, bounded_build, stored_in
from mergekit_bayes.models.load import Task
from mergekit_bayes.models.pretrained import base_of, load_adapter_config, load_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

# Endings of the names of models whose loss is the mean over tokens.
_OF_TOKENS = ("CausalLM", "LMHeadModel", "MaskedLM", "ConditionalGeneration", "TokenClassification")


class Skeleton(NamedTuple):
    """A model on the meta device, where tensors have no numbers.

    Attributes:
        model: The model, with an adapter around it where the checkpoint is one.
        task: `causal-lm` for a model whose observations are tokens, else `classification`.
        path: The local folder that its config was read from.
    """

    model: "PreTrainedModel | PeftModel"
    task: str
    path: Path


def load_skeleton(ref: str, task: Task = "auto", *, trust_remote_code: bool = False) -> Skeleton:
    """Build a checkpoint's model, or an adapter on its base, as a training has had it in memory.

    No tensor is read and no memory taken, so that a model of any size can be looked at.

    Args:
        ref: A local folder or `org/name[@revision]`.
        task: `auto` reads it off the architecture.
        trust_remote_code: Run Python code of the folder, or of the base's, where it needs any.

    Raises:
        CheckpointError: There is no such model, it cannot be built, or it needs code of its own.
        ConfigError: The architecture does not say what an observation is, and no task is named.
    """
    path = resolve(ref, CHECKPOINT)
    if path.is_file():
        raise CheckpointError(
            f"'{ref}' is a file; to know the order of its parameters, the folder with its config "
            "is needed."
        )
    if (path / ADAPTER_CONFIG).exists():
        return _adapted(path, task, trust_remote_code)
    config = load_config(path, trust_remote_code=trust_remote_code)
    names = config.architectures
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if task == "auto":
        task = _task_of(ref, name)
    model = _build(path, config, name, task, trust_remote_code)
    return Skeleton(model, task, path)


def _task_of(ref: str, architecture: str) -> Task:
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    if architecture.endswith(_OF_TOKENS):
        return "causal-lm"
    raise ConfigError(
        f"'{ref}': the architecture {shown(architecture)} does not say what its loss counts. Pass "
        "--task causal-lm where it is a mean over tokens, --task classification where it is one "
        "over rows."
    )


def _build(
    path: Path,
    config: "PretrainedConfig",
    architecture: str,
    task: Task,
    trust_remote_code: bool,
    **options: object,
) -> "PreTrainedModel":
    """The model that a config describes, of its own class where transformers has that."""
    import torch
    import transformers

    own: Any = getattr(transformers, architecture, None) if architecture else None
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    auto: Any = (
        transformers.AutoModelForSequenceClassification
        if task == "classification"
        else transformers.AutoModelForCausalLM
    )

    def build() -> "PreTrainedModel":
        with torch.device("meta"):
            if is_model:
                model: PreTrainedModel = own(config)
            else:
                model = auto.from_config(config, trust_remote_code=trust_remote_code)
            return model

    with bounded_build(path, stored_in(path), is_packed=False):
        return call(f"'{path}': transformers cannot build the model of its {CONFIG}", build)


def _adapted(path: Path, task: Task, trust_remote_code: bool) -> Skeleton:
    """An adapter on the skeleton of its base, its own parameters trainable."""
    import peft
    import torch

    adapter = load_adapter_config(path)
    task = "classification" if adapter.task_type == "SEQ_CLS" else "causal-lm"
    base = resolve(base_of(path, adapter), CHECKPOINT)
    config = load_config(base, trust_remote_code=trust_remote_code)
    if task == "classification" and (path / CONFIG).exists():
        labels = load_config(path, trust_remote_code=trust_remote_code)
        config.num_labels, config.problem_type = labels.num_labels, labels.problem_type
    model = _build(base, config, "", task, trust_remote_code)
    adapter.inference_mode = False

    def wrap() -> "PeftModel":
        with torch.device("meta"):
            wrapped: PeftModel = peft.get_peft_model(model, adapter)
            return wrapped

    return Skeleton(call(f"'{path}': peft cannot build it", wrap), task, path)
