"""Renders captioned videos of one moving shape, and reads the caption back from a video."""

from scripts.toyworld.reader import Reading, read
from scripts.toyworld.render import Attributes, Scene, all_attributes, parse_caption, random_scene, render

__all__ = [
    "Attributes",
    "Reading",
    "Scene",
    "all_attributes",
    "parse_caption",
    "random_scene",
    "read",
    "render",
]
