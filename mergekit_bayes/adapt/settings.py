"""Settings of `bmerge adapt`, and its report."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from mergekit_bayes.configs import Config
from mergekit_bayes.finetune.settings import LoraSettings, say_what_pack_was
from mergekit_bayes.models.load import Task
from mergekit_bayes.records import Force, Frozen, Record, TrustRemoteCode

Removal: TypeAlias = Literal["npo", "ascent", "kl_uniform", "contrast"]
Precision: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Rows(Config):
    """Rows of text; the name of a file, folder or data set alone stands for all of its rows."""

    data: str | tuple[str, ...] = Field(
        description="A file, folder or Hub data set, or a list of them."
    )
    where: dict[str, Any] | None = Field(
        None, description="Keep only the rows with these values, `{column: value}`."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_alone(cls, values: Any) -> Any:
        """A source, or a list of them, stands for rows of which all are kept."""
        return {"data": values} if isinstance(values, (str, Path, list, tuple)) else values

    @property
    def sources(self) -> tuple[str, ...]:
        """Where they come from, as the user named it."""
        return (self.data,) if isinstance(self.data, str) else self.data


class Until(Config):
    """When an adaptation ends by itself; the first goal that is reached ends it."""

    toxic_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the continuations of `prompts` that `scorer` calls toxic.",
    )
    held_out_rise: float | None = Field(
        None,
        gt=0,
        description="Rise of the loss on `held_out` above the start, nats per observation.",
    )
    memory_kl: float | None = Field(
        None,
        gt=0,
        description="Budget: mean KL divergence from the start on the held-out part of the memory, "
        "nats per observation. A check above it ends the run, and one within it is kept.",
    )


class AdaptConfig(Config):
    """Settings of one adaptation: the YAML keys of `bmerge adapt`.

    `docs/removal.md` says how to choose them.
    """

    model: str = Field(description="Model to adapt: a folder or Hub id.")
    output: str = Field(description="Folder to write.")
    remove: Rows | None = Field(None, description="Rows whose knowledge is removed.")
    add: Rows | None = Field(None, description="Rows whose knowledge is added.")
    memory: Rows | None = Field(
        None, description="Rows on which the model should stay as it is: the memory of a K-prior."
    )
    memory_self_generated: int | None = Field(
        None,
        ge=1,
        description="Have the model write this many texts of its own for the memory. They are kept "
        "in `memory.jsonl` of the output, for `bmerge precision` later.",
    )
    memory_filter: str | None = Field(
        None,
        description="Scorer of the self-generated texts, as `evaluate --scorer`; texts that score "
        "`threshold` or more are left out of the memory, which would otherwise hold what is to be "
        "removed.",
    )
    memory_rows: int | None = Field(
        None, ge=1, description="Examples of the memory that are used; by default all."
    )
    memory_select: Literal["random", "leverage"] = Field(
        "random",
        description="Which `memory_rows` are used: at `random`, or those with the largest "
        "`leverage`, prediction error times variance under the stored posterior.",
    )
    memory_held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the memory that is not trained on: checks and the reconstruction "
        "error are measured there.",
    )
    removal: Removal = Field(
        "npo",
        description="Loss of the removed rows: `npo` (negative preference optimisation, a token: "
        "bounded), `ascent` (minus the loss: the exact removal of training data, not bounded), "
        "`kl_uniform` (KL divergence of the uniform distribution from the model), or `contrast` "
        "(`npo`, and the matched rows of `contrast` are added).",
    )
    contrast: Rows | None = Field(
        None,
        description="Rows of the kind of the removed ones that should stay, for `removal: "
        "contrast`. All together count as much as all removed ones.",
    )
    npo_beta: float = Field(
        0.1, gt=0, description="Inverse temperature of `npo`; towards 0 it becomes `ascent`."
    )
    kappa: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Weight of one memory observation. By default the base's observations over the "
        "memory's, which is exact for a memory that represents the base's data.",
    )
    tau: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the whole K-prior; 1 is Bayes' rule, 0 no prior.",
    )
    base_observations: float | None = Field(
        None,
        gt=0,
        description="Observations that the base was trained on, in its unit. By default those that "
        "its posterior records, else `base_multiple` times the removed and added ones.",
    )
    base_multiple: float = Field(
        5.0,
        gt=0,
        description="Where the base records no observations: how many times the removed and added "
        "ones it is taken to have seen.",
    )
    prior: Literal["auto", "stored", "none"] | Precision = Field(
        "auto",
        description="Weight-space part of the K-prior: the model's `stored` precision, one number "
        "(1/weight^2, on the scale of the summed loss), or `none`. `auto` is `none` with a memory, "
        "else `stored` where there is one.",
    )
    precision: str | None = Field(
        None, description="Another place for the model's precision: a file or a folder."
    )
    pool: Literal["tensor", "row"] | None = Field(
        None,
        description="Replace the stored precision by the mean of each `tensor` or `row` first.",
    )
    teacher: Literal["auto", "adapter", "copy", "stored"] = Field(
        "auto",
        description="Where the start's predictions come from: the model with its `adapter` off, a "
        "frozen `copy`, or `stored` logits (the `top_k` largest of each observation, the rest as "
        "one bin). `auto` is `adapter` with `lora`, else `copy`.",
    )
    top_k: int = Field(64, ge=1, description="Logits kept of an observation by `teacher: stored`.")
    until: Until = Field(
        Until.model_validate({}),
        description="Goals that end the run: `toxic_share`, `held_out_rise`, `memory_kl`.",
    )
    check_every: int = Field(10, ge=1, description="Steps from one check of the goals to the next.")
    prompts: str | None = Field(
        None, description="Prompts that checks continue, for `toxic_share`; validation data."
    )
    prompt_column: str = Field(
        "text",
        description="Column of the prompts. Of objects (RealToxicityPrompts') the text is read; "
        "`COLUMN.KEY` names another key.",
    )
    scorer: str | None = Field(
        None, description="Scorer of the continuations, as `evaluate --scorer`."
    )
    threshold: float = Field(
        0.5, gt=0, le=1, description="Score from which a continuation is toxic."
    )
    prompt_rows: int = Field(100, ge=1, description="Prompts of a check.")
    continuations: int = Field(4, ge=1, description="Continuations of a prompt in a check.")
    new_tokens: int = Field(20, ge=1, description="Tokens of a continuation at most.")
    held_out: Rows | None = Field(
        None,
        description="Rows like the removed ones, for `held_out_rise`; by default a tenth of the "
        "removed rows is held out.",
    )
    leap: float = Field(
        4.0,
        gt=1,
        description="A step after which the KL divergence on the memory is more than this many "
        "times its recent mean (0.01 nats at least) is undone, and the learning rate halved.",
    )
    keep_steps: tuple[int, ...] = Field(
        (),
        description="Also store the model as it is after these steps, in `OUTPUT.steps/STEP`, "
        "without a posterior.",
    )
    text_column: str = Field("text", description="Column of the text.")
    label_column: str = Field("label", description="Column of a classifier's label.")
    task: Task = Field(
        "auto",
        description="`causal-lm`, `classification`, or `auto` for what the architecture says.",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Rows at most of each of `remove`, `add`, `contrast`, `memory` and `held_out`.",
    )
    max_length: int = Field(
        512, ge=2, description="Tokens of a row at most; no more than the model's context."
    )
    pack: Annotated[Literal[False, "joined"], BeforeValidator(say_what_pack_was)] = Field(
        False,
        description="Language models: `joined` joins rows by EOS and cuts blocks of `max_length`, "
        "in which a row sees those before it, instead of one row an example.",
    )
    optimizer: Literal["adamw", "ivon"] = Field("adamw", description="`adamw` or `ivon`.")
    learning_rate: float | None = Field(
        None,
        ge=0,
        description="By default 2e-3 of the typical weight (the RMS of the median weight matrix), "
        "ten times that for an adapter. For IVON the bound on the change of a weight in one step, "
        "and at most 0.01.",
    )
    max_steps: int = Field(200, ge=1, description="Number of steps at most.")
    batch_size: int = Field(
        16,
        ge=1,
        description="Examples of each kind (removed, contrast, added, memory) in one pass.",
    )
    gradient_accumulation: int = Field(1, ge=1, description="Passes a step.")
    lora: LoraSettings | None = Field(
        None, description="Train a low-rank adapter with these settings instead of all weights."
    )
    posterior: Literal["flush", "none"] = Field(
        "flush",
        description="What is stored beside the model: `flush`, the base's precision plus the "
        "curvature of the added rows less that of the removed ones at the new mean, or `none`.",
    )
    flush_batches: int = Field(64, ge=1, description="Batches of each kind in the flush.")
    guard: float = Field(
        0.2, gt=0, le=1, description="Bound on what the removed rows take from the precision."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the order of the data and of all noise."
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Dtype of the parameters: `float32`, `bfloat16`, or `auto` for the file's. "
        "With AdamW, many steps of the default size are lost in the rounding of trained weights "
        "of 16 bits; `bf16` or `lora` avoids that.",
    )
    bf16: bool = Field(
        False, description="Compute in bfloat16, with parameters in their own dtype."
    )
    logging_steps: int = Field(20, ge=1, description="Steps from one line of the log to the next.")
    save_steps: int | None = Field(
        None, ge=1, description="Steps from one checkpoint in `OUTPUT.checkpoints` to the next."
    )
    keep_checkpoints: bool = Field(False, description="Keep the checkpoints at the end.")
    resume: bool = Field(
        False, description="Continue from the newest complete checkpoint in OUTPUT.checkpoints."
    )
    num_processes: int | None = Field(
        None, ge=1, description="Number of processes, which train replicas."
    )
    report_to: tuple[str, ...] = Field(
        (), description="Where to report the loss, by the names of transformers."
    )
    trust_remote_code: TrustRemoteCode = False
    force: Force = False

    @property
    def has_goals(self) -> bool:
        """Whether anything but the number of steps ends the run."""
        return any(goal is not None for goal in self.until.model_dump().values())

    @property
    def has_checks(self) -> bool:
        """Whether there is a goal, or anything that only checks look at."""
        return self.has_goals or self.prompts is not None or self.held_out is not None

    @property
    def has_memory(self) -> bool:
        """Whether the K-prior has a memory."""
        return self.memory is not None or self.memory_self_generated is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of examples that a step has, by their names in `objective.PARTS`."""
        rows = {"remove": self.remove, "contrast": self.contrast, "add": self.add}
        named = [name for name, given in rows.items() if given is not None]
        return (*named, *(["memory"] if self.has_memory else []))

    @property
    def asked(self) -> tuple[str, ...]:
        """Those of these for which the start's predictions are asked for."""
        removed = ["remove"] if self.removal in ("npo", "contrast") else []
        return tuple(name for name in self.parts if name in (*removed, "memory"))


