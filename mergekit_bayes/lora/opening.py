"""Open a model by what the user typed: a plain one, or `BASE+ADAPTER`.

What reads adapters is imported on first use: most merges have none.
"""

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.posterior import Posterior, open_posterior
from mergekit_bayes.posterior.quantised import refuse_emptied, refuse_quantised

if TYPE_CHECKING:
    from mergekit_bayes.lora.adapted import AdaptedSource


def open_model(
    ref: str,
    *,
    precision: str | None = None,
    isotropic: float | None = None,
    with_precision: bool = True,
    count: float | None = None,
) -> Posterior:
    """Open a model: by `open_adapted` if it is `BASE+ADAPTER`, else by `open_posterior`.

    Args:
        ref: A path or Hub id, or two of them with a `+` between them.
        precision: Another place for the precision (of the adapter, if there is one).
        isotropic: One precision for every entry, 1/weight^2, in place of a file.
        with_precision: Open the precision too.
        count: See `open_adapted`; not used for a plain model.
    """
    if split_ref(ref) is None:
        return open_posterior(
            ref, precision=precision, isotropic=isotropic, with_precision=with_precision
        )
    return open_adapted(
        ref, precision=precision, isotropic=isotropic, with_precision=with_precision, count=count
    )


def open_adapted(
    ref: str,
    *,
    precision: str | None = None,
    isotropic: float | None = None,
    with_precision: bool = True,
    count: float | None = None,
) -> Posterior:
    """Open `BASE+ADAPTER` as one dense posterior. Reads headers and the adapter's config only.

    Its precision, if the adapter has one, is a `ProductPrecision` on the scale of the summed loss.
    It has no `info`, so it is taken as it is, with prior 0.

    Args:
        ref: Two paths or Hub ids with a `+` between them.
        precision: Another place for the adapter's precision.
        isotropic: One precision for every entry, 1/weight^2, in place of a file.
        with_precision: Open the precision too.
        count: Number of observations for which the adapter's precision is counted; the recorded
            number if None.

    Raises:
        CheckpointError: There is no such base or adapter.
        ConfigError: The adapter is of a kind that is not read.
        MismatchError: The adapter does not fit this base, or the base is quantised.
        PrecisionError: The precision was taken at other weights than this adapter's.
    """
    from mergekit_bayes.lora.adapted import ProductPrecision
    from mergekit_bayes.lora.adapter import open_adapter
    from mergekit_bayes.lora.kept_heads import with_kept_heads

    refs = split_ref(ref)
    if refs is None:
        raise CheckpointError(f"'{ref}': not of the form BASE+ADAPTER.")
    stored = with_precision and isotropic is None
    with ExitStack() as stack:
        base = stack.enter_context(open_posterior(refs[0], with_precision=False))
        adapter = stack.enter_context(
            open_adapter(refs[1], precision=precision, with_precision=stored)
        )
        refuse_emptied(base)
        refuse_quantised(base)
        mean = with_kept_heads(base, adapter)
        product = None if adapter.posterior.precision is None else ProductPrecision(mean, count)
        stack.pop_all()  # the posterior owns the files from here on
    return Posterior(
        ref, base.path, mean, product, isotropic=isotropic, parts=(base, adapter.posterior)
    )


def adapted_mean(model: Posterior) -> "AdaptedSource | None":
    """The weights of a model that is `BASE+ADAPTER`; None for any other."""
    if not model.parts:
        return None
    from mergekit_bayes.lora.adapted import AdaptedSource

    return model.mean if isinstance(model.mean, AdaptedSource) else None


def refuse_other_base(model: Posterior, way_out: str | None = None) -> None:
    """Refuse an adapter on another base than the one that its files record.

    Args:
        model: A model, perhaps `BASE+ADAPTER`.
        way_out: What to do where these weights are meant.

    Raises:
        MismatchError: `model` is `BASE+ADAPTER`, and the hash of the base is not the recorded one.
    """
    source = adapted_mean(model)
    if source is not None and source.other_base is not None:
        raise MismatchError(
            f"{source.other_base}: the hash of a base that it records is not that of "
            f"{source.base.files[0]}. Name the base that it was trained on, in the dtype that it "
            f"had{'' if way_out is None else f'; or, if these weights are meant, {way_out}'}."
        )


def split_ref(ref: str) -> tuple[str, str] | None:
    """The base and the adapter of `BASE+ADAPTER`; None for anything else.

    A path that exists is a plain model, even with a `+` in its name.

    Raises:
        CheckpointError: Neither the whole nor two pieces of it are paths or Hub ids.
    """
    if "+" not in ref or _exists(ref):
        return None
    pairs = [(ref[:i], ref[i + 1 :]) for i, c in enumerate(ref) if c == "+"]
    pairs.sort(key=lambda pair: -sum(map(_exists, pair)))
    for pair in pairs:
        if all(_exists(piece) or is_hub_id(piece) for piece in pair):
            return pair
    missing = next(piece for piece in pairs[0] if not (_exists(piece) or is_hub_id(piece)))
    raise CheckpointError(
        f"'{ref}': no such path, and not BASE+ADAPTER either: '{missing}' is no path and no Hub "
        "id. Name two folders, the model's and the adapter's."
    )


def _exists(ref: str) -> bool:
    return bool(ref) and os.path.exists(os.path.expanduser(ref))
