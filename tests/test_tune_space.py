"""The searched space of a sweep: what it draws builds, what does not exist is named, and what moves stays in bounds."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path
from random import Random

import cloudpickle
import optuna
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from osml_plugin import OsmlError, pml
from osml_plugin.config import Config, make_config
from osml_plugin.schema import _Loader
from osml_plugin.selection import candidates
from osml_plugin.tune.default_spaces import _around, default_space, loss_space
from osml_plugin.tune.results import Dimension
from osml_plugin.tune.space import Space

SPACE = """
loss:
  choice:
    - {name: ArcFaceLoss, margin: {uniform: [5, 45]}, scale: {loguniform: [4, 64]}}
    - TripletMarginLoss
    - {name: SubCenterArcFaceLoss, sub_centers: {int: [2, 4]}}
    - {name: ArcFaceLoss, margin: 0, scale: {logint: [4, 64]}}
miner: {choice: [null, {name: MultiSimilarityMiner, epsilon: {uniform: [0.05, 0.3]}}]}
model: {embedding_size: {choice: [32, 64, 128]}, trunk: {choice: [small_cnn, {name: small_cnn, width: 16}]}}
data.augment: {choice: [none, [{name: RandomRotation, degrees: 10}]]}
optimizer: {lr: {loguniform: [0.0001, 0.01]}}
training.batch_size: {int: [32, 256]}
detector: {choice: [knn, {name: mahalanobis, shrinkage: {loguniform: [0.001, 0.1]}}, {name: knn, k: {int: [1, 4]}}]}
threshold: {name: fixed, tau: {uniform: [0.1, 0.9]}}
"""
# These ask for parts of their own.
REQUIRED = {
    "CrossBatchMemory": {"loss": "ContrastiveLoss"},
    "MultipleLosses": {"losses": ["ContrastiveLoss"]},
    "PseudoUnknowns": {"loss": "MarginOneVsRestLoss"},
}


PAGE = (Path(__file__).parents[1] / "docs" / "sweep-space.md").read_text(encoding="utf-8")


def space(text: str = SPACE, base: Config | None = None, **options) -> Space:
    return Space(yaml.safe_load(text), base or Config(), **options)


def drawn(some: Space, n: int, seed: int = 0) -> list[dict]:
    """What n random trials draw."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trials = [study.ask() for _ in range(n)]
    for trial in trials:
        assert some.suggest(trial) is None
    return [trial.params for trial in trials]


def test_dimensions_have_the_documented_names():
    found = {d.name: d for d in space().dimensions}
    assert found["loss"].choices == ("ArcFaceLoss", "TripletMarginLoss", "SubCenterArcFaceLoss", "ArcFaceLoss#2")
    assert found["loss.ArcFaceLoss.margin"] == Dimension("loss.ArcFaceLoss.margin", "float", low=5, high=45)
    assert found["loss.ArcFaceLoss#2.scale"] == Dimension("loss.ArcFaceLoss#2.scale", "int", low=4, high=64, log=True)
    assert found["loss.TripletMarginLoss.margin"].log  # a bare name: the default space of the loss
    assert found["miner"].choices == (None, "MultiSimilarityMiner")
    assert found["model.trunk"].choices == ("small_cnn", "small_cnn#2")
    assert found["data.augment"].choices == ("none", '[{"name": "RandomRotation", "degrees": 10}]')
    assert found["optimizer.lr"] == Dimension("optimizer.lr", "float", low=1e-4, high=1e-2, log=True)
    assert not [name for name in found if name.startswith(("detector", "threshold"))]


def test_what_is_drawn_is_the_configuration():
    params = {
        "data.augment": '[{"name": "RandomRotation", "degrees": 10}]',
        "model.embedding_size": 128,
        "model.trunk": "small_cnn#2",
        "loss": "ArcFaceLoss#2",
        "loss.ArcFaceLoss#2.scale": 7,
        "miner": "MultiSimilarityMiner",
        "miner.MultiSimilarityMiner.epsilon": 0.2,
        "optimizer.lr": 1e-3,
        "training.batch_size": 50,
    }
    expected = {
        "data": {"augment": [{"name": "RandomRotation", "degrees": 10}]},
        "model": {"embedding_size": 128, "trunk": {"name": "small_cnn", "width": 16}},
        "loss": {"name": "ArcFaceLoss", "margin": 0, "scale": 7},
        "miner": {"name": "MultiSimilarityMiner", "epsilon": 0.2},
        "optimizer": {"name": "AdamW", "lr": 1e-3, "weight_decay": 1e-3},
        "training": {"batch_size": 50},
    }
    assert space().config(params) == make_config(expected)


