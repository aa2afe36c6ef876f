"""From data to a bundle: one training run, whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import detectors, pml, thresholds
from .bundle import MANIFEST, check_writable, save_bundle
from .checkpoints import CheckpointWriter
from .config import Config, load_config
from .copies import copy_radius
from .data import (
    Items,
    Split,
    TrainingRoles,
    check_pictures,
    draw_split,
    open_items,
    readable_items,
    tell_shared_files,
    training_roles,
)
from .data.likeness import SeenItems, near_copies, signatures
from .errors import OsmlError
from .network import epochs
from .recognizer import OpenSetRecognizer
from .selection import DEFAULT, Cached, Candidate, has_unknown, select
from .selection import candidates as detector_candidates
from .training_data import TrainingData, bit_depth_of
from .training_run import TrainingRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run made."""

    recognizer: OpenSetRecognizer
    bundle: Path
    split: Split
    n_items: dict[str, int]
    """Items of each data role."""
    candidates: list[Candidate]
    """Detectors tried on validation, best first; empty where there was nothing to choose by."""
    history: list[dict[str, float]]
    """Validation metrics of each epoch."""
    skipped: list[tuple[Path, str]]
    """Images that cannot be read, with the reason."""


def train(
    data: str | Path,
    out: str | Path,
    *,
    split: str | Path | Split | None = None,
    n_known: int | None = None,
    seed: int | None = None,
    config: str | Path | Config | None = None,
    overrides: Iterable[str] = (),
    alpha: float | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train on known classes, choose detector and threshold on validation, and write a bundle.

    Args:
        data: a folder of images by class, a manifest, or an embeddings file; see `osml_plugin.data.open_items`.
        out: the bundle's folder.
        split: which classes are known, pseudo-unknown and unknown; None = drawn by `n_known` and `seed`.
        config: a YAML file or a `Config`; `overrides` (`loss.margin=20`), `seed` and `alpha` win over it.
        skip_bad: leave out images that cannot be read instead of stopping.

    Raises:
        OsmlError: for bad input, before anything is trained or written.
    """
    out = Path(out)
    if out.exists() and not (overwrite and (out / MANIFEST).is_file()):
        raise OsmlError(
            f"'{out}' exists: "
            + ("pass --overwrite to replace the bundle" if (out / MANIFEST).is_file() else "choose another --out")
        )
    config = _config(config, overrides, seed, alpha)
    items = open_items(data)
    split = split_of(split, items, n_known, config.seed)
    items, survey = readable_items(items, skip_bad, progress, config.data.ground)
    of_images = None if survey is None else survey.signatures
    sets = sets_of(items, of_images, split, config)
    roles = roles_of(items, split, config, sets)
    check_choices(config, split, epochs(config, 0 if survey is None else 1))
    check_writable(out)
    tell_shared_files(items)
    if survey is not None:
        used = survey.of(roles.used)
        check_pictures(items, survey, bit_depth_of(config, used))

    run = TrainingRun(TrainingData(items, split, roles, survey, config), config, device=device, progress=progress)
    data, hook, checkpoints = run.data, None, None
    if run.trainer:
        if has_unknown(data.labels["validation"]):
            hook = run.trainer.end_of_epoch_hook = data.hook(run.model, run.trained, run.device)
        if config.training.checkpoints is not None:
            checkpoints = CheckpointWriter(run, out, config.training.checkpoints)
        run.trainer.train(num_epochs=run.n_epochs)
        if hook is not None:
            hook.restore_best(run.trained)
    cached = run.embed()
    candidates = choose(config, data, cached, progress)
    seen = seen_items(items, of_images, roles, sets)
    recognizer = assemble(
        run, cached, candidates, split=split, items=items, seen=seen, data_fingerprint=items.fingerprint()
    )
    if checkpoints is not None:
        recognizer.details["checkpoints"] = checkpoints.files
    save_bundle(recognizer, out)
    if checkpoints is not None:
        checkpoints.publish()
    return TrainResult(
        recognizer, out, split, data.n_items, candidates, hook.history if hook else [], survey.bad if survey else []
    )


def choose(config: Config, data: TrainingData, cached: Mapping[str, Cached], progress: bool = True) -> list[Candidate]:
    """The detectors that the configuration leaves to choose among, best first; empty where nothing can choose."""
    if not has_unknown(data.labels["validation"]):
        return []
    labels = data.embedded_labels["train"], data.labels["validation"]
    return select(cached, *labels, tried(config), seed=config.seed, progress=progress)


def assemble(
    run: TrainingRun,
    cached: Mapping[str, Cached],
    candidates: Sequence[Candidate],
    *,
    split: Split,
    items: Items,
    seen: SeenItems,
    data_fingerprint: str,
) -> OpenSetRecognizer:
    """The recognizer of a trained run: gallery, the best candidate's detector, a threshold fitted on calibration.

    Args:
        cached: the run's embeddings, as `TrainingRun.embed` gives them.
        items: those that the indices of `run.data` mean.
        seen: the items that nobody may test the recognizer on.
        data_fingerprint: of the whole source.
    """
    config, data = run.config, run.data
    best = candidates[0] if candidates else None
    run.model.output = best.output if best else next(iter(cached))
    embedded, weights = cached[run.model.output].embeddings, cached[run.model.output].class_weights
    recognizer = OpenSetRecognizer(
        detector=detectors.create(best.detector, **best.params) if best else _default_detector(config),
        threshold=threshold_of(config),
        alpha=config.alpha,
        model=run.model.cpu().eval(),
        preprocessing=data.preprocessing,
    )
    fingerprints = items.fingerprints()
    recognizer.details = {
        "config": config.model_dump(mode="json"),
        "input": {"channels": data.channels, "size": data.size},
        "output": run.model.output,
        "split": split.to_dict(),
        "seen": sorted(fingerprints[data.seen].tolist()),
        "validation_items": sorted(fingerprints[data.indices["validation"]].tolist()),
        "provenance": {
            "data": data_fingerprint,
            "n_items": data.n_items,
            "versions": {p: version(p) for p in ("osml-plugin", "torch", "torchvision", "pytorch-metric-learning")},
        },
        "validation": asdict(best) if best else None,
    }
    names = data.names
    held = [*names["references"], *names["calibration"]]
    both = torch.cat([embedded["train"], embedded["calibration"]])
    # The roles hold each item once already, by what the images show; copies of the embedder's making are none.
    recognizer.fit(
        embedded["train"],
        names["references"],
        calibration=(embedded["calibration"], names["calibration"]),
        validation=(embedded["validation"], names["validation"]) if "validation" in embedded else None,
        class_weights=weights,
        near_copies=False,
        copy_radius=copy_radius(both, held) if config.data.near_copies else 0.0,
    )
    recognizer.seen = seen
    return recognizer


def sets_of(items: Items, of_images: np.ndarray | None, split: Split, config: Config) -> np.ndarray | None:
    """Sets `(N,)` of near-copies; None where the configuration takes items of other content for different ones.

    Only items that training may see are looked at: each other one is alone in its set.

    Args:
        of_images: the images' signatures, as a survey found them; None for embeddings.
    """
    if not config.data.near_copies:
        return None
    looked_at = np.isin(items.labels, [*split.known, *split.pseudo_unknown])
    if items.roles is not None:
        looked_at &= np.array(items.roles) != "test"
    some = np.flatnonzero(looked_at)
    if not len(some):
        return None
    found = near_copies(items.select(some), None if of_images is None else of_images[some])
    sets = len(items) + np.arange(len(items))
    sets[some] = found
    n_sets = int(found.max()) + 1
    if n_sets < len(some):
        logger.warning(
            "%d items are %d near-identical sets: each set is kept in one role and counts once; "
            "data.near_copies=false takes them for different items",
            *(len(some), n_sets),
        )
    return sets


def seen_items(items: Items, of_images: np.ndarray | None, roles: TrainingRoles, sets: np.ndarray | None) -> SeenItems:
    """Likeness of the items that training and choosing saw, copies of them included."""
    found, labels = signatures(items, of_images)[roles.seen], np.array(items.labels)[roles.seen]
    if sets is None:
        return SeenItems(found, np.zeros(len(found), np.float32))
    return SeenItems.of(found, labels, sets[roles.seen])


def _config(
    config: str | Path | Config | None, overrides: Iterable[str], seed: int | None, alpha: float | None
) -> Config:
    given = {k: v for k, v in (("seed", seed), ("alpha", alpha)) if v is not None}
    overrides = [*overrides, *(f"{k}={v}" for k, v in given.items())]
    if isinstance(config, Config):
        if overrides:
            raise OsmlError("give either a Config or overrides, not both: make the Config with them")
        return config
    return load_config(config, overrides)


def split_of(split: str | Path | Split | None, items: Items, n_known: int | None, seed: int) -> Split:
    if split is not None and n_known is not None:
        raise OsmlError("give either --split, which names the known classes, or --n-known, which draws them")
    if split is None:
        split = draw_split(items.class_names(), n_known=n_known, seed=seed)
    elif not isinstance(split, Split):
        split = Split.load(split)
    split.check(items.class_names())
    return split


def roles_of(items: Items, split: Split, config: Config, sets: np.ndarray | None = None) -> TrainingRoles:
    """The data roles, given the sets `(N,)` of near-copies.

    Where they leave too few calibration items for the rate to be promised, and the user has not
    said how to cut, calibration gets up to 40 % of the known items at the cost of training."""
    fractions = config.data.fractions
    roles = as_configured = training_roles(items, split, sets=sets, fractions=fractions, seed=config.seed)
    threshold = threshold_of(config)
    if not isinstance(threshold, thresholds.Conformal) or "fractions" in config.data.model_fields_set:
        return roles
    for share in (0.2, 0.25, 0.3, 0.35, 0.4):
        if thresholds.guarantee(len(roles.calibration), threshold.alpha).possible:
            return roles
        train_share = fractions.train + fractions.calibration - share
        cut = replace(fractions, train=train_share, calibration=share)
        roles = training_roles(items, split, sets=sets, fractions=cut, seed=config.seed)
    possible = thresholds.guarantee(len(roles.calibration), threshold.alpha).possible
    return roles if possible else as_configured


def tried(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """The detectors to choose among, each with its parameters."""
    if config.detector.name == "auto":
        return detector_candidates()
    if config.detector.args:
        return [(config.detector.name, config.detector.args)]
    return detector_candidates([config.detector.name])


def _default_detector(config: Config) -> detectors.Detector:
    if config.detector.name == "auto":
        return detectors.create(DEFAULT)
    return detectors.create(config.detector.name, **config.detector.args)


def threshold_of(config: Config) -> thresholds.Threshold:
    """The configured threshold; rules on the known side keep `alpha` unless told their own rate."""
    name, args = config.threshold.name, config.threshold.args
    own = rate_of(name, config.alpha)
    if own and args and "alpha" in config.model_fields_set:
        raise OsmlError(f"alpha and threshold.{next(iter(args))} say the same thing twice: give one of them")
    return thresholds.create(name, **own | args)


def rate_of(name: str, alpha: float) -> dict[str, float]:
    """What `alpha` means to the threshold rule of that name; nothing to most."""
    if issubclass(thresholds.registry.get(name), thresholds.Conformal):
        return {"alpha": alpha}
    return {"quantile": {"accepted": 1 - alpha}}.get(name, {})


def check_choices(config: Config, split: Split, n_epochs: int, *, rate_is_said: bool = False) -> None:
    """What cannot work together is refused before anything is trained."""
    name, args = config.threshold.name, config.threshold.args
    threshold = thresholds.create(name, **args) if rate_is_said else threshold_of(config)
    if threshold.needs_unknown and not split.pseudo_unknown:
        raise OsmlError(
            f"threshold '{threshold.name}' is chosen on pseudo-unknown classes, and the split has none: name some, or "
            "use the threshold 'conformal'"
        )
    if config.training.patience is not None and not split.pseudo_unknown:
        raise OsmlError(
            "training.patience watches pseudo-unknown classes, and the split has none: name some, or drop it"
        )
    name = config.detector.name
    if name != "auto" and detectors.create(name, **config.detector.args).needs_class_weights:
        proxies = n_epochs and pml.has_class_weights(config.loss.name, config.loss.args)
        if not proxies or config.model.output == "trunk":
            raise OsmlError(
                f"detector '{name}' needs class weights, which come from training with a classification loss such as "
                "ArcFaceLoss and live at the embedder's output: change detector, loss, or model.output"
            )
