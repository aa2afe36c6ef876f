"""A training that cannot learn stops after the first epoch, with the reason and the remedy."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from pytorch_metric_learning import losses
from torch import nn
from torch.utils.data import TensorDataset

from osml_plugin import OsmlError, pml
from osml_plugin.config import make_config
from osml_plugin.embedding import EmbeddingModel
from osml_plugin.learning import FirstEpoch
from osml_plugin.training import make_trainer, train_model

NOTHING = "nothing was learned in the first epoch: "
TRIPLET = "TripletMarginLoss"


def vectors(n_classes=4, per_class=12, noise=0.3):
    labels = torch.arange(n_classes).repeat(per_class)
    torch.manual_seed(0)
    return torch.eye(n_classes, 8)[labels] + noise * torch.randn(len(labels), 8), labels


def run(n_epochs=1, embedder=None, data=None, **config):
    x, y = vectors() if data is None else data
    torch.manual_seed(0)
    model = EmbeddingModel(nn.Identity(), nn.Linear(8, 4) if embedder is None else embedder)
    how = {"n_epochs": n_epochs, "progress": False, "device": "cpu"}
    return model, train_model(model, TensorDataset(x, y), y.tolist(), make_config(config), **how)


def small(name: str, size: int) -> dict:
    return {"sampler": {"name": "MPerClassSampler", "m": size}, "training": {"batch_size": 8}, "loss": name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            small(TRIPLET, 1),
            NOTHING + r"no batch of 4 items held two items of one class, .*sampler to MPerClassSampler",
        ),
        (small("ContrastiveLoss", 1), NOTHING + "no batch of 4 items held two items of one class"),
        (small("NTXentLoss", 8), NOTHING + "no batch of 8 items held items of two classes, .* lower sampler.m"),
        (small("MarginLoss", 1), NOTHING + "no batch of 4 items held two items of one class"),
        ({"loss": TRIPLET, "training": {"batch_size": 2}}, NOTHING + f"loss '{TRIPLET}' was 0 in every batch"),
        ({"loss": {"name": TRIPLET, "margin": -9}}, NOTHING + f"loss '{TRIPLET}' was 0 in every batch"),
        (
            {"loss": {"name": "ContrastiveLoss", "distance": "CosineSimilarity", "pos_margin": -1}},
            NOTHING + "loss 'ContrastiveLoss' was 0 in every batch: .*with a similarity, pos_margin goes above",
        ),
        (
            {"loss": TRIPLET, "miner": {"name": "TripletMarginMiner", "margin": -9}},
            NOTHING + "miner 'TripletMarginMiner' found no pair or triplet in any batch",
        ),
        (
            {"optimizer": {"name": "AdamW", "lr": 0.0}},
            NOTHING + "no step changed the network's weights: raise optimizer.lr",
        ),
        ({"optimizer": {"name": "SGD", "lr": 1e-30}, "loss": TRIPLET}, NOTHING + "no step changed"),
        (  # the proxies learn, the network does not
            {"optimizer": {"name": "SGD", "lr": 0.0}, "loss_optimizer": {"name": "SGD", "lr": 0.1}},
            NOTHING + "no step changed the network's weights",
        ),
        (
            {"loss": {"name": "CrossBatchMemory", "loss": "ContrastiveLoss", "memory_size": 47}},
            "loss 'CrossBatchMemory' remembers 47 items, fewer than a batch of 48: set its memory_size to several",
        ),
    ],
)
def test_what_cannot_learn_says_why_and_what_to_do(config, message):
    with pytest.raises(OsmlError, match=message) as error:
        run(**config)
    assert "\n" not in str(error.value)


def test_weight_decay_is_no_learning():
    with pytest.raises(OsmlError, match="was 0 in every batch"):
        run(loss={"name": TRIPLET, "margin": -9}, optimizer={"name": "AdamW", "lr": 0.1, "weight_decay": 0.5})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"loss": "ContrastiveLoss", "training": {"batch_size": 2}},  # one pair a batch: no triplet, yet it learns
        small("ArcFaceLoss", 1),  # a class's weights stand for its other items
        small("ArcFaceLoss", 8),
        {"loss": {"name": "CrossBatchMemory", "loss": "ContrastiveLoss", "memory_size": 48}},
        {"loss": {"name": "CrossBatchMemory", "loss": "ContrastiveLoss"}, "training": {"batch_size": 2}},
        {"optimizer": {"name": "SGD", "lr": 1e-3}, "loss": TRIPLET},
    ],
)
def test_what_can_learn_is_let_be(config):
    model, _ = run(**config)
    torch.manual_seed(0)
    assert not torch.equal(model.embedder.weight, nn.Linear(8, 4).weight)


def test_proxies_alone_may_learn():
    """Without free weights in the network the loss's own are what is trained."""
    _, loss = run(embedder=nn.Identity(), loss={"name": "ArcFaceLoss"})
    assert loss.W.grad.any()


def test_a_loss_that_reaches_0_after_the_first_epoch_has_done_its_work():
    x, y = vectors(noise=0.1)
    config = make_config({"loss": TRIPLET, "optimizer": {"name": "SGD", "lr": 0.3}})
    torch.manual_seed(0)
    model = EmbeddingModel(nn.Identity(), nn.Linear(8, 4))
    trainer = make_trainer(model, TensorDataset(x, y), y.tolist(), config, n_epochs=12, device="cpu")
    means = [trainer.run_epoch() for _ in range(12)]
    assert means[0] > 0 and means[-1] == 0
    # Nor is one refused that goes on from there.
    again = make_trainer(deepcopy(model), TensorDataset(x, y), y.tolist(), config, n_epochs=13, device="cpu")
    again.load_state(trainer.state())
    assert again.run_epoch() == 0


@pytest.mark.parametrize("name", pml.names("loss"))
def test_losses_that_compare_items_are_those_without_weights_for_each_class(name):
    arguments = {
        "MultipleLosses": {"losses": ["ContrastiveLoss", "CosFaceLoss"]},
        "CrossBatchMemory": {"loss": "ContrastiveLoss"},
        "PseudoUnknowns": {"loss": "MarginOneVsRestLoss"},
        "HistogramLoss": {"n_bins": 10},
        "RankedListLoss": {"margin": 0.4, "Tn": 1},
    }
    loss = pml.build("loss", name, arguments.get(name, {}), num_classes=4, embedding_size=8)
    alone = {"MultipleLosses", "CrossBatchMemory", "ReciprocalPointLoss", "ARPLLoss"}
    assert pml.compares_items(loss) == (pml.class_weights(loss) is None and name not in alone)


def test_a_loss_without_gradient_is_not_called_0():
    part = nn.Linear(8, 4)
    watch = FirstEpoch([part], losses.TripletMarginLoss(), 8)
    watch.see_batch(torch.tensor([0, 0, 1]), None, None)
    watch.before_step()
    watch.after_step()
    with pytest.raises(OsmlError, match="gave the network no gradient"):
        watch.check(0.5)


def test_the_command_says_so_with_status_2_and_writes_nothing(osml, digits_folder, tmp_path):
    out = tmp_path / "bundle"
    args = ["train", "--data", digits_folder, "--out", out, "--n-known", 4]
    status, _, said = osml(*args, "--set", "optimizer.lr=0", "--set", "training.epochs=1")
    assert status == 2 and not out.exists()
    assert said.splitlines()[-1].startswith(f"osml: error: {NOTHING}no step changed")
