"""`--force` replaces an output, never something that the command reads."""

import json

import pytest

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests.tiny_models import tiny_gpt2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder that looks like a model's, in which model and texts lie."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "model", width=4, layers=1)
    (folder / "config.json").write_text("{}")
    (folder / "texts").mkdir()
    (folder / "texts" / "t.jsonl").write_text(json.dumps({"text": "the cat sat ."}) + "\n")
    (folder / "words.txt").write_text("bad\n")
    (folder / "link").symlink_to(folder / "model")
    return folder


def _finetune(world, output):
    data = str(world / "texts" / "t.jsonl")
    model = str(world / "model")
    run_finetune(FinetuneConfig(model=model, data=[data], output=output, max_steps=1, force=True))


def _precision(world, output):
    data = str(world / "texts")
    run_precision(PrecisionConfig(model=str(world / "model"), data=data, output=output, force=True))


def _evaluate(world, output):
    run_evaluate(
        EvaluateConfig(
            model=str(world / "model"),
            perplexity={"t": str(world / "texts" / "t.jsonl")},
            toxicity=str(world / "texts" / "t.jsonl"),
            scorer=[f"words:{world / 'words.txt'}"],
            output=output,
            force=True,
        )
    )


@pytest.mark.parametrize("command", [_finetune, _precision, _evaluate])
@pytest.mark.parametrize("place", ["model", ".", "texts", "link"])
def test_an_output_in_the_place_of_an_input_is_refused(world, command, place):
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"would replace .* an input"):
        command(world, str(world / place))
    assert {path: path.read_bytes() for path in world.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["eval_data", "chat_template"])
def test_what_a_fine_tune_reads_besides_its_data_is_not_replaced(world, name):
    output = world / f"with {name}"
    output.mkdir()
    file = output / "t.jsonl"
    file.write_text("{}")
    settings = {"model": str(world / "model"), "data": str(world / "texts"), name: str(file)}
    with pytest.raises(CheckpointError, match=r"would replace .*t.jsonl', an input"):
        run_finetune(FinetuneConfig(**settings, output=str(output), force=True))
    assert file.exists()


@pytest.mark.parametrize(
    ("command", "place"),
    [(_precision, "model/model.safetensors"), (_evaluate, "words.txt")],
)
def test_an_output_in_the_place_of_a_file_that_is_read_is_refused(world, command, place):
    with pytest.raises(CheckpointError, match=r"would replace .* an input"):
        command(world, str(world / place))


def test_a_report_may_lie_in_the_folder_of_its_model(world):
    for _ in range(2):
        _evaluate(world, str(world / "model" / "evaluation"))
    assert (world / "model" / "evaluation" / "report.json").is_file()
