"""Architectures by name, weights from a file, a cache or a server, and checkpoints that describe themselves."""

import hashlib
import http.server
import threading

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from common import BadInput, build_model, load_checkpoint, load_model, normalize, save_checkpoint


@pytest.mark.parametrize("arch, size", [("resnet10", 48), ("resnet18", 64), ("squeezenet1_1", 64), ("mobilenet_v3_small", 64),
                                        ("convnext_tiny", 64), ("inception_v3", 96), ("vit_tiny_patch16_224", 64), ("resnet10t", 64)])
def test_any_torchvision_or_timm_name(arch, size):
    model = build_model(arch, 3, size)
    assert not model.training and model.train()(torch.rand(2, 3, size, size)).shape == (2, 3)


def test_resnet50_is_torchvisions_and_has_the_papers_neurons():
    model = build_model("resnet50", 2, 64)
    assert isinstance(model, torchvision.models.ResNet)
    assert sum(m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)) == 26560


def test_normalisation_follows_the_weights():
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert normalize(grey, build_model("vit_tiny_patch16_224", 2, 32)).abs().max() == 0  # mean = std = 0.5
    expected = [(0.5 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    assert torch.allclose(normalize(grey, build_model("resnet18", 2, 64))[0, :, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("arch, head", [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("vit_tiny_patch16_224", "head")])
@pytest.mark.parametrize("form", ["plain", "nested", "safetensors"])
def test_weights_from_a_file(tmp_path, arch, head, form):
    """Everything but the head comes from the file; the head is new."""
    torch.manual_seed(1)
    published = timm.create_model(arch) if arch.startswith("vit") else torchvision.models.get_model(arch, num_classes=1000)
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state = {key: value + 0.5 if value.is_floating_point() else value for key, value in published.state_dict().items()}
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if form == "nested" else state, file)
    model = build_model(arch, 2, 224 if arch.startswith("vit") else 64, str(file))
    for key, value in model.state_dict().items():
        if key.startswith(head + "."):
            assert value.shape != state[key].shape
        else:
            assert torch.equal(value, state[key]), key


def test_real_squeezenet_weights(real_data):
    model = build_model("squeezenet1_1", 2, 64, str(real_data.parent / "data/weights/squeezenet1_1.pth"))
    published = torch.load(real_data / "weights/squeezenet1_1.pth", weights_only=True)
    assert torch.equal(model.features[0].weight, published["features.0.weight"])


def test_bad_weights(tmp_path):
    file = tmp_path / "w.pth"
    with pytest.raises(BadInput, match="not a readable state dict"):
        build_model("resnet18", 2, 64, str(file))
    file.write_bytes(b"<html>404</html>")
    with pytest.raises(BadInput, match="w.pth: not a readable state dict"):
        build_model("resnet18", 2, 64, str(file))
    torch.save(torchvision.models.squeezenet1_1().state_dict(), file)
    with pytest.raises(BadInput, match="do not fit the architecture: .*conv1.weight missing"):
        build_model("resnet18", 2, 64, str(file))
    state = torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, file)
    with pytest.raises(BadInput, match=r"1 differences \(conv1.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)"):
        build_model("resnet18", 2, 64, str(file))
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(BadInput, match="not a readable state dict"):
        build_model("resnet18", 2, 64, str(file))
    with pytest.raises(BadInput, match="use --weights none"):
        build_model("resnet10", 2, 48, "default")


def test_unknown_arch_and_size():
    with pytest.raises(BadInput, match="--arch resnet51: neither torchvision nor timm has it; similar names: resnet"):
        build_model("resnet51", 2, 224)
    with pytest.raises(BadInput, match="does not take 8 x 8 images"):
        build_model("squeezenet1_1", 2, 8)


class Serve:
    """A folder on a loopback port."""
    def __init__(self, folder):
        handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_default_weights_are_fetched_checked_and_cached(tmp_path, monkeypatch):
    state = torchvision.models.squeezenet1_1(num_classes=1000).state_dict()
    torch.save(state, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "w.pth").rename(tmp_path / f"squeezenet1_1-{digest}.pth")
    torch.save(state, tmp_path / "squeezenet1_1-00000000.pth")
    served, weights = Serve(tmp_path), torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"), raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(weights.value, "url", f"{served.url}/squeezenet1_1-{digest}.pth")
    model = build_model("squeezenet1_1", 2, 64, "default")
    assert torch.equal(model.features[0].weight, state["features.0.weight"])
    served.server.shutdown()
    served.server.server_close()
    build_model("squeezenet1_1", 2, 64, "default")  # from the cache

    monkeypatch.setattr(weights.value, "url", f"{served.url}/squeezenet1_1-11111111.pth")
    with pytest.raises(BadInput, match="cannot fetch .*squeezenet1_1-11111111.pth.*--weights FILE"):
        build_model("squeezenet1_1", 2, 64, "default")
    again = Serve(tmp_path)
    monkeypatch.setattr(weights.value, "url", f"{again.url}/squeezenet1_1-00000000.pth")
    with pytest.raises(BadInput, match="hash"):  # not the file that was published
        build_model("squeezenet1_1", 2, 64, "default")
    again.server.shutdown()


def test_timm_default_weights_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="cannot fetch the weights of vit_small_patch16_224.*model.safetensors of "
                                       "timm/vit_small_patch16_224.*--weights FILE"):
        build_model("vit_small_patch16_224", 2, 224, "default")


def test_checkpoint_round_trip(tmp_path):
    model = build_model("resnet10", 3, 32)
    save_checkpoint(tmp_path / "a.pt", model, arch="resnet10", n_classes=3, size=32, epoch=7)
    again, checkpoint = load_model(tmp_path / "a.pt")
    assert checkpoint["epoch"] == 7 and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    model = build_model("resnet10", 2, 32)
    save_checkpoint(tmp_path / "a.pt", model, arch="resnet10", n_classes=2, size=32)
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "a.pt", model, arch=lambda: 0)
    assert (tmp_path / "a.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_bad_checkpoints(tmp_path):
    file = tmp_path / "best.pt"
    with pytest.raises(BadInput, match="best.pt: no such checkpoint; run train_erm.py first"):
        load_checkpoint(file)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(BadInput, match="not a checkpoint of this project"):
        load_checkpoint(file)
    save_checkpoint(file, build_model("resnet10", 2, 32), arch="resnet10", n_classes=2, size=32)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadInput, match="not a readable checkpoint"):
        load_checkpoint(file)
