"""IVON in a loop of torch alone: train, predict with samples of the posterior, store, merge.

python examples/plain_loop.py first 0
python examples/plain_loop.py second 1
bmerge merge first second --weights precision -o merged
"""

import sys

import torch
from torch.nn.functional import cross_entropy

from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import add_logit_curvature, ivon_settings, save_trained


def main(output: str, seed: int | str = 0, steps: int = 200) -> None:
    """Train a small classifier on points of two classes, and write model and posterior."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    torch.manual_seed(int(seed))
    labels = torch.randint(2, (512,))
    points = torch.randn(512, 2) + 2.0 * labels[:, None]
    # A large prior precision and a large rate: the weights are few, and start at random.
    settings = ivon_settings(
        model, observations=len(points), steps=steps, learning_rate=0.01, weight_decay=1e-3
    )
    optimizer = IVON(model.parameters(), **settings)
    for _ in range(steps):
        chosen = torch.randint(len(points), (32,))
        with optimizer.sampled_params(train=True):
            logits = model(points[chosen])
            add_logit_curvature(optimizer, logits)
            cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()

    probabilities = torch.zeros(len(points), 2)
    with torch.no_grad():
        for _ in range(16):
            with optimizer.sampled_params(temperature=3):
                probabilities += model(points).softmax(-1) / 16
    accuracy = (probabilities.argmax(-1) == labels).float().mean()
    print(f"accuracy {accuracy:.3f}, mean of 16 weight samples")
    save_trained(model, optimizer, output, observations=len(points), unit="example")


if __name__ == "__main__":
    main(*sys.argv[1:])
