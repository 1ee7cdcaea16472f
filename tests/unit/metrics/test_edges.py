"""Agreement of edges against counted pixels."""

from __future__ import annotations

import pytest
import torch

from ldm.metrics.edges import edge_agreement


def lines(*columns: int, side: int = 8) -> torch.Tensor:
    out = torch.zeros(1, 1, side, side)
    out[..., list(columns)] = 1
    return out


def test_counted_by_hand() -> None:
    asked = lines(1, 6)
    assert edge_agreement(asked, asked).item() == 1
    assert edge_agreement(lines(2, 5), asked).item() == 1, "one pixel beside counts"
    assert edge_agreement(lines(2, 5), asked, reach=0).item() == 0
    assert edge_agreement(lines(1), asked).item() == pytest.approx(2 * 1 * 0.5 / 1.5), "precision 1, recall 1/2"
    assert edge_agreement(lines(1, 3, 4, 6), asked).item() == pytest.approx(2 * 0.5 * 1 / 1.5), "precision 1/2"


def test_no_edges() -> None:
    none = torch.zeros(2, 1, 8, 8)
    assert edge_agreement(none, none).tolist() == [1, 1]
    assert edge_agreement(none[:1], lines(1)).item() == 0
    assert edge_agreement(lines(1), none[:1]).item() == 0


def test_of_a_thick_map_alone_precision_suffers() -> None:
    asked, flood = lines(4), torch.ones(1, 1, 8, 8)
    precision, recall = 3 / 8, 1.0
    assert edge_agreement(flood, asked).item() == pytest.approx(2 * precision * recall / (precision + recall))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="edges: expected equal"):
        edge_agreement(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8))
