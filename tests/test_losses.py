"""The losses beside PML's: each against a loop over items, at the edges, and as a citizen of PML."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, miners, reducers, regularizers, samplers
from pytorch_metric_learning.losses import CrossBatchMemory, MultipleLosses, SelfSupervisedLoss
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from osml_plugin import UNKNOWN, OsmlError
from osml_plugin.losses import (
    ARPLLoss,
    CACLoss,
    L2SoftmaxLoss,
    MarginOneVsRestLoss,
    PrototypicalLoss,
    PseudoUnknowns,
    ReciprocalPointLoss,
)
from osml_plugin.losses.rotation import RotationTask

C, D = 5, 8
WITH_WEIGHTS = [L2SoftmaxLoss, MarginOneVsRestLoss, CACLoss, ReciprocalPointLoss, ARPLLoss]
TAKES_UNKNOWN = [MarginOneVsRestLoss, ReciprocalPointLoss, ARPLLoss]


def made(cls, **kwargs) -> nn.Module:
    torch.manual_seed(3)
    return cls(**kwargs) if cls is PrototypicalLoss else cls(C, D, **kwargs)


def batch(n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=rng, dtype=torch.float64).to(dtype), torch.randint(C, (n,), generator=rng)


# The formulas, one item at a time, in Python's own numbers --------------------------------------------------


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def squared(a, b) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def softmax(logits) -> list[float]:
    exps = [math.exp(v - max(logits)) for v in logits]
    return [e / sum(exps) for e in exps]


def l2_softmax(f, y, w):
    norm = math.sqrt(dot(f, f))
    return -math.log(softmax([dot([16 * x / norm for x in f], column) for column in w])[y])


def margin_one_vs_rest(f, y, w):
    total = 0.0
    for k, column in enumerate(w):
        p = 1 / (1 + math.exp(-32 * math.cos(math.acos(cosine(f, column)) + 0.5)))
        total -= math.log(p) if k == y else math.log1p(-p)
    return total


def cac(f, y, w):
    z = [dot(f, column) for column in w]
    return authors_cac([math.sqrt(squared(z, [10.0 * (i == c) for i in range(C)])) for c in range(C)], y, 0.1)


def authors_cac(d, y, weight):
    return weight * d[y] + math.log(1 + sum(math.exp(d[y] - d[j]) for j in range(len(d)) if j != y))


def reciprocal_point(f, y, w, radius=0.3):
    d = [squared(f, column) / D for column in w]
    if y == UNKNOWN:
        return sum(p * math.log(C * p) for p in softmax(d))
    return -math.log(softmax(d)[y]) + 0.1 * (d[y] - radius) ** 2


def arpl(f, y, w, radius=0.3):
    d = [squared(f, column) / D for column in w]
    if y == UNKNOWN:
        return sum(p * math.log(C * p) for p in softmax(d))
    logits = [d[c] - dot(f, w[c]) for c in range(C)]
    return -math.log(softmax(logits)[y]) + 0.1 * max(d[y] - radius + 1, 0)


TWINS = {
    L2SoftmaxLoss: l2_softmax,
    MarginOneVsRestLoss: margin_one_vs_rest,
    CACLoss: cac,
    ReciprocalPointLoss: reciprocal_point,
    ARPLLoss: arpl,
}


@pytest.mark.parametrize("cls", WITH_WEIGHTS)
def test_the_loss_is_the_mean_of_its_formula(cls):
    loss, (embeddings, labels) = made(cls).double(), batch()
    if hasattr(loss, "radius"):
        loss.radius.data.fill_(0.3)
    w = loss.W.t().tolist()
    expected = [TWINS[cls](f, y, w) for f, y in zip(embeddings.tolist(), labels.tolist(), strict=True)]
    assert loss(embeddings, labels).item() == pytest.approx(sum(expected) / len(expected), rel=1e-10)


@pytest.mark.parametrize("cls", TAKES_UNKNOWN)
def test_an_unknown_item_is_a_negative_for_every_class(cls):
    loss, (embeddings, labels) = made(cls).double(), batch()
    labels[::3] = UNKNOWN
    if hasattr(loss, "radius"):
        loss.radius.data.fill_(0.3)
    items = list(zip(embeddings.tolist(), labels.tolist(), strict=True))
    w = loss.W.t().tolist()
    if cls is MarginOneVsRestLoss:
        expected = sum(margin_one_vs_rest(f, y, w) for f, y in items) / len(items)
    else:
        # Two sub-losses, each with a mean of its own: the radius is about known items alone.
        without = {"radius_weight": 0.0}
        plain = made(cls, **without).double()
        plain.W.data = loss.W.data
        radius = [TWINS[cls](f, y, w) - plain(torch.tensor([f]).double(), torch.tensor([y])).item() for f, y in items]
        n_known = sum(y != UNKNOWN for _, y in items)
        expected = sum(TWINS[cls](f, y, w) for f, y in items) / len(items) + sum(radius) * (
            1 / n_known - 1 / len(items)
        )
    assert loss(embeddings, labels).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("cls", [L2SoftmaxLoss, CACLoss, PrototypicalLoss])
def test_the_others_leave_unknown_items_out(cls):
    loss, (embeddings, labels) = made(cls).double(), batch()
    labels[[2, 5, 11]] = UNKNOWN
    known = labels != UNKNOWN
    assert loss(embeddings, labels) == loss(embeddings[known], labels[known])


@pytest.mark.parametrize("n_support", [None, 1, 2])
def test_the_prototypical_loss_is_that_of_its_episode(n_support):
    embeddings, labels = batch(seed=1)
    support, query = {}, []
    seen = dict.fromkeys(range(C), 0)
    for f, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        if seen[y] % 2 == 0 if n_support is None else seen[y] < n_support:
            support.setdefault(y, []).append(f)
        else:
            query.append((f, y))
        seen[y] += 1
    means = {y: [sum(column) / len(of) for column in zip(*of, strict=True)] for y, of in support.items()}
    order = sorted(means)
    expected = [-math.log(softmax([-squared(f, means[c]) for c in order])[order.index(y)]) for f, y in query]
    loss = PrototypicalLoss(n_support=n_support)
    assert loss(embeddings, labels).item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


def test_a_support_set_of_ones_own():
    (embeddings, labels), (support, support_labels) = batch(seed=1), batch(seed=2)
    loss = PrototypicalLoss(softmax_scale=8, distance=distances.CosineSimilarity())
    means = [support[support_labels == c].mean(dim=0).tolist() for c in range(C)]
    expected = [
        -math.log(softmax([8 * cosine(f, mean) for mean in means])[y])
        for f, y in zip(embeddings.tolist(), labels.tolist(), strict=True)
    ]
    value = loss(embeddings, labels, ref_emb=support, ref_labels=support_labels)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    # An item of a class without support is no query.
    few = support_labels < 3
    value = loss(embeddings, labels, ref_emb=support[few], ref_labels=support_labels[few])
    kept = labels < 3
    assert value == loss(embeddings[kept], labels[kept], ref_emb=support[few], ref_labels=support_labels[few])


# CAC and its peer -------------------------------------------------------------------------------------------


def test_cac_counts_every_other_class_where_its_peer_forgets_the_last():
    """pytorch-ood takes the classes 0 to C − 2 for the non-targets of every item: its own class among them, at distance
    0 from itself, and never the last class, since it looks for the target C, which no item has."""
    from pytorch_ood.loss import CACLoss as Peer

    torch.manual_seed(0)
    loss = made(CACLoss, magnitude=1.0, anchor_weight=1.0).double()
    loss.W.data = torch.randn(D, C, dtype=torch.float64)
    embeddings, labels = batch()
    d = loss.distances(embeddings)
    rows = list(zip(d.tolist(), labels.tolist(), strict=True))
    authors = sum(authors_cac(row, y, 1.0) for row, y in rows) / len(rows)
    assert loss(embeddings, labels).item() == pytest.approx(authors, rel=1e-12)
    forgetful = [row[y] + math.log(1 + sum(math.exp(row[y] - row[j]) for j in range(C - 1))) for row, y in rows]
    theirs = Peer(C)(d, labels).item()
    assert theirs == pytest.approx(sum(forgetful) / len(rows), rel=1e-6)
    assert abs(theirs - authors) > 1e-3


def test_the_score_of_cac_is_the_authors():
    from pytorch_ood.loss import CACLoss as Peer

    loss, (embeddings, _) = made(CACLoss).double(), batch()
    embeddings *= 300  # logits on the scale of the anchors
    score = loss.score(embeddings)
    for f, found in zip(embeddings.tolist(), score.tolist(), strict=True):
        z = [dot(f, column) for column in loss.W.t().tolist()]
        d = [math.sqrt(squared(z, [10.0 * (i == c) for i in range(C)])) for c in range(C)]
        p = softmax([-v for v in d])
        assert found == pytest.approx(min(v * (1 - q) for v, q in zip(d, p, strict=True)), rel=1e-8)
    # The peer takes the maximum, turned round: another order of the same items.
    theirs = Peer.score(loss.distances(embeddings).detach())
    assert not torch.equal(score.argsort(), theirs.argsort())
    # At its anchor an item is as known as can be; between two it is not.
    anchors = 10 * torch.eye(C, dtype=torch.float64) @ torch.linalg.pinv(loss.W.detach())
    assert loss.score(anchors).max() < 1e-3 < loss.score((anchors[:1] + anchors[1:2]) / 2)
    own = loss.get_logits(embeddings).detach()[:C]
    assert loss.score(embeddings[:C], centers=own).max() < 1e-2


# Edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
def test_an_empty_batch_gives_zero_with_a_gradient(cls):
    loss = made(cls)
    embeddings = torch.zeros(0, D, requires_grad=True)
    value = loss(embeddings, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert value == 0 and embeddings.grad.shape == (0, D)
    if cls not in TAKES_UNKNOWN:
        embeddings = torch.randn(3, D, requires_grad=True)
        loss(embeddings, torch.full((3,), UNKNOWN)).backward()
        assert not embeddings.grad.any()


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_one_class_and_embeddings_on_the_weights_themselves(cls, size):
    loss = made(cls)
    on = size * loss.W.detach().t() if cls in WITH_WEIGHTS else size * torch.eye(C, D)
    on = torch.cat([on, -on]).requires_grad_()
    for labels in (torch.zeros(2 * C, dtype=torch.long), torch.arange(2 * C) % C):
        value = loss(on, labels)
        (grad,) = torch.autograd.grad(value, on)
        assert value.isfinite() and value >= 0 and grad.isfinite().all()


def test_gradients_are_those_of_the_formula():
    embeddings, labels = batch(6)
    for cls in [*WITH_WEIGHTS, PrototypicalLoss]:
        loss = made(cls).double()
        assert torch.autograd.gradcheck(lambda e, loss=loss: loss(e, labels), embeddings.clone().requires_grad_())


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(cls, dtype):
    loss, (embeddings, labels) = made(cls), batch(dtype=dtype)
    half = embeddings.clone().requires_grad_()
    value, single = loss(half, labels), loss(embeddings.float(), labels)
    value.backward()
    # Where there are several sub-losses, PML adds them up in the embeddings' type.
    assert value.float().item() == pytest.approx(single.item(), rel=torch.finfo(dtype).eps)
    assert half.grad.dtype == dtype and half.grad.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(embeddings.float(), labels) == single
    assert all(p.dtype == torch.float32 for p in loss.parameters())
    loss.set_reducer(reducers.DoNothingReducer())
    for name, part in loss(embeddings, labels).items():
        assert torch.equal(part["losses"], loss(embeddings.float(), labels)[name]["losses"])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([*WITH_WEIGHTS, PrototypicalLoss]), st.booleans())
def test_order_and_names_of_classes_do_not_matter(seed, cls, with_unknown):
    loss, (embeddings, labels) = made(cls).double(), batch(seed=seed)
    if with_unknown:
        labels[seed % 24] = UNKNOWN
    torch.manual_seed(seed)
    order = torch.randperm(24)
    if cls is PrototypicalLoss:
        order = (labels + seed % C).remainder(C).argsort(stable=True)  # the order within a class is its split
    renamed = torch.randperm(C)
    other = made(cls).double()
    if cls in WITH_WEIGHTS:
        other.W.data[:, renamed] = loss.W.data
        if cls is CACLoss:
            assert torch.allclose(other.get_logits(embeddings)[:, renamed], loss.get_logits(embeddings))
    names = torch.where(labels == UNKNOWN, UNKNOWN, renamed[labels])
    assert other(embeddings[order], names[order]).item() == pytest.approx(loss(embeddings, labels).item(), rel=1e-9)


# As PML's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", WITH_WEIGHTS)
def test_reducers_regularizers_and_statistics(cls):
    embeddings, labels = batch(dtype=torch.float32)
    plain = made(cls)(embeddings, labels)
    regular = made(
        cls,
        weight_regularizer=regularizers.LpRegularizer(),
        weight_reg_weight=0.5,
        embedding_regularizer=regularizers.LpRegularizer(),
        collect_stats=True,
    )
    expected = plain + 0.5 * regular.W.norm(dim=0).mean() + embeddings.norm(dim=1).mean()
    torch.testing.assert_close(regular(embeddings, labels), expected)
    loss = made(cls, reducer=reducers.DoNothingReducer())
    by_name = loss(embeddings, labels)
    assert set(by_name) == set(loss.sub_loss_names())
    for part in by_name.values():
        assert part["losses"].shape == (24,) and part["indices"].tolist() == list(range(24))
    torch.testing.assert_close(sum(part["losses"].mean() for part in by_name.values()), plain)


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
def test_every_reducer_that_takes_items(cls):
    embeddings, labels = batch(dtype=torch.float32)
    parts = made(cls, reducer=reducers.DoNothingReducer())(embeddings, labels).values()
    embeddings.requires_grad_()
    low, weights = min(part["losses"].max().item() for part in parts) / 2, torch.arange(1.0, C + 1)
    expected = {
        reducers.MeanReducer(): lambda v, y: v.mean(),
        reducers.SumReducer(): lambda v, y: v.sum(),
        reducers.AvgNonZeroReducer(): lambda v, y: v[v > 0].mean(),
        reducers.ThresholdReducer(low=low): lambda v, y: v[v > low].mean(),
        reducers.ClassWeightedReducer(weights): lambda v, y: (v * weights[y]).mean(),
        reducers.PerAnchorReducer(): lambda v, y: v.mean(),
    }
    for reducer, of in expected.items():
        value = made(cls, reducer=reducer)(embeddings, labels)
        (grad,) = torch.autograd.grad(value, embeddings, retain_graph=True)
        assert grad.any()
        total = sum(of(part["losses"], labels[part["indices"]]) for part in parts)
        torch.testing.assert_close(value, total)
    names = made(cls).sub_loss_names()
    mixed = reducers.MultipleReducers({name: reducers.SumReducer() for name in names})
    torch.testing.assert_close(made(cls, reducer=mixed)(embeddings, labels), sum(p["losses"].sum() for p in parts))


def test_the_weight_of_unknown_items_is_the_last():
    embeddings, labels = batch(dtype=torch.float32)
    labels[::3] = UNKNOWN
    losses = made(MarginOneVsRestLoss, reducer=reducers.DoNothingReducer())(embeddings, labels)["loss"]
    weights = torch.tensor([1.0] * C + [5.0])
    value = made(MarginOneVsRestLoss, reducer=reducers.ClassWeightedReducer(weights))(embeddings, labels)
    of = torch.where(labels[losses["indices"]] == UNKNOWN, 5.0, 1.0)
    torch.testing.assert_close(value, (losses["losses"] * of).mean())


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
def test_copies_and_states_are_whole(cls, tmp_path):
    loss, (embeddings, labels) = made(cls), batch(dtype=torch.float32)
    value = loss(embeddings, labels)
    torch.save(loss, tmp_path / "loss.pt")
    copies = [deepcopy(loss), torch.load(tmp_path / "loss.pt", weights_only=False)]
    other = cls() if cls is PrototypicalLoss else cls(C, D)
    other.load_state_dict(loss.state_dict())
    for copy in (*copies, other):
        assert copy(embeddings, labels) == value
    for parameter in copies[0].parameters():
        parameter.data.add_(1)
    assert loss(embeddings, labels) == value


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type(dtype):
    embeddings, labels = batch(dtype=torch.float32)
    for cls in [*WITH_WEIGHTS, PrototypicalLoss]:
        assert made(cls)(embeddings, labels.to(dtype)) == made(cls)(embeddings, labels)


@pytest.mark.parametrize("cls", WITH_WEIGHTS)
@pytest.mark.parametrize("label", [C, -2, -100])
def test_a_label_that_is_no_classs_number_is_refused(cls, label):
    embeddings, labels = batch(dtype=torch.float32)
    labels[3] = label
    with pytest.raises(OsmlError, match=f"{cls.__name__} takes labels from 0 to 4, and -1 .*; got {label}: number"):
        made(cls)(embeddings, labels)


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss, PseudoUnknowns])
def test_it_learns_in_pmls_own_trainer_and_tester(cls, digit_vectors):
    """Digits as vectors: the classes come together, in the units of PML's own tester, with its miner and sampler."""
    vectors, labels = torch.from_numpy(digit_vectors[0]), torch.from_numpy(digit_vectors[1])
    train, unseen = TensorDataset(vectors[:1000], labels[:1000]), TensorDataset(vectors[1000:], labels[1000:])
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - PML's sampler draws from it
    made = {PrototypicalLoss: cls, PseudoUnknowns: lambda: cls(MarginOneVsRestLoss(10, 16))}
    loss = made.get(cls, lambda: cls(10, 16))()
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    tester = GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        use_trunk_output=True,
        accuracy_calculator=AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count"),
    )

    def precision() -> float:
        found = tester.test({"val": unseen}, 0, trunk)["val"]
        return found["mean_average_precision_at_r_level0"]

    before = precision()
    MetricLossOnly(
        models={"trunk": trunk, "embedder": nn.Identity()},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *loss.parameters()], lr=5e-3)},
        batch_size=100,
        loss_funcs={"metric_loss": loss},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner(epsilon=1)},
        dataset=train,
        sampler=samplers.MPerClassSampler(labels[:1000], 10, length_before_new_iter=1000),
        dataloader_num_workers=0,
    ).train(num_epochs=15)
    assert precision() > before + 0.2


