"""Settings of models measured side by side."""

from typing import Any

from pydantic import Field

from mergekit_bayes.evaluate.settings import EvaluateConfig, Measures


class CompareConfig(Measures):
    """What to measure of which models, and how: the flags of `bmerge evaluate`.

    The differences are those from the first model.
    """

    models: tuple[str, ...] = Field(
        min_length=1,
        description="Model folders, or Hub ids (org/name[@revision]). Several are measured on the "
        "same texts, prompts and noise, and compared with the first in pairs.",
    )
    four_bits: bool = Field(
        False,
        description="Also measure each model after its matrices are rounded to 4 bits, in groups "
        "of 64.",
    )
    relearn: str | None = Field(
        None,
        description="Rows of removed text: also measure each model after relearn_steps steps of "
        "training on them.",
    )
    relearn_where: dict[str, Any] = Field(
        {}, description="COLUMN=VALUE: keep the rows to relearn with this value; repeatable."
    )
    relearn_rows: int = Field(100, ge=1, description="Rows to relearn at most, from the front.")
    relearn_steps: int = Field(50, ge=1, description="Steps of relearning.")
    relearn_rate: float = Field(
        1e-4, gt=0, description="Learning rate of relearning, which AdamW does."
    )

    def evaluation(self, model: str) -> EvaluateConfig:
        """The evaluation of one of the models, without an output."""
        shared = {name: getattr(self, name) for name in Measures.model_fields}
        return EvaluateConfig(**{**shared, "model": model, "output": None})
