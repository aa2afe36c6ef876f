"""One trial trained by several processes through Ray Train, each on its part of every batch."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch
from pytorch_metric_learning.utils.distributed import all_gather
from ray import tune
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader

from osml_plugin.errors import OsmlError
from osml_plugin.training import Trainer

from .folds import SweepData
from .trial import (
    STATE,
    Plan,
    advanced,
    evaluated,
    fold_runs,
    go_on,
    last_checkpoint,
    params_of,
    report,
    report_failure,
    state_of,
)

TRIAL_MEMORY = 512 * 2**20
"""Bytes: what the trial itself takes while its workers train. No CPU, so that all of a machine's are for workers."""
WAIT = 12 * 3600
"""Seconds that workers wait for the first, which judges alone. One that dies is seen at once, whatever this says."""


def trainable_together(data: SweepData, plan: Plan) -> Any:
    """What a `tune.Tuner` takes: `run_together`. Its workers' resources are reserved by Ray Train, all or none."""
    given = {"data": [ray.put(data)], "plan": plan}  # in a list, so that workers read what lies there already
    return tune.with_resources(tune.with_parameters(run_together, **given), {"CPU": 0, "memory": TRIAL_MEMORY})


def run_together(config: Mapping[str, Any], data: list[ray.ObjectRef], plan: Plan) -> None:
    """`run_trial` for more than one worker: starts them, and passes on to Ray Tune what the first of them reports."""
    try:
        _run(params_of(config), data, plan)
    except OsmlError as error:
        report_failure(error, plan)


def _run(params: Mapping[str, Any], data: list[ray.ObjectRef], plan: Plan) -> None:
    resources = plan.settings.resources
    # A trial that is stopped ends its workers first, and Ray Tune waits so long before it gives this process the next.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "120"
    desk = Desk.remote()
    given = {"params": params, "data": data, "plan": plan, "desk": desk, "state": []}
    if checkpoint := last_checkpoint():
        with checkpoint.as_directory() as folder:
            given["state"] = [ray.put(Path(folder, STATE).read_bytes())]
    with tempfile.TemporaryDirectory() as folder:  # for Ray Train's own notes: it sees no checkpoint
        trainer = TorchTrainer(
            _work,
            train_loop_config=given,
            # NCCL takes no two processes on one GPU.
            torch_config=TorchConfig(backend="nccl" if resources.gpu >= 1 else "gloo", timeout_s=WAIT),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpu > 0,
                resources_per_worker={"CPU": resources.cpu} | ({"GPU": resources.gpu} if resources.gpu else {}),
            ),
            # A worker that dies ends the trial: how often it is taken up again is Ray Tune's to count.
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        fit = _Thread(trainer.fit)
        try:
            for figures, [state] in _reports(desk, fit):
                blob = ray.get(state)
                report(figures, lambda file, blob=blob: file.write_bytes(blob))
                ray.get(desk.answer.remote(True))
        finally:
            # Where Ray Tune stops a trial it does so inside the report, while the first worker waits for the answer.
            desk.answer.remote(False)
            fit.join()
    fit.raise_error()


def _reports(desk: Any, fit: _Thread) -> Iterator[tuple[dict[str, Any], list[ray.ObjectRef]]]:
    coming = desk.next.remote()
    while fit.is_alive():
        if ray.wait([coming], timeout=0.5)[0]:
            yield ray.get(coming)
            coming = desk.next.remote()


class _Thread(threading.Thread):
    """Runs `fit`, and keeps what it raised."""

    def __init__(self, fit: Callable[[], Any]):
        super().__init__(daemon=True)
        self.fit, self.error = fit, None
        self.start()

    def run(self) -> None:
        try:
            self.fit()
        except Exception as error:  # handed on by raise_error
            self.error = error

    def raise_error(self) -> None:
        """An OsmlError where a worker raised one; else what Ray Train says."""
        if isinstance(self.error, WorkerGroupError):
            for failure in self.error.worker_failures.values():
                if isinstance(failure, OsmlError):
                    raise failure
        if self.error is not None:
            raise self.error


@ray.remote(num_cpus=0)
class Desk:
    """Where the first worker hands in a report, and learns whether to go on.

    Ray's `TuneReportCallback` passes on figures alone: Ray Tune would know of no checkpoint to keep, or to go on from.
    """

    def __init__(self) -> None:
        self.reports, self.answers = asyncio.Queue(), asyncio.Queue()

    async def report(self, figures: dict[str, Any], state: list[ray.ObjectRef]) -> bool:
        await self.reports.put((figures, state))
        return await self.answers.get()

    async def next(self) -> tuple[dict[str, Any], list[ray.ObjectRef]]:
        return await self.reports.get()

    async def answer(self, further: bool) -> None:
        await self.answers.put(further)


