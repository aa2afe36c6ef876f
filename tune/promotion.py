"""The champion of a registered model: what beats it takes its place, and can be taken back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from osml_plugin import UNKNOWN
from osml_plugin.bundle import load_bundle
from osml_plugin.data import Items, open_items
from osml_plugin.errors import OsmlError
from osml_plugin.metrics import open_set_metrics
from osml_plugin.recognizer import OpenSetRecognizer
from osml_plugin.tracking import check_tracking, download_bundle, find_version, mlflow_calls, tracking_uri
from osml_plugin.tracking_names import model_name

CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of model versions."""
PAST = "osml.champions"
"""The tag of a registered model with the versions that were champions before, oldest first, as a JSON list."""


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion."""

    name: str
    version: int
    promoted: bool
    champion: int | None
    """The version that was the champion before."""
    scores: dict[str, float]
    """OSCR of "challenger" and "champion" on the same validation items; empty where nothing was compared."""
    n_items: int
    """How many these were."""
    reason: str
    """One sentence."""


def promote(
    name: str,
    *,
    data: str | Path | None = None,
    version: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Promotion:
    """Make the challenger of a registered model its champion, if it beats the present one.

    Both are judged by their OSCR on the challenger's validation items, without those that the champion was trained,
    calibrated or taught on; a tie does not win. Test items take no part. Without a champion there is nothing to
    beat.

    Args:
        data: where these items are, as `osml_plugin.data.open_items` takes it; None = where the version's tag
            `data_path` says.
        version: this version instead of the one with the alias 'challenger'.
        force: promote without comparing.

    Raises:
        OsmlError: for a model or version that does not exist, and where the two cannot be compared.
    """
    name, store = model_name(name), tracking_uri()
    check_tracking(store, make=False)
    with mlflow_calls(store):
        found = find_version(name, alias=CHALLENGER) if version is None else find_version(name, version=version)
        challenger, champion = int(found.version), _champion(name)
        was = found.tags.get("data_path")
    scores, n_items = {}, 0
    if champion == challenger:
        promoted, reason = False, f"version {challenger} is the champion already"
    elif champion is None:
        promoted, reason = True, f"version {challenger} is the first champion"
    elif force:
        promoted, reason = True, f"version {challenger} replaces version {champion} without a comparison, as asked"
    else:
        if data is None:
            data = _where_they_were(name, challenger, was)
        scores, n_items = _compared(name, challenger, champion, data, progress)
        promoted = scores["challenger"] > scores["champion"]
        figures = f"{scores['challenger']:.4f} against {scores['champion']:.4f} OSCR on {n_items} validation items"
        verb = "beats" if promoted else "does not beat"
        reason = f"version {challenger} {verb} version {champion}: {figures}"
    if promoted:
        with mlflow_calls(store):
            # The list first: if the alias is then not set, its last entry is the champion, which `rollback` skips.
            _set_past(name, [*_past(name), *([] if champion is None else [champion])])
            _set_champion(name, challenger)
    return Promotion(name, challenger, promoted, champion, scores, n_items, reason)


def rollback(name: str) -> int:
    """Make the champion before the present one the champion again; returns its version.

    Raises:
        OsmlError: for a model that does not exist, or that had no other champion whose version is still there.
    """
    name, store = model_name(name), tracking_uri()
    check_tracking(store, make=False)
    with mlflow_calls(store):
        champion, past = _champion(name), _past(name)
        while past:
            before = past.pop()
            if before != champion and _exists(name, before):
                _set_champion(name, before)
                _set_past(name, past)
                return before
    now = "no champion" if champion is None else f"champion version {champion}"
    raise OsmlError(f"model '{name}' has {now} and none before it: nothing to go back to")


# --- the comparison --------------------------------------------------------------------------------------


def _compared(
    name: str, challenger: int, champion: int, data: str | Path, progress: bool
) -> tuple[dict[str, float], int]:
    """The OSCR of both on the same items, and how many these are."""
    versions = {"challenger": challenger, "champion": champion}
    recognizers = {role: load_bundle(download_bundle(f"models:/{name}/{number}")) for role, number in versions.items()}
    new, old = recognizers["challenger"], recognizers["champion"]
    if "validation_items" not in new.details:
        raise _not_comparable("the challenger's bundle does not name its validation items", challenger, champion)
    if set(new.class_names) != set(old.class_names):
        differ = sorted(set(new.class_names) ^ set(old.class_names))
        raise _not_comparable(f"only one of them knows {', '.join(map(repr, differ[:3]))}", challenger, champion)
    items = _common_items(open_items(data), new, old)
    known = np.isin(items.labels, new.class_names) if len(items) else np.zeros(0, bool)
    if not known.any() or known.all():
        missing = "no items" if not len(items) else "only unknown items" if not known.any() else "only known items"
        where = f"of the challenger's validation items, those in '{data}' that the champion has not learned from"
        raise _not_comparable(f"{where} are {missing}", challenger, champion)
    scores = {}
    for role, recognizer in recognizers.items():
        try:
            scores[role] = _oscr(recognizer, items, f"judging the {role}" if progress else None)
        except OsmlError as error:
            raise _not_comparable(f"the {role} cannot take '{data}': {error}", challenger, champion) from error
    return scores, len(items)


def _where_they_were(name: str, version: int, data: str | None) -> str:
    """The place of the validation items that a version's tag names."""
    if data is None:
        raise OsmlError(f"version {version} of '{name}' does not say where its data are: name them with --data")
    if not Path(data).exists():
        raise OsmlError(
            f"the data of version {version} of '{name}' are not in '{data}' any more: name them with --data"
        )
    return data