def test_what_is_collected():
    embeddings, labels = batch(dtype=torch.float32)
    loss = made(MarginOneVsRestLoss, collect_stats=True)
    loss(embeddings, labels)
    angles = torch.rad2deg((normalize(embeddings) * normalize(loss.W.t()[labels])).sum(dim=1).arccos())
    assert loss.avg_angle == pytest.approx(angles.mean().item(), rel=1e-4)
    cac = made(CACLoss, collect_stats=True)
    by_name = made(CACLoss, reducer=reducers.DoNothingReducer())(embeddings, labels)
    cac(embeddings, labels)
    assert cac.avg_anchor_distance == pytest.approx(10 * by_name["anchor_loss"]["losses"].mean().item(), rel=1e-4)
    prototypical = PrototypicalLoss(collect_stats=True)
    prototypical(embeddings, labels)
    assert prototypical.num_classes == C and 0 < prototypical.num_queries < 24


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
def test_a_miner_weighs_the_items(cls):
    loss, (embeddings, labels) = made(cls), batch(dtype=torch.float32)
    chosen = torch.arange(0, 24, 2)
    triplets = (chosen, chosen, chosen)
    with_none = (chosen[:0], chosen[:0], chosen[:0])
    assert loss(embeddings, labels, with_none) == loss(embeddings, labels)
    loss.set_reducer(reducers.DoNothingReducer())
    for part in loss(embeddings, labels, triplets).values():
        mined = torch.isin(part["indices"], chosen)
        assert not part["losses"][~mined].any() and part["losses"][mined].any()


