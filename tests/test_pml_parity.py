"""Our plug-ins in the place of pytorch-metric-learning's own: the same arguments, and the same answers for its part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.testers import (
    GlobalEmbeddingSpaceTester,
    GlobalTwoStreamEmbeddingSpaceTester,
    WithSameParentLabelTester,
)
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN, InferenceModel, MatchFinder
from sklearn.cluster import KMeans
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from osml_plugin import OpenSetAccuracyCalculator, OpenSetInferenceModel
from osml_plugin.metrics.functional import RANK_METRICS

CPU = torch.device("cpu")


def draw(n: int, seed: int):
    """Embeddings `(n, 3)`, fine labels and the coarse ones they belong to, `(n, 2)`."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randint(0, 6, (n,), generator=generator)
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))[fine]
    return embeddings + 0.6 * torch.randn(n, 3, generator=generator), torch.stack([fine, fine // 2], dim=1)


def both(**settings):
    return AccuracyCalculator(device=CPU, **settings), OpenSetAccuracyCalculator(device=CPU, **settings)


def same_answers(theirs, ours, *args, **kwargs):
    expected = theirs.get_accuracy(*args, **kwargs)
    found = ours.get_accuracy(*args, **kwargs)
    assert expected and set(found) - set(expected) <= set(RANK_METRICS)
    for name, value in expected.items():  # the same numbers, and NaN in the same places
        np.testing.assert_equal(found[name], value, err_msg=name)
    return found


def kmeans(embeddings, n):
    return torch.from_numpy(KMeans(n, n_init=1, random_state=0).fit_predict(embeddings.numpy()))


def other_fine(a, b):
    """Alike, but not the same: PML takes comparisons that no classes stand behind."""
    return (a[..., 1] == b[..., 1]) & (a[..., 0] != b[..., 0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": 1},
        {"k": 7, "avg_of_avgs": True},
        {"k": "max_bin_count", "return_per_class": True},
        {"knn_func": CustomKNN(LpDistance(normalize_embeddings=False, power=2), batch_size=16)},
        {"exclude": ("NMI", "AMI"), "knn_func": FaissKNN()},
        {"label_comparison_fn": lambda a, b: (a - b).abs() < 2, "exclude": ("NMI", "AMI"), "avg_of_avgs": True},
    ],
)
@pytest.mark.parametrize("kind", ["tensor", "array", "own reference", "within", "float", "unseen"])
def test_the_calculator_gives_pmls_numbers(settings, kind):
    (query, query_labels), (reference, reference_labels) = draw(25, 0), draw(60, 1)
    query_labels, reference_labels = query_labels[:, 0], reference_labels[:, 0]
    args = [query, query_labels, reference, reference_labels]
    if kind == "array":
        args = [a.numpy() for a in args]
    elif kind == "own reference":
        args = args[2:]
    elif kind == "within":
        args = [query, query_labels, torch.cat([query, reference]), torch.cat([query_labels, reference_labels]), True]
    elif kind == "float":
        args[1::2] = [a.double() / 2 for a in args[1::2]]
    elif kind == "unseen":
        args[1] = query_labels * 3
    found = same_answers(*both(kmeans_func=kmeans, **settings), *args)
    assert set(RANK_METRICS) <= set(found)


@pytest.mark.parametrize("as_numpy", [False, True])
@pytest.mark.parametrize("compare", [other_fine, lambda a, b: (a == b).all(dim=-1)])
def test_the_calculator_compares_labels_of_several_columns(compare, as_numpy):
    args = [*draw(25, 0), *draw(60, 1)]
    args = [a.numpy() for a in args] if as_numpy else args
    same_answers(*both(label_comparison_fn=compare, exclude=("NMI", "AMI")), *args)


@pytest.mark.parametrize("at", ["made", "called"])
def test_the_calculator_includes_and_excludes(at):
    args = [*draw(25, 0), *draw(60, 1)]
    args[1::2] = [a[:, 0] for a in args[1::2]]
    chosen = {"include": ("precision_at_1", "r_precision", "NMI"), "exclude": ("NMI",)}
    made, called = (chosen, {}) if at == "made" else ({}, chosen)
    found = same_answers(*both(**made), *args, **called)
    assert set(found) == {"precision_at_1", "r_precision"}
    ours = OpenSetAccuracyCalculator(device=CPU, include=("oscr",))
    assert set(ours.get_accuracy(*args)) == {"oscr"} and ours.get_curr_metrics() == ["oscr"]


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"k": 1.5},
        {"k": "most"},
        {"include": ("f1",)},
        {"include": "precision_at_1"},
        {"avg_of_avgs": True, "return_per_class": True},
        {"label_comparison_fn": other_fine, "include": ("NMI",)},
    ],
)
def test_the_calculator_refuses_what_pmls_refuses(settings):
    with pytest.raises(Exception) as theirs:
        AccuracyCalculator(device=CPU, **settings)
    with pytest.raises(theirs.type):
        OpenSetAccuracyCalculator(device=CPU, **settings)


def test_a_reference_that_does_not_start_with_its_queries_is_refused():
    (query, query_labels), (reference, reference_labels) = draw(5, 0), draw(9, 1)
    for calculator in both(include=("precision_at_1",)):
        with pytest.raises(ValueError, match="first len"):
            calculator.get_accuracy(query, query_labels[:, 0], reference, reference_labels[:, 0], True)
        with pytest.raises(ValueError, match="same length"):
            calculator.get_accuracy(query, query_labels[1:, 0], reference, reference_labels[:, 0])


