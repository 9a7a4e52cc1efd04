"""Decide everything about a merge before any tensor is read: names, shapes, counts, priors, anchors, outputs.

A plan is made from file headers and a few sampled blocks, so that every mismatch is found first and `--dry-run`
costs nothing. `merge.run_merge` carries it out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora import AdaptedSource, is_adapter, open_model
from mergekit_bayes.methods import Method
from mergekit_bayes.plan.match import Found, Step, match_tensors, one_shape, row_shape
from mergekit_bayes.plan.settings import (
    MergeConfig,
    Shrink,
    check_options,
    check_scales,
    choose_method,
    choose_target,
    parse_shrink,
    parse_size,
    partial_path,
    recipe_path,
    report_path,
)
from mergekit_bayes.plan.weigh import (
    Pull,
    Weighing,
    check_precisions,
    choose_guard,
    common_count,
    known_info,
    precision_identity,
    weigh,
)
from mergekit_bayes.posterior import Anchor as StoredAnchor
from mergekit_bayes.posterior import Identity, MergeTrace, Posterior, PosteriorInfo, Prior, Term
from mergekit_bayes.tensors import ITEM_SIZE

__all__ = [
    "Found", "MergeConfig", "MergePlan", "Pull", "Shrink", "Step", "Weighing", "known_info", "one_shape",
    "partial_path", "plan_merge", "recipe_path", "report_path", "row_shape",
]  # fmt: skip


@dataclass(frozen=True)
class MergePlan:
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
                    f"'{model.ref}' is an adapter among whole models. Put its base before it: BASE+{model.ref}. "
                    "(Adapters alone merge into an adapter.)"
                )
            wanted = config.precision_identities.get(model.ref) if by_precision and model.has_precision else None
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
            # A task that left a tensor alone has scale zero there, which is no other merge than with its own scale.
            uneven = bool(rules) or any(s.copied is None and s.merged < s.spec.size for s in steps)
            info = _merged_info(config, models, scales, weighings, uneven=uneven)
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
            shards=_shards(config, steps, models[0], target),
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
            if s.copied is None and s.sources[i].model == i
            and _DIGITS[model.mean.specs[s.sources[i].name].dtype] > _DIGITS[s.spec.dtype]
        ]  # fmt: skip
        if finer and not isinstance(model.mean, AdaptedSource):
            written = next(s.spec.dtype for s in steps if s.name == finer[0])
            notes.append(
                f"'{model.ref}' has {len(finer)} tensors in a finer dtype than they are written in ({written}, as "
                f"'{models[0].ref}' has them); --dtype chooses another"
            )


_DIGITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}  # of the significand


def _merged_info(
    config: MergeConfig, models: Sequence[Posterior], scales: Sequence[float], weighings: Sequence[Weighing],
    *, uneven: bool,
) -> PosteriorInfo:  # fmt: skip
    base = models[0] if config.base is not None else None
    tasks = models[1:] if base else models
    total = sum(scales)
    shares = scales if base else [s / total for s in scales]
    counted = weighings[1:] if base else weighings
    known = [info for m in models if (info := known_info(m)) is not None]
    counts = [s * w.count for s, w in zip(shares, counted, strict=True) if w.count is not None]
    observations = sum(counts) if counts else None
    common = common_count(config, models)
    weight = sum(abs(s) for s in shares)
    if counts and weight and (config.counts == "recorded" or common is None):
        common = sum(abs(c) for c in counts) / weight
    return PosteriorInfo(
        estimator=known[0].estimator if known else "merged",
        unit=known[0].unit if known else None,
        observations=observations,
        ess=observations,
        prior=_merged_prior(base, weighings, models, shares),
        anchor=StoredAnchor(kind="base", precision=None) if base else StoredAnchor(),
        mean=_BLANK,
        base=Identity(blocks=base.identity) if base else None,
        tokenizer=next((i.tokenizer for i in known if i.tokenizer), None),
        dtype=config.dtype or _main_dtype(models[0]),
        aliases=models[0].info.aliases if models[0].info else {},
        terms=_terms(tasks, shares, counted),
        merge=MergeTrace(
            common_count=common,
            anchor=config.anchor,
            shrink=config.shrink,
            pool=config.pool,
            only=config.only,
            uneven=uneven,
            guarded_share=_BLANK_SHARE,
        ),
    )


# As long as what replaces them: the header is reserved before the data is known.
_BLANK = Identity(blocks="0" * 64, full="0" * 64)
_BLANK_SHARE = 0.123456


def _merged_prior(
    base: Posterior | None,
    weighings: Sequence[Weighing],
    models: Sequence[Posterior],
    shares: Sequence[float],
) -> Prior:
    if base is not None:
        return Prior(
            kind="base",
            centre="base",
            precision=weighings[0].prior,
            base=Identity(blocks=base.identity),
            base_precision=precision_identity(base),
            base_count=weighings[0].gain,
        )
    inside = [m.info.prior for m in models if m.info is not None and m.info.prior.kind in ("base", "unknown")]
    if inside:
        # Merges of one frame, counted alike, average to a merge in that frame; anything else has no one prior.
        same = len(inside) == len(models) and len(set(inside)) == 1 and all(w.gain == 1 for w in weighings)
        return inside[0] if same else Prior(kind="unknown")
    scalar = sum(c * w.prior for c, w in zip(shares, weighings, strict=True))
    return Prior(kind="isotropic", precision=scalar + DELTA_0)


def _terms(tasks: Sequence[Posterior], shares: Sequence[float], weighings: Sequence[Weighing]) -> tuple[Term, ...]:
    found: dict[str, Term] = {}
    for task, share, weighing in zip(tasks, shares, weighings, strict=True):
        inner = task.info.terms if task.info and task.info.terms else ()
        own = inner or (Term(label=_label(task), mean=Identity(blocks=task.identity), scale=1.0),)
        for term in own:
            before = found[term.mean.blocks].scale if term.mean.blocks in found else 0.0
            update = {"scale": before + share * term.scale, "gain": term.gain * weighing.gain * weighing.inner}
            found[term.mean.blocks] = term.model_copy(update=update)
    return tuple(t for t in found.values() if abs(t.scale) > 1e-9)


def _label(task: Posterior) -> str:
    """A name for people; of a Hub id without its revision, so that a recipe which pins it writes the same."""
    return Path(task.ref if task.commit is None else re.sub(r"@[\w./-]+", "", task.ref)).name


def _main_dtype(model: Posterior) -> str:
    sizes: dict[str, int] = {}
    for spec in model.mean.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size * ITEM_SIZE[spec.dtype]
    return max(sizes, key=lambda d: sizes[d], default="F32")


def _shards(config: MergeConfig, steps: Sequence[Step], donor: Posterior, target: Path) -> tuple[tuple[str, ...], ...]:
    """Tensors by output file: filled up in order to the size asked for, else as the donor has them."""
    size = sum(s.spec.nbytes for s in steps)
    limit = parse_size(config.max_shard_size) if config.max_shard_size is not None else None
    if target.suffix == ".safetensors":
        if limit is not None and size > limit:
            raise ConfigError(
                f"--max-shard-size {config.max_shard_size}: {target} is one file and needs {size:,} bytes. "
                "Name a folder with -o."
            )
        return (tuple(s.name for s in steps),)
    if limit is None:
        shards: dict[int, list[str]] = {}
        for step in steps:
            shards.setdefault(donor.mean.file_of(step.name), []).append(step.name)
        return tuple(tuple(names) for _, names in sorted(shards.items()))
    filled: list[list[str]] = [[]]
    room = limit
    for step in steps:
        if step.spec.nbytes > room and filled[-1]:
            filled.append([])
            room = limit
        filled[-1].append(step.name)
        room -= step.spec.nbytes
    return tuple(tuple(names) for names in filled)
