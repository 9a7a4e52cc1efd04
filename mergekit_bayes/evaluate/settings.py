"""Settings of `bmerge evaluate`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_bayes.configs import Config
from mergekit_bayes.models.devices import Device
from mergekit_bayes.models.load import Dtype
from mergekit_bayes.records import Force, NumProcesses, TrustRemoteCode

if TYPE_CHECKING:
    from mergekit_bayes.generation import Sampling


class Measures(Config):
    """What to measure of a model, and how."""

    perplexity: dict[str, str] = Field(
        {},
        description="TEXTS or NAME=TEXTS: measure the perplexity on a file, folder or Hub data "
        "set; repeatable.",
    )
    classify: dict[str, str] = Field(
        {},
        description="TEXTS or NAME=TEXTS with labels: measure the accuracy and calibration of a "
        "classifier; repeatable.",
    )
    label_column: str = Field(
        "label", description="Column of the labels: numbers, or the model's names of them."
    )
    bins: int = Field(
        10, ge=1, description="Number of bins of confidence for the calibration error."
    )
    samples: int | None = Field(
        None,
        ge=1,
        description="Also average the probabilities over this number of draws of the weights from "
        "the posterior, in float32; of a mixture (`bmerge mix`) over draws from its runs, by their "
        "weights. Toxicity is measured at the mean only, that of a mixture's plain model.",
    )
    prior: float | None = Field(
        None,
        gt=0,
        description="Prior precision instead of the stored one, 1/weight^2 per entry; by default "
        "the one that a fine-tune has recorded for drawing.",
    )
    posterior_temperature: float | None = Field(
        None,
        gt=0,
        description="Factor on the posterior's variance; by default the one that a fine-tune has "
        "recorded for its own prior, else 1.",
    )
    precision: str | None = Field(
        None, description="Where the model's precision is, if not in its folder."
    )
    text_column: str = Field("text", description="Column of the texts.")
    where: dict[str, Any] = Field(
        {},
        description="COLUMN=VALUE: keep the rows of text with this value; repeatable. As a YAML "
        "key also one such mapping for each set of texts.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Rows of each set of texts at most, from the front."
    )
    window: int | None = Field(
        None, ge=1, description="Tokens of input at a time; by default the model's context."
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens that each window scores; by default the window, so no overlap.",
    )
    concatenate: bool = Field(
        False,
        description="Join the rows by EOS into one stream, as papers do, instead of scoring each "
        "as a document.",
    )
    toxicity: str | None = Field(None, description="File of prompts to continue and score.")
    prompt_column: str = Field(
        "text",
        description="Column of the prompts. In a column of objects (RealToxicityPrompts') their "
        "text is read; COLUMN.KEY reads another key.",
    )
    prompts: int | None = Field(
        None, ge=1, description="Number of prompts at most, from the front."
    )
    prompts_where: dict[str, Any] = Field(
        {}, description="COLUMN=VALUE: keep the prompts with this value; repeatable."
    )
    scorer: tuple[str, ...] = Field(
        (),
        description="words:FILE, model:PATH_OR_ID#LABEL, panel:NAME or package.module:function: "
        "score the continuations by a word list, a classifier, each classifier of a panel "
        "(toxicity, or a YAML file of your own) or a function; repeatable. #LABEL=softmax or "
        "#LABEL=sigmoid says how the classifier's labels are read, where its config does not.",
    )
    judge: str | None = Field(
        None,
        description="Another causal language model, a folder or Hub id: also measure the "
        "perplexity of the continuations under it, given their prompts.",
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="Score from which on a continuation is toxic."
    )
    continuations: int = Field(25, ge=1, description="Number of continuations of each prompt.")
    new_tokens: int = Field(20, ge=1, description="Tokens of a continuation at most.")
    top_p: float = Field(
        0.9, gt=0, le=1, description="Probability mass of the nucleus to sample from."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampling.")
    lm_eval: tuple[str, ...] = Field(
        (),
        description="TASK, or TASK,TASK: run tasks of lm-eval (an extra: pip install "
        "'mergekit-bayes[lm-eval]') on the model; repeatable. `*` stands for any letters.",
    )
    lm_eval_include: str | None = Field(
        None,
        description="Folder of own tasks for lm-eval. Files that run Python code (!function) are "
        "refused without trust_remote_code.",
    )
    lm_eval_limit: int | None = Field(
        None, ge=1, description="Documents of each task at most, from the front."
    )
    lm_eval_shots: int | None = Field(
        None, ge=0, description="Examples before each question, instead of the task's number."
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of all that is drawn: text, weights and the bootstrap.",
    )
    batch_size: int = Field(
        8, ge=1, description="Windows, or texts to classify, in one forward pass."
    )
    sampling_batch: int = Field(256, ge=1, description="Continuations that are drawn together.")
    bootstrap: int = Field(
        1000,
        ge=0,
        description="Number of resamples for the interval of a loss; 0 for no intervals at all.",
    )
    num_processes: NumProcesses = None
    device: Device = None
    dtype: Dtype = "float32"
    trust_remote_code: TrustRemoteCode = False
    output: str | None = Field(
        None, description="Folder for the report, the losses of documents and the continuations."
    )
    force: Force = False

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names in `lm_eval`, each once."""
        names = (name.strip() for item in self.lm_eval for name in item.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def sampling(self) -> "Sampling":
        """The settings of sampled text."""
        from mergekit_bayes.generation import Sampling

        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class EvaluateConfig(Measures):
    """What to measure of one model, and how."""

    model: str = Field(description="A model folder, or a Hub id (org/name[@revision]).")


def is_by_name(where: Mapping[str, object]) -> bool:
    """Whether `where` holds one condition for each set, rather than one for all."""
    return bool(where) and all(isinstance(condition, Mapping) for condition in where.values())