class Dicts(Dataset):
    """Items as a dictionary of one picture, its labels and more."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return {"picture": self.inputs[i], "classes": self.labels[i], "number": i}


def from_dict(batch):
    return batch["picture"], batch["classes"]


@pytest.mark.parametrize("level", [0, 1, [0, 1], "all"])
@pytest.mark.parametrize("splits", [None, [("val", ["train"])], [("val", ["train", "val"]), ("train", ["train"])]])
@pytest.mark.parametrize("tester", [GlobalEmbeddingSpaceTester, WithSameParentLabelTester])
def test_testers_give_the_same_with_our_calculator(tester, splits, level):
    if tester is WithSameParentLabelTester and level == 1:
        level = 0  # the last level has no parents
    data = {"train": Dicts(*draw(40, 1)), "val": Dicts(*draw(25, 0))}
    results = []
    for calculator in both(include=("precision_at_1", "mean_average_precision"), k=3):
        made = tester(
            accuracy_calculator=calculator,
            data_and_label_getter=from_dict,
            label_hierarchy_level=level,
            dataloader_num_workers=0,
            data_device=CPU,
        )
        results.append(made.test(data, 1, nn.Identity(), splits_to_eval=splits and [(q, list(r)) for q, r in splits]))
    assert results[0] == results[1] and results[0]["val"]
    open_set = OpenSetAccuracyCalculator(include=("auroc", "closed_set_accuracy"), device=CPU)
    made.accuracy_calculator = open_set
    level = made.test(data, 1, nn.Identity(), splits_to_eval=[("val", ["train"])])["val"]
    assert any(name.startswith("closed_set_accuracy") for name in level)


def test_the_tester_of_two_streams_gives_the_same():
    (anchors, labels), (others, _) = draw(20, 0), draw(20, 0)
    data = {"val": TensorDataset(anchors, others, labels[:, 0])}
    names = ("precision_at_1",)
    ours = OpenSetAccuracyCalculator(include=(*names, "closed_set_accuracy", "auroc"), device=CPU)
    results = []
    for calculator in (AccuracyCalculator(include=names, device=CPU), ours):
        tester = GlobalTwoStreamEmbeddingSpaceTester(
            accuracy_calculator=calculator, dataloader_num_workers=0, data_device=CPU
        )
        results.append(tester.test(data, 1, nn.Identity())["val"])
    assert results[0]["precision_at_1_level0"] == results[1]["precision_at_1_level0"]
    assert 0 < results[1]["closed_set_accuracy_level0"] <= 1 and np.isnan(results[1]["auroc_level0"])


class Words(nn.Module):
    """Embeds texts, as a language model's tokenizer in front would take them: by their letters."""

    def forward(self, texts):
        return torch.tensor([[len(t), t.count("a") + 1, t.count("o")] for t in texts]).float()


class Texts(Dataset):
    words = ("cat", "dog", "wolf", "panda", "koala", "boar")

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        return self.words[i], i


@pytest.mark.parametrize("source", ["tensor", "list", "dataset"])
@pytest.mark.parametrize("settings", [{}, {"normalize_embeddings": False}, {"knn_func": FaissKNN()}])
def test_the_inference_model_searches_and_matches_as_pmls_does(source, settings, tmp_path):
    torch.manual_seed(0)
    trunk, embedder = nn.Linear(3, 4), nn.Linear(4, 4)
    inputs, labels = draw(40, 1)
    given = {"tensor": inputs, "list": list(inputs), "dataset": TensorDataset(inputs, labels[:, 0])}[source]
    finder = MatchFinder(LpDistance(), threshold=0.5)
    answers = []
    for model in (InferenceModel, OpenSetInferenceModel):
        made = model(trunk, embedder, finder, data_device=CPU, **settings)
        made.train_knn(given, batch_size=7)
        made.add_to_knn(given)
        made.save_knn_func(str(tmp_path / "index"))
        made.load_knn_func(str(tmp_path / "index"))
        distances, rows = made.get_nearest_neighbors(inputs[:5], k=4)
        matches = made.get_matches(inputs[:6], inputs[3:9]), made.get_matches(inputs[:6], return_tuples=True)
        answers.append(
            [distances, rows, *matches, made.is_match(inputs[:4], inputs[4:8]), made.is_match(inputs[:1], inputs[:1])]
        )
    for theirs, ours in zip(*answers, strict=True):
        np.testing.assert_equal(np.asarray(ours), np.asarray(theirs))


def test_the_inference_model_takes_texts_and_an_index_that_is_not_there_as_pmls_does():
    answers = []
    for model in (InferenceModel, OpenSetInferenceModel):
        made = model(Words(), data_device=CPU)
        made.train_knn(Texts())
        made.add_to_knn([["mole", "lemur"], ["yak", "otter"]])
        answers.append(made.get_nearest_neighbors(["cat", "goat"], k=3)[1])
        untrained = model(nn.Identity(), data_device=CPU, knn_func=FaissKNN(reset_before=False, reset_after=False))
        with pytest.raises(ValueError, match="needs to be initialized"):
            untrained.get_nearest_neighbors(torch.zeros(1, 3), k=1)
        with pytest.raises(TypeError, match="not supported"):
            made.train_knn({"a": 1})
    assert torch.equal(*answers)
