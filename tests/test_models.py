"""Networks by name, weights from a file or a server, checkpoints that describe themselves."""

import errno
import hashlib
import http.server
import math
import os
import pickle
import threading

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import common
from common import BadInput, build_model, load_checkpoint, load_model, save_checkpoint

from .conftest import run_script

ABOUT = {"arch": "resnet10", "n_classes": 2, "size": 32, "epoch": 7, "args": {}, "metrics": {}}
ABOUT |= {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3, "data": {}}


@pytest.mark.parametrize(
    "arch,size",
    [
        ("resnet10", 48),
        ("mobilenetv3_small_050.lamb_in1k", 64),
        ("timm/resnet10t.c3_in1k", 64),
        ("vit_tiny_patch16_224", 64),
        ("deit_tiny_distilled_patch16_224", 64),
        ("levit_128s", 224),
    ],
)
def test_every_head_starts_as_torchs_linear(arch, size):
    torch.manual_seed(0)
    model = build_model(arch, 3, size)
    assert not model.training and model(torch.rand(2, 3, size, size)).shape == (2, 3)
    for name in common.head_names(model):
        head = model.get_submodule(name)
        bound = 1 / math.sqrt(head.in_features)
        assert 0.8 * bound < head.weight.abs().max() <= bound and head.bias.abs().max() <= bound
    assert not any(name in common.prunable_layers(model) for name in common.head_names(model))


def test_the_first_loss_of_an_efficientnet():
    """In training; timm's own start of this head gives 3.0."""
    torch.manual_seed(0)
    model = build_model("tf_efficientnet_lite0", 2, 64).train()
    logits = model(torch.randn(32, 3, 64, 64))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(32) % 2)
    assert loss.item() == pytest.approx(math.log(2), abs=0.15)


def test_resnet50_is_torchvisions(tmp_path):
    """Keys and values of a file as torchvision publishes it; mean and std are ImageNet's."""
    published = torchvision.models.resnet50().state_dict()
    torch.save(published, tmp_path / "resnet50-11ad3fa6.pth")
    model = build_model("resnet50", 2, 64, str(tmp_path / "resnet50-11ad3fa6.pth"))
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, published[key]), key
    assert common.ARCHS["resnet50"] == "resnet50.tv2_in1k"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert build_model("vit_tiny_patch16_224", 2, 32).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("form", ["plain", "state_dict", "model_state_dict", "module", "file"])
def test_weights_as_trainers_wrap_them(tmp_path, form):
    published = timm.create_model("mobilenetv3_small_050").state_dict()
    published = {k: v + 0.5 if v.is_floating_point() else v for k, v in published.items()}
    path = tmp_path / ("w.safetensors" if form == "file" else "w.pth")
    if form == "file":
        save_file(published, path)
    else:
        state = {f"module.{k}": v for k, v in published.items()} if form == "module" else published
        torch.save({form: state, "epoch": 3} if "state" in form else state, path)
    model = build_model("mobilenetv3_small_050", 2, 64, str(path))
    for key, value in model.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, published[key]), key


def test_a_transformers_weights_of_another_size(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    small = build_model("vit_tiny_patch16_224", 2, 96, str(tmp_path / "vit.pth"))
    assert small.pos_embed.shape == (1, 37, 192)
    assert torch.equal(small.pos_embed[:, 0], model.pos_embed[:, 0])
    assert torch.equal(small.blocks[3].mlp.fc1.weight, model.blocks[3].mlp.fc1.weight)


def test_real_weights(real_data):
    path = real_data / "weights/tf_efficientnet_lite0.pth"
    model = build_model("tf_efficientnet_lite0", 2, 64, str(path))
    published = torch.load(path, weights_only=True)
    assert torch.equal(model.conv_stem.weight, published["conv_stem.weight"])


class Touch:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["none", "html", "cut", "other", "shape", "code"])
def test_weights_that_are_none(tmp_path, kind):
    path, state = tmp_path / "w.pth", torchvision.models.resnet18().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    other = torchvision.models.squeezenet1_1().state_dict()
    torch.save(state if kind == "shape" else other, path)
    if kind == "none":
        path.unlink()
    elif kind == "html":
        path.write_bytes(b"<html>404</html>")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    words = {"none": "no such file", "other": "Missing key.*conv1.weight", "shape": "size mismatch"}
    with pytest.raises(BadInput, match=f"w.pth: .*{words.get(kind, 'cannot be used')}"):
        build_model("resnet18", 2, 64, str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "arch,size,words",
    [
        ("resnet51", 224, "resnet51 of timm .*Unknown model"),
        ("resnet50.nonsense", 64, "resnet50.nonsense of timm"),
        ("vit_tiny_patch16_224", 8, "--size 8"),
        ("xcit_nano_12_p8_224", 100, "--size 100"),
        ("vit_tiny_patch16_224", 10**7, "--size 10000000"),
    ],
)
def test_what_cannot_be_built(arch, size, words):
    with pytest.raises(BadInput, match=words):
        build_model(arch, 2, size)


