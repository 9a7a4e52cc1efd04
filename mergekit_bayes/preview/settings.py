"""Settings of `bmerge preview`."""

from copy import copy
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.evaluate.settings import EvaluateConfig, Measures, is_by_name
from mergekit_bayes.models.devices import Device
from mergekit_bayes.models.load import Dtype
from mergekit_bayes.records import Force, TrustRemoteCode

Design: TypeAlias = Literal["one", "common", "product", "simplex"]
Origin: TypeAlias = Literal["recipe", "scales", "grid", "search"]  # of scales
Choice: TypeAlias = Literal["mean", "worst"]
# Settings of an evaluation that a preview has, too.
_SHARED = (
    *("text_column", "label_column", "where", "max_rows", "window", "stride", "concatenate"),
    *("batch_size", "seed", "device", "dtype", "trust_remote_code", "output", "force"),
)
Vector: TypeAlias = tuple[float, ...]  # a scale for each task of the recipe, dimensionless


def _as_measured(name: str) -> Any:
    """The field of an evaluation, said once, there."""
    return copy(Measures.model_fields[name])


class PreviewConfig(Config):
    """What to preview of one merge, and how: many scale vectors, and no model written."""

    recipe: str = Field(
        description="Recipe of a merge of whole models: a YAML file as `bmerge merge` writes and "
        "reads."
    )
    data: dict[str, str] = Field(
        min_length=1,
        description="TEXTS or NAME=TEXTS: a file, folder or Hub data set on which every merge is "
        "measured; labelled texts for a classifier; repeatable.",
    )
    scales: tuple[Vector, ...] = Field(
        (),
        description="X,Y,...: preview these scales, one for each model of the recipe, or one for "
        "all; repeatable.",
    )
    grid: Vector = Field(
        (), description="X,Y,...: values of a scale, of which --design makes the vectors."
    )
    design: Design | None = Field(
        None,
        description="one (each model's scale takes every value, the others keep the recipe's), "
        "common (one value for all), product (all combinations) or simplex (the combinations that "
        "sum to 1); by default one, of an average simplex.",
    )
    search: int | None = Field(
        None,
        ge=1,
        description="Number of further merges, at scales that Optuna's TPE sampler proposes (an "
        "extra: pip install 'mergekit-bayes[search]').",
    )
    between: Vector | None = Field(
        None,
        description="LOW,HIGH: where the search looks for each scale; by default from 0 to twice "
        "the recipe's, or to 1 where that is 0. Shares of an average are sought between 0 and 1.",
    )
    predict_first: int | None = Field(
        None,
        ge=1,
        description="Measure only this number of the given and the grid's merges: those of the "
        "smallest predicted rise of the models' losses, for which every model needs a precision.",
    )
    choose: Choice = Field(
        "mean",
        description="The merge that is recommended: mean (smallest mean loss over the data sets) "
        "or worst (smallest of the largest rises over the recipe's loss).",
    )
    test: dict[str, str] = Field(
        {},
        description="TEXTS or NAME=TEXTS: also measure the recommended merge and the recipe's own "
        "on these texts, which decide nothing; repeatable.",
    )
    text_column: str = _as_measured("text_column")
    label_column: str = _as_measured("label_column")
    where: dict[str, Any] = _as_measured("where")
    max_rows: Annotated[int | None, Field(ge=1)] = _as_measured("max_rows")
    window: Annotated[int | None, Field(ge=1)] = _as_measured("window")
    stride: Annotated[int | None, Field(ge=1)] = _as_measured("stride")
    concatenate: bool = _as_measured("concatenate")
    batch_size: Annotated[int, Field(ge=1)] = _as_measured("batch_size")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the search.")
    device: Device = None
    dtype: Dtype = "float32"
    trust_remote_code: TrustRemoteCode = False
    output: str = Field(
        description="Folder for the report, its text and picture, and the recipe of the "
        "recommended merge."
    )
    force: Force = False

    def evaluation(self, texts: dict[str, str], *, classifies: bool) -> EvaluateConfig:
        """How a merge is measured on some of the texts: its losses, without intervals.

        Args:
            texts: `data` or `test`, or both.
            classifies: Whether the merges are classifiers.
        """
        settings = {name: getattr(self, name) for name in _SHARED}
        settings["classify" if classifies else "perplexity"] = texts
        if is_by_name(self.where):
            others = (self.data.keys() | self.test.keys()) - texts.keys()
            settings["where"] = {n: w for n, w in self.where.items() if n not in others}
        return EvaluateConfig(model=self.recipe, bootstrap=0, **settings)
