"""Training with any part of PML by name, on real digits; trunks; repeatability."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset

from osml_plugin import OsmlError, pml, trunks
from osml_plugin.config import load_config, make_config
from osml_plugin.embedding import EmbeddingModel, default_device, embed_dataset
from osml_plugin.hooks import OpenSetHook
from osml_plugin.network import build_model
from osml_plugin.registry import refusing
from osml_plugin.training import checked_device, make_trainer, seed_everything, train_model

ARGUMENTS = {
    "HistogramLoss": {"n_bins": 10},
    "RankedListLoss": {"margin": 0.4, "Tn": 10},
    "MultipleLosses": {"losses": ["ContrastiveLoss", {"name": "CosFaceLoss", "scale": 16}]},
    "CrossBatchMemory": {"loss": "ContrastiveLoss", "memory_size": 256},
    "PseudoUnknowns": {"loss": {"name": "MarginOneVsRestLoss", "scale": 16}},
}


@pytest.fixture(scope="module")
def digits(digit_vectors):
    vectors, labels = digit_vectors
    chosen = labels < 5
    images = torch.from_numpy(vectors[chosen]).view(-1, 1, 8, 8) * 4 - 1
    return TensorDataset(images, torch.from_numpy(labels[chosen])), labels[chosen].tolist()


def trained(digits, n_epochs=1, items=200, **config):
    dataset, labels = digits
    dataset = torch.utils.data.Subset(dataset, range(items))
    config = make_config({"model": {"trunk": {"name": "small_cnn", "width": 8}, "embedding_size": 16}, **config})
    seed_everything(config.seed)
    model = build_model(config, channels=1, size=8)
    loss = train_model(model, dataset, labels[:items], config, n_epochs=n_epochs, progress=False, device="cpu")
    return model, loss


@pytest.mark.parametrize("name", pml.names("loss"))
def test_every_loss_trains(digits, name):
    torch.manual_seed(0)
    untouched = build_model(
        make_config({"model": {"trunk": {"name": "small_cnn", "width": 8}, "embedding_size": 16}}), channels=1, size=8
    )
    sampler = "MPerClassSampler" if name == "SmoothAPLoss" else None  # it wants equally many of each class
    model, loss = trained(digits, loss={"name": name, **ARGUMENTS.get(name, {})}, sampler=sampler)
    moved = [
        not torch.equal(a, b) for a, b in zip(model.embedder.parameters(), untouched.embedder.parameters(), strict=True)
    ]
    assert all(moved) and all(p.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())
    weights = pml.class_weights(loss)
    assert pml.has_class_weights(name, ARGUMENTS.get(name, {})) == (weights is not None)
    assert weights is None or (weights.shape[0] == 5 and weights.shape[2] == 16)


@pytest.mark.parametrize("name", pml.names("miner"))
def test_every_miner_trains(digits, name):
    model, _ = trained(digits, miner=name, loss="TripletMarginLoss")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", pml.names("sampler"))
def test_every_sampler_trains(digits, name):
    trained(digits, sampler=name)
    trained(digits, sampler={"name": name, "m": 8}, training={"batch_size": 30})


@pytest.mark.parametrize("name", pml.names("distance"))
def test_every_distance_trains(digits, name):
    # A similarity rises where a distance falls: with the margins of a distance its loss is 0 from the start.
    margins = {"pos_margin": 1, "neg_margin": 0} if pml.build("distance", name, {}).is_inverted else {}
    trained(digits, loss={"name": "ContrastiveLoss", "distance": name, **margins})


@pytest.mark.parametrize("name", pml.names("reducer"))
def test_every_reducer_is_built(digits, name):
    arguments = {"ClassWeightedReducer": {"weights": [1.0] * 5}, "ThresholdReducer": {"low": 0}}.get(name, {})
    if name in ("DoNothingReducer", "DivisorReducer", "ClassWeightedReducer", "PerAnchorReducer"):
        # These give no scalar, want a loss of their own kind, or a tensor: building by name is what is promised.
        arguments = {"weights": torch.ones(5)} if name == "ClassWeightedReducer" else arguments
        assert type(pml.build("reducer", name, arguments)).__name__ == name
        return
    trained(digits, loss={"name": "ContrastiveLoss", "reducer": {"name": name, **arguments}})


def test_the_known_come_together_and_apart(digits):
    model, _ = trained(digits, n_epochs=12, items=600, model={"trunk": "small_cnn", "embedding_size": 16})
    embeddings, labels = embed_dataset(model, digits[0], device="cpu")
    similarity = embeddings[600:] @ embeddings[:600].T
    nearest = labels[:600][similarity.argmax(dim=1)]
    assert (nearest == labels[600:]).float().mean() > 0.95


def test_the_same_seed_gives_the_same_model(digits):
    config = {"sampler": "MPerClassSampler", "loss": "TripletMarginLoss", "miner": "DistanceWeightedMiner"}
    first, again = trained(digits, **config)[0].state_dict(), trained(digits, **config)[0].state_dict()
    other = trained(digits, seed=1, **config)[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_a_frozen_trunk_does_not_move(digits):
    config = make_config({"model": {"trunk": "small_cnn", "frozen": True}})
    torch.manual_seed(0)
    model = build_model(config, channels=1, size=8)
    before = {k: v.clone() for k, v in model.trunk.state_dict().items()}
    embedder = model.embedder.weight.clone()
    train_model(model, digits[0], digits[1], config, n_epochs=1, progress=False, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.trunk.state_dict().items())
    assert not torch.equal(model.embedder.weight, embedder)


def test_a_loss_that_refuses_its_batches_says_why(digits):
    with pytest.raises(OsmlError, match=r"loss 'SmoothAPLoss' refuses a batch \(.*MPerClassSampler"):
        trained(digits, loss="SmoothAPLoss")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"loss": {"name": "TripletMarginLoss", "margin": "abc"}}, "loss 'TripletMarginLoss' refuses a batch"),
        (
            {"loss": "TripletMarginLoss", "miner": {"name": "TripletMarginMiner", "margin": "abc"}},
            "loss 'TripletMarginLoss' with miner 'TripletMarginMiner' refuses a batch",
        ),
        ({"loss": {"name": "CosFaceLoss", "margin": "abc"}}, "loss 'CosFaceLoss' refuses a batch"),
        ({"loss": {"name": "ArcFaceLoss", "margin": "abc"}}, "loss 'ArcFaceLoss' refuses its arguments"),
        (
            {"loss": {"name": "CrossBatchMemory", "loss": "ArcFaceLoss"}},
            "loss 'CrossBatchMemory' refuses its arguments",
        ),
        ({"sampler": {"name": "MPerClassSampler", "m": 0}}, "sampler.m must be a whole number of at least 1; got 0"),
        ({"sampler": {"name": "MPerClassSampler", "m": "abc"}}, "sampler.m must be a whole number .* got 'abc'"),
        ({"optimizer": {"name": "Adam", "betas": ["a", "b"]}}, "optimizer 'Adam' refuses its arguments"),
        ({"model": {"trunk": {"name": "small_cnn", "width": "abc"}}}, "small_cnn's width must be .* got 'abc'"),
        ({"model": {"trunk": {"name": "small_cnn", "width": 0}}}, "small_cnn's width must be .* got 0"),
        ({"model": {"trunk": {"name": "small_cnn", "dropout": "abc"}}}, "trunk 'small_cnn' refuses its arguments"),
        (
            {"model": {"trunk": "small_cnn", "frozen": True, "embedder": "identity"}, "loss": "TripletMarginLoss"},
            "nothing can be trained",
        ),
    ],
)
def test_parts_that_cannot_be_used_say_so_in_one_line(digits, parts, message):
    with pytest.raises(OsmlError, match=message) as error:
        trained(digits, **parts)
    assert "\n" not in str(error.value)


def test_memory_that_runs_out_is_nobodys_mistake():
    for error in (MemoryError, torch.OutOfMemoryError):
        with pytest.raises(error), refusing("arguments"):
            raise error("no more")


def test_what_the_trainer_fills_in_is_not_the_users_to_set():
    assert list(pml.settable("sampler", "MPerClassSampler")) == ["m"]
    for name in pml.names("loss"):
        assert not pml.settable("loss", name).keys() & {"num_classes", "embedding_size", "descriptors_dim"}
    assert {"margin", "scale", "distance"} <= pml.settable("loss", "ArcFaceLoss").keys()


@pytest.mark.parametrize("device", ["foo", "", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(OsmlError, match=f"the device '{device}' cannot be used") as error:
        checked_device(device)
    assert "\n" not in str(error.value)


def test_a_device_that_can_be_used():
    assert checked_device("cpu") == torch.device("cpu") and checked_device(None) == default_device()


def test_fewer_items_than_a_batch_train_too(digits):
    trained(digits, items=10)


def test_a_loss_that_explodes_says_what_to_do(digits):
    with pytest.raises(OsmlError, match=r"the loss is (nan|inf).*lower optimizer.lr"):
        trained(digits, optimizer={"name": "SGD", "lr": 1e38}, n_epochs=3)


def test_patience_stops_and_gives_back_the_best(digits):
    class Scripted(OpenSetHook):
        """Trains for real, with a validation OSCR that is best after the second epoch."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.states = []

        def evaluate(self, model, device=None):
            self.states.append({k: v.clone() for k, v in model.state_dict().items()})
            oscr = [0.5, 0.7, 0.6, 0.7, 0.9, 0.9][len(self.history)]
            return replace(super().evaluate(model, device), oscr=oscr)

    dataset, labels = digits
    validation = torch.utils.data.Subset(dataset, range(600, 700))
    known = [i for i, label in enumerate(labels[:600]) if label < 4]
    reference = torch.utils.data.Subset(dataset, known)
    config = make_config({"model": {"trunk": {"name": "small_cnn", "width": 8}}})
    model = build_model(config, channels=1, size=8)
    hook = Scripted(reference, validation, patience=2)
    known_labels = [labels[i] for i in known]
    arguments = {"n_epochs": 6, "progress": False, "device": "cpu", "end_of_epoch_hook": hook}
    train_model(model, reference, known_labels, config, **arguments)
    # The fourth epoch equals the best and does not better it: two epochs without a better one.
    assert [h["epoch"] for h in hook.history] == [1, 2, 3, 4] and hook.best_epoch == 1
    assert not torch.equal(hook.states[3]["embedder.weight"], hook.states[1]["embedder.weight"])
    hook.restore_best(model)
    assert all(torch.equal(v, hook.states[1][k]) for k, v in model.state_dict().items())