def _work(given: dict[str, Any]) -> None:
    """What each worker runs: all train, the first embeds, judges and reports while the others wait."""
    plan: Plan = given["plan"]
    config = plan.space.config(given["params"])
    torch.set_num_threads(max(1, int(plan.settings.resources.cpu)))
    runs = fold_runs(config, ray.get(given["data"][0]), device=get_device(), trainer_class=PartTrainer)
    for state in given["state"]:
        go_on(runs, torch.load(io.BytesIO(ray.get(state)), map_location="cpu", weights_only=True))
    for loss, seconds in advanced(runs, plan):
        further = [True]
        if distributed.get_rank() == 0:
            figures, state = evaluated(runs, config, plan, loss, seconds), io.BytesIO()
            torch.save(state_of(runs), state)
            further = [ray.get(given["desk"].report.remote(figures, [ray.put(state.getvalue())]))]
        distributed.broadcast_object_list(further)
        if not further[0]:
            return


class PartTrainer(Trainer):
    """A trainer on its part of every batch, in step with the other processes of torch.distributed's group.

    Embeddings and labels are gathered, so that miner and loss see the whole batch in every process, as with
    `DistributedLossWrapper`: gradients flow through a process's own embeddings, and DistributedDataParallel takes their
    mean over the processes. Where the batch cannot be shared out evenly, the rest of it, fewer items than there are
    processes, is left out. A second task is given one's own part alone. `models` and `loss_funcs` stay what they are:
    the state is that of any trainer.

    Batch normalisation has the whole batch's mean and variance on GPUs, and on the CPU those of the part.
    """

    def prepare(self, n_epochs: int) -> None:
        self.n_processes = distributed.get_world_size()
        if self.data_device.type == "cuda":
            for model in self.models.values():  # in place: the parameters stay those that the optimizers have
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
        super().prepare(n_epochs)

    def initialize_dataloader(self) -> None:
        super().initialize_dataloader()
        whole = self.dataloader
        self.dataloader = DataLoader(
            whole.dataset,
            batch_sampler=Parts(whole.batch_sampler, distributed.get_rank(), self.n_processes),
            num_workers=whole.num_workers,
            pin_memory=whole.pin_memory,
            persistent_workers=whole.persistent_workers,
            generator=whole.generator,
            collate_fn=self.collate_fn,
        )

    def run_epoch(self, on_batch: Callable[[], Any] = lambda: None) -> float:
        # Anew in each epoch: it takes over what the first process has.
        self.parallel = {
            name: DistributedDataParallel(model) if any(p.requires_grad for p in model.parameters()) else model
            for name, model in self.models.items()
        }
        loss = torch.tensor(super().run_epoch(on_batch), device=self.data_device)
        distributed.all_reduce(loss)  # the second task's is of one's own part
        self.epoch_loss = loss.item() / self.n_processes
        return self.epoch_loss

    def get_batch(self) -> tuple[Tensor, Tensor]:
        data, labels = super().get_batch()
        return data, self._gathered(labels.to(self.data_device))

    def compute_embeddings(self, data: Tensor) -> Tensor:
        own = super().compute_embeddings(data)
        if own.requires_grad:
            # Each process has the gradient of its own part alone, and their mean is taken where the sum is meant.
            own.register_hook(lambda grad: self.n_processes * grad)
        return self._gathered(own)

    def get_trunk_output(self, data: Tensor) -> Tensor:
        return self.parallel["trunk"](data)

    def get_final_embeddings(self, base_output: Tensor) -> Tensor:
        return self.parallel["embedder"](base_output)

    def backward(self) -> None:
        super().backward()
        # Proxies have the whole batch's gradient in every process, and the mean keeps the copies equal to the last
        # digit; a second task has that of one's own part, and of equal parts the mean is the batch's.
        for parameter in chain.from_iterable(loss.parameters() for loss in self.loss_funcs.values()):
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.all_reduce(grad)
                parameter.grad = grad / self.n_processes

    def _gathered(self, own: Tensor) -> Tensor:
        """The whole batch `(B, …)`, one's own part first, as it alone has gradients."""
        return torch.cat([own, all_gather(own)])


class Parts:
    """Of every batch of `batches` every n-th item from the rank-th on."""

    def __init__(self, batches: BatchSampler, rank: int, n: int):
        if batches.batch_size < n:
            raise OsmlError(
                f"a batch of {batches.batch_size} items cannot be shared by {n} workers: raise training.batch_size, or "
                "lower resources.workers"
            )
        self.batches, self.rank, self.n = batches, rank, n

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[: len(batch) // self.n * self.n][self.rank :: self.n]
