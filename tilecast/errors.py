"""Every exception that Tilecast raises on purpose.

TilecastError
├── UsageError          the call or command line does not fit together
├── InputError          something handed in cannot be used
│   ├── ModelError      a model, config.json, preset or spec
│   ├── ConfigError     a tile config outside its kernel's domain
│   └── CacheError      a store, table or exported file
│       └── SchemaError a file of another schema version
├── CoverageError       a table lacks, or no longer fits, what is asked of it
├── AgreementError      ranks do not, or no longer, agree
└── DeviceError         nothing usable on this device

Messages say what happened, the value seen, what was expected and what to do.
"""

from __future__ import annotations


class TilecastError(Exception):
    """Base of all errors that Tilecast raises on purpose."""


class UsageError(TilecastError):
    """The call or command line does not fit together."""


class InputError(TilecastError):
    """Something handed in cannot be used."""


class ModelError(InputError):
    """A model, its config.json, a preset name or a layer spec cannot be used."""


class ConfigError(InputError):
    """A tile config is unknown or lies outside its kernel's declared domain."""


class CacheError(InputError):
    """A store, table or exported file cannot be read, written or trusted."""


class SchemaError(CacheError):
    """A file was written by another schema version than this Tilecast reads."""


class CoverageError(TilecastError):
    """A table lacks, or no longer fits, what is asked of it."""


class AgreementError(TilecastError):
    """Ranks do not, or no longer, agree on one table."""


class DeviceError(TilecastError):
    """Nothing that Tilecast has can run on this device."""