# Proxies ----------------------------------------------------------------------------------------------------

WITH_PROXIES = [n for n in pml.names("loss") if n != "PseudoUnknowns" and pml.has_class_weights(n, {})]


@pytest.mark.parametrize("name", WITH_PROXIES)
def test_class_weights_are_the_losss_own_logits(name):
    torch.manual_seed(0)
    loss = pml.build("loss", name, {}, num_classes=4, embedding_size=8)
    x = normalize(torch.randn(50, 8))
    ours = torch.einsum("nd,cpd->ncp", x, pml.class_weights(loss)).amax(dim=2)
    if name == "SoftTripleLoss":  # softly averaged there: the best proxy bounds it, and often decides
        theirs = loss.la * loss.get_logits(x)
        assert (ours >= theirs - 1e-4).all() and (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.8
        return
    if name == "P2SGradLoss":
        theirs = x @ normalize(loss.weight, dim=0)
    elif name == "ProxyAnchorLoss":
        theirs = loss.alpha * loss.get_logits(x)
    elif name == "ProxyNCALoss":
        theirs = -loss.softmax_scale * loss.get_logits(x) + 2 * loss.softmax_scale
    else:
        theirs = loss.get_logits(x)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


def test_the_table_of_losses_names_each_of_them():
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| .* \| `(\w+)` \| (ours|PML) \|$", page, re.MULTILINE))
    assert sorted(named) == pml.names("loss")
    assert all(hasattr(losses, name) == (home == "PML") for name, home in named.items())


def test_losses_without_proxies_have_none():
    assert pml.class_weights(losses.ContrastiveLoss()) is None
    assert pml.class_weights(pml.build("loss", "ARPLLoss", {}, num_classes=4, embedding_size=8)) is None


def test_the_proxies_behind_pseudo_unknowns():
    args = {"num_classes": 4, "embedding_size": 8}
    loss = pml.build("loss", "PseudoUnknowns", {"loss": "MarginOneVsRestLoss"}, **args)
    assert torch.equal(pml.class_weights(loss), pml.class_weights(loss.loss))
    refused = {"loss": {"name": "PseudoUnknowns", "loss": "ArcFaceLoss"}}
    with pytest.raises(OsmlError, match="expected MarginOneVsRestLoss, Recip.* got ArcFaceLoss$"):
        pml.build("loss", "PseudoUnknowns", {"loss": "ArcFaceLoss"}, **args)
    make_config(refused)  # seen when it is built, as all that depends on arguments together


# Rotation ---------------------------------------------------------------------------------------------------


def test_rotation_teaches_the_trunk_and_is_off_by_default(digits):
    plain = trained(digits)[0].state_dict()
    turned, loss = trained(digits, training={"rotation": 0.5})
    again = trained(digits, training={"rotation": 0.5})[0].state_dict()
    turned = turned.state_dict()
    assert turned.keys() == plain.keys() and not any("rotation" in key or "head" in key for key in turned)
    assert not torch.equal(turned["trunk.layers.0.weight"], plain["trunk.layers.0.weight"])
    assert all(torch.equal(turned[key], again[key]) for key in turned)
    assert type(loss).__name__ == "ArcFaceLoss"


def test_the_rotation_of_unseen_images_is_learned(digits):
    dataset, labels = digits
    chosen = [i for i, label in enumerate(labels) if label in (2, 3, 4)]  # a turned 0 or 1 is hardly one
    config = make_config(
        {"model": {"trunk": {"name": "small_cnn", "width": 8}}, "training": {"rotation": 1.0, "batch_size": 32}}
    )
    seed_everything(0)
    model = build_model(config, channels=1, size=8)
    known = {2: 0, 3: 1, 4: 2}
    images = dataset.tensors[0][chosen]
    classes = [known[labels[i]] for i in chosen]
    train = TensorDataset(images[:400], torch.tensor(classes[:400]))
    trainer = make_trainer(model, train, classes[:400], config, n_epochs=15, device="cpu")
    trainer.show_progress = False
    trainer.train(num_epochs=15)
    assert set(trainer.losses) == {"metric_loss", "rotation_loss", "total_loss"}
    assert any(key.startswith("loss_funcs.rotation_loss") for key in trainer.state())
    model.eval()
    with torch.no_grad():
        for quarter in range(4):
            logits = trainer.loss_funcs["rotation_loss"].head(model.trunk(images[400:].rot90(quarter, (2, 3))))
            assert (logits.argmax(dim=1) == quarter).float().mean() > 0.7


def test_rotation_is_for_square_images_and_a_trunk_that_learns(digits):
    images, labels = digits[0].tensors
    for data, frozen, message in [
        (images.flatten(1), False, r"these inputs have the shape \(64,\)"),
        (images[..., :6], False, r"shape \(1, 8, 6\)"),
        (images, True, "the trunk is frozen"),
    ]:
        config = make_config({"model": {"frozen": frozen}, "training": {"rotation": 0.1}})
        vectors = data.ndim == 2
        model = build_model(config, channels=0 if vectors else 1, size=64 if vectors else 8)
        with pytest.raises(OsmlError, match=f"training.rotation teaches the trunk .*{message}: set it to 0"):
            train_model(model, TensorDataset(data, labels), labels.tolist(), config, n_epochs=1, device="cpu")


# Trunks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "vit_b_16", "swin_t", "vgg11"])
def test_torchvision_trunks_lose_their_head(name):
    trunk = trunks.build(name, {}, channels=3).eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, 224, 224))
    assert features.ndim == 2 and features.shape[1] != 1000


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_the_small_trunk_takes_small_images(size, channels):
    trunk = trunks.build("small_cnn", {}, channels=channels).eval()
    assert trunk(torch.zeros(2, channels, size, size)).ndim == 2


