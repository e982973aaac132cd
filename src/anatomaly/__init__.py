"""Finds what is not normal in medical images after seeing only normal ones."""

__version__ = "0.1.0"
