"""Variants of the method, one file each: python -m ablations.NAME."""
