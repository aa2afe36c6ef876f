"""Many thresholds at once against one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osml_plugin import OsmlError
from osml_plugin.metrics import open_set_metrics, operating_points


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_they_are_what_deciding_one_by_one_gives(seed, n, n_classes, unknown):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, n) / 4  # with ties
    labels = np.where(rng.random(n) < unknown, -1, rng.integers(0, n_classes, n))
    predictions = rng.integers(0, n_classes, n)
    taus = np.concatenate([[-np.inf, np.inf], np.unique(scores), rng.random(3) * 2])
    points = operating_points(scores, labels, predictions, taus)
    for i, tau in enumerate(taus):
        one = open_set_metrics(scores, labels, predictions, rejected=scores > tau)
        for figure in ("known_rejected", "unknown_rejected", "macro_f1"):
            np.testing.assert_allclose(getattr(points, figure)[i], getattr(one, figure), atol=1e-12)


def test_taus_may_be_a_tensor_and_bad_ones_are_refused():
    items = [0.1, 0.7, 0.9], [0, 1, -1], [0, 0, 1]
    taus = torch.tensor([0.5, 0.8], requires_grad=True)
    assert operating_points(*items, taus).known_rejected.tolist() == [0.5, 0.0]
    for wrong, message in (([np.nan], "none of them NaN"), (["a"], "real numbers"), ([[0.5]], "shape"), ([], "empty")):
        with pytest.raises(OsmlError, match=message):
            operating_points(*items, wrong)
