"""From what a user has to what training takes: sources, data roles, images."""

from .images import (
    ImageDataset,
    ImageSurvey,
    augmentation,
    inspect_images,
    load_images,
    normalisation,
    read_image,
    readable_items,
    to_float,
)
from .items import ROLES, Items
from .roles import Fractions, Split, TrainingRoles, draw_split, test_indices, training_roles
from .sources import open_items, write_embeddings

__all__ = [
    "ROLES",
    "Fractions",
    "ImageDataset",
    "ImageSurvey",
    "Items",
    "Split",
    "TrainingRoles",
    "augmentation",
    "draw_split",
    "inspect_images",
    "load_images",
    "normalisation",
    "open_items",
    "read_image",
    "readable_items",
    "test_indices",
    "to_float",
    "training_roles",
    "write_embeddings",
]
