"""A menu of small problems, whose Hessian, GGN and posterior are exact dense matrices in float64.

`CASES` is for tests that compare every optimizer and every estimator of curvature with a matrix.
The other helpers are the regression that most tests of the optimizers train on.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev

SETTINGS = {"ess": 50.0, "hess_init": 0.5, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def net(seed=0, dtype=torch.float32):
    """A perceptron with five inputs, seven hidden units and one output."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers).to(dtype)


def data(n=16, dtype=torch.float32):
    """Random inputs and targets for `net`."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, 5, generator=g).to(dtype), torch.randn(n, 1, generator=g).to(dtype)


def loss_of(model, x, y):
    """Half the mean squared error."""
    return 0.5 * (model(x) - y).square().mean()


def train(model, optimizer, steps, samples=1):
    """Train a `net` on `data`."""
    x, y = data(dtype=next(model.parameters()).dtype)
    for _ in range(steps):
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
        optimizer.step()


class Classifier(torch.nn.Module):
    """A module that is called, and answers, like a classifier of transformers."""

    def __init__(self, module, problem):
        super().__init__()
        self.module = module
        self.config = types.SimpleNamespace(problem_type=problem, num_labels=3)

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(logits=self.module(input_ids))


@dataclass(frozen=True)
class Case:
    """A model with data, and a mean loss over n observations.

    Attributes:
        likelihood: "gaussian" (loss 0.5 |z - y|^2), "bernoulli" or "categorical".
        inputs: (n, inputs), float64.
        targets: (n, C), float64; of a categorical one class each, (n,).
        layers: Builds the module, whose weights are then random, with a seed.
        is_linear: Whether outputs are linear in the weights. Then Hessian and GGN are equal, and
            under a gaussian likelihood the posterior is known.
    """

    likelihood: str
    inputs: Tensor
    targets: Tensor
    layers: Callable[[], torch.nn.Module]
    is_linear: bool

    def model(self, dtype=torch.float32):
        """The model, always with the same weights."""
        torch.manual_seed(0)
        problems = {"gaussian": "regression", "bernoulli": "multi_label_classification"}
        module = self.layers().double()
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.5)
        return Classifier(module, problems.get(self.likelihood)).to(dtype)

    def outputs(self, model):
        """(n, C)."""
        return model(self.inputs.to(next(model.parameters()).dtype)).logits

    def losses(self, model):
        """(n,)."""
        return self._losses(self.outputs(model))

    def loss(self, model):
        """Their mean."""
        return self.losses(model).mean()

    def _losses(self, z):
        if self.likelihood == "categorical":
            return torch.nn.functional.cross_entropy(z, self.targets, reduction="none")
        targets = self.targets.to(z.dtype)
        if self.likelihood == "gaussian":
            return 0.5 * (z - targets).square().sum(-1)
        logistic = torch.nn.functional.binary_cross_entropy_with_logits
        return logistic(z, targets, reduction="none").sum(-1)

    # Dense matrices of the mean loss in float64, at the weights of a model.

    def hessian(self, model):
        """(P, P), with all weights in a row."""
        weights, outputs = self._function(model)
        return hessian(lambda w: self._losses(outputs(w)).mean())(weights)

    def gradients(self, model):
        """(n, P), of single observations."""
        weights, outputs = self._function(model)
        return jacrev(lambda w: self._losses(outputs(w)))(weights)

    def jacobian(self, model):
        """(n, C, P), of the outputs."""
        weights, outputs = self._function(model)
        return jacrev(outputs)(weights)

    def ggn(self, model):
        """(P, P): the mean of J' A J, with A the Hessian of the loss in the outputs."""
        weights, outputs = self._function(model)
        jacobian, z = self.jacobian(model), outputs(weights)
        factors = torch.stack([output_factor(self.likelihood, row) for row in z])
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, factors, jacobian) / len(z)

    def posterior(self, ess, weight_decay):
        """Mean (P,) and dense precision (P, P) of a linear model with a gaussian likelihood.

        The loss is m' H m / 2 - b' m + const, the prior N(0, 1 / (ess weight_decay)).
        """
        assert self.is_linear
        assert self.likelihood == "gaussian"
        model = self.model(torch.float64)
        weights, _ = self._function(model)
        dense, gradient = self.hessian(model), self.gradients(model).mean(0)
        damped = dense + weight_decay * torch.eye(len(dense), dtype=torch.float64)
        return torch.linalg.solve(damped, dense @ weights - gradient), ess * damped

    def _function(self, model):
        """All weights in a row, and the function from such a row to the outputs."""
        model = model.double()
        shapes = {n: p.shape for n, p in model.named_parameters()}
        sizes = [s.numel() for s in shapes.values()]

        def outputs(row):
            parts = zip(shapes.items(), row.split(sizes), strict=True)
            tensors = {name: part.view(shape) for (name, shape), part in parts}
            return functional_call(model, tensors, (self.inputs,)).logits

        return flat(p.detach() for p in model.parameters()), outputs


def flat(tensors):
    """All entries in a row, float64."""
    return torch.cat([t.detach().flatten().double() for t in tensors])


def output_factor(likelihood, z):
    """The Hessian of the loss in the outputs z of one observation, (C, C)."""
    if likelihood == "gaussian":
        return torch.eye(len(z), dtype=z.dtype)
    if likelihood == "bernoulli":
        return torch.diag(z.sigmoid() * (1 - z.sigmoid()))
    p = z.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def exact_ggn_diagonal(likelihood, outputs, parameters):
    """The diagonal of the summed J' A J of any model, one tensor a parameter.

    One backward per entry of a square root of A, where the Jacobian of `Case.ggn` would be large.
    """
    totals = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for z in outputs:
        values, vectors = torch.linalg.eigh(output_factor(likelihood, z.detach()))
        for column in (vectors * values.clamp(min=0).sqrt()).T:
            projected = (column * z).sum()
            gradients = torch.autograd.grad(
                projected, parameters, retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient.double().square()
    return totals


def _inputs(n, width, seed):
    scales = torch.linspace(0.5, 1.5, width, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64) * scales


def _noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _linear(inputs, outputs):
    return lambda: torch.nn.Linear(inputs, outputs)


def _perceptron(inputs, hidden, outputs):
    return lambda: torch.nn.Sequential(
        torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs)
    )


CASES = {
    "linear regression": Case(
        "gaussian", _inputs(24, 3, 1), _noise(24, 1, seed=2), _linear(3, 1), True
    ),
    "regression with two outputs": Case(
        "gaussian", _inputs(20, 3, 3), _noise(20, 2, seed=4), _linear(3, 2), True
    ),
    "logistic regression": Case(
        "bernoulli", _inputs(24, 3, 5), (_noise(24, 1, seed=6) > 0).double(), _linear(3, 1), True
    ),
    "softmax of three classes": Case(
        "categorical", _inputs(24, 3, 7), torch.arange(24) % 3, _linear(3, 3), True
    ),
    "perceptron, regression": Case(
        "gaussian", _inputs(16, 3, 8), _noise(16, 1, seed=9), _perceptron(3, 4, 1), False
    ),
    "perceptron, several labels": Case(
        "bernoulli",
        _inputs(16, 3, 10),
        (_noise(16, 2, seed=11) > 0).double(),
        _perceptron(3, 4, 2),
        False,
    ),
    "perceptron, three classes": Case(
        "categorical", _inputs(16, 3, 12), torch.arange(16) % 3, _perceptron(3, 4, 3), False
    ),
}
