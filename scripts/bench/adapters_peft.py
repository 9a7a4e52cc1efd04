"""PEFT's `add_weighted_adapter` beside the sum of the changes that it combines."""

import copy
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

D, RANK = 48, 4
COMBINATIONS = ("linear", "cat", "svd")
WEIGHTS = ([1.0], [-1.0], [0.7, 0.6], [0.7, -0.6])


class Layers(nn.Module):
    """Linear layers, of which adapters target the first two."""

    def __init__(self, d: int = D, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def combine(factors: list, rank: int) -> object:
    """Combine adapters of one layer by "svd", from factors in memory."""
    torch.set_num_threads(1)
    model = Layers(len(factors[0].b), 1)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = get_peft_model(model, config, adapter_name="0")
    for t, pair in enumerate(factors):
        if t:
            model.add_adapter(str(t), config)
        layer = model.base_model.model.layers[0]
        layer.lora_A[str(t)].weight.data = torch.from_numpy(pair.a)
        layer.lora_B[str(t)].weight.data = torch.from_numpy(pair.b)
    names = [str(t) for t in range(len(factors))]
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", "svd", svd_rank=rank)
    return model


def kinds() -> dict[str, tuple[dict, dict]]:
    """The settings of two adapters, by what they are called in the table."""
    from peft import KasaConfig

    last = {"rank_pattern": {"layers.1": 8}}
    return {
        "plain": ({}, {}),
        "different alpha": ({}, {"lora_alpha": 32}),
        "different rank": ({}, {"r": 8}),
        "rank_pattern": (last, last),
        "alpha_pattern": ({"alpha_pattern": {"layers.1": 40}},) * 2,
        "use_rslora": ({"use_rslora": True},) * 2,
        "use_rslora in the second": ({}, {"use_rslora": True}),
        "lora_bias": ({"lora_bias": True},) * 2,
        "use_dora": ({"use_dora": True},) * 2,
        "modules_to_save in the first": ({"modules_to_save": ["2"]}, {}),
        "kasa_config": ({"kasa_config": KasaConfig()},) * 2,
    }


def errors() -> list[list[str]]:
    """Rows of the table: kind, combination, and errors for one and for two adapters."""
    warnings.simplefilter("ignore")
    rows = []
    for kind, settings in kinds().items():
        for combination in COMBINATIONS:
            found = [_error(settings, combination, weights) for weights in WEIGHTS]
            rows.append([kind, combination, *(error for error, _ in found), found[2][1]])
    return rows


def _error(settings: tuple[dict, dict], combination: str, weights: list[float]) -> tuple[str, str]:
    """The distance of the combined change from the sum, relative to it, and whether it loads."""
    torch.manual_seed(0)
    common = {"r": RANK, "lora_alpha": 8, "target_modules": ["0", "1"]}
    names = ["one", "two"][: len(weights)]
    try:
        plain = Layers().double()
        last = [t.detach().clone() for t in plain.layers[-1].parameters()]  # not targeted
        model = get_peft_model(plain, LoraConfig(**common | settings[0]), "one")
        if len(names) > 1:
            model.add_adapter("two", LoraConfig(**common | settings[1]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    parameter.normal_(std=0.3)
                elif "magnitude" in name:
                    parameter.mul_(1.3)
                elif "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        before = _folded(model, None)[:-2] + last
        sum_ = [
            sum(w * (x - y) for w, x, y in zip(weights, each, [of] * len(weights), strict=True))
            for *each, of in zip(*(_folded(model, name) for name in names), before, strict=True)
        ]
        given = {"svd_rank": 16} if combination == "svd" else {}  # all that both have
        model.add_weighted_adapter(names, weights, "merged", combination, **given)
        merged = [x - y for x, y in zip(_folded(model, "merged"), before, strict=True)]
    except Exception as error:
        return type(error).__name__, ""
    lacking = sum(float((x - y).square().sum()) for x, y in zip(merged, sum_, strict=True))
    relative = (lacking / sum(float(x.square().sum()) for x in sum_)) ** 0.5
    return f"{relative:.1e}", _loads_again(model)


def _loads_again(model: nn.Module) -> str:
    """Whether the combined adapter can be read back; what is raised if not."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["merged"])
        try:
            PeftModel.from_pretrained(Layers().double(), f"{folder}/merged")
        except Exception as error:
            return type(error).__name__
    return "yes"


def _folded(model: nn.Module, adapter: str | None) -> list[torch.Tensor]:
    """All weights and biases with an adapter folded in by PEFT; those of the base for None."""
    own = copy.deepcopy(model)
    if adapter is not None:
        own.set_adapter(adapter)
    base = own.unload() if adapter is None else own.merge_and_unload(adapter_names=[adapter])
    found = []
    for layer in base.layers:
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
        found += [layer.weight.detach().double(), bias.detach().double()]
    return found
