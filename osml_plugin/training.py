"""A training run on pytorch-metric-learning's parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import optimizers, pml
from .config import Config
from .embedding import EmbeddingModel, autocast, default_device
from .errors import OsmlError
from .learning import FirstEpoch, check_memories
from .losses.rotation import RotationTask
from .network import feature_width
from .registry import checked_count, refusing


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch: PML's samplers and miners draw from NumPy's global state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the state that PML reads
    torch.manual_seed(seed)


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device of that name, tried out; None = a GPU if there is one. OsmlError for one that cannot be used."""
    if device is None:
        return default_device()
    with refusing(f"the device '{device}' cannot be used", "expected cpu, cuda, or cuda:1 for the second GPU"):
        torch.zeros(1, device=device).tolist()
        return torch.device(device)


def train_model(
    model: EmbeddingModel,
    dataset: Dataset,
    labels: Sequence[int],
    config: Config,
    *,
    n_epochs: int,
    workers: int = 0,
    device: torch.device | str | None = None,
    end_of_epoch_hook: Callable | None = None,
    progress: bool = True,
) -> nn.Module:
    """Train `model` in place with the configured loss, miner and sampler; returns the loss, which holds the proxies.

    Args:
        dataset: `dataset[i]` is `(input, label)`.
        labels: of every item, integers in 0..C-1: what samplers and classification losses need to know.
        end_of_epoch_hook: called with the trainer, as PML does; returning False stops the run.

    Raises:
        OsmlError: for a device that cannot be used, a part that refuses its arguments or these data, nothing that
            could learn, a first epoch that taught nothing, and for a loss that is no longer finite.
    """
    trainer = make_trainer(model, dataset, labels, config, n_epochs=n_epochs, workers=workers, device=device)
    trainer.end_of_epoch_hook = end_of_epoch_hook or trainer.end_of_epoch_hook
    trainer.show_progress = progress
    trainer.train(num_epochs=n_epochs)
    model.eval()
    return trainer.loss_funcs["metric_loss"]


