"""Steps of AdamW that 16-bit weights would round away are told, wherever weights are trained."""

import pytest

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt import data as adaptations
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune import data as fine_tunes
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2


def fine_tune(folder, **changes):
    rows = str(folder / "rows.jsonl")
    config = {"model": str(folder / "base"), "output": str(folder / "out"), "data": rows}
    return fine_tunes.load_run(FinetuneConfig.model_validate(config | changes), 1)


def adaptation(folder, **changes):
    rows = {"data": str(folder / "rows.jsonl")}
    config = {"model": str(folder / "base"), "output": str(folder / "out"), "add": rows}
    return adaptations.load_run(AdaptConfig.model_validate(config | changes))


@pytest.mark.parametrize("load", [fine_tune, adaptation])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "adamw", "dtype": "bfloat16"}, True),
        ({"optimizer": "adamw", "dtype": "bfloat16", "lora": {"r": 2}}, False),
        ({"optimizer": "adamw", "dtype": "float32"}, False),
        ({"optimizer": "ivon", "dtype": "bfloat16"}, False),
    ],
    ids=["16 bits", "an adapter in 32", "32 bits", "IVON's own float32"],
)
def test_steps_that_would_be_rounded_away_are_told(tmp_path, caplog, load, changes, told):
    tiny_gpt2(tmp_path / "base", layers=1)
    texts(tmp_path / "rows.jsonl", rows=8, seed=1)
    load(tmp_path, **changes)
    assert ("in whose rounding" in caplog.text) == told
