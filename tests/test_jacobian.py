"""The Jacobian norm against loops and closed forms; the detector; checkpoints and the diagnostics over them."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import davies_bouldin_score, roc_auc_score
from torch import nn
from torch.nn.functional import normalize

from osml_plugin import UNKNOWN, OpenSetRecognizer, OsmlError, commands, detectors, train, trunks
from osml_plugin.bundle import save_bundle
from osml_plugin.checkpoints import find_checkpoints, folder_of
from osml_plugin.embedding import EmbeddingModel
from osml_plugin.jacobian import JacobianDetector, estimate_jacobian_norm, jacobian_norm
from osml_plugin.jacobian_diagnostics import Diagnosis, Diagnostics
from osml_plugin.report.jacobian import write_jacobian

SPLIT = {"known": ["0", "1", "2", "3", "4"], "pseudo_unknown": ["5", "6"], "unknown": ["7", "8", "9"]}


def loop(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The slow, obvious twin: output by output, item by item."""
    found = []
    for item in inputs:
        x = item[None].clone().requires_grad_()
        rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in model(x)[0]]
        found.append(torch.stack(rows).double().square().sum().sqrt())
    return torch.stack(found)


def small_cnn(embedding_size: int = 12, unit_norm: bool = True, size: int = 8) -> tuple[EmbeddingModel, torch.Tensor]:
    """A network whose batch norm has seen data, in eval mode, and inputs."""
    torch.manual_seed(0)
    trunk = trunks.build("small_cnn", {"width": 4, "dropout": 0.5}, channels=1)
    model = EmbeddingModel(trunk, nn.Linear(64 // 4, embedding_size), unit_norm)
    model.embedder = nn.Linear(trunk(torch.zeros(2, 1, size, size)).shape[1], embedding_size)
    inputs = torch.randn(40, 1, size, size)
    model.train()(inputs)
    return model.eval(), inputs[:7]


class Attention(nn.Module):
    """A trunk of another kind: layer norm, attention, GELU, a cut along the tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)

    def forward(self, x):
        return self.block(x.flatten(1).view(len(x), 8, 8))[:, 0]


# Exact ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_size", [12, 80], ids=["rows", "columns"])  # an input has 64 numbers
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("chunk", [4, 30, 256])
def test_it_is_the_loop_over_outputs_and_items(embedding_size, unit_norm, chunk):
    model, inputs = small_cnn(embedding_size, unit_norm)
    inputs = inputs[:3]
    expected = loop(model, inputs).float()
    torch.testing.assert_close(jacobian_norm(model, inputs, chunk=chunk), expected, rtol=1e-4, atol=1e-6)
    model.unit_norm = False
    before = loop(model, inputs).float()
    model.unit_norm = unit_norm
    torch.testing.assert_close(jacobian_norm(model, inputs, before_norm=True), before, rtol=1e-4, atol=1e-6)
    assert model.unit_norm is unit_norm


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_trunks(name):
    torch.manual_seed(0)
    model = nn.Sequential(trunks.build(name, {}, channels=3), nn.LazyLinear(3)).eval()
    inputs = torch.randn(2, 3, 32, 32)
    model(inputs)
    torch.testing.assert_close(jacobian_norm(model, inputs), loop(model, inputs).float(), rtol=1e-3, atol=1e-6)


def test_attention():
    model = Attention().eval()
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(jacobian_norm(model, inputs), loop(model, inputs).float(), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 9), n_inputs=st.integers(1, 9), seed=st.integers(0, 99))
def test_closed_forms(width, n_inputs, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(n_inputs, width, bias=False).double()
    inputs, a = torch.randn(5, n_inputs).double(), linear.weight.detach()
    norms = jacobian_norm(linear, inputs)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, a.norm().expand(5))
    # f = Ax/‖Ax‖: ∂f/∂x = (I − ffᵀ) A / ‖Ax‖.
    unit = nn.Sequential(linear, Normalize())
    y = inputs @ a.T
    f = normalize(y)
    expected = torch.stack([((torch.eye(width) - torch.outer(u, u)) @ a).norm() for u in f]) / y.norm(dim=1)
    torch.testing.assert_close(jacobian_norm(unit, inputs), expected, atol=1e-8, rtol=1e-6)


class Normalize(nn.Module):
    def forward(self, x):
        return normalize(x)


def test_parity_with_torchs_own_jacobian():
    model, inputs = small_cnn()
    full = torch.stack([torch.autograd.functional.jacobian(model, x[None])[0, :, 0] for x in inputs])
    torch.testing.assert_close(jacobian_norm(model, inputs), full.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("embedding_size", [12, 80])
@pytest.mark.parametrize("outside", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_was_whatever_the_mode_outside(embedding_size, outside):
    model, inputs = small_cnn(embedding_size)
    expected = loop(model, inputs).float()
    model.train()
    model.trunk.layers[1].eval()  # a frozen batch norm
    model.embedder.weight.requires_grad_(False)
    model.embedder.bias.grad = torch.ones(embedding_size)
    flags = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with outside():
        given = inputs.clone()
        torch.testing.assert_close(jacobian_norm(model, given), expected, rtol=1e-4, atol=1e-6)
        estimate_jacobian_norm(model, given, 4)
        assert torch.is_grad_enabled() == (outside is nullcontext) and not given.requires_grad
    assert [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == needs
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    with pytest.raises(RuntimeError, match="channels"):  # after a mistake too
        jacobian_norm(model, inputs.expand(-1, 2, -1, -1))
    assert [p.requires_grad for p in model.parameters()] == needs
    assert [m.training for m in model.modules()] == flags


class Forgetful(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


class Pairs(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: jacobian_norm(m, x.numpy()), "inputs must be a floating-point tensor .* got ndarray"),
        (lambda m, x: jacobian_norm(m, (x * 9).byte()), "inputs must be a floating-point tensor .* got torch.uint8"),
        (lambda m, x: jacobian_norm(m, x[0, 0, 0]), r"got torch.float32 of shape \(8,\)"),
        (lambda m, x: jacobian_norm(m, x / 0), "NaN or infinity"),
        (lambda m, x: jacobian_norm(m, x, chunk=0), "chunk must be a whole number of at least 1"),
        (
            lambda m, x: jacobian_norm(m.trunk, x, before_norm=True),
            "before_norm is for an EmbeddingModel; got SmallCNN",
        ),
        (lambda m, x: jacobian_norm(m.trunk.layers[0], x), r"must return embeddings of shape \(1, width\)"),
        (lambda m, x: jacobian_norm(Pairs(), x), "must return embeddings .* got tuple"),
        (lambda m, x: jacobian_norm(Forgetful(), x), "the network cannot be differentiated by its input"),
        (lambda m, x: estimate_jacobian_norm(m, x, 1), "n_projections must be from 2 to 12"),
        (lambda m, x: estimate_jacobian_norm(m, x, 13), "n_projections must be from 2 to 12.* the exact norm takes 12"),
        (lambda m, x: estimate_jacobian_norm(m, x, 2.5), "n_projections must be a whole number"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(call, message):
    with pytest.raises(OsmlError, match=message) as error:
        call(*small_cnn())
    assert "\n" not in str(error.value)


def test_nothing_gives_nothing():
    model, inputs = small_cnn()
    assert jacobian_norm(model, inputs[:0]).shape == (0,)
    assert [t.shape for t in estimate_jacobian_norm(model, inputs[:0], 2)] == [(0,), (0,)]


# Estimated --------------------------------------------------------------------------------------------------


def test_the_estimate_is_unbiased_and_so_is_its_error():
    model, inputs = small_cnn()
    x, n, draws = inputs[:1].double(), 3, 4000
    model = model.double()
    model.embedder.float()  # embeddings are made in single precision
    exact = jacobian_norm(model, x).square()
    norms, errors = estimate_jacobian_norm(model, x.expand(draws, -1, -1, -1), n, seed=1)
    squares = norms.square()
    of_square = 2 * norms * errors  # the standard error of J², without the root
    standard = squares.std() / math.sqrt(draws)
    assert abs(squares.mean() - exact) < 4 * standard
    assert standard < 0.02 * exact  # so the line above could have failed
    spread = of_square.square().mean() / squares.var()
    assert 0.9 < spread < 1.1
    # The root's bias is as documented: about −standard_error² / (2 J).
    bias, told = norms.mean() - exact.sqrt(), -squares.var() / (8 * exact**1.5)
    assert bias < 0 and 0.5 < bias / told < 2


def test_as_many_projections_as_outputs_are_exact():
    model, inputs = small_cnn()
    norms, errors = estimate_jacobian_norm(model, inputs, 12)
    torch.testing.assert_close(norms, jacobian_norm(model, inputs), rtol=1e-4, atol=1e-6)
    assert (errors == 0).all()


def test_the_estimate_is_the_slow_one():
    model, inputs = small_cnn()
    norms, errors = estimate_jacobian_norm(model, inputs, 4, seed=5, chunk=3)
    draw = np.random.default_rng(5)
    for i, item in enumerate(inputs):
        frame = np.linalg.qr(draw.standard_normal((12, 4), dtype=np.float32))[0].T
        x = item[None].clone().requires_grad_()
        rows = [torch.autograd.grad(model(x), x, torch.from_numpy(v)[None])[0] for v in frame]
        samples = np.array([12 * float(r.square().sum()) for r in rows])
        error = math.sqrt(samples.var(ddof=1) / 4 * (1 - 4 / 12)) / (2 * math.sqrt(samples.mean()))
        assert norms[i] == pytest.approx(math.sqrt(samples.mean()), rel=1e-3)
        assert errors[i] == pytest.approx(error, rel=1e-2)


def test_the_estimate_depends_on_the_seed_and_not_on_the_chunk():
    model, inputs = small_cnn()
    first = estimate_jacobian_norm(model, inputs, 4)
    for chunk in (1, 3, 9):
        for a, b in zip(first, estimate_jacobian_norm(model, inputs, 4, chunk=chunk), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.equal(first[0], estimate_jacobian_norm(model, inputs, 4, seed=1)[0])


def test_a_constant_embedding_has_norm_zero_for_certain():
    model = nn.Linear(5, 4)
    nn.init.zeros_(model.weight)
    norms, errors = estimate_jacobian_norm(model, torch.randn(3, 5), 2)
    assert (norms == 0).all() and (errors == 0).all() and (jacobian_norm(model, torch.randn(3, 5)) == 0).all()


# Detector ---------------------------------------------------------------------------------------------------


def test_the_detector_scores_by_the_norm():
    model, inputs = small_cnn()
    assert torch.equal(JacobianDetector(model).fit(inputs).score(inputs), jacobian_norm(model, inputs))
    estimated = JacobianDetector(model, n_projections=4, seed=3, before_norm=True).score(inputs)
    assert torch.equal(estimated, estimate_jacobian_norm(model, inputs, 4, 3, before_norm=True)[0])


def test_with_a_detector_it_scores_by_both():
    model, inputs = small_cnn()
    with torch.no_grad():
        embeddings = model(inputs)
    knn = detectors.create("knn", k=1).fit(embeddings[:3], [0, 1, 1])
    both = JacobianDetector(model, detector=knn)
    with pytest.raises(OsmlError, match="not fitted"):
        both.score(inputs)
    with pytest.raises(OsmlError, match="at least two known inputs"):
        both.fit(inputs[:1])
    scores = both.fit(inputs[3:]).score(inputs)
    columns = np.stack([jacobian_norm(model, inputs).numpy(), knn.score(embeddings).numpy()])
    known = columns[:, 3:]
    expected = ((columns - known.mean(1, keepdims=True)) / known.std(1, ddof=1, keepdims=True)).sum(0)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)


# Checkpoints and diagnostics --------------------------------------------------------------------------------

QUICK = ["training.epochs=4", "training.checkpoints=1", "training.batch_size=32", "detector=knn"]


@pytest.fixture(scope="module")
def trained(digits_folder, tmp_path_factory) -> Path:
    """A bundle with four checkpoints."""
    root = tmp_path_factory.mktemp("jacobian")
    (root / "split.json").write_text(json.dumps(SPLIT))
    small = ["model.trunk={name: small_cnn, width: 8}", "model.embedding_size=16", "model.output=embedder"]
    out = root / "bundle"
    train(digits_folder, out, split=root / "split.json", overrides=[*QUICK, *small], progress=False, device="cpu")
    return out


def test_checkpoints_lie_beside_the_bundle_and_are_of_its_training(trained):
    recognizer = OpenSetRecognizer.load(trained)
    found = find_checkpoints(trained, recognizer.details)
    assert [c.epoch for c in found] == [1, 2, 3, 4]
    assert folder_of(trained) == trained.parent / "bundle.checkpoints"
    assert sorted(p.name for p in folder_of(trained).iterdir()) == [f"epoch-000{e}.safetensors" for e in range(1, 5)]
    assert not [p for p in trained.parent.iterdir() if p.name.startswith(".")]
    models = [c.load(recognizer.model) for c in found]
    final = recognizer.model.state_dict()
    assert all(torch.equal(v, final[k]) for k, v in models[-1][0].state_dict().items())
    assert not torch.equal(models[0][0].embedder.weight, final["embedder.weight"])
    assert torch.allclose(models[-1][1], recognizer.class_weights)


def test_no_checkpoints_unless_asked_for(digits_folder, tmp_path):
    out = tmp_path / "bundle"
    few = ["training.epochs=1", "model.trunk={name: small_cnn, width: 4}", "detector=knn"]
    train(digits_folder, out, n_known=4, overrides=few, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert find_checkpoints(out, OpenSetRecognizer.load(out).details) == []


def test_a_training_that_fails_leaves_no_checkpoints(osml, digits_folder, tmp_path):
    wild = ["--set", "training.checkpoints=1", "--set", "optimizer={name: SGD, lr: 1.0e+38}"]
    assert osml("train", "--data", digits_folder, "--out", tmp_path / "bundle", "--n-known", 4, *wild)[0] == 2
    gc.collect()  # the exception is gone, as after the process
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_trunk_is_not_kept_again(digits_folder, tmp_path):
    frozen = ["training.epochs=2", "training.checkpoints=2", "model.frozen=true", "model.trunk=small_cnn"]
    out = tmp_path / "bundle"
    train(digits_folder, out, n_known=4, overrides=[*frozen, "detector=knn", "model.output=embedder"], progress=False)
    recognizer = OpenSetRecognizer.load(out)
    (checkpoint,) = find_checkpoints(out, recognizer.details)
    assert checkpoint.epoch == 2 and checkpoint.file.stat().st_size < 200_000
    model, _ = checkpoint.load(recognizer.model)
    assert all(torch.equal(v, recognizer.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_diagnostics_are_those_of_each_checkpoint(trained, digits_folder):
    found = commands.jacobian(trained, digits_folder, max_items=20, progress=False)
    assert [n.epoch for n in found.networks] == [1, 2, 3, 4]
    unknown = found.labels == UNKNOWN
    assert unknown.sum() == 20 and (~unknown).sum() == 20
    recognizer = OpenSetRecognizer.load(trained)
    # The last checkpoint is the final model: the same norms as of the bundle alone, item by item.
    alone = commands.jacobian(recognizer, digits_folder, max_items=20, progress=False)
    assert alone.networks[0].epoch is None and np.array_equal(alone.labels, found.labels)
    np.testing.assert_allclose(alone.norms, found.norms, rtol=1e-4)
    last = found.networks[-1]
    assert last.known == pytest.approx(found.norms[~unknown].mean(), rel=1e-5)
    assert last.difference == pytest.approx(found.norms[unknown].mean() - found.norms[~unknown].mean(), rel=1e-4)
    assert last.jacobian_auroc == pytest.approx(roc_auc_score(unknown, found.norms))
    assert last.davies_bouldin == pytest.approx(alone.networks[0].davies_bouldin, rel=1e-4)
    pairs = np.array([(n.difference, n.auroc) for n in found.networks]).T
    assert found.pearson == pytest.approx(pearsonr(*pairs).statistic)
    assert found.spearman == pytest.approx(spearmanr(*pairs).statistic)


def test_davies_bouldin_is_of_the_known_items(trained, digits_folder):
    tested = commands.evaluate(trained, digits_folder, progress=False)[0]
    known = tested.labels != UNKNOWN
    expected = davies_bouldin_score(tested.embeddings[known], tested.labels[known])
    recognizer = OpenSetRecognizer.load(trained)
    found = commands.jacobian(recognizer, digits_folder, max_items=10_000, n_projections=2, progress=False)
    assert found.networks[0].davies_bouldin == pytest.approx(expected, rel=1e-4)
    assert found.networks[0].auroc == pytest.approx(tested.metrics.auroc, abs=1e-6)


def test_the_command(osml, trained, digits_folder, tmp_path):
    arguments = ["jacobian", trained, "--data", digits_folder, "--max-items", 10, "--projections", 4]
    status, out, err = osml(*arguments, "--json", "--out", tmp_path / "new" / "out")
    assert status == 0 and "Jacobian norms" in err and "no checkpoints" not in err
    figures = json.loads(out)
    assert figures == json.loads((tmp_path / "new" / "out" / "jacobian.json").read_text())
    assert len(figures["networks"]) == 4 and figures["n_projections"] == 4
    names = {"correlation.png", "davies-bouldin.png", "difference.png", "histogram.png", "means.png", "jacobian.json"}
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == names
    status, out, _ = osml(*arguments, "--before-norm")
    assert status == 0 and out.count("\n") == 6 and "Pearson" in out


def test_without_its_checkpoints_the_final_model_is_shown(osml, trained, digits_folder, tmp_path):
    save_bundle(OpenSetRecognizer.load(trained), tmp_path / "alone")
    out = tmp_path / "pictures"
    status, said, err = osml("jacobian", tmp_path / "alone", "--data", digits_folder, "--max-items", 10, "--out", out)
    assert status == 0 and "no checkpoints beside this bundle" in err and "final" in said
    assert sorted(p.name for p in out.iterdir()) == ["histogram.png", "jacobian.json"]


def test_the_pictures_of_another_model_do_not_stay(trained, digits_folder, tmp_path, monkeypatch):
    many = commands.jacobian(trained, digits_folder, max_items=10, n_projections=2, progress=False)
    alone = commands.jacobian(
        OpenSetRecognizer.load(trained), digits_folder, max_items=10, n_projections=2, progress=False
    )
    (tmp_path / "notes.txt").write_text("the user's own")
    write_jacobian(tmp_path, many)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OsmlError, match=r"cannot write to .*: No space left on device; choose another --out"):
        write_jacobian(tmp_path, alone)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "replace", replace)
    write_jacobian(tmp_path, alone)
    assert {p.name for p in tmp_path.iterdir()} == {"histogram.png", "jacobian.json", "notes.txt"}


def test_no_unknown_items(trained, digits_folder, tmp_path):
    only = {"known": SPLIT["known"], "pseudo_unknown": SPLIT["pseudo_unknown"], "unknown": []}
    (tmp_path / "only.json").write_text(json.dumps(only))
    found = commands.jacobian(
        trained, digits_folder, split=tmp_path / "only.json", max_items=10, n_projections=2, progress=False
    )
    last = found.to_dict()["networks"][-1]
    assert last["known"] > 0 and last["davies_bouldin"] > 0 and found.pearson is None
    assert last["unknown"] is last["difference"] is last["auroc"] is last["jacobian_auroc"] is None


def test_what_the_command_refuses(osml, trained, digits_folder, digit_embeddings, tmp_path):
    def refused(*arguments, bundle=trained) -> str:
        status, _, err = osml("jacobian", bundle, *arguments)
        assert status == 2
        return err.strip().splitlines()[-1]

    assert "this bundle's network takes images" in refused("--data", digit_embeddings)
    (tmp_path / "file").write_text("")
    assert "is no folder that can be written" in refused("--data", digits_folder, "--out", tmp_path / "file")
    assert "n_projections must be from 2 to 16" in refused("--data", digits_folder, "--projections", 40)
    plain = OpenSetRecognizer("knn").fit(torch.eye(40), ["a", "b"] * 20)
    save_bundle(plain, tmp_path / "plain")
    assert "this bundle has none" in refused("--data", digit_embeddings, bundle=tmp_path / "plain")
    recognizer = OpenSetRecognizer.load(trained)
    recognizer.details["checkpoints"] = {"../epoch-0001.safetensors": "0"}
    save_bundle(recognizer, tmp_path / "odd")
    folder_of(tmp_path / "odd").mkdir()
    assert "names a checkpoint '../epoch" in refused("--data", digits_folder, bundle=tmp_path / "odd")
    recognizer.details["checkpoints"] = {"epoch-0001.safetensors": "0"}
    save_bundle(recognizer, tmp_path / "odd")
    assert "cannot read the checkpoint" in refused("--data", digits_folder, bundle=tmp_path / "odd")
    (folder_of(tmp_path / "odd") / "epoch-0001.safetensors").write_bytes(b"x")
    assert "is not the one that the bundle names" in refused("--data", digits_folder, bundle=tmp_path / "odd")
    strangers = tmp_path / "strangers"
    for name in ("0", "8"):
        (strangers / name).mkdir(parents=True)
        (strangers / name / "a.png").write_bytes(next((digits_folder / "9").iterdir()).read_bytes())
    assert "give the data of the training" in refused("--data", strangers)


def test_a_network_of_embeddings_has_a_norm_too(digit_embeddings, tmp_path):
    out = tmp_path / "bundle"
    overrides = ["training.epochs=3", "training.checkpoints=1", "loss=TripletMarginLoss", "detector=centroid"]
    train(digit_embeddings, out, n_known=5, overrides=overrides, progress=False)
    found = commands.jacobian(out, digit_embeddings, max_items=10, progress=False)
    assert [n.epoch for n in found.networks] == [1, 2, 3] and (found.norms > 0).all()


def test_correlations_need_three_checkpoints_that_differ():
    def of(*figures) -> Diagnostics:
        networks = tuple(Diagnosis(i + 1, 1.0, 1.0 + d, a, 0.5, None) for i, (d, a) in enumerate(figures))
        return Diagnostics(networks, "knn", np.ones(2), np.array([0, UNKNOWN]), None, False)

    assert of((0.1, 0.5), (0.2, 0.6)).pearson is None
    assert of((0.1, 0.5), (0.2, 0.5), (0.3, 0.5)).spearman is None
    curve = of((0.1, 0.5), (0.2, 0.6), (0.9, 0.7))
    assert curve.spearman == pytest.approx(1) and 0.8 < curve.pearson < 0.95


def test_the_name_of_a_detector_is_no_detector():
    with pytest.raises(OsmlError, match="fitted Detector"):
        JacobianDetector(nn.Linear(4, 3), detector="knn")
