"""Settings of `bmerge evaluate`."""

from typing import Any

from pydantic import Field

from mergekit_bayes.generation import Sampling
from mergekit_bayes.records import Config


class EvaluateConfig(Config):
    """What to measure, and how. The fields are the flags of `bmerge evaluate`.

    Attributes:
        model: A local folder or `org/name[@revision]`.
        perplexity: Name to texts (JSONL, CSV, Parquet, text, a folder, a Hub data set).
        classify: Name to labelled texts, for a classifier.
        label_column: Where the labels are in them: numbers, or the model's names.
        bins: Of confidence, for the calibration error.
        samples: Also average probabilities over so many weights drawn from the model's posterior;
            toxicity stays at the mean.
        prior: Prior precision of the posterior in place of the stored one, 1/weight^2.
        posterior_temperature: Multiplies the variance of the posterior.
        precision: Another place for the model's precision.
        where: Keeps text rows with these values, `{"label": 0}`; or one such mapping for some of
            the names.
        max_rows: At most so many texts of each set, from the front.
        window: Tokens of input at a time; None: the model's context.
        stride: Tokens that a window scores; None: the window, so no overlap.
        concatenate: Join the rows by EOS, as the papers do, instead of scoring each as a document.
        toxicity: File of prompts.
        prompt_column: Where the prompts are in it.
        prompts: At most so many, from the front.
        prompts_where: Keeps prompts with these values.
        scorer: `words:FILE`, `model:PATH_OR_ID#LABEL` or `package.module:function`; one or more.
        threshold: A continuation is toxic from this score on.
        continuations, new_tokens, top_p, temperature, seed: See `Sampling`; the seed is that of the
            bootstrap and of the posterior's samples, too.
        batch_size: Full windows, or texts to classify, in a batch.
        sampling_batch: Continuations drawn together.
        bootstrap: Resamples behind each interval; 0 for none.
        output: Folder for report.json, documents.jsonl, examples.jsonl and continuations.jsonl.
    """

    model: str
    perplexity: dict[str, str] = {}
    classify: dict[str, str] = {}
    label_column: str = "label"
    bins: int = Field(default=10, ge=1)
    samples: int | None = Field(default=None, ge=1)
    prior: float | None = Field(default=None, gt=0)
    posterior_temperature: float = Field(default=1.0, gt=0)
    precision: str | None = None
    text_column: str = "text"
    where: dict[str, Any] = {}
    max_rows: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    concatenate: bool = False
    toxicity: str | None = None
    prompt_column: str = "text"
    prompts: int | None = Field(default=None, ge=1)
    prompts_where: dict[str, Any] = {}
    scorer: tuple[str, ...] = ()
    threshold: float = Field(default=0.5, ge=0, le=1)
    continuations: int = Field(default=25, ge=1)
    new_tokens: int = Field(default=20, ge=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=8, ge=1)
    sampling_batch: int = Field(default=256, ge=1)
    bootstrap: int = Field(default=1000, ge=0)
    dtype: str = "float32"
    output: str | None = None
    force: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})
