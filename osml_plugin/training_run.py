"""One training on its way from data to embeddings, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import detectors
from .config import Config
from .embedding import OUTPUTS
from .network import build_model, epochs
from .pml import class_weights
from .selection import Cached
from .training import Trainer, checked_device, make_trainer, seed_everything
from .training_data import TrainingData


class TrainingRun:
    """Network and trainer on the data of one run: `advance` it, `embed` its data roles, go on from a `state`."""

    def __init__(
        self,
        data: TrainingData,
        config: Config,
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        trainer_class: type[Trainer] = Trainer,
    ):
        self.data, self.config, self.progress = data, config, progress
        self.device = checked_device(device)
        seed_everything(config.seed)
        self.model = build_model(config, channels=data.channels, size=data.size)
        self.n_epochs = epochs(config, data.channels)
        self.trainer, self.trained = None, self.model
        if self.n_epochs:
            dataset, self.trained = data.training_set(self.model, self.device, progress)
            labels = data.labels["train"].tolist()
            how = {"workers": data.workers, "device": self.device, "trainer_class": trainer_class}
            self.trainer = make_trainer(self.trained, dataset, labels, config, n_epochs=self.n_epochs, **how)
            self.trainer.show_progress = progress

    @property
    def epoch(self) -> int:
        """Epochs behind it."""
        return self.trainer.epoch if self.trainer else 0

    def advance(self) -> float:
        """Train one more epoch; returns its mean loss."""
        self.model.to(self.device)
        return self.trainer.run_epoch()

    def state(self) -> dict[str, Any]:
        return self.trainer.state() if self.trainer else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self.trainer:
            self.trainer.load_state(state)

    @property
    def class_weights(self) -> Tensor | None:
        """The proxies of the loss, as `Detector.fit` takes them; None for a loss without."""
        weights = class_weights(self.trainer.loss_funcs["metric_loss"]) if self.trainer else None
        return None if weights is None else weights.detach().float().cpu()

    def embed(self) -> dict[str, Cached]:
        """By output of the model that may be chosen: the embeddings of each data role, and the class weights that go
        with them. Of the training items it embeds the references (`TrainingData.embedded_labels` has their labels)."""
        outputs = OUTPUTS if self.config.model.output == "auto" else (self.config.model.output,)
        name, args = self.config.detector.name, self.config.detector.args
        if name != "auto" and detectors.create(name, **args).needs_class_weights:
            outputs = ("embedder",)  # where the proxies are
        if isinstance(self.model.embedder, torch.nn.Identity):
            outputs = ("embedder",)  # the same as the trunk's
        model = self.model.eval()
        features = self.data.features(model, self.device, self.progress)
        model.cpu()
        found = {}
        for output in outputs:
            model.output = output
            with torch.inference_mode():
                embedded = {role: model.embed_features(f).clone() for role, f in features.items()}
            embedded["train"] = embedded["train"][self.data.references]
            # The proxies live where the loss saw the embeddings.
            found[output] = Cached(embedded, self.class_weights if output == "embedder" else None)
        model.output = outputs[0]
        return found
