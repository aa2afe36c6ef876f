"""The exact Jacobian norm against the loop over outputs, and how far the estimate is off at the cost of ten forwards.

python benchmarks/jacobian.py [--n 64] [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from osml_plugin import trunks
from osml_plugin.embedding import EmbeddingModel
from osml_plugin.jacobian import estimate_jacobian_norm, jacobian_norm

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=32, help="images")
    parser.add_argument("--outputs", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--projections", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(
        f"small_cnn of width {given.width}, {given.n} images of 3 × 32 × 32, {given.device}, "
        f"{torch.get_num_threads()} threads, medians of {ROUNDS}"
    )
    for n_outputs in given.outputs:
        torch.manual_seed(0)
        model, images = trained(n_outputs, given.n, given.width)
        compare(model.to(given.device), images.to(given.device), n_outputs, given.projections)


def trained(n_outputs: int, n: int, width: int) -> tuple[EmbeddingModel, Tensor]:
    """A network that has learnt ten noisy patterns, as an untrained one has another Jacobian; and images."""
    model = EmbeddingModel(trunks.build("small_cnn", {"width": width}, channels=3), nn.Linear(16 * width, n_outputs))
    patterns, proxies = torch.randn(10, 3, 32, 32), torch.randn(n_outputs, 10, requires_grad=True)
    optimizer = torch.optim.AdamW([*model.parameters(), proxies], lr=2e-3)
    for _ in tqdm(range(40), desc="training", leave=False):
        labels = torch.randint(10, (64,))
        images = patterns[labels] + torch.randn(64, 3, 32, 32)
        optimizer.zero_grad()
        cross_entropy(16 * model(images) @ nn.functional.normalize(proxies, dim=0), labels).backward()
        optimizer.step()
    return model.eval(), patterns[torch.randint(10, (n,))] + torch.randn(n, 3, 32, 32)


def loop(model: nn.Module, images: Tensor) -> Tensor:
    """The loop over outputs, image by image, as `torch.autograd.functional.jacobian` does it."""
    return torch.cat([loop_over_batch(model, image[None]) for image in images])


def loop_over_batch(model: nn.Module, images: Tensor) -> Tensor:
    """The loop over outputs with all images at once: nothing but the outputs is left to vectorise."""
    x = images.clone().requires_grad_()
    out, total = model(x), 0
    for k in range(out.shape[1]):
        (row,) = torch.autograd.grad(out[:, k].sum(), x, retain_graph=True)
        total = total + row.flatten(1).square().sum(dim=1)
    return total.sqrt()


def forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def compare(model: nn.Module, images: Tensor, n_outputs: int, n_projections: int) -> None:
    works = {
        "forward": lambda: forward(model, images),
        "loop over outputs, one image at a time": lambda: loop(model, images),
        "loop over outputs, all images at once": lambda: loop_over_batch(model, images),
        "exact": lambda: jacobian_norm(model, images),
        f"estimate, {n_projections} projections": lambda: estimate_jacobian_norm(model, images, n_projections),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(ROUNDS), leave=False):  # round by round, so that another load falls on all alike
        for name, work in works.items():
            seconds[name].append(timed(work, images.device))
    exact, slow = jacobian_norm(model, images), loop(model, images)
    estimated, errors = estimate_jacobian_norm(model, images, n_projections)
    off = ((estimated - exact).abs() / exact).median()
    took = {name: median(times) for name, times in seconds.items()}
    print(f"\n{n_outputs} outputs{'':<33}{'seconds':>9}{'/ forward':>11}{'exact is ×':>12}")
    for name, time in took.items():
        print(f"{name:<44}{time:>9.4f}{time / took['forward']:>11.1f}{time / took['exact']:>12.2f}")
    print(f"largest relative difference of exact and loop: {((exact - slow).abs() / slow).max():.1e}")
    print(f"estimate: median relative error {off:.1%}, median standard error told {(errors / exact).median():.1%}")


def timed(work: Callable[[], object], device: torch.device) -> float:
    start = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


if __name__ == "__main__":
    main()
