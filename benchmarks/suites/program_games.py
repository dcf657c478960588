"""Programs whose loss does not say how good they are: a generative adversarial network and a policy gradient."""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.suites.program_loop import Make, TrainingOutcome, batches, end_of, perceptron
from learned_optim.meta_train.data import datasets as data

LATENT = 32
SAMPLES = 4_000  # for a Frechet distance on 32 features: 125 a feature
JUDGE_STEPS = 1_500  # of batches of 64; the judge then knows 96 digits of 100


def adversarial(make: Make, steps: int) -> TrainingOutcome:
    """Digits by a generator 32-128-784 against 784-128-1 (Goodfellow et al. 2014), without saturation.

    The score is the Frechet distance of the judge's features (Heusel et al. 2017, with a small classifier of digits
    in place of Inception): the less the better.
    """
    real = (data.pooled(data.load("mnist", "train").images, 28).flatten(1),)
    generator = nn.Sequential(perceptron(LATENT, 128, 784, activation=lambda: nn.LeakyReLU(0.2)), nn.Sigmoid())
    discriminator = perceptron(784, 128, 1, activation=lambda: nn.LeakyReLU(0.2))
    of_generator, of_discriminator = make(generator.parameters()), make(discriminator.parameters())
    losses = []
    for (images,) in itertools.islice(batches(real, 64), steps):
        made = generator(torch.randn(len(images), LATENT))
        of_discriminator.zero_grad()
        (F.softplus(-discriminator(images)).mean() + F.softplus(discriminator(made.detach())).mean()).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        loss = F.softplus(-discriminator(made)).mean()
        loss.backward()
        of_generator.step()
        losses.append(loss.item())
    with torch.no_grad():
        distance, entropy = frechet_and_entropy(generator(torch.randn(SAMPLES, LATENT)))
    return TrainingOutcome(end_of(losses), score=distance, entropy=entropy)


class Judge(NamedTuple):
    """A classifier of digits, and how its features of real ones are distributed."""

    features: nn.Module
    output: nn.Module
    mean: Tensor
    covariance: Tensor


@functools.cache
def judge() -> Judge:
    """784-128-32-10 trained on MNIST; always the same on one machine."""
    images, labels = data.load("mnist", "train")
    pixels = data.pooled(images, 28)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        features, output = nn.Sequential(perceptron(784, 128, 32), nn.ReLU()), nn.Linear(32, 10)
        optimizer = torch.optim.Adam([*features.parameters(), *output.parameters()])
        for inputs, targets in itertools.islice(batches((pixels, labels), 64), JUDGE_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(output(features(inputs)), targets).backward()
            optimizer.step()
    with torch.no_grad():
        return Judge(features, output, *moments(features(data.pooled(data.load("mnist", "test").images, 28))))


def frechet_and_entropy(images: Tensor) -> tuple[float, float]:
    """Frechet distance from real digits, and entropy in nats of the classes: at most log 10, about 2.3."""
    features, output, mean, covariance = judge()
    found = features(images)
    if not found.isfinite().all():
        return math.inf, 0.0
    shares = output(found).argmax(1).bincount(minlength=10) / len(images)
    return frechet(*moments(found), mean, covariance), float(torch.special.entr(shares).sum())


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, in float64."""
    return features.double().mean(0), features.double().T.cov()


def frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """``|m - n|^2 + tr(A + B - 2 (A B)^(1/2))``, the squared distance of two normal distributions."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * common)


EPISODES, LONGEST = 16, 500  # at once, and steps of one, as many as CartPole-v1 has
DISCOUNT = 0.99


def policy_gradient(make: Make, steps: int) -> TrainingOutcome:
    """Balance a pole on a cart (Barto et al. 1983) by REINFORCE (Williams 1992); the score is the return."""
    policy = perceptron(4, 64, 2, activation=nn.Tanh)
    optimizer = make(policy.parameters())
    losses, returns = [], []
    for _ in range(steps):
        states, actions, alive = cart_pole_episodes(policy)
        gains, gain = torch.zeros_like(alive), torch.zeros(EPISODES)
        for step in reversed(range(len(alive))):
            gain = alive[step] + DISCOUNT * gain
            gains[step] = gain
        seen = alive.bool()
        advantages = (gains[seen] - gains[seen].mean()) / (gains[seen].std() + 1e-6)  # all gains may be the same
        optimizer.zero_grad()
        loss = (F.cross_entropy(policy(states[seen]), actions[seen], reduction="none") * advantages).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        returns.append(float(alive.sum(0).mean()))
    return TrainingOutcome(end_of(losses), score=end_of(returns))


@torch.no_grad()
def cart_pole_episodes(policy: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """States ``(steps, episodes, 4)``, actions ``(steps, episodes)``, and 1 where the pole had not fallen before."""
    state, alive = 0.1 * torch.rand(EPISODES, 4) - 0.05, torch.ones(EPISODES)
    states, actions, living = list[Tensor](), list[Tensor](), list[Tensor]()
    while alive.any() and len(states) < LONGEST:
        action = (torch.rand(EPISODES) < policy(state).softmax(1)[:, 1]).long()  # NaN plays 0
        states.append(state)
        actions.append(action)
        living.append(alive)
        state = moved_cart(state, action)
        alive = alive * ((state[:, 0].abs() < 2.4) & (state[:, 2].abs() < math.radians(12)))
    return torch.stack(states), torch.stack(actions), torch.stack(living)


def moved_cart(state: Tensor, action: Tensor) -> Tensor:
    """The cart 0.02 seconds later, pushed to the left (0) or right (1) with 10 N, with the constants of Gym's CartPole.

    ``state`` is place, speed, angle and angular speed, ``(episodes, 4)``; the cart weighs 1 kg, the pole 0.1 kg and is
    1 m long.
    """
    _, speed, angle, spin = state.unbind(1)
    push = (20.0 * action - 10 + 0.05 * spin.square() * angle.sin()) / 1.1
    turn = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    return state + 0.02 * torch.stack([speed, push - 0.05 * turn * angle.cos() / 1.1, spin, turn], 1)
