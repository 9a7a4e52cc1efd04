"""The `PosteriorInfo` of a merge: prior, terms and trace."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.specs import ITEM_SIZE
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.plan.counts import common_count
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.tied_heads import Ties
from mergekit_bayes.plan.weigh import precision_identity
from mergekit_bayes.posterior import (
    Anchor,
    Edit,
    Identity,
    MergeTrace,
    Posterior,
    PosteriorInfo,
    Prior,
    Term,
)
from mergekit_bayes.posterior.info import LOSS, recorded_losses

# As long as what replaces them: the header is reserved before the data is known.
_BLANK = Identity(blocks="0" * 64, full="0" * 64)
_BLANK_SHARE = 0.123456


def merged_info(config: MergeConfig, inputs: Inputs, ties: Ties, *, uneven: bool) -> PosteriorInfo:
    """The record of a merge's precision, its own identity still blank.

    Args:
        config: The settings.
        inputs: The models, weighed.
        ties: The tied tensors.
        uneven: Whether some tensor or entry is merged by other scales than the terms'.
    """
    base, donor = inputs.base, inputs.donor.posterior
    shares = _shares(inputs)
    aliases = donor.info.aliases if donor.info else {}
    infos = [info for model in inputs if (info := model.precision_info) is not None]
    counts = [
        share * task.weighing.count
        for share, task in zip(shares, inputs.tasks, strict=True)
        if task.weighing.count is not None
    ]
    observations = sum(counts) if counts else None
    common = common_count(config, inputs)
    weight = sum(abs(share) for share in shares)
    if counts and weight and (config.counts == "recorded" or common is None):
        common = sum(abs(count) for count in counts) / weight
    return PosteriorInfo(
        estimator=infos[0].estimator if infos else "merged",
        unit=infos[0].unit if infos else None,
        observations=observations,
        ess=observations,
        prior=_merged_prior(inputs, shares),
        anchor=Anchor(kind="base", precision=None) if base else Anchor(),
        mean=_BLANK,
        base=Identity(blocks=base.posterior.identity) if base else None,
        tokenizer=next((info.tokenizer for info in infos if info.tokenizer), None),
        training={LOSS: "; ".join(losses)} if (losses := recorded_losses(infos)) else {},
        dtype=config.dtype or _main_dtype(donor, but=ties.copies),
        aliases={n: s for n, s in aliases.items() if n not in ties.untied},
        terms=_terms(inputs.tasks, shares),
        merge=MergeTrace(
            common_count=common,
            anchor=config.anchor,
            shrink=config.shrink,
            pool=config.pool,
            only=config.only,
            uneven=uneven,
            guarded_share=_BLANK_SHARE,
        ),
        edits=_edits(inputs),
    )


def _edits(inputs: Inputs) -> tuple[Edit, ...]:
    """The adaptations that the base and the tasks added went through, each once.

    How much of their starts' precision is left is not the merge's to say.
    """
    infos = [m.precision_info for m in inputs if m is inputs.base or m.scale > 0]
    update = {"start_precision": None, "start_count": None}
    edits = (edit for info in infos if info is not None for edit in info.edits)
    return tuple(dict.fromkeys(edit.model_copy(update=update) for edit in edits))


def _shares(inputs: Inputs) -> list[float]:
    """The tasks' scales; without a base they are shares of one."""
    scales = [task.scale for task in inputs.tasks]
    total = sum(scales)
    return scales if inputs.base is not None else [scale / total for scale in scales]


def _merged_prior(inputs: Inputs, shares: Sequence[float]) -> Prior:
    base = inputs.base
    if base is not None:
        return Prior(
            kind="base",
            centre="base",
            precision=base.weighing.prior,
            base=Identity(blocks=base.posterior.identity),
            base_precision=precision_identity(base.posterior),
            base_count=base.weighing.gain,
        )
    infos = [task.posterior.info for task in inputs.tasks]
    priors = {i.prior for i in infos if i is not None and i.prior.kind in ("base", "unknown")}
    if priors:
        # Merges of one frame, counted alike, average to a merge in that frame; anything else has no
        # one prior.
        first, *others = priors
        is_one_frame = not others and all(i is not None and i.prior == first for i in infos)
        counts_alike = all(task.weighing.gain == 1 for task in inputs.tasks)
        return first if is_one_frame and counts_alike else Prior(kind="unknown")
    weighed = zip(shares, inputs.tasks, strict=True)
    scalar = sum(share * task.weighing.prior for share, task in weighed)
    return Prior(kind="isotropic", precision=scalar + DELTA_0)


def _terms(tasks: Sequence[Input], shares: Sequence[float]) -> tuple[Term, ...]:
    """The posteriors inside a merge, each once, with its scales added up."""
    terms: dict[str, Term] = {}  # by the identity of the mean
    for task, share in zip(tasks, shares, strict=True):
        for term in _terms_of(task):
            identity = term.mean.blocks
            before = terms[identity].scale if identity in terms else 0.0
            update = {
                "scale": before + share * term.scale,
                "gain": term.gain * task.weighing.gain * task.weighing.inner,
            }
            terms[identity] = term.model_copy(update=update)
    return tuple(term for term in terms.values() if abs(term.scale) > 1e-9)


def _terms_of(model: Input) -> tuple[Term, ...]:
    task, info = model.posterior, model.precision_info
    pool = None if info is None else info.pool
    if task.info is not None and task.info.terms:
        terms = task.info.terms
        return tuple(term.model_copy(update={"pool": pool or term.pool}) for term in terms)
    mean = Identity(blocks=task.identity)
    return (Term(label=_label(model), mean=mean, scale=1.0, pool=pool),)


def _label(model: Input) -> str:
    """A short name for readers: the last part of a path, and of the run's for a component.

    The revision of a Hub id is left out, so that a recipe which pins it writes the same label.
    """
    refs = [model.ref] if model.mixed_in is None else [model.mixed_in.ref, model.run]
    if model.posterior.commit is not None:
        refs[0] = re.sub(r"@[\w./-]+", "", refs[0])
    return ": ".join(Path(ref).name for ref in refs)


def _main_dtype(model: Posterior, *, but: Collection[str]) -> str:
    """The dtype that holds most bytes of all tensors but some."""
    sizes: dict[str, int] = {}
    for name, spec in model.mean.specs.items():
        if name not in but:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size * ITEM_SIZE[spec.dtype]
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")
