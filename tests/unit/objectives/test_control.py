"""Control sensitivity: of a loss whose dependence on the condition is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.objectives.control import SENSITIVITY, ControlObjective
from ldm.rng import Rng

torch.set_num_threads(1)


class Known(nn.Module):
    """A loss in the place of the denoising one: the squared distance of each condition's mean to its `value`."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(1, 1)
        self.asked = 0

    def forward(self, batch: dict[str, Any], rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked += 1
        error = (batch["condition"].mean((1, 2, 3)) - batch["value"]).square().mean()
        return error + 0 * self.trained.weight.sum(), {}

    def after_step(self, step: int) -> None: ...


def batch(*means: float) -> tuple[dict[str, Any], Rng]:
    values = torch.tensor(means)
    shown = values.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return {"condition": shown, "value": values}, Rng(0, tuple(range(len(means))))


def test_right_minus_shuffled_every_so_many_steps() -> None:
    known = Known()
    objective: Any = ControlObjective(known, 3)  # type: ignore[arg-type]
    found = {}
    for step in range(7):
        loss, metrics = objective(*batch(0.0, 0.5, 1.0))
        assert float(loss.detach()) == 0
        found[step + 1] = metrics.get(SENSITIVITY)
        objective.after_step(step + 1)
    assert [step for step, value in found.items() if value is not None] == [1, 3, 6]
    wanted = -(1.0**2 + 0.5**2 + 0.5**2) / 3  # each is shown the one before it
    assert float(found[3]) == pytest.approx(wanted)
    assert not found[3].requires_grad
    assert known.asked == 7 + 2 * 3
    with torch.no_grad():  # validation has none
        assert SENSITIVITY not in objective(*batch(0.0, 1.0))[1]


def test_a_micro_batch_of_one_is_shown_the_last_one() -> None:
    objective: Any = ControlObjective(Known(), 1)  # type: ignore[arg-type]
    assert SENSITIVITY not in objective(*batch(0.25))[1]
    assert float(objective(*batch(1.0))[1][SENSITIVITY]) == pytest.approx(-(0.75**2))


def test_never_and_without_a_condition() -> None:
    objective: Any = ControlObjective(Known(), 0)  # type: ignore[arg-type]
    assert objective(*batch(0.0, 1.0))[1] == {}
    with pytest.raises(ValueError, match=r"the batch has no 'condition'; data\.pairs makes or reads one"):
        objective({"value": torch.zeros(1)}, Rng(0, (0,)))


class Product(Known):
    """A loss whose gradient is of a product, which autocast computes in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[bool] = []

    def forward(self, batch: dict[str, Any], rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.trained(batch["condition"][:, 0, 0, :1]).square().mean()
        self.graphs.append(loss.requires_grad)
        return loss, {}


def test_the_figure_is_taken_before_there_is_a_graph_and_changes_no_gradient() -> None:
    """Else both lie in memory at once; and autocast would hand its casts without a gradient on to the loss."""
    found = []
    for every in (0, 1):
        torch.manual_seed(0)
        known = Product()
        objective: Any = ControlObjective(known, every)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(*batch(0.5, 1.0))
        loss.backward()
        assert known.graphs == [False, False, True][-1 if not every else 0 :]
        found.append(known.trained.weight.grad)
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].abs() > 0
    assert torch.equal(found[0], found[1])
