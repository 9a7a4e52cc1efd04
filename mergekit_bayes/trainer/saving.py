"""Store a model with the posterior that its optimizer holds, as `bmerge merge` reads it.

    save_trained(model, optimizer, "tuned", observations=tokens, tokenizer=tokenizer)

The model's files are those of `save_pretrained`, or one safetensors file of a module of torch, and
the precision lies beside them in `posterior/` with its record.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.libraries import call
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.optim import full_tensors
from mergekit_bayes.optim.base import PosteriorOptimizer
from mergekit_bayes.optim.rates import step_bound
from mergekit_bayes.posterior import Anchor, PosteriorInfo, Prior, identify, save_posterior
from mergekit_bayes.posterior.info import LOSS, base_identity
from mergekit_bayes.ranks import on_main
from mergekit_bayes.trainer.choices import predictive

Unit = Literal["token", "example"]
_WEIGHTS = "model.safetensors"
# Of a parameter group: what is no setting, or is recorded under another name.
_NOT_RECORDED = {
    *("params", "draws", "prior_sum", "prior_order", "ggn", "initial_lr", "differentiable")
}
_ATTRIBUTES = ("antithetic", "curvature", "rank_noise", "restore")  # settings beside the groups


def save_trained(
    model: Module,
    optimizer: PosteriorOptimizer,
    folder: str | Path,
    *,
    observations: float,
    unit: Unit = "token",
    tokenizer: Any = None,
    base: str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a model and its posterior into a new folder. Every rank must call this; rank 0 writes.

    Args:
        model: The trained model: one of transformers or peft, or any module of torch, of which
            `model.safetensors` is written. Wrappers of DDP and `torch.compile` are taken off.
        optimizer: The optimizer that trained it, outside of `sampled_params`.
        folder: The folder to make.
        observations: Number of observations in the data, for which the precision stands.
        unit: What an observation is: a scored token, or an example.
        tokenizer: Saved with the model, if given.
        base: Folder of the model that training started from, if it is known.
        training: More to record of the training: names and numbers or texts.
        force: Replace the folder if it exists.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder exists, or cannot be written.
        ConfigError: A posterior that no record describes, or no parameter that was trained.
        PrecisionError: An entry of the precision is not finite.
    """
    model = _unwrapped(model)
    precision = gathered(stored_precision(model, optimizer))
    weights = model.state_dict()
    state = full_tensors(weights) if _is_sharded(weights) else None
    target = Path(folder)

    def write() -> Path:
        with replacing(target, force=force) as partial:
            way_out = "Free some space or choose another folder."
            call(f"{target}: writing failed", lambda: _save_model(model, state, partial), way_out)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            store(
                partial,
                model,
                optimizer,
                precision,
                observations=observations,
                unit=unit,
                base=base,
                training=training,
            )
        return target

    return on_main(write)


def stored_precision(model: Module, optimizer: PosteriorOptimizer) -> dict[str, Tensor]:
    """The optimizer's precision by parameter name, if a record can say what it contains.

    Raises:
        ConfigError: The prior is not one number for all weights, or nothing was trained.
    """
    groups = optimizer.param_groups
    is_adapted = any(group.get("adapt_prior") for group in groups)
    if optimizer.has_prior or is_adapted or len({g["weight_decay"] * g["ess"] for g in groups}) > 1:
        raise ConfigError(
            "the prior of this optimizer (prior=, adapt_prior= or groups with their own "
            "weight_decay) is not one number for all weights, and a merge could not take it off "
            "the precision. Save the model, and store a precision by `bmerge precision`."
        )
    precision = optimizer.precision(model.named_parameters())
    if not precision:
        raise ConfigError(
            "the optimizer has no precision of any parameter of this model. Give the model that it "
            "has trained, without a wrapper (accelerator.unwrap_model)."
        )
    return precision


def gathered(precision: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of shards, on rank 0; a collective, which every rank must call."""
    return full_tensors(precision) if _is_sharded(precision) else precision


def store(
    folder: Path,
    model: Module,
    optimizer: PosteriorOptimizer,
    precision: Mapping[str, Tensor],
    *,
    observations: float,
    unit: Unit,
    base: str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write a precision beside the model in `folder`, with its record.

    Args:
        folder: Where the model was saved.
        model: The model.
        optimizer: The optimizer that trained it.
        precision: From `stored_precision`, whole tensors.
        observations: As in `save_trained`.
        unit: As in `save_trained`.
        base: As in `save_trained`.
        training: As in `save_trained`.
        force: Replace a precision that is there.
    """
    group = optimizer.param_groups[0]
    is_ggn = group.get("ggn", False)
    estimator = "ggn" if is_ggn else type(optimizer).__name__.lower()
    ess, decay = float(group["ess"]), float(group["weight_decay"])
    damping = float(group.get("damping", 0.0)) if is_ggn else 0.0
    prior = ess * decay
    with SafetensorsSource(checkpoint_files(folder)) as source:
        mean = identify(source)
    is_known = hasattr(model, "config")  # else nothing says which loss it is
    info = PosteriorInfo(
        estimator=estimator,
        ess=ess,
        unit=unit,
        observations=observations,
        prior=Prior(kind="isotropic", precision=prior) if prior else Prior(),
        anchor=Anchor(kind="zero", precision=prior) if prior else Anchor(),
        predictive=predictive(ess, ess=ess, damping=damping, weight_decay=decay),
        mean=mean,
        base=None if base is None else base_identity(Path(base)),
        tokenizer=tokenizer_identity(folder),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        training=_settings(optimizer)
        | ({LOSS: trained_loss(model).name} if is_known else {})
        | dict(training or {}),
        health=precision_health(precision),
        aliases=dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )
    named = checkpoint_names(model, dict(precision)) if _is_pretrained(model) else precision
    arrays = {name: tensor.detach().cpu().float().numpy() for name, tensor in named.items()}
    save_posterior(folder, arrays, info, force=force)


def _settings(optimizer: PosteriorOptimizer) -> dict[str, Any]:
    """The settings of the optimizer and its number of steps, under the names of its arguments."""
    group = optimizer.param_groups[0]
    lr = group.get("initial_lr", group["lr"])
    settings: dict[str, Any] = {"optimizer": type(optimizer).__name__.lower()}
    if group.get("clip_radius", math.inf) < math.inf:
        settings["learning_rate"] = step_bound(group, lr)
    settings |= {
        name: value
        for name, value in group.items()
        if name not in _NOT_RECORDED and value != math.inf  # for which JSON has no number
    }
    others = {n: getattr(optimizer, n) for n in _ATTRIBUTES if hasattr(optimizer, n)}
    return settings | {"lr": lr, "steps": group["steps"]} | others


def _is_pretrained(model: Module) -> bool:
    return hasattr(model, "save_pretrained")


def _is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _unwrapped(model: Any) -> Any:
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def _save_model(model: Any, state: dict[str, Tensor] | None, folder: Path) -> None:
    if _is_pretrained(model):
        model.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
        return
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {}
    places = set()
    for name, tensor in (model.state_dict() if state is None else state).items():
        # Of tied weights the first name is stored, as in `named_parameters`.
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in places:
            continue
        places.add(place)
        tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
