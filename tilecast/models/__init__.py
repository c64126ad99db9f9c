"""Models: config.json of any MoE family, presets and specs to expert layers, and how ranks share them."""

from tilecast.models.families import FAMILIES
from tilecast.models.find import preset_names, resolve
from tilecast.models.model import LayerGroup, Model, Router, own_code_layers
from tilecast.models.sharding import Shard, layer_for_rank, shard, split, uneven_note

__all__ = [
    "FAMILIES",
    "LayerGroup",
    "Model",
    "Router",
    "Shard",
    "layer_for_rank",
    "own_code_layers",
    "preset_names",
    "resolve",
    "shard",
    "split",
    "uneven_note",
]
