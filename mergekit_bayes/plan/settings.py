"""Settings of a merge."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from mergekit_bayes.configs import Config
from mergekit_bayes.records import Force

BY_MODEL = ("precision", "isotropic", "observations")  # settings of single models: MODEL=VALUE


class MergeConfig(Config):
    """Settings of one merge: the flags of `bmerge merge` and the keys of a recipe.

    Each field's description is the help of its flag. A setting of a single model names it as
    `models` and `base` do; `BASE` names the base, too.
    """

    models: tuple[str, ...] = Field(
        description=".safetensors files, folders, BASE+ADAPTER, or Hub ids "
        "(org/name[@revision]); or one recipe.yaml."
    )
    base: str | None = Field(
        None,
        description="Model that the others were fine-tuned from. Their changes are added to it; "
        "without a base the models are averaged.",
    )
    weights: Literal["uniform", "precision"] = Field(
        "uniform",
        description="uniform: weigh all entries alike. precision: weigh each entry by its "
        "precision, and layers as a whole where it is stored as matrices.",
    )
    method: str | None = Field(
        None,
        description="Merge by this method instead of the one that --weights and --base choose; "
        "`bmerge methods` lists them.",
    )
    param: dict[str, float | str] = Field(
        {}, description="NAME=VALUE: set a parameter of the method; repeatable."
    )
    scale: tuple[float | str, ...] = Field(
        (1.0,),
        description="One number for all models, or one for each by repeating the flag; a negative "
        "one removes a model's change and needs a base. MODEL:REGEX=X sets it for the tensors "
        "whose name matches; later ones win.",
    )
    trajectory: bool = Field(
        False,
        description="The models are checkpoints of one run, such as RUN/checkpoint-*: order them "
        "by the step at the end of their names, and average them.",
    )
    decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With --trajectory: the factor, in (0, 1], by which the share falls over the "
        "median distance in steps of two neighbouring checkpoints, as in an exponential moving "
        "average; by default all have equal shares.",
    )
    out: str | None = Field(
        None,
        description="A .safetensors file or a folder; by default merged.safetensors or merged.",
    )
    only: str | None = Field(
        None,
        description="Merge only the tensors whose name matches this regular expression; copy the "
        "others from the base, else from the first model.",
    )
    on_missing: Literal["error", "base", "skip"] = Field(
        "error",
        description="A tensor that a model lacks: error, base (unchanged by that model; needs a "
        "base) or skip (leave it out).",
    )
    vocab: Literal["error", "base", "common", "union"] = Field(
        "error",
        description="Different vocabularies: error, base (keep the base's, else the first "
        "model's), common (merge the tokens that all models have, and copy the rows of others) or "
        "union (find each token by its text, and write all tokens of all models).",
    )
    on_bad: Literal["error", "base"] = Field(
        "error",
        description="NaN, infinity or a negative precision: error, or base (unchanged by that "
        "model; needs a base).",
    )
    on_config: Literal["error", "base"] = Field(
        "error",
        description="Configs that give the weights another meaning (attention heads, activation, "
        "position embedding): error, or base (take the base's, else the first model's, as true of "
        "all).",
    )
    on_base: Literal["error", "apply"] = Field(
        "error",
        description="An adapter that records a base of other weights than the one before its +: "
        "error, or apply (to the one that is named).",
    )
    side_files: str | None = Field(
        None,
        description="MODEL: take tokenizer, chat template, generation config and the like from "
        "this one; by default from the model that gives rows of new tokens, else from the first "
        "with a positive scale.",
    )
    dtype: Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"] | None = Field(
        None,
        description="Store merged tensors as F64, F32, F16, BF16, F8_E4M3 or F8_E5M2; by default "
        "as the base does, else the first model.",
    )
    max_shard_size: str | None = Field(
        None,
        description="Size of a file, such as 5GB or 512MiB; by default the files are split as the "
        "base's, else the first model's.",
    )
    precision: dict[str, str] = Field(
        {}, description="MODEL=PATH: read the precision of a model from elsewhere; repeatable."
    )
    isotropic: dict[str, float] = Field(
        {},
        description="MODEL=X: use one number (1/weight^2) as the precision of a model; repeatable.",
    )
    anchor: str = Field(
        "h0",
        description="What training pulled the weights towards: h0 (the base's posterior), none, "
        "zero-decay, recorded (as stored with each precision), or a number (1/weight^2).",
    )
    guard: float = Field(
        0.2,
        gt=0,
        le=1,
        description="Limit the amplification that a removal may cause to 1/guard, at scales "
        "down to -1; in (0, 1].",
    )
    counts: Literal["equal", "recorded"] = Field(
        "equal",
        description="equal: take precisions per observation, times one common count. recorded: "
        "times each model's own count.",
    )
    observations: dict[str, str] = Field(
        {},
        description="MODEL=3x or MODEL=1000: multiply or set the number of observations of a "
        "model, or of BASE; repeatable.",
    )
    shrink: str | None = Field(
        None,
        description="X or row:X: add X times the mean of the tensor (or of the row) to each "
        "likelihood precision.",
    )
    pool: Literal["tensor", "row"] | None = Field(
        None,
        description="tensor or row: replace each precision by the mean of its tensor or row, as a "
        "control of what single entries contribute.",
    )
    space: Literal["product", "concat", "factor", "core"] = Field(
        "product",
        description="Adapters only: product (merge the products of the factors), concat (their "
        "exact sum), factor (merge factor by factor) or core (merge the products by --method, in "
        "the small space of their common directions; the default with --method).",
    )
    rank: int | None = Field(
        None,
        description="Adapters only: rank of the merged adapter in product or core space; by "
        "default the largest of theirs.",
    )
    identities: dict[str, str] = Field(
        {}, description="Recipes only: the content hash that each model must have."
    )
    precision_identities: dict[str, str] = Field(
        {}, description="Recipes only: the content hash that each precision must have."
    )
    full_identities: dict[str, str] = Field(
        {}, description="Recipes only: the hash of all bytes that each model must have."
    )
    full_precision_identities: dict[str, str] = Field(
        {}, description="Recipes only: the hash of all bytes that each precision must have."
    )
    posterior: bool = Field(True, description="Write the merged precision.")
    force: Force = False
    verify: bool = Field(
        False,
        description="Hash all bytes of all inputs, before and after merging, instead of sampled "
        "blocks; compare with what is on record, and record the hashes in the recipe.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_models_as_given(cls, content: Any) -> Any:
        """Let a setting of a single model name it by BASE, or by another spelling of its path."""
        if not isinstance(content, Mapping):
            return content
        base, models = content.get("base"), content.get("models")
        given = [*(models if isinstance(models, (list, tuple)) else ()), base]
        given = [ref for ref in given if isinstance(ref, str)]
        names = {os.path.normpath(ref): ref for ref in given} | {ref: ref for ref in given}
        if isinstance(base, str):
            names.setdefault("BASE", base)

        def as_given(ref: Any) -> Any:
            if not isinstance(ref, str) or not ref:
                return ref
            return names.get(ref) or names.get(os.path.normpath(ref), ref)

        named = dict(content)
        for name in BY_MODEL:
            if isinstance(by_model := content.get(name), Mapping):
                named[name] = {as_given(ref): value for ref, value in by_model.items()}
        if isinstance(side_files := content.get("side_files"), str):
            named["side_files"] = as_given(side_files)
        return named
