"""One schema for YAML, flags and Python; what is wrong is named, with the nearest right thing."""

from __future__ import annotations

import pytest

from osml_plugin import OsmlError
from osml_plugin.config import Config, load_config, make_config


def test_defaults_need_nothing():
    assert load_config() == Config()


def test_file_and_overrides(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "alpha: 0.1\nloss: {name: CosFaceLoss, margin: 0.2}\nmodel: {trunk: resnet18, embedding_size: 32}\n"
        "optimizer: {name: SGD, lr: 1e-2}\ntraining: {epochs: 3}\n"
    )
    config = load_config(
        file, ["loss.margin=0.3", "model.trunk=small_cnn", "model.trunk.width=16", "training.epochs=4"]
    )
    assert config.alpha == 0.1 and config.loss.name == "CosFaceLoss" and config.loss.args == {"margin": 0.3}
    assert config.model.trunk.name == "small_cnn" and config.model.trunk.args == {"width": 16}
    assert config.optimizer.args == {"lr": 0.01} and config.training.epochs == 4


def test_an_argument_alone_changes_the_default_part():
    config = load_config(overrides=["loss.margin=30", "optimizer.lr=5e-4"])
    assert config.loss.name == "ArcFaceLoss" and config.loss.args == {"margin": 30, "scale": 16}
    assert config.optimizer.args["lr"] == 5e-4


def test_another_part_takes_no_arguments_of_the_old_one_with_it():
    for override in ("loss=CosFaceLoss", "loss.name=CosFaceLoss"):
        assert load_config(overrides=[override]).loss.args == {}
    assert load_config(overrides=["loss=CosFaceLoss", "loss.margin=0.2"]).loss.args == {"margin": 0.2}


def test_parts_in_parts():
    config = make_config(
        {
            "loss": {
                "name": "ContrastiveLoss",
                "distance": {"name": "LpDistance", "power": 2},
                "reducer": "AvgNonZeroReducer",
            },
            "miner": {"name": "MultiSimilarityMiner", "epsilon": 0.2},
        }
    )
    assert config.loss.args["distance"] == {"name": "LpDistance", "power": 2}


def test_it_survives_json():
    config = load_config(overrides=["loss=CosFaceLoss", "data.augment=none", "threshold=max_f1", "miner=HDCMiner"])
    assert make_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("los.margin=3", "unknown configuration key 'los': did you mean 'loss'"),
        ("training.epoch=3", "unknown configuration key 'training.epoch': did you mean 'training.epochs'"),
        (
            "data.fractions.tain=0.5",
            "unknown configuration key 'data.fractions.tain': did you mean 'data.fractions.train'",
        ),
        ("loss.margni=3", "unknown argument of loss 'ArcFaceLoss' 'margni': did you mean 'margin'"),
        ("loss=ArcfaceLos", "unknown loss 'ArcfaceLos': did you mean 'ArcFaceLoss'"),
        ("loss=VICRegLoss", "cannot be used here: it needs two views"),
        (
            "loss={name: ContrastiveLoss, distance: LPDistance}",
            "unknown distance 'LPDistance': did you mean 'LpDistance'",
        ),
        ("miner=MultiSimilarity", "unknown miner 'MultiSimilarity': did you mean 'MultiSimilarityMiner'"),
        ("optimizer=AdamV", "unknown optimizer 'AdamV': did you mean 'Adam"),
        ("optimizer.rl=1", "unknown argument of optimizer 'AdamW' 'rl'"),
        ("model.trunk=resnet19", "unknown trunk 'resnet19': did you mean 'resnet1"),
        ("detector=kn", "unknown detector 'kn': did you mean 'knn'"),
        ("detector.k=-1", "detector 'auto' takes no arguments, but was given 'k'"),
        ("threshold=fixed", r"threshold 'fixed' refuses its arguments \(.*missing.*'tau'"),
        ("threshold={name: fixed, tau: null}", "tau must be a finite number; got None"),
        ("threshold={name: fixed, tau: .inf}", "tau must be a finite number; got inf"),
        ("detector={name: energy, temperature: abc}", "temperature must be a finite number; got 'abc'"),
        ("detector={name: energy, temperature: .inf}", "temperature must be a finite number; got inf"),
        ("detector={name: msp, temperature: true}", "temperature must be a finite number; got True"),
        ("detector={name: mahalanobis, shrinkage: abc}", "shrinkage must be a finite number; got 'abc'"),
        ("detector={name: mahalanobis, shrinkage: true}", "shrinkage must be a finite number; got True"),
        ("seed=2001-99-99", "cannot read the value of --set 'seed=2001-99-99'"),
        ("seed=-1", "configuration key 'seed' = -1 is wrong"),
        ("seed=4294967296", "configuration key 'seed' = 4294967296 is wrong"),
        ("data.fractions.train=.nan", "configuration key 'data.fractions.train' = nan is wrong"),
        ("loss.num_classes=3", "argument 'num_classes' of loss 'ArcFaceLoss' is filled in by the trainer"),
        ("loss={name: P2SGradLoss, descriptors_dim: 3}", "argument 'descriptors_dim' of loss 'P2SGradLoss' is filled"),
        ("sampler={name: MPerClassSampler, batch_size: 3}", "'batch_size' of sampler 'MPerClassSampler' is filled in"),
        (
            "loss={name: CrossBatchMemory, loss: {name: CosFaceLoss, embedding_size: 3}}",
            "'embedding_size' of loss 'Cos",
        ),
        ("model.trunk=:x", "trunk factory ':x' is not of the form package.module:factory"),
        ("model.trunk=.a:b", "trunk factory '.a:b' is not of the form package.module:factory"),
        ("threshold.alfa=0.1", "unknown argument of threshold 'conformal' 'alfa': did you mean 'alpha'"),
        ("alpha=2", "configuration key 'alpha' = 2 is wrong"),
        ("training.epochs=-1", "configuration key 'training.epochs' = -1 is wrong"),
        ("training.epochs=many", "configuration key 'training.epochs' = 'many' is wrong"),
        ("data.fractions={train: 0.9, calibration: 0.9, validation: 0, test: 0}", "sum of 1"),
        ("loss", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("seed.x=3", "configuration key 'seed' = {'x': 3} is wrong"),
        ("loss.margin=[1", "expected YAML"),
    ],
)
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(OsmlError, match=message) as error:
        load_config(overrides=[override])
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(OsmlError, match="cannot read the configuration"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(OsmlError, match="must hold keys and values; it holds a list"):
        load_config(tmp_path / "list.yaml")
    for broken in ("a: [1\n", "seed: 2001-99-99\n"):
        (tmp_path / "broken.yaml").write_text(broken)
        with pytest.raises(OsmlError, match="is not YAML"):
            load_config(tmp_path / "broken.yaml")
