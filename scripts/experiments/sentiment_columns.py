"""The columns of the experiment on addition: each way of merging, its controls, and their looks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sentiment_world import EVERY, Step, World, estimators

from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan import MergeConfig

OWN = "own"  # IVON's own precision, which lies beside each of its models
SELF = "self-generated"  # root-GGN on text that each language model writes itself
UNTUNED = 1.0
_SUMS = (0.1, 0.2, 0.3, 0.5, UNTUNED)  # of what adds up whole changes
_MEANS = (0.5, 0.75, UNTUNED, 1.5, 2.0)  # of what averages them
_PRECISE = (0.2, 0.4, 0.7, UNTUNED, 1.5)  # of what is divided by a precision


class Column(NamedTuple):
    """A way of merging.

    Attributes:
        name: Of its files.
        label: In tables.
        method: Of `bmerge merge`.
        looks: The scales that are looked at, the same for all tasks; the untuned one is among them.
            One alone where the scale changes nothing.
        estimator: Of its precisions; None without.
        settings: Further ones of the merge.
        permuted: Pattern of the tensors whose entries are permuted in its precisions; None for
            none.
        constant: Whether all its precisions are the same number.
        optimizer: What trained its tasks.
        is_control: Whether it weighs by nothing that a precision tells of single entries.
        with_base: Whether its merges start from the base.
    """

    name: str
    label: str
    method: str
    looks: tuple[float, ...]
    estimator: str | None = None
    settings: Mapping[str, Any] = {}
    permuted: str | None = None
    constant: bool = False
    optimizer: str = "adamw"
    is_control: bool = False
    with_base: bool = True

    @property
    def is_tuned(self) -> bool:
        """Whether there is a scale to choose."""
        return len(self.looks) > 1

    def lacking(self) -> str | None:
        """What this version of the package does not have of it."""
        if self.method not in METHODS:
            return f"there is no method {self.method}"
        if self.estimator not in {None, OWN, SELF, *estimators()}:
            return f"there is no estimator {self.estimator}"
        return None

    def seeds(self, world: World) -> tuple[int, ...]:
        """The seeds in which it is run."""
        size = world.size
        if self.optimizer == "adamw":
            return size.seeds
        return tuple(seed for seed in size.seeds if seed in size.ivon_seeds)

    def steps(self, world: World, seed: int) -> tuple[Step, ...]:
        """What it is made of beside the base: the tasks, and then the precisions."""
        tasks = tuple(world.tuned(task, seed, self.optimizer) for task in world.size.tasks)
        return (*tasks, *self._precisions(world, seed).values())

    def _precisions(self, world: World, seed: int) -> dict[str, Step]:
        """The precision of each model that has one to be read, by the model's path."""
        if self.estimator is None or self.constant:
            return {}
        models = {task: world.tuned(task, seed, self.optimizer) for task in world.size.tasks}
        found = {}
        if self.with_base:  # IVON's tasks start from AdamW's base, which has no precision of IVON's
            models = {world.base_text: world.base(seed), **models}
        for text, model in models.items():
            estimator = self.estimator
            if estimator == OWN:
                if text != world.base_text:
                    continue
                estimator = "ggn"
            step = world.precision(model, text, estimator, seed)
            if self.permuted is not None:
                step = world.permuted(step, seed, self.permuted)
            found[str(model.model)] = step
        return found

    def config(self, world: World, seed: int, scale: float) -> MergeConfig:
        """The settings of the merge at a scale."""
        tasks = [str(world.tuned(t, seed, self.optimizer).model) for t in world.size.tasks]
        base = str(world.base(seed).model)
        settings: dict[str, Any] = {
            "models": tuple(tasks),
            "base": base if self.with_base else None,
            "method": self.method,
            "scale": (scale,) if self.with_base else (1.0,),
            "posterior": False,
            **self.settings,
        }
        if self.constant:
            settings["isotropic"] = dict.fromkeys((base, *tasks), 1.0)
        elif self.estimator is not None:
            precisions = self._precisions(world, seed)
            settings["precision"] = {ref: str(s.precision) for ref, s in precisions.items()}
        return MergeConfig.model_validate(settings)


_GM = "gradient_matching"
BASELINE = "task_arithmetic"
COLUMNS = (
    Column("task_arithmetic", "task arithmetic", "task_arithmetic", _SUMS),
    Column("average", "average", "average", (UNTUNED,), is_control=True, with_base=False),
    Column("gm", "gradient matching, root-GGN", _GM, _PRECISE, "ggn"),
    Column("gm_constant", "control: one constant", _GM, _PRECISE, constant=True, is_control=True),
    Column(
        "gm_tensor",
        "control: per tensor",
        _GM,
        _PRECISE,
        "ggn",
        {"pool": "tensor"},
        is_control=True,
    ),
    Column("gm_row", "control: rows", _GM, _PRECISE, "ggn", {"pool": "row"}, is_control=True),
    Column(
        "gm_permuted",
        "control: entries permuted",
        _GM,
        _PRECISE,
        "ggn",
        permuted=EVERY,
        is_control=True,
    ),
    Column("gm_inputs", "gradient matching, input covariance", _GM, _PRECISE, "inputs"),
    Column("fisher", "Fisher", "fisher", (UNTUNED,), "ggn", with_base=False),
    Column("regmean", "RegMean", "regmean", (UNTUNED,), "inputs", with_base=False),
    Column("ace", "ACE", "ace", _MEANS),
    Column("tsv_m", "TSV-M", "tsv_m", (0.25, 0.5, 0.75, UNTUNED, 1.5)),
    Column("iso_c", "Iso-C", "iso_c", _MEANS),
    Column("ties", "TIES", "ties", _MEANS),
    Column("dare_ties", "DARE-TIES", "dare_ties", _MEANS),
    Column("consensus", "consensus", "consensus", _SUMS),
    Column("gm_adam", "gradient matching, Adam's moments", _GM, _PRECISE, "adam"),
    Column("ivon_ta", "IVON: task arithmetic", "task_arithmetic", _SUMS, optimizer="ivon"),
    Column("ivon_own", "IVON: gradient matching, its own", _GM, _PRECISE, OWN, optimizer="ivon"),
    Column("ivon_gm", "IVON: gradient matching, root-GGN", _GM, _PRECISE, "ggn", optimizer="ivon"),
    Column(
        "ivon_constant",
        "IVON: control, one constant",
        _GM,
        _PRECISE,
        constant=True,
        optimizer="ivon",
        is_control=True,
    ),
    Column("gm_kronecker", "gradient matching, Kronecker", _GM, _PRECISE, "kronecker"),  # slow
)
# Of language models, which can write the text of a precision themselves.
LANGUAGE = (
    *(c for c in COLUMNS if c.name not in {"dare_ties", "consensus", "ivon_gm"}),
    Column("gm_self", "gradient matching, root-GGN, self-generated", _GM, _PRECISE, SELF),
    Column(
        "gm_permuted_embeddings",
        "gradient matching, entries of the embeddings permuted",
        _GM,
        (UNTUNED,),
        "ggn",
        permuted="wte",
    ),
    Column(
        "gm_permuted_rest",
        "gradient matching, all other entries permuted",
        _GM,
        (UNTUNED,),
        "ggn",
        permuted="^(?!.*wte)",
    ),
)
