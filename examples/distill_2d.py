"""Distillation where the teacher is exact: few-step students of a mixture of Gaussians, and how far each is from it.

    python examples/distill_2d.py

The teacher is the exact denoiser of `mixture_2d.py` under classifier-free guidance; a student is its small network,
first brought to the teacher's answers, then distilled. Prints energy distances to the guided teacher's own samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mixture_2d import NOTHING, SCHEDULE, Network, data, exact
from torch import Tensor, nn

from launch.options import Parser
from ldm.diffusion import Process, Sample, V
from ldm.objectives import Objective
from ldm.objectives.consistency import ConsistencyObjective, ConsistencyOptions
from ldm.objectives.matching import MatchingObjective, MatchingOptions
from ldm.objectives.progressive import ProgressiveObjective, ProgressiveOptions
from ldm.objectives.teacher import Estimator, Target, Teacher
from ldm.objectives.trajectory import TrajectoryObjective, TrajectoryOptions
from ldm.rng import Rng, generator
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free
from ldm.types import Batch, Cond, Denoise

W = 0.5
"""Guidance strength: the scale is 1.5."""
BATCH = 256
STUDENT = Process(schedule=SCHEDULE, prediction=V())
EMPTY: Cond = {"class": torch.tensor([NOTHING])}


@dataclass(frozen=True)
class Together(Rng):
    """One generator for the whole batch: quicker, where no batch is ever divided."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(len(self), *shape, generator=generator(self.seed, self.positions[0], purpose))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        return torch.rand(len(self), *shape, generator=generator(self.seed, self.positions[0], purpose))


class Points:
    """Feeds points and their classes."""

    empty = EMPTY

    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor:
        return batch["points"]

    def cond(self, batch: Batch, rng: Rng, device: torch.device) -> Cond:
        return {"class": batch["class"]}


def teacher() -> Teacher:
    """The exact denoiser."""
    return Teacher(Estimator(exact, Process(schedule=SCHEDULE, prediction=Sample())), EMPTY)


def fit(objective: Objective, steps: int, lr: float = 2e-3, beta: float = 0.9) -> None:
    """Adam with the rate going to 0."""
    adam = torch.optim.Adam(objective.parameters(), lr=lr, betas=(beta, 0.99))
    objective.after_step(0)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        points, label = data(BATCH, seed=1000 + step)
        rng = Together(0, tuple(range(step * BATCH, (step + 1) * BATCH)))
        loss, _ = objective({"points": points, "class": label, "weight": torch.ones(BATCH)}, rng)
        adam.zero_grad()
        loss.backward()
        adam.step()
        objective.after_step(step + 1)


def matched(steps: int) -> Network:
    """A network that answers as the guided teacher does: its other, one-forward form."""
    torch.manual_seed(0)
    net = Network()
    options = ProgressiveOptions(stage="match", w=(W, W))
    fit(ProgressiveObjective(net, Estimator(net, STUDENT), teacher(), Points(), options), steps)
    return net


def copy_of(net: Network) -> Network:
    """Another network of the same weights."""
    made = Network()
    made.load_state_dict(net.state_dict())
    return made


def consistency(start: Network, steps: int) -> Network:
    """Latent consistency distillation."""
    net, goal = copy_of(start), copy_of(start).requires_grad_(False)
    options = ConsistencyOptions(w=(W, W), huber=0.03)
    target = Target(dict(goal.named_parameters()), options.decay)
    student = Estimator(net, STUDENT)
    fit(ConsistencyObjective(net, student, Estimator(goal, STUDENT), teacher(), Points(), options, target), steps)
    return net


def trajectory(start: Network, steps: int) -> Network:
    """Trajectory consistency distillation."""
    net, goal = copy_of(start), copy_of(start).requires_grad_(False)
    options = TrajectoryOptions(w=(W, W), huber=0.03)
    target = Target(dict(goal.named_parameters()), options.decay)
    student = Estimator(net, STUDENT)
    fit(TrajectoryObjective(net, student, Estimator(goal, STUDENT), teacher(), Points(), options, target), steps)
    return net


