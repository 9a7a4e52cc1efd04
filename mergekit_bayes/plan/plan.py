"""Decide everything about a merge before any tensor is read: names, shapes, counts, priors,
anchors, outputs.

A plan is made from file headers and a few sampled blocks, so that every mismatch is found first and
`--dry-run` costs nothing. `merge.run_merge` carries it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora import AdaptedSource, is_adapter, open_model
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.guard import choose_guard
from mergekit_bayes.plan.match import match_tensors
from mergekit_bayes.plan.merged_info import merged_info
from mergekit_bayes.plan.options import Shrink, check_options, choose_method, parse_shrink
from mergekit_bayes.plan.outputs import choose_target, split_shards
from mergekit_bayes.plan.precisions import check_precisions
from mergekit_bayes.plan.scales import check_scales
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.plan.weigh import Weighing, weigh
from mergekit_bayes.posterior import Posterior, PosteriorInfo


@dataclass(frozen=True)
class MergePlan(Closing):
    """A merge that can be carried out: `models` is the base, if any, and then the tasks.

    Attributes:
        settings: The method's own, checked.
        shards: Names of the tensors of each output file.
        mended: What a rule (`--on-missing`, `--vocab`, tied heads) decided, by tensor.
    """

    config: MergeConfig
    method: Method
    settings: dict[str, float | str]
    models: tuple[Posterior, ...]
    scales: tuple[float, ...]
    guard: float
    weighings: tuple[Weighing, ...]
    shrink: Shrink | None
    steps: tuple[Step, ...]
    shards: tuple[tuple[str, ...], ...]
    left_out: dict[str, str]
    mended: dict[str, str]
    notes: tuple[str, ...]
    target: Path
    info: PosteriorInfo | None = field(repr=False)  # of the merge, its own identity still blank

    @property
    def donor(self) -> Posterior:
        return self.models[0]

    @property
    def base(self) -> Posterior | None:
        return self.models[0] if self.config.base is not None else None

    @property
    def tasks(self) -> tuple[Posterior, ...]:
        return self.models[1:] if self.config.base is not None else self.models

    @property
    def to_file(self) -> bool:
        return self.target.suffix == ".safetensors"

    def close(self) -> None:
        for model in self.models:
            model.close()


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the models' headers and decide the merge.

    Raises:
        ConfigError: Options that contradict each other.
        CheckpointError: A file that cannot be read, or an output that exists.
        MismatchError: Models that do not fit together.
        PrecisionError: A precision that is missing or belongs to other weights.
    """
    scales, rules = check_scales(config)
    method, settings = choose_method(config)
    check_options(config, method, scales, rules)
    by_precision = method.needs_precision
    models: list[Posterior] = []
    try:
        for ref in ((config.base,) if config.base is not None else ()) + config.models:
            models.append(
                open_model(
                    ref,
                    precision=config.precision.get(ref),
                    isotropic=config.isotropic.get(ref),
                    with_precision=by_precision,
                )
            )
        for model in models:
            if is_adapter(model.path):
                raise MismatchError(
                    f"'{model.ref}' is an adapter among whole models. Put its base before it: "
                    f"BASE+{model.ref}. "
                    "(Adapters alone merge into an adapter.)"
                )
            wanted = (
                config.precision_identities.get(model.ref)
                if by_precision and model.has_precision
                else None
            )
            model.check_identity(config.identities.get(model.ref), wanted)
        target = choose_target(config, models)
        notes = [note for m in models if isinstance(m.mean, AdaptedSource) for note in m.mean.notes]
        weighings = [Weighing()] * len(models)
        guard, info = config.guard, None
        if by_precision:
            check_precisions(config, models, notes)
            weighings = weigh(config, models, notes)
            guard = choose_guard(config, models, scales, rules, weighings, notes)
        steps, left_out, mended = match_tensors(config, method, models, scales, rules, notes)
        _note_narrowing(steps, models, notes)
        if by_precision and config.posterior and method.is_posterior:
            # A task that left a tensor alone has scale zero there, which is no other merge than
            # with its own scale.
            uneven = bool(rules) or any(s.copied is None and s.merged < s.spec.size for s in steps)
            info = merged_info(config, models, scales, weighings, uneven=uneven)
        return MergePlan(
            config=config,
            method=method,
            settings=settings,
            models=tuple(models),
            scales=scales,
            guard=guard,
            weighings=tuple(weighings),
            shrink=parse_shrink(config.shrink),
            steps=tuple(steps),
            shards=split_shards(config, steps, models[0], target),
            left_out=left_out,
            mended=mended,
            notes=tuple(notes),
            target=target,
            info=info,
        )
    except BaseException:
        for model in models:
            model.close()
        raise


def _note_narrowing(steps: Sequence[Step], models: Sequence[Posterior], notes: list[str]) -> None:
    """Say where a model holds more digits than the output."""
    for i, model in enumerate(models[1:], 1):
        finer = [
            s.name
            for s in steps
            if s.copied is None
            and s.sources[i].model == i
            and _DIGITS[model.mean.specs[s.sources[i].name].dtype] > _DIGITS[s.spec.dtype]
        ]
        if finer and not isinstance(model.mean, AdaptedSource):
            written = next(s.spec.dtype for s in steps if s.name == finer[0])
            notes.append(
                f"'{model.ref}' has {len(finer)} tensors in a finer dtype than they are written in "
                f"({written}, as "
                f"'{models[0].ref}' has them); --dtype chooses another"
            )


_DIGITS = {
    "F64": 53,
    "F32": 24,
    "F16": 11,
    "BF16": 8,
    "F8_E4M3": 4,
    "F8_E5M2": 3,
}  # of the significand
