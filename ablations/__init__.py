"""Variants of the method, one file each; run by ablate.py or with python -m ablations.NAME."""