def progressive(start: Network, steps: int, first: int = 16, last: int = 4) -> Network:
    """Halving from `first` steps to `last`; the first round's teacher is the exact guided one."""
    net, own = copy_of(start), teacher()
    for count in ProgressiveOptions(steps=first, until=last).rounds():
        options = ProgressiveOptions(steps=count, until=last, w=(W, W))
        fit(ProgressiveObjective(net, Estimator(net, STUDENT), own, Points(), options), steps, lr=1e-3)
        own = Teacher(Estimator(copy_of(net), STUDENT), None)
    return net


def matching(start: Network, steps: int) -> Network:
    """Distribution matching: the student beside its critic, whose data are the student's points."""
    net, critic = copy_of(start), copy_of(start)
    trained = nn.ModuleDict({"student": net, "critic": critic})
    options = MatchingOptions(w=(W, W), every=2)
    own = MatchingObjective(trained, Estimator(net, STUDENT), Estimator(critic, STUDENT), teacher(), Points(), options)
    fit(own, steps, lr=1e-3, beta=0.0)
    return net


def adversarial(start: Network, steps: int) -> Network:
    """Distribution matching with a head on the critic's hidden layer that tells the student's points from real ones.

    The teacher is guided, the real points are not: where the two disagree, the head pulls to the data.
    """
    net, critic, head = copy_of(start), copy_of(start), nn.Sequential(nn.SiLU(), nn.Linear(128, 1))
    nn.init.zeros_(head[1].weight)  # type: ignore[arg-type]
    trained = nn.ModuleDict({"student": net, "critic": critic, "head": head})
    options = MatchingOptions(w=(W, W), every=2, adversarial=0.003, head=0.03)

    def logits(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return head(critic.hidden(x, t, cond))[:, 0]

    estimators = Estimator(net, STUDENT), Estimator(critic, STUDENT)
    fit(MatchingObjective(trained, *estimators, teacher(), Points(), options, logits), steps, lr=1e-3, beta=0.0)
    return net


def draw(denoise: Denoise, sampler: str, steps: int, count: int, seed: int = 3) -> Tensor:
    """Points (B, 2) of class 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 1, 1, generator=g)
    noises = [torch.randn(count, 2, 1, 1, generator=g) for _ in range(steps)]
    cond = {"class": torch.ones(count, dtype=torch.int64)}
    made = sample(sampler, denoise, x, cond, schedule=SCHEDULE, steps=steps, noise=noises.__getitem__)
    return made[:, :, 0, 0]


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two sets of points (B, 2)."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


STUDENTS: dict[str, tuple[Callable[[Network, int], Network], str]] = {
    "consistency": (consistency, "lcm"),
    "trajectory": (trajectory, "tcd"),
    "progressive": (progressive, "ddim"),
    "matching": (matching, "lcm"),
    "matching, adversarial": (adversarial, "lcm"),
}


def main(argv: list[str] | None = None) -> int:
    p = Parser(description="Few-step students of an exact teacher.")
    p.add_argument("--steps", type=int, default=1500, help="training steps of each (progressive: of each round)")
    p.add_argument("--count", type=int, default=2000, help="points to compare")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    guided = classifier_free(exact, EMPTY, 1 + W)
    truth = draw(guided, "heun", 60, args.count)
    floor = energy(draw(guided, "heun", 60, args.count, seed=4), truth)
    print(f"{'energy distance to the teacher':>32}{'1 step':>9}{'2':>9}{'4':>9}{'8':>9}")
    print(f"{'(two sets of the teacher)':>32}{floor:9.4f}")

    def row(name: str, denoise: Denoise, sampler: str) -> None:
        found = [energy(draw(denoise, sampler, n, args.count), truth) for n in (1, 2, 4, 8)]
        print(f"{name:>32}" + "".join(f"{value:9.4f}" for value in found))

    row("teacher, ddim", guided, "ddim")
    row("teacher, dpmpp_2m", guided, "dpmpp_2m")
    start = matched(args.steps)
    row("matched, ddim", STUDENT.denoiser(start), "ddim")
    for name, (distil, sampler) in STUDENTS.items():
        began = time.perf_counter()
        net = distil(start, args.steps)
        seconds = time.perf_counter() - began
        row(f"{name}, {sampler} ({seconds:.0f} s)", STUDENT.denoiser(net), sampler)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