@pytest.mark.parametrize("levels", [1, 2])
def test_random_draws_build_and_are_conditional(levels):
    some = space(levels=levels)
    domains = {d.name: d for d in some.dimensions}
    seen = set()
    for params in drawn(some, 100):
        config = some.config(params)
        seen |= set(params)
        for name, value in params.items():
            d = domains[name]
            assert value in d.choices if d.kind == "choice" else d.low <= value <= d.high
            assert d.kind != "int" or type(value) is int
        below = {name.split(".")[1] for name in params if name.startswith("loss.")}
        assert below <= {params["loss"]}
        assert ("miner.MultiSimilarityMiner.epsilon" in params) == (config.miner is not None)
    assert seen == set(domains)


def test_a_fixed_trial_is_taken_at_its_word():
    some = space("loss.margin: {uniform: [5, 45]}")
    trial = optuna.trial.FixedTrial({"loss.margin": 12.5})
    some.suggest(trial)
    assert some.config(trial.params).loss.args == {"margin": 12.5, "scale": 16}


def test_a_part_without_a_name_keeps_the_rest_and_a_named_one_does_not():
    base = make_config({"optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}})
    kept = space("optimizer: {lr: {uniform: [0.01, 0.1]}}", base).config({"optimizer.lr": 0.05})
    assert kept.optimizer.name == "SGD" and kept.optimizer.args == {"lr": 0.05, "momentum": 0.9}
    named = space("optimizer: {name: SGD, lr: {uniform: [0.01, 0.1]}}", base).config({"optimizer.lr": 0.05})
    assert named.optimizer.args == {"lr": 0.05}


def test_parts_in_parts():
    some = space(
        "loss: {name: ContrastiveLoss, distance: {choice: [LpDistance, {name: LpDistance, power: {int: [1, 2]}}]}}"
    )
    params = {"loss.distance": "LpDistance#2", "loss.distance.LpDistance#2.power": 2}
    assert some.config(params).loss.args == {"distance": {"name": "LpDistance", "power": 2}}
    assert some.config({"loss.distance": "LpDistance"}).loss.args == {"distance": "LpDistance"}


def test_two_levels_enumerate_detectors_and_thresholds():
    some = space()
    shrinkages = [a["shrinkage"] for n, a in some.inner_detectors if n == "mahalanobis"]
    assert shrinkages == pytest.approx([10 ** (-3 + i / 4) for i in range(9)])
    others = [(n, a) for n, a in some.inner_detectors if n != "mahalanobis"]
    assert others == [("knn", {})] + [("knn", {"k": k}) for k in (1, 2, 3, 4)]
    assert [n for n, _ in some.inner_thresholds] == ["fixed"] * 9
    assert [a["tau"] for _, a in some.inner_thresholds] == pytest.approx([0.1 * i for i in range(1, 10)])
    only_auto = space("{detector: auto, loss.margin: {uniform: [1, 2]}}")
    assert only_auto.inner_detectors == candidates() and only_auto.inner_thresholds is None
    assert Space(None, Config()).inner_detectors is None


def test_one_level_searches_them_outside():
    some = space(levels=1)
    assert {"detector", "detector.mahalanobis.shrinkage", "detector.knn#2.k", "threshold.tau"} <= {
        d.name for d in some.dimensions
    }
    assert some.inner_detectors is None and some.inner_thresholds is None
    params = {**drawn(some, 1)[0], "detector": "knn#2", "detector.knn#2.k": 3, "threshold.tau": 0.5}
    params.pop("detector.mahalanobis.shrinkage", None)
    config = some.config(params)
    assert config.detector.args == {"k": 3} and config.threshold.args == {"tau": 0.5}


def test_it_survives_pickling():
    params = drawn(space(), 1)[0]
    for pickler in (pickle, cloudpickle):
        again = pickler.loads(pickler.dumps(space().suggest))
        trial = optuna.trial.FixedTrial(params)
        again(trial)
        assert trial.params == params
        assert again.__self__.config(params) == space().config(params)


def test_defaults_are_the_base_configuration_where_it_lies_inside():
    base = Config()
    some = Space(None, base)
    assert some.defaults() == {"model.embedding_size": 64, "loss.margin": 20, "loss.scale": 16, "optimizer.lr": 2e-3}
    assert some.config(some.defaults()) == base
    assert space("loss: {choice: [TripletMarginLoss, CosFaceLoss]}").defaults() is None
    assert space("optimizer.lr: {uniform: [0.1, 0.2]}").defaults() is None
    # What the base leaves to the part's own default counts as that; what the option leaves out, too.
    cosface = make_config({"loss": "CosFaceLoss"})
    assert space("loss: {choice: [TripletMarginLoss, CosFaceLoss]}", cosface).defaults() == {
        "loss": "CosFaceLoss",
        "loss.CosFaceLoss.margin": 0.35,
        "loss.CosFaceLoss.scale": 64,
    }
    # Another distance is another loss.
    euclidean = make_config({"loss": {"name": "CosFaceLoss", "reducer": "MeanReducer"}})
    assert space("loss: {choice: [TripletMarginLoss, CosFaceLoss]}", euclidean).defaults() is None


def test_only_what_fits_a_checkpoint_is_movable():
    assert space(levels=1).movable == [
        "loss.ArcFaceLoss.margin",
        "loss.ArcFaceLoss.scale",
        "loss.TripletMarginLoss.margin",
        "loss.ArcFaceLoss#2.scale",
        "miner.MultiSimilarityMiner.epsilon",
        "optimizer.lr",
    ]
    assert space("model.embedding_size: {int: [8, 64]}").movable == []


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(0, 50))
def test_explore_stays_within_bounds_and_leaves_the_structure(seed, which):
    params = DRAWN[which % len(DRAWN)]
    rng, moved = Random(seed), dict(params)
    for _ in range(20):
        moved = EXPLORED.explore(moved, rng)
        EXPLORED.config(moved)  # refuses what is out of bounds
    assert moved.keys() == params.keys()
    still = params.keys() - set(EXPLORED.movable)
    assert {k: moved[k] for k in still} == {k: params[k] for k in still}


EXPLORED = space()
DRAWN = drawn(EXPLORED, 20)


@pytest.mark.parametrize(
    ("domain", "start", "steps"),
    [
        ("uniform: [10, 20]", 15.0, {13.0, 17.0}),
        ("uniform: [10, 20]", 19.0, {17.0, 20.0}),
        ("loguniform: [1, 100]", 10.0, {8.0, 12.5}),
        ("int: [1, 4]", 2, {1, 3}),
        ("logint: [1, 100]", 2, {1, 3}),
    ],
)
def test_a_step_of_explore_is_the_documented_one(domain, start, steps):
    some = space(f"loss.scale: {{{domain}}}")
    rng = Random(0)
    found = [some.explore({"loss.scale": start}, rng)["loss.scale"] for _ in range(400)]
    assert all(type(value) is type(start) for value in found)
    stepped = sum(any(value == pytest.approx(s) for s in steps) for value in found)
    # Three in four are steps; of whole numbers, what is drawn anew may look like one.
    assert 250 < stepped <= (340 if type(start) is float else 400)
    assert all(any(value == pytest.approx(s) for value in found) for s in steps)


# --- default spaces


def ends(space: dict) -> list[dict]:
    """Every combination of the ends of the domains, and of the options."""
    values = [next(iter(domain.values())) for domain in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in product(*values)]


@pytest.mark.parametrize("name", pml.names("loss"))
def test_the_default_space_of_every_loss_trains_at_its_ends(name):
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(4)  # equally many of each: SmoothAPLoss asks for that
    for args in ends(loss_space(name)):
        embeddings = torch.nn.functional.normalize(torch.randn(16, 8)).requires_grad_()
        loss = pml.build("loss", name, REQUIRED.get(name, {}) | args, num_classes=4, embedding_size=8)
        value = loss(embeddings, labels)
        value.backward()
        assert value.isfinite() and embeddings.grad.isfinite().all(), args
        assert embeddings.grad.any(), args  # there is something to learn from


@pytest.mark.parametrize("name", pml.names("loss"))
def test_the_default_space_of_every_loss_can_be_drawn_from(name):
    some = Space(None, make_config({"loss": {"name": name} | REQUIRED.get(name, {})}))
    for params in drawn(some, 5):
        assert some.config(params).loss.name == name
    names = {d.name for d in some.dimensions}
    assert names >= {f"loss.{k}" for k in loss_space(name)} | {"optimizer.lr", "model.embedding_size"}


def test_the_documented_example_works():
    example = yaml.load(PAGE.split("```yaml")[1].split("```")[0], _Loader)["space"]
    some = Space(example, Config())
    assert {"loss.ArcFaceLoss.margin", "loss.TripletMarginLoss.margin", "optimizer.lr"} <= set(some.movable)
    assert len(some.inner_detectors) == 10 and len(some.inner_thresholds) == 9


def test_the_documented_table_is_the_one_in_use():
    for name in pml.names("loss"):
        domains = [
            f"{key}: {yaml.safe_dump(d, default_flow_style=True).strip()[1:-1]}" for key, d in loss_space(name).items()
        ]
        miner = "miner" in default_space(make_config({"loss": name}))
        assert f"| {name} | {'; '.join(domains) or 'nothing'} | {'yes' if miner else ''} |" in PAGE


def test_the_base_configuration_decides_what_the_default_space_leaves_alone():
    base = make_config(
        {
            "loss": {"name": "ContrastiveLoss", "distance": "CosineSimilarity", "pos_margin": 1, "neg_margin": 0},
            "miner": "PairMarginMiner",
            "optimizer": {"name": "SGD", "lr": 0.1},
            "model": {"embedder": "identity"},
        }
    )
    assert default_space(base) == {"optimizer": {"lr": {"loguniform": pytest.approx([0.015, 0.5])}}}
    reduced = Space(None, make_config({"loss": {"name": "CosFaceLoss", "reducer": "MeanReducer"}}))
    assert reduced.config(reduced.defaults() or drawn(reduced, 1)[0]).loss.args["reducer"] == "MeanReducer"


def test_a_loss_without_an_entry_is_searched_around_its_defaults():
    assert _around(64) == {"logint": [32, 128]} and _around(28.5) == {"loguniform": [7.125, 114]}
    assert _around(0.75) == {"loguniform": [0.1875, 0.875]} and _around(0.125) == {"loguniform": [0.03125, 0.5]}
    assert not any(map(_around, (0, 1, -2.0, 0.0, True, None, "all")))


# --- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # what does not exist
        ("loss.margni: {uniform: [5, 45]}", "unknown argument of loss 'ArcFaceLoss' 'margni': did you mean 'margin'"),
        ("los.margin: {uniform: [5, 45]}", "unknown configuration key 'los': did you mean 'loss'"),
        ("model.embeding_size: {int: [8, 9]}", "'model.embeding_size': did you mean 'model.embedding_size'"),
        ("loss: {choice: [CosFaceLoss, TripletMarginLos]}", "'TripletMarginLos': did you mean 'TripletMarginLoss'"),
        ("miner: {choice: [null, {name: HDCMinr}]}", "space: with miner = HDCMinr: unknown miner 'HDCMinr': did you"),
        ("optimizer: {choice: [SGD, {name: Adam, rl: {uniform: [0, 1]}}]}", "argument of optimizer 'Adam' 'rl'"),
        ("detector: {choice: [knn, {name: knn, kk: 3}]}", "with detector = knn#2: unknown argument of detector 'knn'"),
        ("model.trunk: {choice: [small_cnn, resnet19]}", "unknown trunk 'resnet19': did you mean 'resnet18'"),
        # malformed domains
        ("loss.margin: {unifrom: [5, 45]}", "unknown domain of 'loss.margin' 'unifrom': did you mean 'uniform'"),
        ("optimizer: {chioce: [SGD, AdamW]}", "unknown domain of 'optimizer' 'chioce': did you mean 'choice'"),
        ("loss.margin: {between: [5, 45]}", "unknown domain of 'loss.margin' 'between': choices: choice, int"),
        ("loss.margin: {uniform: [45, 5]}", "'loss.margin' has uniform: [45, 5]; expected two numbers, [low, high]"),
        ("loss.margin: {uniform: [5, 5]}", "with low < high"),
        ("loss.margin: {uniform: [5]}", "expected two numbers"),
        ("loss.margin: {uniform: 5}", "expected two numbers"),
        ("loss.margin: {uniform: [a, b]}", "expected two numbers"),
        ("loss.margin: {uniform: [1, .inf]}", "expected two numbers"),
        ("loss.margin: {uniform: [false, true]}", "expected two numbers"),
        ("loss.scale: {loguniform: [0, 5]}", "expected two numbers above 0"),
        ("model.embedding_size: {int: [2.5, 8]}", "expected two whole numbers"),
        ("loss: {choice: []}", "'loss' has choice: []; expected a list of options"),
        ("loss: {choice: ArcFaceLoss}", "expected a list of options"),
        ("model.embedding_size: {choice: [32, 32]}", "has the option 32 twice"),
        ("model.embedding_size: {choice: [32, {int: [33, 64]}]}", "expected a value, a list, or a part with a name"),
        ("model: {choice: [{embedding_size: 32}]}", "an option of 'model' is {'embedding_size': 32}; expected"),
        ("optimizer.lr: {uniform: [0, 1], log: true}", "has 'log' beside 'uniform': a domain has one key"),
        ("optimizer.betas: [{uniform: [0.8, 0.9]}, 0.99]", "has a domain inside a list"),
        ("loss: {name: {choice: [ArcFaceLoss, CosFaceLoss]}}", "the name of 'loss' cannot be a domain"),
        ("{model.embedding_size: {int: [2, 8]}, model: {embedding_size: 3}}", "'model.embedding_size' is there twice"),
        ("{loss: CosFaceLoss, loss.margin: {int: [5, 45]}}", "cannot be searched beside 'loss: CosFaceLoss': nest it"),
        # what the configuration or the part refuses, at either end or in between
        ("model.embedding_size: {int: [1, 8]}", "'model.embedding_size' = 1 is wrong"),
        ("training.patience: {choice: [5, 0]}", "with training.patience = 0: configuration key"),
        ("model.embedding_size: {uniform: [8, 16]}", "with model.embedding_size = 11.04: configuration key"),
        ("detector: {name: knn, k: {int: [0, 9]}}", "k of detector 'knn' must be a whole number of at least 1; got 0"),
        ("threshold: {name: quantile, accepted: {uniform: [0.5, 1]}}", "with threshold.accepted = 1.0: accepted"),
        ("optimizer.lr: {uniform: [-1, 1]}", "optimizer 'AdamW' refuses its arguments (Invalid learning rate: -1.0)"),
        ("model.trunk: {name: small_cnn, dropout: {uniform: [0, 2]}}", "with model.trunk.dropout = 2.0: trunk"),
        ("loss: {choice: [ArcFaceLoss, CrossBatchMemory]}", "loss 'CrossBatchMemory' needs the argument 'loss'"),
        ("miner.epsilon: {uniform: [0, 1]}", "the configuration has no miner whose arguments could be searched"),
        # not the space's to say, and nothing at all
        ("seed: {int: [0, 5]}", "'seed' cannot be searched"),
        ("alpha: 0.1", "'alpha' cannot be searched"),
        ("data.fractions.train: {uniform: [0.1, 0.5]}", "'data.fractions' cannot be searched"),
        ("model.embedding_size: 32", "there is nothing to search: add a domain"),
        ("detector: {choice: [knn, centroid]}", "nothing to search but detector and threshold, which every trial"),
        ("[loss, miner]", "expected keys and values"),
    ],
)
def test_what_is_wrong_is_one_line(text, message):
    with pytest.raises(OsmlError) as error:
        space(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"loss": "CosFaceLoss", "los": 1}, "unknown parameter of the space 'los': did you mean 'loss'"),
        ({}, "parameter 'loss' of the space is missing: expected one of ArcFaceLoss, CosFaceLoss"),
        ({"loss": "ArcFace"}, "parameter 'loss' = 'ArcFace' is outside the space: one of"),
        ({"loss": "ArcFaceLoss", "loss.ArcFaceLoss.margin": 50}, "outside the space: a number from 5.0 to 45.0"),
        ({"loss": "ArcFaceLoss"}, "parameter 'loss.ArcFaceLoss.margin' of the space is missing"),
        ({"loss": "CosFaceLoss", "loss.ArcFaceLoss.margin": 9}, "belongs to an option that was not chosen"),
    ],
)
def test_parameters_that_are_not_the_spaces_are_refused(params, message):
    some = space("loss: {choice: [{name: ArcFaceLoss, margin: {uniform: [5, 45]}}, {name: CosFaceLoss}]}")
    with pytest.raises(OsmlError) as error:
        some.config(params)
    assert message in str(error.value)
