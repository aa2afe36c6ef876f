"""What trials receive, and what they share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from osml_plugin import UNKNOWN, OsmlError
from osml_plugin.config import load_config
from osml_plugin.data import Items, Split, open_items, readable_items
from osml_plugin.feature_cache import cache_folder
from osml_plugin.training_run import TrainingRun
from osml_plugin.tune.folds import share, sweep_data

CONFIG = load_config(overrides=["model.trunk={name: small_cnn, width: 8}", "training.epochs=2"])
SPLIT = Split(("0", "1", "2"), ("3", "4"), ("5", "6", "7", "8", "9"))


def data_of(folder, n_folds: int, config=CONFIG, split=SPLIT):
    items, survey = readable_items(open_items(folder), False, False)
    return sweep_data(items, survey, split, config, n_folds)


def test_every_class_is_held_out_in_turn(digits_folder):
    data = data_of(digits_folder, 6)
    assert data.own and data.folds[0].split.known == SPLIT.known
    held = [c for fold in data.folds for c in fold.split.pseudo_unknown]
    counts = {c: held.count(c) for c in (*SPLIT.known, *SPLIT.pseudo_unknown)}
    assert max(counts.values()) - min(counts.values()) <= 1
    for fold in data.folds:
        assert len(fold.split.known) == 3 and len(fold.split.pseudo_unknown) == 2 and not fold.split.unknown


def test_roles_of_a_fold_do_not_overlap_and_hold_what_they_should(digits_folder):
    data = data_of(digits_folder, 4)
    labels = np.array(data.items.labels)
    for fold in data.folds:
        roles = [fold.roles.train, fold.roles.calibration, fold.roles.validation]
        assert len(np.unique(np.concatenate(roles))) == sum(map(len, roles)) == len(data.items)
        assert set(labels[roles[0]]) == set(labels[roles[1]]) == set(fold.split.known)
        assert set(labels[roles[2]]) == {*fold.split.known, *fold.split.pseudo_unknown}


def test_without_pseudo_unknown_classes_all_folds_are_drawn(digits_folder):
    data = data_of(digits_folder, 3, split=Split(("0", "1", "2", "3"), (), ("5",)))
    assert not data.own
    assert len(data.folds) == 3
    assert all(len(fold.split.pseudo_unknown) == 1 for fold in data.folds)


def test_two_known_classes_are_too_few_to_hold_one_out(digits_folder):
    with pytest.raises(OsmlError, match="too few"):
        data_of(digits_folder, 2, split=Split(("0", "1"), (), ("5",)))


def test_a_pseudo_unknown_class_of_a_few_items_stays_one():
    rng = np.random.default_rng(0)
    labels = tuple("a" * 20 + "b" * 20 + "c" * 20 + "d" * 20 + "e" * 2)
    items = Items(labels, None, rng.normal(size=(len(labels), 8)).astype(np.float32), None)
    config = load_config(overrides=["training.epochs=0"])
    data = sweep_data(items, None, Split(("a", "b", "c"), ("d", "e")), config, 4)
    assert all("e" in fold.split.pseudo_unknown for fold in data.folds)


def test_shared_images_are_what_each_would_decode_itself(digits_folder):
    alone = data_of(digits_folder, 2)
    shared = share(alone, CONFIG, progress=False)
    for fold in alone.folds[:1]:
        one, two = alone.of_fold(fold, CONFIG), shared.of_fold(fold, CONFIG)
        assert one.preprocessing == two.preprocessing
        for role in one.ROLES:
            assert torch.equal(one.sets[role][0][0], two.sets[role][0][0])
            assert torch.equal(one.sets[role].images, two.sets[role].images)
    assert shared.of_fold(shared.folds[1], CONFIG).sets["train"].images.shape[1:] == (1, 8, 8)


def test_other_settings_of_the_images_share_nothing(digits_folder):
    shared = share(data_of(digits_folder, 1), CONFIG, progress=False)
    other = load_config(overrides=["model.trunk={name: small_cnn, width: 8}", "data.image_size=16"])
    assert shared.of_fold(shared.folds[0], other).sets["train"].images.shape[-1] == 16


def test_features_of_a_frozen_trunk_are_computed_once_and_kept(digits_folder, monkeypatch):
    frozen = load_config(
        overrides=["model.trunk={name: small_cnn, width: 8}", "model.frozen=true", "training.epochs=1"]
    )
    data = share(data_of(digits_folder, 2, frozen), frozen, progress=False)
    assert data.shared.features.shape == (len(data.items), 8 * 4 * 4)
    files = set(cache_folder().glob("*.safetensors"))
    assert files

    def never(*args, **kwargs):
        raise AssertionError("the trunk ran again")

    from osml_plugin import training_data

    monkeypatch.setattr(training_data, "embed_dataset", never)
    again = share(data_of(digits_folder, 2, frozen), frozen, progress=False)
    np.testing.assert_array_equal(again.shared.features, data.shared.features)
    run = TrainingRun(again.of_fold(again.folds[1], frozen), frozen, progress=False)
    run.advance()
    embedded = run.embed()["trunk"].embeddings["validation"]
    monkeypatch.undo()
    directly, _ = training_data.embed_dataset(run.model.trunk, run.data.sets["validation"])
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(directly), atol=1e-5, rtol=1e-4)
    assert set(cache_folder().glob("*.safetensors")) == files
    assert (run.data.labels["validation"] == UNKNOWN).any()


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.schedule=constant"],
        ["miner=MultiSimilarityMiner"],
        ["loss=TripletMarginLoss", "sampler={name: MPerClassSampler, m: 4}"],
        ["loss={name: CrossBatchMemory, loss: ContrastiveLoss, memory_size: 128}"],
        ["loss=DynamicSoftMarginLoss", "training.batch_size=32"],
        ["loss=SoftTripleLoss", "model.frozen=true"],
        ["training.epochs=3", "data.workers=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_going_on_from_a_state_is_as_if_nothing_had_happened(digits_folder, overrides):
    trunk = "model.trunk={name: small_cnn, width: 8, dropout: 0.2}"
    config = load_config(overrides=[trunk, "training.epochs=3", *overrides])
    data = data_of(digits_folder, 1)

    def run() -> TrainingRun:
        return TrainingRun(data.of_fold(data.folds[0], config), config, device="cpu", progress=False)

    whole, first = run(), run()
    for _ in range(3):
        whole.advance()
    first.advance()
    first.embed()  # looking does not disturb
    state = {k: v for k, v in first.state().items()}
    second = run()
    second.load_state(state)
    assert second.epoch == 1
    second.advance()
    second.advance()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    if whole.class_weights is not None:
        assert torch.equal(second.class_weights, whole.class_weights)


def test_a_state_is_gone_on_from_at_ones_own_learning_rate(digits_folder):
    """What PBT does: another's weights, as far down the schedule, under one's own settings."""
    data = data_of(digits_folder, 1)

    def run(lr: float) -> TrainingRun:
        config = load_config(
            overrides=[f"optimizer={{name: AdamW, lr: {lr}, weight_decay: {lr}}}", "training.epochs=4"]
        )
        return TrainingRun(data.of_fold(data.folds[0], config), config, device="cpu", progress=False)

    donor, heir = run(1e-3), run(4e-3)
    donor.advance()
    donor.advance()
    heir.load_state(donor.state())
    heirs, donors = (r.trainer.optimizers["trunk_optimizer"].param_groups[0] for r in (heir, donor))
    assert heirs["lr"] == pytest.approx(4 * donors["lr"])
    assert heirs["weight_decay"] == 4e-3
    heir.advance()
    donor.advance()
    assert heirs["lr"] == pytest.approx(4 * donors["lr"])
