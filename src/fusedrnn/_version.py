"""The version of fusedrnn; the build reads it here."""

__version__ = "0.1.0"
