"""The same script, open-set: it knows the digits 0 to 6, was chosen on the 7, and calls an 8 or a 9 unknown (-1)."""

import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from osml_plugin import OpenSetAccuracyCalculator, OpenSetHook, OpenSetInferenceModel

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
known = labels <= 6
part = torch.randperm(len(labels)) % 10
train_set = TensorDataset(images[known & (part < 6)], labels[known & (part < 6)])
held_out_set = TensorDataset(images[known & (part >= 6) & (part < 8)], labels[known & (part >= 6) & (part < 8)])
val_set = TensorDataset(images[(labels <= 7) & (part == 8)], labels[(labels <= 7) & (part == 8)])

trunk = nn.Sequential(nn.Conv2d(1, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
embedder = nn.Sequential(nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 32))
loss = ArcFaceLoss(num_classes=7, embedding_size=32, margin=20, scale=16)
parameters = [*trunk.parameters(), *embedder.parameters(), *loss.parameters()]
trainer = MetricLossOnly(
    models={"trunk": trunk, "embedder": embedder},
    optimizers={"trunk_optimizer": torch.optim.AdamW(parameters, lr=2e-3)},
    batch_size=64,
    loss_funcs={"metric_loss": loss},
    dataset=train_set,
    dataloader_num_workers=0,
    end_of_epoch_hook=OpenSetHook(train_set, val_set),
)
trainer.train(num_epochs=15)

calculator = OpenSetAccuracyCalculator(include=("precision_at_1", "auroc", "oscr"), k=1)
tester = GlobalEmbeddingSpaceTester(accuracy_calculator=calculator, dataloader_num_workers=0)
metrics = tester.test({"train": train_set, "val": val_set}, 15, trunk, embedder, [("val", ["train"])])
print("validation", dict(metrics["val"]))

model = OpenSetInferenceModel(trunk, embedder, alpha=0.05)
model.fit(train_set, held_out_set)
for digit in range(10):
    answers = model.predict(images[(labels == digit) & (part == 9)])
    print(f"shown {digit}:", answers.tolist())