class Check(Record):
    """What one check of the goals found.

    Attributes:
        step: Optimizer steps made.
        toxic_share: Share of toxic continuations; None without prompts.
        held_out_rise: Rise of the held-out loss, nats per observation; None without rows.
        memory_kl: Mean KL divergence on the held-out memory, nats per observation; None without
            a memory.
    """

    step: int
    toxic_share: float | None = None
    held_out_rise: float | None = None
    memory_kl: float | None = None


class AdaptReport(Frozen):
    """What an adaptation did.

    Attributes:
        path: The folder that was written.
        steps: Optimizer steps made.
        kept_step: The step whose weights were stored.
        reached: Whether a goal was reached; None without goals.
        checks: What each check found.
        unit: What an observation is: a token or an example.
        removed: Observations that were removed.
        added: Observations that were added.
        memory: Observations of the memory that was trained on.
        base: Observations that the base stands for.
        kappa: Weight of one memory observation.
        tau: Weight of the K-prior.
        prior: Its weight-space part: `stored`, `none` or one number, 1/weight^2.
        learning_rate: Learning rate at the start, in the unit of the settings.
        refused_steps: Steps that were undone because the memory's KL leapt.
        reconstruction_error: Relative squared error of the K-prior's gradient at the end, measured
            on the held-out memory: 0 is exact, and noise can bring it below; None where the
            held-out memory is too small to tell.
        estimator: What made the precision; None if none was stored.
        without_precision: Why none was stored; None if one was.
        health: Statistics of the precision.
    """

    path: Path
    steps: int
    kept_step: int
    reached: bool | None
    checks: tuple[Check, ...]
    unit: str
    removed: int
    added: int
    memory: int
    base: float
    kappa: float
    tau: float
    prior: Literal["stored", "none"] | float
    learning_rate: float
    refused_steps: int
    reconstruction_error: float | None
    estimator: str | None
    without_precision: str | None
    health: dict[str, float]
