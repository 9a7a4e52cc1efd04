"""The settings of `bmerge extract`."""

from typing import Literal

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.records import Force

RANK = 16  # where neither a rank nor a tolerance is given

Weights = Literal["precision", "uniform"]
Dtype = Literal["F32", "F16", "BF16"]


class ExtractConfig(Config):
    """Settings of `bmerge extract`."""

    model: str = Field(
        description="The tuned or edited model: a folder, a file, a Hub id, or BASE+ADAPTER."
    )
    base: str = Field(description="The model that it was made of, likewise.")
    out: str | None = Field(None, description="The folder of the adapter.")
    rank: int | None = Field(
        None,
        ge=1,
        description="Largest rank of a layer; layers whose change needs less get less. By default "
        f"{RANK}, or with --tolerance what it takes.",
    )
    tolerance: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Give each layer the smallest rank at which at most this share is lost of the "
        "loss that leaving its change out would cost, such as 0.05.",
    )
    weights: Weights | None = Field(
        None,
        description="What weighs the entries: the precision of MODEL, so that the error is in "
        "units of the loss, or uniform. By default the precision where there is one, but for one "
        "of inputs alone (`--estimator inputs`).",
    )
    precision: str | None = Field(
        None, description="Where the precision of MODEL is, if not beside it."
    )
    sweeps: int = Field(
        8,
        ge=0,
        description="Most improvements of a layer whose precision has one number an entry.",
    )
    embeddings: bool = Field(
        False, description="Adapt embeddings and heads of the vocabulary as well."
    )
    rest: bool = Field(
        False,
        description="Store what else changed: norms and other modules whole, biases of adapted "
        "layers beside the factors.",
    )
    dtype: Dtype = Field("F32", description="Number format of the factors.")
    force: Force = False