@pytest.mark.parametrize("cls", [*WITH_WEIGHTS, PrototypicalLoss])
def test_the_wrappers_of_pml(cls):
    loss, (embeddings, labels) = made(cls), batch(dtype=torch.float32)
    with pytest.warns(UserWarning, match="non-distributed"):
        assert DistributedLossWrapper(loss)(embeddings, labels) == loss(embeddings, labels)
    assert MultipleLosses([loss, loss])(embeddings, labels) == 2 * loss(embeddings, labels)
    # These two go by the name of the class, and none of ours compares pairs.
    with pytest.raises(Exception, match=f"CrossBatchMemory not supported for {cls.__name__}"):
        CrossBatchMemory(loss, D)
    with pytest.raises(Exception, match=f"SelfSupervisedLoss not supported for {cls.__name__}"):
        SelfSupervisedLoss(loss)
    with pytest.raises(ValueError, match="labels are required"):
        loss(embeddings)
    if cls in WITH_WEIGHTS:
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            loss(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)
        with pytest.raises(AssertionError, match="requires the distance metric to be"):
            made(cls, distance=distances.SNRDistance())


def whole_batch(cls) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A loss, an embedder, inputs, and labels whose episode is the same whichever half comes first."""
    labels = torch.arange(C).repeat_interleave(2).repeat(2)
    embeddings, _ = batch(len(labels), dtype=torch.float32)
    loss = PseudoUnknowns(made(MarginOneVsRestLoss)) if cls is PseudoUnknowns else made(cls)
    return loss, nn.Linear(D, D, bias=False), embeddings, labels


def _half_of_a_batch(rank: int, folder: Path) -> None:
    """What one of two processes does, as PML's documentation has it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for cls in [*WITH_WEIGHTS, PrototypicalLoss, PseudoUnknowns]:
        loss, embedder, inputs, labels = whole_batch(cls)
        wrapped = DistributedLossWrapper(loss)
        if list(loss.parameters()):
            wrapped = DistributedDataParallel(wrapped)
        half, network = (slice(0, 10), slice(10, 20))[rank], DistributedDataParallel(embedder)
        value = wrapped(network(inputs[half]), labels[half])
        value.backward()
        grads = {name: p.grad for name, p in [*embedder.named_parameters(), *loss.named_parameters()]}
        found[cls.__name__] = (value.item(), grads)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path):
    multiprocessing.spawn(_half_of_a_batch, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for cls in [*WITH_WEIGHTS, PrototypicalLoss]:
        loss, embedder, inputs, labels = whole_batch(cls)
        value = loss(embedder(inputs), labels)
        value.backward()
        for mean, grads in (first[cls.__name__], second[cls.__name__]):
            # PML multiplies by the number of processes, by which DistributedDataParallel divides: it is meant for
            # embeddings, of which each process has a part, and falls on the loss's own weights as well.
            assert mean == pytest.approx(2 * value.item(), rel=1e-5)
            torch.testing.assert_close(grads["weight"], embedder.weight.grad, rtol=1e-4, atol=1e-6)
            for name, parameter in loss.named_parameters():
                torch.testing.assert_close(grads[name], 2 * parameter.grad, rtol=1e-4, atol=1e-6)
    (_, one), (_, other) = first["PseudoUnknowns"], second["PseudoUnknowns"]
    assert all(grad.any() and torch.equal(grad, other[name]) for name, grad in one.items())


def test_the_scale_of_l2_softmax_may_be_learned():
    embeddings, labels = batch(dtype=torch.float32)
    learned, fixed = made(L2SoftmaxLoss, learn_scale=True), made(L2SoftmaxLoss)
    value = learned(embeddings, labels)
    value.backward()
    assert value == fixed(embeddings, labels)
    assert learned.scale.grad.abs() > 0 and "scale" not in dict(fixed.named_parameters())


# Pseudo-unknowns --------------------------------------------------------------------------------------------


def test_mixtures_lie_between_items_of_different_classes():
    mixer = PseudoUnknowns(made(MarginOneVsRestLoss), share=3.0)
    labels = torch.arange(C).repeat(4)
    embeddings = torch.eye(C, D)[labels].requires_grad_()
    mixtures = mixer.mix(embeddings, labels)
    assert mixtures.shape == (60, D)
    assert torch.allclose(mixtures.sum(dim=1), torch.ones(60)) and ((mixtures > 0).sum(dim=1) == 2).all()
    assert set(mixtures.nonzero()[:, 1].tolist()) == set(range(C))
    mixtures.sum().backward()
    assert embeddings.grad.any()
    for of in (labels[:1], labels[:0], torch.full((3,), UNKNOWN), torch.zeros(4, dtype=torch.long)):
        assert len(mixer.mix(torch.randn(len(of), D), of)) == 0


@pytest.mark.parametrize("cls", TAKES_UNKNOWN)
def test_pseudo_unknowns_are_added_to_the_batch(cls):
    inner, (embeddings, labels) = made(cls), batch(dtype=torch.float32)
    mixer = PseudoUnknowns(inner, share=0.5, alpha=4)
    torch.manual_seed(1)
    value = mixer(embeddings, labels)
    torch.manual_seed(1)
    mixtures = mixer.mix(embeddings, labels)
    unknown = torch.full((12,), UNKNOWN)
    expected = inner(torch.cat([embeddings, mixtures]), torch.cat([labels, unknown]))
    assert value == expected and value != inner(embeddings, labels)
    # A miner has seen the batch alone; the mixtures count in full.
    inner.set_reducer(reducers.DoNothingReducer())
    mined = torch.arange(4)
    part = mixer(embeddings, labels, (mined, mined, mined))["loss"]
    assert (part["losses"] > 0).tolist() == [True] * 4 + [False] * 20 + [True] * 12
    one = torch.zeros(24, dtype=torch.long)
    inner.set_reducer(reducers.MeanReducer())
    assert mixer(embeddings, one) == inner(embeddings, one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": L2SoftmaxLoss(C, D)}, "expected MarginOneVsRestLoss, ReciprocalPointLoss or ARPLLoss; got L2Soft"),
        ({"share": 0}, "share of PseudoUnknowns must be above 0; got 0"),
        ({"alpha": -1}, "must be above 0"),
        ({"share": "much"}, "share of PseudoUnknowns must be a finite number; got 'much'"),
    ],
)
def test_pseudo_unknowns_refuse(arguments, message):
    with pytest.raises(OsmlError, match=message):
        PseudoUnknowns(**{"loss": made(MarginOneVsRestLoss)} | arguments)


