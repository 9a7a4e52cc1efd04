"""The methods of the experiment on removal: how each makes its looks, from a base's start."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from detox_world import CONDITIONS, CONTEXT, OWN_SCORER, World

from mergekit_bayes.merge import MergeConfig, run_merge

MAIN = ("trained", "other")
ONE = ("trained",)


@dataclass(frozen=True)
class Method:
    """A curve of looks.

    Attributes:
        name: In file names.
        label: In tables.
        kind: What makes its looks.
        looks: Scales that are subtracted, or steps after which a correction is stopped.
        options: Settings of the merge or the adaptation; FILES are names of texts.
        tuned: Texts whose fine-tunes a merge takes, the first subtracted, others added.
        weighs: Whether the base's precision is used.
        proper: Whether that precision contains a prior.
        conditions: Where it is run.
        all_seeds: Conditions in which it is run with all seeds; elsewhere with the first.
        lasts: Whether it is measured how long the removal lasts.
    """

    name: str
    label: str
    kind: Literal["merge", "adapt", "oracle"]
    looks: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    weighs: bool = False
    proper: bool = False
    conditions: tuple[str, ...] = MAIN
    all_seeds: tuple[str, ...] = MAIN
    lasts: bool = True

    def seeds(self, world: World, condition: str) -> tuple[int, ...]:
        """The seeds that it is run with."""
        if condition not in self.conditions or not world.size.has(self.name, condition):
            return ()
        return world.size.seeds if condition in self.all_seeds else world.size.seeds[:1]

    def looks_of(self, world: World) -> tuple[float, ...]:
        """The looks at this size."""
        looks = self.looks[: world.size.looks]
        if self.kind != "adapt":
            return looks
        return tuple(dict.fromkeys(float(world.size.times(int(step))) for step in looks))


def merge(name: str, label: str, looks: tuple[float, ...], **settings: Any) -> Method:
    """A merge that subtracts the fine-tune on the removed text."""
    return Method(name, label, "merge", looks, **{"tuned": ("removed",), **settings})


def gradient_matching(name: str, label: str, looks: tuple[float, ...], **settings: Any) -> Method:
    """Gradient matching with the defaults of the documents; `settings` as those of `adapt`."""
    fields = _fields_in(settings)
    common = {"weights": "precision", "anchor": "h0", "shrink": "0.3"}
    return merge(name, label, looks, weighs=True, options=common | settings, **fields)


def adapt(name: str, label: str, looks: tuple[float, ...], **settings: Any) -> Method:
    """A correction in a few steps; `settings` of `Method` besides those of the adaptation."""
    fields = _fields_in(settings)
    return Method(name, label, "adapt", looks, options=settings, **fields)


def _fields_in(settings: dict[str, Any]) -> dict[str, Any]:
    """Take those of `Method` out of these settings."""
    return {k: settings.pop(k) for k in list(settings) if k in Method.__dataclass_fields__}


SIDE: dict[str, Any] = {"conditions": ONE, "all_seeds": (), "lasts": False}
PART: dict[str, Any] = {"conditions": ONE, "lasts": False}  # a part of the K-prior alone
FEWER: dict[str, Any] = {"all_seeds": ONE, "lasts": False}
FIRST: dict[str, Any] = {"all_seeds": (), "lasts": False}
STEPS, FREE = (50, 90, 130, 180, 250), (20, 40, 60, 80, 110)  # with a memory, and without one
FEW = STEPS[:3]  # where the question is only what a memory of another kind or size does
SUBTRACTED, AMPLIFIED = (0.5, 1, 1.5, 2, 3), (0.3, 0.5, 0.75, 1, 1.5)
METHODS = (
    merge("task_arithmetic", "task arithmetic", SUBTRACTED),
    adapt("adapt", "correction, memory", STEPS, memory="memory"),
    adapt(
        "adapt_beta1",
        "correction, memory, beta 1",
        STEPS,
        memory="memory",
        npo_beta=1.0,
        all_seeds=(),
    ),
    adapt("npo", "NPO alone", (10, 20, 30, 40, 50), prior="none"),
    gradient_matching(
        "gradient_matching_1", "gradient matching, guard 1", SUBTRACTED, guard=1.0, all_seeds=ONE
    ),
    merge(
        "fisher_negation",
        "Fisher-weighted negation",
        (1, 2, 3, 4.5, 6),
        weighs=True,
        options={"method": "fisher_negation"},
        all_seeds=ONE,
    ),
    adapt(
        "ascent",
        "ascent and KL to the base",
        STEPS,
        removal="ascent",
        memory="memory",
        all_seeds=(),
    ),
    gradient_matching(
        "gradient_matching", "gradient matching, guard 0.2", AMPLIFIED, guard=0.2, **FIRST
    ),
    gradient_matching(
        "control", "its control (a number a tensor)", AMPLIFIED, **FIRST, pool="tensor"
    ),
    merge(
        "contrast", "contrast by two fine-tunes", SUBTRACTED, tuned=("removed", "matched"), **FIRST
    ),
    adapt(
        "clean",
        "further training on clean text",
        (25, 50, 100, 200, 400),
        add="clean",
        remove=None,
        prior="none",
        tau=0.0,
        learning_rate=1e-4,
        **FEWER,
    ),
    adapt(
        "clean_few",
        "further training on the memory's rows",
        (25, 50, 100, 200, 400),
        add="memory",
        remove=None,
        prior="none",
        tau=0.0,
        learning_rate=1e-4,
        **PART,
    ),
    adapt("adapt_clean", "correction, memory of all clean text", STEPS, memory="clean", **PART),
    adapt("adapt_weights", "correction, entries", FREE, prior="stored", weighs=True, **SIDE),
    adapt(
        "adapt_pool",
        "correction, a number a tensor",
        FREE,
        prior="stored",
        pool="tensor",
        weighs=True,
        **SIDE,
    ),
    adapt(
        "adapt_both",
        "correction, memory and entries",
        FEW,
        memory="memory",
        prior="stored",
        weighs=True,
        **SIDE,
    ),
    adapt(
        "adapt_row",
        "correction, a number a row",
        FREE,
        prior="stored",
        pool="row",
        weighs=True,
        **SIDE,
    ),
    adapt(
        "adapt_proper",
        "correction, entries and a proper prior",
        FREE,
        prior="stored",
        weighs=True,
        proper=True,
        **SIDE,
    ),
    adapt("adapt_ivon", "correction, memory, IVON", FEW, memory="memory", optimizer="ivon", **SIDE),
    adapt("memory_novels", "memory of novels", FEW, memory="novels", **SIDE),
    adapt("memory_own", "memory of its own text", FEW, memory_self_generated=True, **SIDE),
    adapt(
        "memory_filtered",
        "memory of its own text, filtered",
        FEW,
        memory_self_generated=True,
        memory_filter=True,
        **SIDE,
    ),
    Method("oracle", "oracle", "oracle", (1,), conditions=ONE, lasts=False),
)


def all_methods(world: World) -> tuple[Method, ...]:
    """The methods, and corrections with memories of several sizes."""
    sizes = [
        adapt(
            f"memory_{size}_{select}",
            f"memory of {size} blocks, " + ("by leverage" if select == "leverage" else select),
            FEW,
            memory="pool",
            memory_rows=size,
            memory_select=select,
            weighs=select == "leverage",
            proper=select == "leverage",
            **SIDE,
        )
        for size in world.size.memory_sizes
        for select in ("random", "leverage")
    ]
    return (*METHODS[:-1], *sizes, METHODS[-1])


def make_looks(
    world: World, method: Method, condition: str, seed: int, needed: tuple[float, ...]
) -> Iterator[tuple[float, Path, float]]:
    """Make the models of a curve, those that are needed.

    Yields:
        A look, its model's folder, and the CPU seconds from the start of the method to it, without
        fine-tunes and precisions.
    """
    if method.kind == "oracle":
        yield 1.0, world.oracle(seed), 0.0
        return
    place = world.models(method.name, condition, seed)
    if method.kind == "merge":
        for look in needed:
            folder, begun = place / f"{look:g}", time.process_time()
            if not folder.exists():
                run_merge(merge_config(world, method, condition, seed, look, folder))
            yield look, folder, time.process_time() - begun
        return
    # Imported here: what only merges needs no adaptation.
    from mergekit_bayes.adapt.run import run_adapt

    output, clock = place / "last", place / "seconds.json"
    if not clock.exists():
        shutil.rmtree(place, ignore_errors=True)  # of a run that was interrupted
        begun = time.process_time()
        run_adapt(adapt_config(world, method, condition, seed, output), quiet=True)
        clock.write_text(json.dumps(time.process_time() - begun))
    spent, last = json.loads(clock.read_text()), method.looks_of(world)[-1]
    for look in needed:
        yield look, Path(f"{output}.steps") / f"{look:g}", spent * look / last


def merge_config(
    world: World, method: Method, condition: str, seed: int, scale: float, out: Path
) -> MergeConfig:
    """The merge of one look."""
    base = str(world.start(seed))
    models = [str(world.tuned(f"{text}-{condition}", seed)) for text in method.tuned]
    options = dict(method.options)
    if "weights" in options:  # gradient matching; Fisher negation knows no counts
        options["observations"] = {base: "3x"}
    return MergeConfig(
        models=tuple(models),
        base=base,
        scale=(-scale, *(scale for _ in models[1:])),
        out=str(out),
        posterior=False,
        **options,
    )


def adapt_config(world: World, method: Method, condition: str, seed: int, output: Path) -> Any:
    """The adaptation of a curve, which stores all looks on its way.

    The base's precision says how many observations it stands for. Beside other text a person has
    no such record: there the base is taken without one, and stands for as many times the removed
    observations as the settings assume.
    """
    from mergekit_bayes.adapt import AdaptConfig

    is_recorded = condition == "trained"
    start = world.start(seed, proper=method.proper) if is_recorded else world.base(seed)

    options = {"remove": f"removed-{condition}", **method.options}
    for name in ("remove", "add", "memory"):
        if options.get(name) is not None:
            options[name] = {"data": world.rows(options[name])}
    if options.pop("memory_self_generated", None):
        options["memory_self_generated"] = world.size.self_generated
    if options.pop("memory_filter", None):
        options["memory_filter"] = f"detox_scorers:{OWN_SCORER[condition]}"
    looks = tuple(int(look) for look in method.looks_of(world))
    return AdaptConfig(
        **{
            "model": str(start),
            "output": str(output),
            "pack": "joined",
            "max_length": CONTEXT,
            "batch_size": 16,
            "posterior": "none",
            "max_steps": looks[-1],
            "keep_steps": looks,
            "seed": seed,
            **options,
        }
    )


assert set(MAIN) == set(CONDITIONS)