# ---- weights from the hub ----


class Hub(http.server.BaseHTTPRequestHandler):
    """The little of the hub's protocol that fetching one file needs."""

    content = b""

    def do_GET(self):
        if not self.path.endswith("model.safetensors"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


FETCH = """
import torch
from common import BadInput, build_model
try:
    print(build_model("mobilenetv3_small_050", 2, 64, "default").conv_stem.weight.sum().item())
except BadInput as error:
    print("refused:", error)
"""


def test_default_weights_come_from_the_hub(tmp_path):
    model = timm.create_model("mobilenetv3_small_050")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    Hub.content = (tmp_path / "w.safetensors").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_HOME": str(tmp_path / "home"),
        "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }
    settings["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    out = run_script("-c", FETCH, **settings).stdout
    server.shutdown()
    assert float(out) == pytest.approx(model.conv_stem.weight.sum().item())
    settings |= {"HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "1"}
    out = run_script("-c", FETCH, **settings).stdout
    assert out.startswith("refused: --weights default") and "--weights FILE" in out
    assert "model.safetensors of timm/mobilenetv3_small_050" in out


# ---- checkpoints ----


def test_round_trip(tmp_path):
    model = build_model("resnet10", 2, 32)
    save_checkpoint(tmp_path / "a.pt", model, **ABOUT)
    again, checkpoint = load_model(tmp_path / "a.pt")
    assert checkpoint["epoch"] == 7 and not again.training
    pairs = zip(model.state_dict().values(), again.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert common.fingerprint_of(model) == common.fingerprint_of(again)
    again.fc.bias.data[0] += 1e-3
    assert common.fingerprint_of(model) != common.fingerprint_of(again)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "change,words",
    [
        ({"size": "32"}, "TypeError: size is '32'"),
        ({"mean": [0.5, 0.5]}, "cannot be used"),
        ({"std": ["a", "b", "c"]}, "cannot be used"),
        ({"args": None}, "TypeError: args"),
        ({"arch": "resnet18"}, "do not fit its own description"),
        ({"n_classes": 3}, "do not fit its own description"),
    ],
)
def test_odd_fields(tmp_path, change, words):
    save_checkpoint(tmp_path / "a.pt", build_model("resnet10", 2, 32), **{**ABOUT, **change})
    with pytest.raises(BadInput, match=f"a.pt: .*{words}"):
        load_model(tmp_path / "a.pt")


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(BadInput, match="best.pt: no such file; train_erm.py"):
        load_checkpoint(path)
    save_checkpoint(path, build_model("resnet10", 2, 32), **ABOUT)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # torch.load would read a slightly different weight
    for damaged in (bytes(data), bytes(data[: len(data) // 2]), b"", b"<html>"):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="best.pt: cannot be used"):
            load_checkpoint(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(BadInput, match="best.pt: cannot be used"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, build_model("resnet10", 2, 32), **ABOUT)
    before = path.read_bytes()

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(BadInput, match="a.pt cannot be written .No space left.*MB free"):
        save_checkpoint(path, build_model("resnet10", 2, 32), **{**ABOUT, "epoch": 8})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file/a.pt cannot be written"):
        common.write(tmp_path / "file/a.pt", "x")
