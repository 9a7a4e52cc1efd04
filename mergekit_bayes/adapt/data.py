"""Load the model and the rows of an adaptation, and put together what it works on."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mergekit_bayes.adapt.memory import Memory, build_memory
from mergekit_bayes.adapt.objective import PARTS
from mergekit_bayes.adapt.refusals import refuse_model, refuse_start
from mergekit_bayes.adapt.rows import read_examples
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.units import Units, choose_units
from mergekit_bayes.adapt.weights import chosen_prior, places_of
from mergekit_bayes.draws import mix
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.data import load_base, warn_of_rounding, with_lora
from mergekit_bayes.finetune.identity import digest
from mergekit_bayes.finetune.refusals import refuse_quantised
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.encode import Collate, observations
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.models.places import Place
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.posterior import Identity, PosteriorInfo, open_posterior
from mergekit_bayes.posterior.info import base_identity
from mergekit_bayes.ranks import is_main, main_first

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]
_HELD_OUT = 0.1  # of the removed rows, where `held_out_rise` is a goal and no rows are named
# Settings that may change between a run and its continuation, as in a fine-tune: where things are,
# what happens after training, and what is compared by its content.
_FREE = {
    "model",
    "output",
    "force",
    "resume",
    "keep_checkpoints",
    "report_to",
    "num_processes",
    "trust_remote_code",
    "posterior",
    "flush_batches",
    "logging_steps",
    "memory_filter",
    "prompts",
    "prompt_column",
    "remove",
    "add",
    "memory",
    "contrast",
    "held_out",
}


class Held(NamedTuple):
    """Examples that no step trains on.

    Attributes:
        removed: Rows like the removed ones; empty unless they are named or their loss is a goal.
        memory: The held-out part of the memory.
    """

    removed: Sequence[Example]
    memory: Sequence[Example]


@dataclass(frozen=True)
class Run:
    """All that an adaptation works on, from the first step to the stored posterior.

    Attributes:
        config: The settings, as given.
        training: The same run as the fine-tuning machinery sees it.
        loaded: The model that is adapted, with its adapter if there is one.
        parts: Encoded examples that are trained on, by the part's name.
        held: Encoded examples that are not.
        prompts: What checks have continued; empty without `prompts`.
        memory: How the memory was made; None without one.
        units: The weights of the parts.
        base: Content hash of the start.
        info: The record of the start's posterior; None without one.
        places: Where the tensors of its precision belong in the model; empty without one.
        precision: Content hash of its precision; None without one.
        identity: All that decides the bits of the run; only a run of the same may resume.
    """

    config: AdaptConfig
    training: FinetuneConfig
    loaded: Loaded
    parts: Mapping[str, Sequence[Example]]
    held: Held
    prompts: Sequence[str]
    memory: Memory | None
    units: Units
    base: Identity | None
    info: PosteriorInfo | None
    places: tuple[Place, ...]
    precision: Identity | None
    identity: dict[str, object]


def training_config(config: AdaptConfig) -> FinetuneConfig:
    """The settings of the fine-tuning machinery that carries out an adaptation.

    Those that both have are the same. Its learning rate is a placeholder: the rate is chosen when
    the model is there.
    """
    shared = {name: value for name, value in config if name in FinetuneConfig.model_fields}
    settings = shared | {
        "data": sources(config),
        "weight_decay": 1e-6 if config.optimizer == "ivon" else 0.0,
        "damping": 0.0,  # the noise is bounded by the prior, and by the ess that is chosen for it
        "scheduler": "constant",
    }
    return FinetuneConfig.model_validate(settings)


def sources(config: AdaptConfig) -> tuple[str, ...]:
    """All files, folders and Hub data sets of rows that an adaptation reads."""
    rows = (config.remove, config.add, config.contrast, config.memory, config.held_out)
    named = [ref for given in rows if given is not None for ref in given.sources]
    prompts = [config.prompts] if config.prompts is not None else []
    return tuple(dict.fromkeys(named + prompts))


def load_run(config: AdaptConfig) -> Run:
    """Load model and rows, and choose what the settings leave open. Every rank must call this.

    Raises:
        CheckpointError: The model or rows cannot be loaded.
        ConfigError: A model that cannot be adapted, or settings that contradict each other.
        MismatchError: Rows without the named columns or with unknown labels.
    """
    training = training_config(config)
    start = main_first(lambda: _load(config, training))
    loaded, info, places, precision, parts, removed, prompts = start
    memory = build_memory(config, loaded)  # of which rank 0 tells the others
    if memory is not None:
        parts["memory"] = memory.examples
    held = Held(removed, memory.held_out if memory is not None else [])
    counts = {name: observations(examples, loaded.task) for name, examples in parts.items()}
    unit = UNIT[loaded.task]
    units = choose_units(config, loaded, counts, info, unit)
    _warn_of_a_loose_memory(config, units)
    base = base_identity(loaded.path)
    if config.lora is not None:
        loaded = replace(loaded, model=with_lora(loaded, config.lora, config.model))
    refuse_quantised(loaded.model, config.model)
    warn_of_rounding(training, loaded)
    settings = {
        name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE
    }
    identity = settings | {
        "model": base.blocks if base is not None else config.model,
        "precision": precision and precision.blocks,
        "units": units.record(),
        "data": {name: digest(examples) for name, examples in parts.items()},
        "held": [digest(held.removed), digest(held.memory)],
        "prompts": sha256("\0".join(prompts).encode()).hexdigest(),
    }
    return Run(
        config,
        training,
        loaded,
        parts,
        held,
        prompts,
        memory,
        units,
        base,
        info,
        places,
        precision,
        identity,
    )


def _warn_of_a_loose_memory(config: AdaptConfig, units: Units) -> None:
    """Say if a record of few observations makes the memory count for less than without a record.

    A precision that was made for a checkpoint stands for the rows that it was given, which may be
    few beside what the checkpoint was trained on.
    """
    is_chosen = config.kappa is not None or config.base_observations is not None
    assumed = config.base_multiple * units.edited
    if units.memory and not is_chosen and units.base < assumed and is_main():
        logger.warning(
            "the posterior of '%s' stands for %s %ss, so the memory holds the model %.2g times as "
            "firmly as without a posterior (%s assumed). If the model was trained on more, give "
            "base_observations.",
            config.model,
            f"{units.base:,.0f}",
            units.unit,
            units.base / assumed,
            f"{assumed:,.0f}",
        )


class _Start(NamedTuple):
    """The model, its posterior's record, places and precision, each part's rows, prompts."""

    loaded: Loaded
    info: PosteriorInfo | None
    places: tuple[Place, ...]
    precision: Identity | None
    parts: dict[str, Sequence[Example]]
    removed: Sequence[Example]
    prompts: list[str]


def _load(config: AdaptConfig, training: FinetuneConfig) -> _Start:
    refuse_start(config)
    loaded = load_base(training)
    refuse_model(config, loaded)
    if loaded.task == "classification":
        # Whoever reads the head later must not guess how it was adapted.
        loaded.model.config.problem_type = "single_label_classification"
    with open_posterior(config.model, precision=config.precision) as posterior:
        info = posterior.info if posterior.has_precision else None
        reads = config.prior in ("auto", "stored") or config.posterior == "flush"
        # Before an adapter renames the parameters.
        places = places_of(loaded, posterior) if reads else ()
        precision = Identity(blocks=posterior.precision_identity) if places else None
    # Refused early.
    chosen_prior(config, is_stored=bool(places))
    named = {"remove": config.remove, "contrast": config.contrast, "add": config.add}
    parts: dict[str, Sequence[Example]] = {
        name: read_examples(config, loaded, rows).examples for name, rows in named.items() if rows
    }
    removed = _held_out(config, loaded, parts)
    return _Start(loaded, info, places, precision, parts, removed, _prompts(config))


def _prompts(config: AdaptConfig) -> list[str]:
    if config.prompts is None:
        return []
    rows = load_rows(config.prompts, max_rows=config.prompt_rows, text=config.prompt_column)
    return list(rows[config.prompt_column])


def _held_out(
    config: AdaptConfig, loaded: Loaded, parts: dict[str, Sequence[Example]]
) -> Sequence[Example]:
    """Rows like the removed ones whose loss is a goal; without named ones taken from these."""
    if config.held_out is not None:
        return read_examples(config, loaded, config.held_out).examples
    if config.until.held_out_rise is None or "remove" not in parts:
        return []
    removed = parts["remove"]
    count = max(1, round(_HELD_OUT * len(removed)))
    if count == len(removed):
        raise ConfigError(
            "held_out_rise: one removed example cannot also be held out. Name rows by held_out."
        )
    parts["remove"] = removed[:-count]
    return removed[-count:]


class Mixture(Dataset[dict[str, Example]]):
    """What one example of a step is: one example of each part.

    Every part goes through its examples in a random order, and again in another one when all have
    come, however many the other parts have.

    Args:
        parts: Encoded examples by the part's name.
        length: Number of items, of all steps and ranks together.
        seed: Seed of the orders.
    """

    def __init__(self, parts: Mapping[str, Sequence[Example]], length: int, seed: int) -> None:
        self._parts, self._length = parts, length
        self._orders = {
            name: _order(len(examples), length, mix(seed, PARTS.index(name)))
            for name, examples in parts.items()
        }

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Example]:
        return {
            name: {**examples[(j := self._orders[name][i])], "index": j}
            for name, examples in self._parts.items()
        }


def _order(size: int, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    order: list[int] = []
    while len(order) < length:
        order += torch.randperm(size, generator=generator).tolist()
    return order[:length]


class CollateParts:
    """Join the examples of a `Mixture` into one batch, part after part.

    Beside the tensors of `Collate` it has `part`, each example's part by its place in
    `objective.PARTS`, and `index`, its place among that part's examples.

    Args:
        pad: The token that fills short rows.
    """

    def __init__(self, pad: int) -> None:
        self._collate = Collate(pad)

    def __call__(self, items: Sequence[Mapping[str, Example]]) -> dict[str, Tensor]:
        """A batch of all parts of the items."""
        names = [name for name in PARTS if name in items[0]]
        examples = [item[name] for name in names for item in items]
        return batch_of(
            self._collate, examples, [PARTS.index(name) for name in names for _ in items]
        )


def batch_of(
    collate: Collate, examples: Sequence[Example], parts: Sequence[int]
) -> dict[str, Tensor]:
    """A batch of these examples, which may lack labels and an index, with their parts' numbers."""
    whole = [{"labels": 0, "index": 0, **example} for example in examples]
    batch = collate(whole)
    batch["part"] = torch.tensor(list(parts))
    batch["index"] = torch.tensor([e["index"] for e in whole])
    return batch


def batches_of(adapted: Run, examples: Sequence[Example], part: int) -> Iterator[dict[str, Tensor]]:
    """Batches of one part's examples, as a teacher reads them, on the device of the model.

    Args:
        adapted: The run.
        examples: Encoded examples of the part, in its order; others have their place as `index`.
        part: Number of the part.
    """
    collate, size = Collate(adapted.loaded.pad), adapted.config.batch_size
    device = adapted.loaded.device
    for first in range(0, len(examples), size):
        chosen = examples[first : first + size]
        whole = [{"index": first + i, **example} for i, example in enumerate(chosen)]
        batch = batch_of(collate, whole, [part] * len(whole))
        yield {name: tensor.to(device) for name, tensor in batch.items()}
