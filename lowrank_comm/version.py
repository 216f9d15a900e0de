"""The version of the library, which all workers must share."""

__version__ = "0.1.0"
