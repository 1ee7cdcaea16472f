"""PSNR and SSIM against torchmetrics and closed forms."""

from __future__ import annotations

import pytest
import torch

from ldm.metrics import reconstruction


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6), size=(40, 33), mode="bilinear") * 2 - 1
    return (truth + 0.1 * torch.randn_like(truth)).clamp(-1, 1), truth


def test_psnr_of_a_known_error() -> None:
    truth = torch.zeros(2, 3, 8, 8)
    assert reconstruction.psnr(truth + 0.2, truth).tolist() == pytest.approx([20.0, 20.0])
    assert torch.isinf(reconstruction.psnr(truth, truth)).all()


def test_equal_torchmetrics() -> None:
    peer = pytest.importorskip("torchmetrics.functional.image")
    images, truth = pair()
    for image, true, psnr, ssim in zip(
        images, truth, reconstruction.psnr(images, truth), reconstruction.ssim(images, truth)
    ):
        assert psnr.item() == pytest.approx(peer.peak_signal_noise_ratio(image, true, data_range=2.0).item(), abs=1e-4)
        both = ((image[None].double() + 1) / 2, (true[None].double() + 1) / 2)
        _, places = peer.structural_similarity_index_measure(*both, data_range=1.0, return_full_image=True)
        # theirs also averages over padded windows at the border; the paper has full windows only
        assert ssim.item() == pytest.approx(places[..., 5:-5, 5:-5].mean().item(), abs=1e-6)


def test_ssim_of_equal_and_of_opposite_pictures() -> None:
    _, truth = pair()
    assert torch.allclose(reconstruction.ssim(truth, truth), torch.ones(4).double())
    assert (reconstruction.ssim(-truth, truth) < 0.5).all()


def test_bad_pictures() -> None:
    with pytest.raises(ValueError, match=r"SSIM needs pictures of at least 11 pixels, got \(8, 8\)"):
        reconstruction.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected equal \(B, C, H, W\)"):
        reconstruction.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
