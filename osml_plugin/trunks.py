"""Feature networks by name: the small trunk, any torchvision model, or a factory of the user's own.

Functions import torchvision: it takes longer than torch, and the small trunk and embeddings do without it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import OsmlError, unknown_name
from .registry import check_arguments, checked_count, refusing

# These two add auxiliary outputs in training unless told otherwise.
_ONE_OUTPUT = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


class SmallCNN(nn.Module):
    """Three convolutions for images of 8 to 64 pixels; the last map is pooled to 2 × 2 and flattened."""

    def __init__(self, channels: int = 1, width: int = 32, dropout: float = 0.0):
        super().__init__()
        checked_count("small_cnn's width", width)
        self.layers = nn.Sequential(
            *_convolution(channels, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        # Channels last is a third faster on a CPU.
        return self.layers(images.contiguous(memory_format=torch.channels_last))


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def names() -> list[str]:
    """Every trunk that has a name."""
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models, exclude="squeezenet*")
    return ["identity", "small_cnn", *classifiers]


def check(name: str, args: Mapping[str, Any]) -> None:
    """OsmlError for a trunk that does not exist or an argument that it does not take."""
    if name in ("auto", "identity"):
        check_arguments("trunk", name, args, [])
    elif name == "small_cnn":
        check_arguments("trunk", name, args, ["width", "dropout"])
    elif ":" in name:
        module, _, factory = name.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), factory]):
            raise OsmlError(f"trunk factory '{name}' is not of the form package.module:factory")
    elif name not in names():
        raise unknown_name("trunk", name, [*names(), "auto", "package.module:factory"])


def build(name: str, args: Mapping[str, Any], *, channels: int, factories: Collection[str] | None = None) -> nn.Module:
    """Make a trunk that maps a batch to features `(N, F)`.

    Args:
        name: one of `names()`, or `package.module:factory`, a callable that returns the module.
        channels: of the images, for trunks that can be built for either.
        factories: the factories that may be imported; None = any. A bundle's factory is never trusted
            unasked, since importing and calling it runs code.
    """
    check(name, args)
    if name == "identity":
        return nn.Identity()
    if ":" in name:
        if factories is not None and name not in factories:
            raise OsmlError(
                f"the model's trunk is made by the code '{name}', which is run only when you trust it: "
                f"pass --trust-factory {name} (Python: factories=['{name}'])"
            )
        return _from_factory(name, args)
    with refusing(f"trunk '{name}' refuses its arguments"):
        if name == "small_cnn":
            return SmallCNN(channels, **args)
        import torchvision

        trunk = torchvision.models.get_model(name, weights=None, **_ONE_OUTPUT.get(name, {}) | dict(args))
    return without_head(trunk)


def _from_factory(name: str, args: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    with refusing(f"trunk factory '{name}' cannot be imported", "expected package.module:factory, on the Python path"):
        factory = getattr(importlib.import_module(module_name), attribute)
    with refusing(f"trunk factory '{name}' fails"):
        parameters = inspect.signature(factory).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            check_arguments("trunk", name, args, parameters)
        trunk = factory(**args)
    if not isinstance(trunk, nn.Module):
        raise OsmlError(f"trunk factory '{name}' must return a torch.nn.Module; it returned {type(trunk).__name__}")
    return trunk


def without_head(model: nn.Module) -> nn.Module:
    """A torchvision classifier whose last linear layer passes its features through."""
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(model, attribute, None)
        if head is None:
            continue
        linear = [n for n, m in head.named_modules() if isinstance(m, nn.Linear)]
        if not linear:
            continue
        if linear[-1] == "":
            setattr(model, attribute, nn.Identity())
        else:
            head.set_submodule(linear[-1], nn.Identity())
        return model
    raise OsmlError(
        f"torchvision's {type(model).__name__} has no classification head to replace by an embedder: choose a "
        "classification model such as resnet18, or pass package.module:factory"
    )


def load_weights(trunk: nn.Module, name: str, weights: str) -> None:
    """Load a local file (`.safetensors`, or a `.pth` of plain tensors) or torchvision weights such as 'DEFAULT'."""
    import torchvision

    path = Path(weights)
    if path.is_file():
        state = _read_weights(path)
    elif name in torchvision.models.list_models() and path.suffix == "":
        members = {w.name: w for w in torchvision.models.get_model_weights(name)}
        if weights not in {*members, "DEFAULT"}:
            raise unknown_name(f"weights of trunk '{name}'", weights, [*members, "DEFAULT"])
        chosen = torchvision.models.get_model_weights(name).DEFAULT if weights == "DEFAULT" else members[weights]
        with refusing(f"weights '{weights}' of trunk '{name}' cannot be fetched", "pass a local file"):
            state = chosen.get_state_dict(progress=True, check_hash=True)
    else:
        raise OsmlError(f"no weights at '{weights}': expected a .safetensors or .pth file, or torchvision's name")
    own = trunk.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and isinstance(v, Tensor) and own[k].shape == v.shape}
    missing = [k for k in own if k not in fitting]
    if missing:
        raise OsmlError(
            f"weights '{weights}' do not fit trunk '{name}': {len(missing)} of its {len(own)} tensors are missing "
            f"or of another shape, the first is '{missing[0]}'"
        )
    trunk.load_state_dict(fitting)


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return dict(state.items())
    except Exception as error:  # torch's own message says to load it unsafely
        raise OsmlError(
            f"cannot read the weights '{path}': expected a .safetensors file, or a .pth file of a dictionary of tensors"
        ) from error
