"""Names: which module of a diffusers component a community file's name means, per family of base models."""

from .bases import BASES, known_base
from .build import index_model
from .families import FAMILIES, Family
from .guess import guess_base
from .index import NameIndex, Part, Parts, Site, flatten
from .lookup import find, native_names, native_of, nearest_name, portable_path, unknown_prefix
from .prefixes import PREFIXES, Prefix, split_prefix

__all__ = [
    "BASES",
    "FAMILIES",
    "PREFIXES",
    "Family",
    "NameIndex",
    "Part",
    "Parts",
    "Prefix",
    "Site",
    "find",
    "flatten",
    "guess_base",
    "index_model",
    "known_base",
    "native_names",
    "native_of",
    "nearest_name",
    "portable_path",
    "split_prefix",
    "unknown_prefix",
]
