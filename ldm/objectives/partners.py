"""Other samples of a micro-batch: their targets to stay away from, and the noise that is shared out among them.

Both keep to small runs of consecutive rows, which are the same samples however a global batch is divided over ranks and
micro-batches, so that nothing is sent and the losses stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def swapped(rows: Tensor) -> Tensor:
    """Rows (B, ...), the two of each pair (0, 1), (2, 3), ... in each other's place; B is even.

    Contrastive flow matching (arXiv 2506.05350) takes any other sample of the batch: of a shuffled batch the neighbour
    is one.
    """
    if rows.is_meta:
        return rows.flip(0)
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).reshape(rows.shape)


def assigned(x0: Tensor, noise: Tensor, group: int) -> Tensor:
    """The rows (B,) of `noise` that belong to x0 (B, ...), least in the sum of squared distances in each `group` rows.

    The optimal transport plan between two samples of one size is such a permutation (arXiv 2304.14772 and 2302.00482);
    its use for diffusion is called immiscible (arXiv 2406.12303).
    """
    if x0.is_meta:
        return torch.arange(len(x0), device=x0.device)
    best = _solver()
    rows = []
    for first in range(0, len(x0), group):
        # Squared norms are the same in every permutation's sum: only the products are left.
        part = slice(first, first + group)
        products = x0[part].detach().flatten(1).double() @ noise[part].flatten(1).double().T
        products = products.nan_to_num(0, 0, 0)  # a bad sample is for the loss to show
        rows.append(first + torch.from_numpy(best(products.cpu().numpy(), maximize=True)[1]))
    return torch.cat(rows).to(x0.device)


def _solver() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ValueError("options.assign: 'optimal' needs the package scipy: pip install 'ldm[eval]'") from None
    return linear_sum_assignment


def check(count: int, contrastive: float, group: int) -> None:
    """Raise ValueError unless micro-batches of `count` samples divide into pairs and groups (0: none are needed)."""
    if contrastive and count % 2:
        raise ValueError(
            f"options.contrastive: {contrastive} takes samples in pairs, but a micro-batch (train.batch over ranks and "
            f"train.accumulate) has {count}; make it even, or write 0"
        )
    if group:
        _solver()
    if group and count % group:
        raise ValueError(
            f"options.assign_among: {group} must divide a micro-batch (train.batch over ranks and train.accumulate), "
            f"which has {count} samples"
        )
