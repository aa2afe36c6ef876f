"""Batches, labels and comparisons as pytorch-metric-learning takes them, in our plug-ins."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import losses, trainers
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from osml_plugin import UNKNOWN, OpenSetAccuracyCalculator, OpenSetHook, OpenSetInferenceModel, OsmlError, detectors
from osml_plugin.metrics import open_set_metrics
from osml_plugin.pml_batches import BatchReader, KnownClasses

CPU = torch.device("cpu")


class Items(Dataset):
    def __init__(self, item, n):
        self.item, self.n = item, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item(i)


@pytest.fixture(scope="module")
def data():
    """Five classes, the last of them unknown; `(embeddings, labels)` of training and of validation."""
    x, y, _ = sphere_classes(n_classes=5, per_class=40, spread=0.35)
    x, y = x[:, :8], y + 3
    odd = torch.arange(len(y)) % 2 == 1
    train = ~odd & (y < 7)
    return (x[train], y[train]), (x[odd], y[odd])


def sets(data, item):
    return [Items(lambda i, x=x, y=y: item(x[i], y[i]), len(y)) for x, y in data]


def modules():
    torch.manual_seed(0)
    trunk = nn.Linear(8, 8)
    return {"trunk": trunk, "embedder": nn.Identity()}, {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), 0.01)}


def history(hook, train_set, trainer=trainers.MetricLossOnly, models=None, losses_of=("metric_loss",), **settings):
    parts, optimizers = models or modules()
    settings = {"batch_size": 32, "dataloader_num_workers": 0, "data_device": CPU, **settings}
    torch.manual_seed(1)
    made = trainer(
        models=parts,
        optimizers=optimizers,
        loss_funcs={name: losses.ContrastiveLoss() for name in losses_of},
        dataset=train_set,
        end_of_epoch_hook=hook,
        **settings,
    )
    made.train(num_epochs=1)
    return hook.history


def two(batch):
    return batch["x"], batch["y"]


def coarse(y):
    return y // 2


READINGS = {
    "dictionaries": (lambda x, y: {"x": x, "y": y, "path": "a.png"}, {"data_and_label_getter": two}),
    "three values": (lambda x, y: (x, 0, y), {"data_and_label_getter": lambda b: (b[0], b[2])}),
    "one column": (lambda x, y: (x, y[None]), {}),
    "second level": (lambda x, y: (x, torch.stack([coarse(y), y])), {"label_hierarchy_level": 1}),
    "tuples of labels": (lambda x, y: (x, (coarse(y), y)), {"label_hierarchy_level": 1}),
    "floats": (lambda x, y: (x, y.float()), {}),
    "text": (
        lambda x, y: (x, f"class {y}"),
        {
            "data_and_label_getter": lambda b: (b[0], np.array(b[1])),
            "set_min_label_to_zero": True,
            "dataset_labels": [f"class {y}" for y in range(3, 8)],
        },
    ),
    "collated": (
        lambda x, y: [x, y],
        {"collate_fn": lambda items: (torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items]))},
    ),
}


class TestHook:
    @pytest.mark.parametrize("reading", READINGS)
    def test_it_reads_batches_as_its_trainer_does(self, data, reading):
        plain = sets(data, lambda x, y: (x, y))
        expected = history(OpenSetHook(*plain), plain[0])
        item, settings = READINGS[reading]
        train_set, validation = sets(data, item)
        found = history(OpenSetHook(train_set, validation), train_set, **settings)
        assert found == expected and found[0]["n_unknown_items"] == 20

    def test_its_own_way_of_reading_comes_first(self, data):
        plain = sets(data, lambda x, y: (x, y))
        expected = history(OpenSetHook(*plain), plain[0])
        dicts = sets(data, lambda x, y: {"x": x, "y": torch.stack([coarse(y), y])})
        hook = OpenSetHook(*dicts, data_and_label_getter=two, label_hierarchy_level=1)
        assert history(hook, plain[0]) == expected
        assert hook.evaluate(nn.Identity(), "cpu").n_unknown_items == 20

    def test_a_level_is_what_is_known(self, data):
        """Class 7 is unknown, but its super-class 3 is that of class 6: on that level nothing is unknown."""
        train_set, validation = sets(data, lambda x, y: (x, torch.stack([coarse(y), y])))
        with pytest.raises(OsmlError, match=r"known and unknown ones \(there are 100 and 0\)"):
            history(OpenSetHook(train_set, validation), train_set)
        every = OpenSetHook(train_set, validation, label_hierarchy_level="all").evaluate(nn.Identity(), "cpu")
        fine = OpenSetHook(train_set, validation, label_hierarchy_level=1).evaluate(nn.Identity(), "cpu")
        assert every == fine and fine.n_unknown_items == 20

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_it_runs_models_of_other_precision(self, data, dtype):
        plain = sets(data, lambda x, y: (x, y))
        expected = history(OpenSetHook(*plain), plain[0])
        models = {"trunk": nn.Linear(8, 8), "embedder": nn.Linear(8, 8)}
        models["trunk"].load_state_dict(modules()[0]["trunk"].state_dict())
        nn.init.eye_(models["embedder"].weight), nn.init.zeros_(models["embedder"].bias)
        models = {name: part.to(dtype) for name, part in models.items()}
        optimizers = {"trunk_optimizer": torch.optim.SGD(models["trunk"].parameters(), 0.01)}
        optimizers["embedder_optimizer"] = torch.optim.SGD(models["embedder"].parameters(), 0.0)
        found = history(OpenSetHook(*plain), plain[0], models=(models, optimizers), dtype=dtype)
        assert found[0]["auroc"] == pytest.approx(expected[0]["auroc"], abs=0.02)

    def test_other_trainers(self, data):
        plain = sets(data, lambda x, y: (x, y))
        parts, optimizers = modules()
        parts["classifier"] = nn.Linear(8, 8)
        found = history(OpenSetHook(*plain), plain[0], trainers.TrainWithClassifier, (parts, optimizers))
        assert found == history(OpenSetHook(*plain), plain[0])
        cascade = {"losses_of": ("metric_loss_0", "metric_loss_1"), "embedding_sizes": [4, 4]}
        found = history(OpenSetHook(*plain), plain[0], trainers.CascadedEmbeddings, **cascade)
        assert 0 < found[0]["oscr"] < 1

    def test_two_streams_need_a_getter_of_the_hooks_own(self, data):
        streams = sets(data, lambda x, y: (x, x + 0.01, y))
        with pytest.raises(
            OsmlError, match=r"batches are 3 values, expected \(inputs, labels\): give a data_and_label_"
        ):
            history(OpenSetHook(*streams), streams[0], trainers.TwoStreamMetricLoss)
        hook = OpenSetHook(*streams, data_and_label_getter=lambda b: (b[0], b[2]))
        assert history(hook, streams[0], trainers.TwoStreamMetricLoss)[0]["n_unknown_items"] == 20

    def test_labels_that_are_none_are_refused(self, data):
        for item, message in [
            (lambda x, y: x, "gives inputs alone"),
            (lambda x, y: (x, y * float("nan")), "labels hold NaN"),
            (
                lambda x, y: {"x": x, "y": y},
                r"dictionaries with the keys 'x', 'y', .*lambda batch: \(batch\['x'\], batch",
            ),
            (lambda x, y: (x, torch.eye(9)[y]), "labels have 9 columns: name one .* one-hot"),
        ]:
            with pytest.raises(OsmlError, match=message):
                OpenSetHook(*sets(data, item)).evaluate(nn.Identity(), "cpu")


def test_a_level_that_is_none():
    labels = torch.zeros(4, 2)
    for level, message in [(2, "2 columns"), ([0, 2], "2 columns"), (-3, "2 columns")]:
        with pytest.raises(OsmlError, match=message):
            BatchReader(level=level)((labels, labels))
    for level in ("fine", 1.5, [0, 1.5], [None]):
        with pytest.raises(OsmlError, match="expected a column, a list of columns"):
            BatchReader(level=level)
    with pytest.raises(OsmlError, match="data_and_label_getter is 'label', expected a function"):
        BatchReader("label")
    with pytest.raises(OsmlError, match="1 columns"):
        BatchReader(level=1)((labels, labels[:, 0]))


def test_columns_of_numpy_are_columns():
    labels = torch.arange(8).reshape(4, 2)
    assert torch.equal(BatchReader(level=np.int64(1))((labels, labels))[1], labels[:, 1])
    assert torch.equal(BatchReader(level=list(np.arange(2)))((labels, labels))[1], labels)
    assert OpenSetInferenceModel(nn.Identity(), data_device=CPU, label_hierarchy_level=np.int64(1)).reader.level == 1


class TestInferenceModel:
    @pytest.mark.parametrize("reading", ["dictionaries", "three values", "one column", "second level"])
    def test_it_reads_datasets_as_trainers_do(self, data, reading):
        item, settings = READINGS[reading]
        train_set, validation = sets(data, item)
        model = OpenSetInferenceModel(nn.Identity(), data_device=CPU, **settings).fit(train_set)
        plain = sets(data, lambda x, y: (x, y))
        expected = OpenSetInferenceModel(nn.Identity(), data_device=CPU).fit(plain[0])
        assert torch.equal(model.predict(validation), expected.predict(data[1][0]))
        for some in (model, expected):
            some.enroll(17, data[1][0][-20:-10])
        model.train_knn(train_set)
        assert torch.equal(model.predict(validation, batch_size=7), expected.predict(plain[1]))
        assert (model.predict(validation) == 17).any()
        assert model.get_nearest_neighbors(data[0][0][:1], k=1)[1] == 0

    def test_inputs_without_labels_can_be_predicted(self, data):
        model = OpenSetInferenceModel(nn.Identity(), data_device=CPU).fit(TensorDataset(*data[0]))
        inputs = sets(data, lambda x, y: x)[1]
        assert torch.equal(model.predict(inputs), model.predict(data[1][0]))
        # PML takes a batch of two for one input and one label.
        assert torch.equal(model.predict(inputs, batch_size=2), model.predict(data[1][0]))

    def test_a_new_class_answers_with_its_own_number(self, data):
        x, y = data[0]
        model = OpenSetInferenceModel(nn.Identity(), data_device=CPU).fit(TensorDataset(x[y != 5], y[y != 5]))
        model.enroll(np.int64(5), x[y == 5])  # between the others
        answers = model.predict(x)
        assert (answers[y == 5] == 5).any() and set(answers.tolist()) <= {UNKNOWN, 3, 4, 5, 6}
        for label, message in [("seal", "text"), (-1, "numbered from 0"), (5.5, "integers"), (True, "integers")]:
            with pytest.raises(OsmlError, match=message):
                model.enroll(label, x[:3])

    def test_labels_that_are_none_are_refused(self, data):
        for item, message in [
            (
                lambda x, y: (x, f"class {y}"),
                "labels are text such as 'class 3', expected integers: number the classes",
            ),
            (lambda x, y: (x, torch.eye(9)[y]), "labels have 9 columns"),
            (lambda x, y: {"x": x, "y": y}, "batches are dictionaries with the keys 'x', 'y'"),
        ]:
            with pytest.raises(OsmlError, match=message):
                OpenSetInferenceModel(nn.Identity(), data_device=CPU).fit(sets(data, item)[0])
        with pytest.raises(OsmlError, match="expected one column"):
            OpenSetInferenceModel(nn.Identity(), data_device=CPU, label_hierarchy_level="all")
        with pytest.raises(OsmlError, match="dataset is empty"):
            OpenSetInferenceModel(nn.Identity(), data_device=CPU).fit(Items(None, 0))


class TestComparison:
    def test_super_classes(self):
        """Classes 10 to 14 are of super-class 1, 20 to 24 of 2, 30 of a third that is not there."""
        torch.manual_seed(0)
        centers = {c: 0.3 * torch.randn(16) + 4 * torch.eye(16)[c // 10] for c in (10, 11, 12, 20, 21, 22, 30)}

        def draw(classes):
            labels = torch.tensor(classes).repeat_interleave(20)
            return torch.stack([centers[int(c)] for c in labels]) + 0.3 * torch.randn(len(labels), 16), labels

        reference, labels = draw((10, 11, 20, 21))
        calculator = OpenSetAccuracyCalculator(
            include=("precision_at_1", "auroc", "closed_set_accuracy", "oscr"),
            k=1,
            label_comparison_fn=lambda a, b: a // 10 == b // 10,
            device=CPU,
        )
        known = calculator.get_accuracy(*draw((10, 12, 20, 22)), reference, labels)
        assert known["closed_set_accuracy"] == known["precision_at_1"] == 1 and math.isnan(known["auroc"])
        found = calculator.get_accuracy(*draw((10, 12, 20, 22, 30)), reference, labels)
        assert found["closed_set_accuracy"] == 1 and found["auroc"] == found["oscr"] > 0.95

    @given(
        st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 2)), min_size=1, max_size=12),
        st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 2)), min_size=1, max_size=12),
        st.sampled_from(["equal", "one column", "first", "near", "other"]),
    )
    def test_known_and_correct_are_what_two_loops_say(self, reference, queries, how):
        reference, queries = torch.tensor(reference).float(), torch.tensor(queries).float()
        compare = {
            "equal": torch.eq,
            "one column": torch.eq,
            "first": lambda a, b: a[..., 0] == b[..., 0],
            "near": lambda a, b: (a - b).abs().sum(dim=-1) < 2,
            "other": lambda a, b: (a[..., 0] == b[..., 0]) & (a[..., 1] != b[..., 1]),
        }[how]
        if how == "one column":
            reference, queries = reference[:, 0], queries[:, 0]

        def equal(a, b):
            return bool(compare(a[None], b[None]).all())

        def is_unknown(label):
            return bool((label == UNKNOWN).any() if compare is torch.eq else (label == UNKNOWN).all())

        classes, of_reference = KnownClasses.of(reference, compare)
        for label, c in zip(reference, of_reference.tolist(), strict=True):
            assert c == UNKNOWN if is_unknown(label) else torch.equal(classes.labels[c], label)
        known = [label for label in reference if not is_unknown(label)]
        assert len(classes.labels) == len({tuple(label.view(-1).tolist()) for label in known})
        if not known:
            return
        predicted = torch.arange(len(queries)) % len(classes.labels)
        truth = classes.truth(queries, predicted).tolist()
        for query, guess, true in zip(queries, predicted.tolist(), truth, strict=True):
            if is_unknown(query) or not any(equal(query, label) for label in known):
                assert true == UNKNOWN
            else:
                assert (true == guess) == equal(query, classes.labels[guess]) and true >= 0

    def test_every_metric_follows_the_comparison(self, data):
        """With super-classes compared, all metrics are those of the super-classes of what was predicted."""
        (x, y), (q, _) = data
        of_queries = data[1][1] + 1  # classes 4 to 8: 8 is of super-class 4, which is not there
        calculator = OpenSetAccuracyCalculator(
            exclude=("NMI", "AMI"), k=1, label_comparison_fn=lambda a, b: a // 2 == b // 2, device=CPU
        )
        found = calculator.get_accuracy(q, of_queries, x, y)
        predicted, scores = detectors.create("knn").fit(x, y).predict(q)
        truth = torch.where(torch.isin(of_queries // 2, y // 2), of_queries // 2, UNKNOWN)
        expected = open_set_metrics(scores, truth, predicted // 2).to_dict()
        ours = {name: value for name, value in found.items() if name in expected}
        assert ours == {name: pytest.approx(expected[name]) for name in ours} and "oscr" in ours

    def test_labels_that_are_none_are_refused(self, data):
        (x, y), (q, of_queries) = data
        calculator = OpenSetAccuracyCalculator(include=("auroc",), device=CPU)
        expected = calculator.get_accuracy(q, of_queries, x, y)
        assert calculator.get_accuracy(q, of_queries.tolist(), x, y.numpy().astype(">i4")) == expected
        assert calculator.get_accuracy(q, of_queries / 10, x, y / 10) == expected  # not cut to whole numbers
        for labels, message in [
            ([f"class {c}" for c in y.tolist()], "labels are text such as 'class 3'"),
            (y * float("nan"), "labels hold NaN"),
            (torch.stack([y, y], dim=1), "the same number of columns"),
            (y + 2**25, "PML compares them in single precision"),
        ]:
            with pytest.raises(OsmlError, match=message):
                calculator.get_accuracy(q, of_queries, x, labels)

    def test_it_goes_through_pickle(self, data):
        (x, y), (q, of_queries) = data
        calculator = OpenSetAccuracyCalculator(include=("auroc", "precision_at_1"), k=1, device=CPU)
        again = pickle.loads(pickle.dumps(calculator))
        assert again.get_accuracy(q, of_queries, x, y) == calculator.get_accuracy(q, of_queries, x, y)

    def test_a_reference_of_unknown_items_alone_tells_nothing(self, data):
        (x, y), (q, of_queries) = data
        calculator = OpenSetAccuracyCalculator(include=("auroc", "oscr"), device=CPU)
        assert all(map(math.isnan, calculator.get_accuracy(q, of_queries, x, y * 0 - 1).values()))
