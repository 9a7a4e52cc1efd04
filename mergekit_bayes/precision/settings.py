"""Settings of `bmerge precision`, and its report."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.models.load import Device, Dtype, Task
from mergekit_bayes.records import Force, Frozen, TrustRemoteCode


class PrecisionConfig(Config):
    """Settings of one estimate of a precision: the flags of `bmerge precision`."""

    model: str = Field(description="A model folder, or a Hub id (which needs -o).")
    data: str | tuple[str, ...] = Field(
        description="What the precision stands for: a file, folder or Hub data set; repeatable."
    )
    output: str | None = Field(
        None, description="A folder or .safetensors file; by default MODEL/posterior."
    )
    where: dict[str, Any] | None = Field(
        None, description="COLUMN=VALUE: keep the rows with this value; repeatable."
    )
    text_column: str = Field("text", description="Column of the text.")
    label_column: str = Field(
        "label", description="Column of the label, which root-GGN does not need."
    )
    examples: int = Field(2000, ge=1, description="Number of rows to look at, drawn at random.")
    batch_size: int = Field(
        8,
        ge=1,
        description="Rows in one backward pass; smaller batches give more draws from the same "
        "data.",
    )
    max_length: int = Field(512, ge=2, description="Tokens of a row at most.")
    pool: Literal["tensor", "row"] | None = Field(
        None,
        description="tensor or row: keep the mean of each tensor or row in place of its entries, "
        "so that the sums take kilobytes.",
    )
    sums: Literal["device", "cpu", "disk"] = Field(
        "device",
        description="Where the sums lie meanwhile, 4 bytes an entry: device, cpu (in memory) or "
        "disk (in a file beside the output).",
    )
    prior: float = Field(0.0, ge=0, description="Isotropic prior precision to include, 1/weight^2.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the choice of rows and of the random signs."
    )
    task: Task = Field("auto", description="auto, causal-lm or classification.")
    device: Device = None
    dtype: Dtype = "float32"
    trust_remote_code: TrustRemoteCode = False
    force: Force = False


class PrecisionReport(Frozen):
    """Where the precision was written, and what it stands for.

    Attributes:
        path: The precision's folder or file.
        estimator: Name of the estimator.
        unit: What an observation is: a token or an example.
        loss: The loss whose curvature it is, and what says so.
        observations: Number of observations that the precision stands for.
        rows: Number of rows in the data.
        sampled: Number of rows that were looked at.
        device: Where the model ran.
        dtype: Type of its parameters meanwhile; sums and the precision are float32.
        health: Statistics of the precision.
    """

    path: Path
    estimator: str
    unit: str
    loss: str
    observations: int
    rows: int
    sampled: int
    device: str
    dtype: str
    health: dict[str, float]