def test_local_weights_are_loaded_and_must_fit(tmp_path):
    from safetensors.torch import save_file

    source = trunks.build("small_cnn", {"width": 8}, channels=1)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "weights.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    for file in ("weights.safetensors", "weights.pth"):
        model = build_model(
            make_config({"model": {"trunk": {"name": "small_cnn", "width": 8}, "weights": str(tmp_path / file)}}),
            channels=1,
            size=8,
        )
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.trunk.state_dict().items())
    for weights, message in [
        (str(tmp_path / "weights.pth"), "do not fit trunk 'small_cnn'"),
        (str(tmp_path / "absent.pth"), "no weights at"),
    ]:
        with pytest.raises(OsmlError, match=message):
            build_model(make_config({"model": {"trunk": "small_cnn", "weights": weights}}), channels=1, size=8)


def test_weights_that_cannot_be_read_or_fetched(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    trunk = trunks.build("resnet18", {}, channels=3)
    for weights, message in [
        *((str(tmp_path / f), "cannot read the weights") for f in ("text.pth", "text.safetensors", "list.pth")),
        ("DEFAULT", "weights 'DEFAULT' of trunk 'resnet18' cannot be fetched .*no network.*: pass a local file"),
    ]:
        with pytest.raises(OsmlError, match=message) as error:
            trunks.load_weights(trunk, "resnet18", weights)
        assert "\n" not in str(error.value)


def test_weights_of_torchvision_by_name():
    with pytest.raises(OsmlError, match="unknown weights of trunk 'resnet18' 'IMAGENET': did you mean 'IMAGENET1K_V1'"):
        trunks.load_weights(trunks.build("resnet18", {}, channels=3), "resnet18", "IMAGENET")


def test_a_factory_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_trunks.py").write_text(
        "from torch import nn\n"
        "def tiny(features=12):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(features))\n"
        "def wrong():\n    return 3\n"
        "def keywords(**kwargs):\n    return nn.Linear(kwargs['rows'], 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trunk = trunks.build("my_trunks:tiny", {"features": 7}, channels=1)
    assert trunk(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert trunks.build("my_trunks:keywords", {"rows": 5}, channels=1).in_features == 5
    for name, args, message in [
        ("my_trunks:tinny", {}, "cannot be imported"),
        ("absent_module:tiny", {}, "cannot be imported"),
        ("my_trunks:tiny", {"feature": 3}, "did you mean 'features'"),
        ("my_trunks:keywords", {"row": 5}, r"trunk factory 'my_trunks:keywords' fails \('rows'\)"),
        ("my_trunks:nn", {}, "trunk factory 'my_trunks:nn' fails"),
        ("my_trunks:wrong", {}, "must return a torch.nn.Module; it returned int"),
    ]:
        with pytest.raises(OsmlError, match=message):
            trunks.build(name, args, channels=1)
    sys.modules.pop("my_trunks")
    with pytest.raises(OsmlError, match="--trust-factory my_trunks:tiny"):
        trunks.build("my_trunks:tiny", {}, channels=1, factories=[])
    assert "my_trunks" not in sys.modules  # it was not even imported


def test_a_trunk_that_does_not_fit_the_images_says_so():
    with pytest.raises(OsmlError, match="the trunk cannot take a batch"):
        build_model(load_config(overrides=["model.trunk=vgg11"]), channels=1, size=32)


def test_embedding_goes_in_order_and_leaves_the_model_as_it_was(digits):
    model = EmbeddingModel(nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5))).train()
    embeddings, labels = embed_dataset(model, digits[0], batch_size=37, device="cpu")
    assert model.training and torch.equal(labels, digits[0].tensors[1])
    model.eval()
    torch.testing.assert_close(embeddings, model(digits[0].tensors[0]).detach())
    assert np.allclose(embeddings.norm(dim=1), 1, atol=1e-5)
