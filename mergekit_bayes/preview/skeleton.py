"""The model that a merge would be loaded as, before it has any of its numbers."""

from pathlib import Path

from mergekit_bayes.checkpoint.layout import shard_name
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.pool import PLAIN_CHUNK
from mergekit_bayes.merge.side_files import SideFiles
from mergekit_bayes.merge.work import Sinks, Worker
from mergekit_bayes.plan import MergePlan
from mergekit_bayes.stream.chunks import Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.units import units_of


def write_skeleton(plan: MergePlan, folder: Path) -> None:
    """Write the folder of a merge with the tensors that are copied, and zeros for the merged ones.

    It has the config, the tokenizer and the names, shapes and dtypes of the merge, so that it loads
    as the merge does. The zeros take no room on most disks: they are holes in the file.

    Args:
        plan: The merge.
        folder: A new folder.

    Raises:
        CheckpointError: The models are files without a config, or a file cannot be written.
    """
    side_files = SideFiles(plan)
    if plan.side_files is None or Path("config.json") not in plan.side_files.gathered.files:
        raise CheckpointError(
            f"'{plan.inputs.donor.ref}' has no config.json, which running its merges needs. Name "
            "the folders of the models in the recipe, or merge first and evaluate the result."
        )
    side_files.check()
    folder.mkdir()
    specs = {step.name: step.spec for step in plan.steps}
    path = folder / shard_name("model", 0, 1)
    with SafetensorsSink(path, specs, {"format": "pt"}, sparse=True) as sink:
        reader = Reader(plan)
        worker = Worker(plan, reader, PLAIN_CHUNK, fused=False)
        first_pass = FirstPass(plan, lambda: reader, map, fused=False)
        for unit in units_of(plan):
            step = plan.steps[unit.step]
            if step.copied is not None:
                worker.run(unit, first_pass.measure(step), Sinks(sink, None))
    side_files.copy(folder)