def test_mixtures_teach_the_space_between_classes():
    """Two classes a right angle apart: with mixtures as negatives the middle is refused, without them it is not."""
    torch.manual_seed(0)
    middle = {}
    for mixed in (False, True):
        points = nn.Parameter(normalize(torch.randn(40, D) * 0.1 + torch.eye(2, D).repeat_interleave(20, 0)))
        labels = torch.arange(2).repeat_interleave(20)
        inner = MarginOneVsRestLoss(2, D, scale=8)
        loss = PseudoUnknowns(inner, share=1.0) if mixed else inner
        optimizer = torch.optim.Adam([points, *inner.parameters()], lr=0.05)
        for _ in range(50):
            optimizer.zero_grad()
            loss(points, labels).backward()
            optimizer.step()
        between = normalize(normalize(points[:20]) + normalize(points[20:]))
        middle[mixed] = inner.get_logits(between).amax(dim=1).mean().item()
    assert middle[True] < middle[False]


# Rotation ---------------------------------------------------------------------------------------------------


def test_images_are_turned_by_what_is_said():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 6, 6)
    turned, quarters = RotationTask.turned(images)
    assert set(quarters.tolist()) == {0, 1, 2, 3}
    for image, other, quarter in zip(images, turned, quarters, strict=True):
        for _ in range(quarter):
            image = image.transpose(1, 2).flip(1)
        assert torch.equal(image, other)
    assert RotationTask(10)(torch.randn(7, 10), torch.arange(7) % 4).ndim == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MarginOneVsRestLoss(3, 4, margin=28.6), "radians"),
        (lambda: MarginOneVsRestLoss(3, 4, margin="big"), "margin of MarginOneVsRestLoss"),
        (lambda: MarginOneVsRestLoss(3, 4, scale=-3), "scale of MarginOneVsRestLoss"),
        (lambda: CACLoss(3, 4, magnitude=-1), "magnitude of CACLoss"),
        (lambda: CACLoss(3, 4, anchor_weight=-1), "anchor_weight"),
        (lambda: L2SoftmaxLoss(3, 4, scale=0), "scale of L2SoftmaxLoss"),
        (lambda: ReciprocalPointLoss(3, 4, temperature=0), "temperature"),
        (lambda: ARPLLoss(3, 4, margin=-1), "margin of ARPLLoss"),
        (lambda: PrototypicalLoss(softmax_scale=0), "softmax_scale"),
    ],
)
def test_arguments_outside_their_range_are_named(make, says):
    with pytest.raises(OsmlError, match=says):
        make()
