"""Names: which module of a diffusers component a community file's name means, per family of base models."""

from .bases import BASES, KNOWN_BASES, known_base
from .build import index_model
from .families import FAMILIES, Family
from .index import NameIndex, Part, Parts, Site, flatten
from .lookup import find, native_names, native_of, nearest_name, portable_path, unknown_prefix
from .prefixes import PREFIXES, Prefix, prefix_of, split_prefix
from .writing import COMPONENTS, SCHEMES, Scheme, written_name

__all__ = [
    "BASES",
    "COMPONENTS",
    "FAMILIES",
    "KNOWN_BASES",
    "PREFIXES",
    "SCHEMES",
    "Family",
    "NameIndex",
    "Part",
    "Parts",
    "Prefix",
    "Scheme",
    "Site",
    "find",
    "flatten",
    "index_model",
    "known_base",
    "native_names",
    "native_of",
    "nearest_name",
    "portable_path",
    "prefix_of",
    "split_prefix",
    "unknown_prefix",
    "written_name",
]
