"""The packages: those with code, and the config files, which stand beside them in a checkout."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["lightning_rlhf*"]), "lightning_rlhf.configs"])
