"""The `PosteriorInfo` of a merge: prior, terms and trace."""

import re
from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.specs import ITEM_SIZE
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.weigh import Weighing, common_count, known_info, precision_identity
from mergekit_bayes.posterior import Anchor as StoredAnchor
from mergekit_bayes.posterior import Identity, MergeTrace, Posterior, PosteriorInfo, Prior, Term


def merged_info(
    config: MergeConfig,
    models: Sequence[Posterior],
    scales: Sequence[float],
    weighings: Sequence[Weighing],
    *,
    uneven: bool,
) -> PosteriorInfo:
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
    inside = [
        m.info.prior
        for m in models
        if m.info is not None and m.info.prior.kind in ("base", "unknown")
    ]
    if inside:
        # Merges of one frame, counted alike, average to a merge in that frame; anything else has no
        # one prior.
        same = (
            len(inside) == len(models)
            and len(set(inside)) == 1
            and all(w.gain == 1 for w in weighings)
        )
        return inside[0] if same else Prior(kind="unknown")
    scalar = sum(c * w.prior for c, w in zip(shares, weighings, strict=True))
    return Prior(kind="isotropic", precision=scalar + DELTA_0)


def _terms(
    tasks: Sequence[Posterior], shares: Sequence[float], weighings: Sequence[Weighing]
) -> tuple[Term, ...]:
    found: dict[str, Term] = {}
    for task, share, weighing in zip(tasks, shares, weighings, strict=True):
        inner = task.info.terms if task.info and task.info.terms else ()
        own = inner or (Term(label=_label(task), mean=Identity(blocks=task.identity), scale=1.0),)
        for term in own:
            before = found[term.mean.blocks].scale if term.mean.blocks in found else 0.0
            update = {
                "scale": before + share * term.scale,
                "gain": term.gain * weighing.gain * weighing.inner,
            }
            found[term.mean.blocks] = term.model_copy(update=update)
    return tuple(t for t in found.values() if abs(t.scale) > 1e-9)


def _label(task: Posterior) -> str:
    """A name for people; of a Hub id without its revision, so that a recipe which pins it writes
    the same.
    """
    return Path(task.ref if task.commit is None else re.sub(r"@[\w./-]+", "", task.ref)).name


def _main_dtype(model: Posterior) -> str:
    sizes: dict[str, int] = {}
    for spec in model.mean.specs.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size * ITEM_SIZE[spec.dtype]
    return max(sizes, key=lambda d: sizes[d], default="F32")
