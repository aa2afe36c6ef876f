"""An ordinary pytorch-metric-learning script. It knows the digits 0 to 6, and calls an 8 or a 9 one of them too."""

import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.trainers import MetricLossOnly
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
known = labels <= 6
part = torch.randperm(len(labels)) % 10
train_set = TensorDataset(images[known & (part < 6)], labels[known & (part < 6)])
held_out_set = TensorDataset(images[known & (part >= 6) & (part < 8)], labels[known & (part >= 6) & (part < 8)])
val_set = TensorDataset(images[known & (part == 8)], labels[known & (part == 8)])

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
)
trainer.train(num_epochs=15)

calculator = AccuracyCalculator(include=("precision_at_1",), k=1)
tester = GlobalEmbeddingSpaceTester(accuracy_calculator=calculator, dataloader_num_workers=0)
metrics = tester.test({"train": train_set, "val": val_set}, 15, trunk, embedder, [("val", ["train"])])
print("validation", dict(metrics["val"]))

model = InferenceModel(trunk, embedder)
model.train_knn(train_set)
for digit in range(10):
    _, nearest = model.get_nearest_neighbors(images[(labels == digit) & (part == 9)], k=1)
    answers = train_set.tensors[1][nearest[:, 0]]
    print(f"shown {digit}:", answers.tolist())