def _not_comparable(why: str, challenger: int, champion: int) -> OsmlError:
    return OsmlError(
        f"versions {challenger} and {champion} cannot be compared: {why}; --force promotes without a comparison"
    )


def _common_items(items: Items, challenger: OpenSetRecognizer, champion: OpenSetRecognizer) -> Items:
    """The challenger's validation items, but for those that the champion learned from, and for declared test items."""
    fingerprints = items.fingerprints()
    learned = _seen(champion, "seen") - _seen(champion, "validation_items")
    use = np.isin(fingerprints, np.array(sorted(_seen(challenger, "validation_items") - learned), dtype=np.uint64))
    if items.roles is not None:
        use &= np.array([role != "test" for role in items.roles])
    return items.select(use)


def _seen(recognizer: OpenSetRecognizer, which: str) -> set[int]:
    return set(recognizer.details.get(which, []))


def _oscr(recognizer: OpenSetRecognizer, items: Items, bar: str | None) -> float:
    inputs = items.paths if items.embeddings is None else items.embeddings
    recognition = recognizer.predict(inputs, neighbours=0, progress=bar)
    ids = {name: i for i, name in recognizer.gallery.classes.items()}
    labels = np.array([ids.get(name, UNKNOWN) for name in items.labels])
    return open_set_metrics(recognition.scores, labels, np.array([ids[n] for n in recognition.nearest])).oscr


# --- the registry ----------------------------------------------------------------------------------------


def _registered(name: str) -> Any:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient().get_registered_model(name)
    except MlflowException:
        find_version(name, version=1)  # says which models there are
        raise


def _champion(name: str) -> int | None:
    alias = _registered(name).aliases.get(CHAMPION)
    return None if alias is None else int(alias)


def _past(name: str) -> list[int]:
    return json.loads(_registered(name).tags.get(PAST, "[]"))


def _set_past(name: str, versions: list[int]) -> None:
    from mlflow import MlflowClient

    MlflowClient().set_registered_model_tag(name, PAST, json.dumps(versions))


def _set_champion(name: str, version: int) -> None:
    from mlflow import MlflowClient

    MlflowClient().set_registered_model_alias(name, CHAMPION, str(version))


def _exists(name: str, version: int) -> bool:
    try:
        find_version(name, version=version)
    except OsmlError:
        return False
    return True
