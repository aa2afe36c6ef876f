"""The network after some epochs of its training, kept for diagnostics: safetensors in the folder BUNDLE.checkpoints.

The folder stands beside the bundle and is named after it. The bundle's details name its files with their checksums, so
that those of another training are never taken for its own; a bundle that was moved without it has no checkpoints.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from .embedding import EmbeddingModel
from .errors import OsmlError
from .training_run import TrainingRun

CLASS_WEIGHTS = "class_weights"
_NAME = re.compile(r"epoch-(\d{4,9})\.safetensors")


def folder_of(bundle: str | Path) -> Path:
    bundle = Path(os.path.abspath(bundle))
    return bundle.with_name(f"{bundle.name}.checkpoints")


class CheckpointWriter:
    """Keeps the network after every so many epochs of a run, aside until the bundle is there.

    Args:
        run: its trainer calls this after each epoch, behind the hook that it has.
        bundle: the folder where the bundle is going to be.
    """

    def __init__(self, run: TrainingRun, bundle: Path, every: int):
        self._run, self._folder, self._every = run, folder_of(bundle), every
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        # It goes by itself where the training fails.
        self._aside = tempfile.TemporaryDirectory(prefix=f".{self._folder.name}.", dir=self._folder.parent)
        self._hook = run.trainer.end_of_epoch_hook
        run.trainer.end_of_epoch_hook = self._after_epoch
        self.files: dict[str, str] = {}
        """The SHA-256 of each file, for the bundle's details."""

    def _after_epoch(self, trainer: Any) -> Any:
        go_on = self._hook(trainer)
        if trainer.epoch % self._every == 0:
            tensors = {k: v.contiguous() for k, v in self._run.trained.state_dict().items()}
            if self._run.class_weights is not None:
                tensors[CLASS_WEIGHTS] = self._run.class_weights.contiguous()
            content, name = save(tensors), f"epoch-{trainer.epoch:04d}.safetensors"
            (Path(self._aside.name) / name).write_bytes(content)
            self.files[name] = sha256(content).hexdigest()
        return go_on

    def publish(self) -> None:
        """Put the folder in its place, instead of that of an earlier training."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        for name in self.files:
            os.replace(Path(self._aside.name) / name, self._folder / name)
        self._aside.cleanup()


@dataclass(frozen=True)
class Checkpoint:
    """A network's file."""

    epoch: int
    file: Path
    sha256: str

    def load(self, model: EmbeddingModel) -> tuple[EmbeddingModel, Tensor | None]:
        """A copy of the bundle's `model` as it was after this epoch, and the class weights of then, if the loss had
        any. OsmlError for a file that is gone, or another."""
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise OsmlError(f"cannot read the checkpoint '{self.file}': {error.strerror}; train again") from error
        if sha256(content).hexdigest() != self.sha256:
            raise OsmlError(f"the checkpoint '{self.file}' is not the one that the bundle names: train again")
        tensors = load(content)
        class_weights = tensors.pop(CLASS_WEIGHTS, None)
        model = deepcopy(model)
        model.load_state_dict(model.state_dict() | tensors)  # a frozen trunk is in the bundle only
        return model, class_weights


def find_checkpoints(bundle: str | Path, details: Mapping[str, Any]) -> list[Checkpoint]:
    """Those of a bundle, by epoch; none where its training kept none, or their folder is not beside it."""
    folder = folder_of(bundle)
    if not folder.is_dir():
        return []
    found = []
    for name, checksum in details.get("checkpoints", {}).items():
        if not (match := _NAME.fullmatch(name)):  # nothing but a file of this folder
            raise OsmlError(
                f"bundle '{bundle}' names a checkpoint '{name}'; expected epoch-0001.safetensors: train again"
            )
        found.append(Checkpoint(int(match[1]), folder / name, checksum))
    return sorted(found, key=lambda checkpoint: checkpoint.epoch)
