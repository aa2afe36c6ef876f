"""From what a user has to what training takes: sources, data roles, images."""

from .images import ImageDataset, augmentation, load_images, normalisation, read_image, to_float
from .items import ROLES, Items
from .pixels import ON_WHITE, Rendering
from .roles import Fractions, Split, TrainingRoles, draw_split, test_indices, training_roles
from .sources import open_items, write_embeddings
from .survey import ImageSurvey, check_pictures, inspect_images, readable_items, tell_shared_files

__all__ = [
    "ON_WHITE",
    "ROLES",
    "Fractions",
    "ImageDataset",
    "ImageSurvey",
    "Items",
    "Rendering",
    "Split",
    "TrainingRoles",
    "augmentation",
    "check_pictures",
    "draw_split",
    "inspect_images",
    "load_images",
    "normalisation",
    "open_items",
    "read_image",
    "readable_items",
    "tell_shared_files",
    "test_indices",
    "to_float",
    "training_roles",
    "write_embeddings",
]