def make_trainer(
    model: EmbeddingModel,
    dataset: Dataset,
    labels: Sequence[int],
    config: Config,
    *,
    n_epochs: int,
    workers: int = 0,
    device: torch.device | str | None = None,
    trainer_class: type[Trainer] | None = None,
) -> Trainer:
    """The trainer that `train_model` runs, before its first epoch: for those who advance it epoch by epoch.

    Args:
        trainer_class: `Trainer`, or one that trains otherwise.
    """
    device = checked_device(device)
    seed_everything(config.seed)
    batch_size = min(config.training.batch_size, len(dataset))
    width = feature_width(model, torch.stack([dataset[0][0]] * 2))
    n_classes = int(max(labels)) + 1
    loss = pml.build("loss", config.loss.name, config.loss.args, num_classes=n_classes, embedding_size=width)
    miners = {}
    if config.miner is not None:
        miners["tuple_miner"] = pml.build("miner", config.miner.name, config.miner.args)
    sampler = None
    if config.sampler is not None:
        sampler_args = dict(config.sampler.args)
        # The sampler's batches must be a whole number of classes times m.
        m = checked_count("sampler.m", sampler_args.setdefault("m", max(2, batch_size // n_classes)))
        batch_size = min(batch_size // m, n_classes) * m or m
        sampler = pml.build(
            "sampler",
            config.sampler.name,
            sampler_args,
            labels=torch.as_tensor(labels),
            batch_size=batch_size,
            epoch_length=max(len(dataset), batch_size),
        )
    check_memories(loss, batch_size)
    tasks, weights = {"metric_loss": loss}, {"metric_loss": 1.0}
    if config.training.rotation:
        tasks["rotation_loss"] = rotation_task(model, dataset[0][0], config)
        weights["rotation_loss"] = config.training.rotation
    model.to(device)
    for task in tasks.values():
        task.to(device)
    chosen = {}
    for part, module, optimizer in [
        ("trunk", model.trunk, config.optimizer),
        ("embedder", model.embedder, config.optimizer),
        ("metric_loss", loss, config.loss_optimizer or config.optimizer),
        *((name, task, config.optimizer) for name, task in tasks.items() if task is not loss),
    ]:
        if parameters := [p for p in module.parameters() if p.requires_grad]:
            chosen[f"{part}_optimizer"] = optimizers.build(optimizer.name, optimizer.args, parameters)
    if not chosen:
        raise OsmlError(
            f"nothing can be trained: trunk and embedder have no free weights, and loss '{config.loss.name}' none of "
            "its own: set model.frozen to false, model.embedder to linear, or training.epochs to 0"
        )
    trainer = (trainer_class or Trainer)(
        models={"trunk": model.trunk, "embedder": model.embedder},
        optimizers=chosen,
        batch_size=batch_size,
        loss_funcs=tasks,
        loss_weights=weights,
        mining_funcs=miners,
        dataset=dataset,
        sampler=sampler,
        dataloader_num_workers=workers,
        data_device=device,
        freeze_these=("trunk",) if config.model.frozen else (),
    )
    trainer.cosine = config.training.schedule == "cosine"
    trainer.seed = config.seed
    trainer.prepare(n_epochs)
    return trainer


def rotation_task(model: EmbeddingModel, example: torch.Tensor, config: Config) -> RotationTask:
    """The task that `training.rotation` asks for, for a dataset of such examples."""
    if config.model.frozen or example.ndim != 3 or example.shape[1] != example.shape[2]:
        found = "the trunk is frozen" if config.model.frozen else f"these inputs have the shape {tuple(example.shape)}"
        raise OsmlError(f"training.rotation teaches the trunk by turning square images, and {found}: set it to 0")
    return RotationTask(feature_width(model.trunk, example[None]))


_MEMORY = ("queue_idx", "has_been_filled", "hist_")
"""What PML's losses with a memory keep beside their state."""


class Trainer(MetricLossOnly):
    """PML's trainer with bf16 on the GPU, pinned loading, a cosine schedule and one progress bar.

    Each epoch is seeded by its number, so that one that goes on from `state` gives what an uninterrupted one gives.
    """

    show_progress = True
    cosine = True
    seed = 0
    n_epochs = 0
    _watch: FirstEpoch | None = None
    epoch_note = ""
    """What an end-of-epoch hook wants to be seen beside the loss."""

    def modify_schema(self) -> None:
        # A frozen or empty part has no optimizer, and that is no reason to warn.
        self.schema["optimizers"].important = []
        self.schema["loss_funcs"].keys = list(self.loss_funcs)

    def prepare(self, n_epochs: int) -> None:
        """Make ready for so many epochs in all."""
        self.n_epochs, self.epoch = n_epochs, 0
        self._sampler_as_made = deepcopy(vars(self.sampler)) if self.sampler is not None else {}
        self.initialize_dataloader()
        if self.cosine:
            steps = self.iterations_per_epoch * max(n_epochs, 1)
            self.lr_schedulers = {
                f"{key.removesuffix('_optimizer')}_scheduler_by_iteration": torch.optim.lr_scheduler.CosineAnnealingLR(
                    optimizer, steps
                )
                for key, optimizer in self.optimizers.items()
            }

    def train(self, start_epoch: int = 1, num_epochs: int = 1) -> None:
        if num_epochs < start_epoch:
            return
        if num_epochs != self.n_epochs:
            self.prepare(num_epochs)
        steps = self.iterations_per_epoch * (num_epochs - start_epoch + 1)
        self.epoch = start_epoch - 1
        with tqdm(total=steps, desc="training", unit="batch", disable=not self.show_progress) as bar:
            while self.epoch < num_epochs:
                self.run_epoch(bar.update)
                go_on = self.end_of_epoch_hook(self)
                bar.set_postfix_str(f"epoch {self.epoch}/{num_epochs}, loss {self.epoch_loss:.3f}{self.epoch_note}")
                if go_on is False:
                    break

    def run_epoch(self, on_batch: Callable[[], Any] = lambda: None) -> float:
        """Train the next epoch; returns its mean loss. OsmlError where that is no longer finite, and where the first
        epoch taught nothing."""
        self.epoch += 1
        # One that goes on from a state has learned: a loss that reaches 0 later has done its work.
        self._watch = self._first_epoch() if self.epoch == 1 else None
        seed_everything(int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]))
        self.dataloader.generator.manual_seed(torch.initial_seed())
        if self.sampler is not None:
            vars(self.sampler).update(deepcopy(self._sampler_as_made))  # PML's shuffle what they hold
        self.dataloader_iter = iter(self.dataloader)
        self.set_to_train()
        total = 0.0
        for iteration in range(self.iterations_per_epoch):
            self.iteration = iteration
            self.forward_and_backward()
            self._forget_graph()
            self.end_of_iteration_hook(self)
            self.step_lr_schedulers(end_of_epoch=False)
            total += float(self.losses["total_loss"].detach())
            on_batch()
        self.step_lr_schedulers(end_of_epoch=True)
        self.epoch_loss = total / self.iterations_per_epoch
        if not np.isfinite(self.epoch_loss):
            raise OsmlError(
                f"the loss is {self.epoch_loss} in epoch {self.epoch}: lower optimizer.lr, or the loss's scale"
            )
        if self._watch is not None:
            self._watch.check(self.epoch_loss)
        self.zero_losses()
        return self.epoch_loss

    def _first_epoch(self) -> FirstEpoch:
        loss = self.loss_funcs["metric_loss"]
        return FirstEpoch([self.models["embedder"], self.models["trunk"], loss], loss, self.batch_size)

    def step_optimizers(self) -> None:
        if self._watch is None:
            return super().step_optimizers()
        self._watch.before_step()
        super().step_optimizers()
        self._watch.after_step()

    def _forget_graph(self) -> None:
        """A histogram that PML keeps from batch to batch must not keep the batch's graph."""
        for loss in self.loss_funcs["metric_loss"].modules():
            if getattr(loss, "hist_", None) is not None:
                loss.hist_ = loss.hist_.detach()

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, as nested dictionaries of tensors and numbers."""
        state = {"epoch": self.epoch}
        for name, part in self._parts():
            state[name] = part.state_dict()
            state[f"{name}.memory"] = {key: getattr(part, key) for key in _MEMORY if hasattr(part, key)}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. The optimizers keep the rates and arguments that they were made with, so that a run
        may go on from another's state under its own settings."""
        own = {key: [dict(group) for group in optimizer.param_groups] for key, optimizer in self.optimizers.items()}
        self.epoch = state["epoch"]
        for name, part in self._parts():
            part.load_state_dict(state[name])
            vars(part).update(state[f"{name}.memory"])
        for key, optimizer in self.optimizers.items():
            for group, made in zip(optimizer.param_groups, own[key], strict=True):
                base = made.get("initial_lr", made["lr"])
                lr = group["lr"] * base / group.get("initial_lr", group["lr"])  # as far down the schedule as it was
                group.update({k: v for k, v in made.items() if k != "params"}, lr=lr)
        for scheduler in self.lr_schedulers.values():
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for kind in ("models", "loss_funcs", "optimizers", "lr_schedulers"):
            yield from ((f"{kind}.{name}", part) for name, part in getattr(self, kind).items())

    def initialize_dataloader(self) -> None:
        whole = len(self.dataset) // self.batch_size >= 1
        self.dataloader = DataLoader(
            self.dataset,
            self.batch_size,
            shuffle=self.sampler is None,
            sampler=self.sampler,
            drop_last=whole,
            num_workers=self.dataloader_num_workers,
            pin_memory=self.data_device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=self.collate_fn,
        )
        self.iterations_per_epoch = self.iterations_per_epoch or len(self.dataloader)

    def calculate_loss(self, curr_batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        data, labels = curr_batch
        embeddings = self.compute_embeddings(data)
        parts = [f"loss '{type(self.loss_funcs['metric_loss']).__name__}'"]
        parts += [f"miner '{type(miner).__name__}'" for miner in self.mining_funcs.values()]
        with refusing(f"{' with '.join(parts)} refuses a batch", "look at its arguments, or choose another"):
            mined = self.maybe_mine_embeddings(embeddings, labels)
            self.losses["metric_loss"] = self.maybe_get_metric_loss(embeddings, labels, mined)
        if self._watch is not None:
            self._watch.see_batch(labels, self.mining_funcs.get("tuple_miner"), mined)

    def compute_embeddings(self, data: torch.Tensor) -> torch.Tensor:
        with autocast(self.data_device):
            data = data.to(self.data_device, non_blocking=True)
            if "rotation_loss" in self.loss_funcs:
                embeddings = self._compute_rotation(data)
            else:
                embeddings = super().compute_embeddings(data)
        # PML's losses cast their proxies to the embeddings' type, and bf16 would round these away.
        return embeddings.float()

    def _compute_rotation(self, data: torch.Tensor) -> torch.Tensor:
        """The batch's embeddings; sets the loss of the second task."""
        task = self.loss_funcs["rotation_loss"]
        turned, quarters = task.turned(data)
        # In one pass: what batch normalisation remembers is then what it has normalised by.
        features = self.get_trunk_output(torch.cat([data, turned]))
        self.losses["rotation_loss"] = task(features[len(data) :], quarters)
        return self.get_final_embeddings(features[: len(data)])
