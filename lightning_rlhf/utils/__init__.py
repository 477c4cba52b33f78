"""Helpers for all packages: atomic files and directories, checkpoints, collectives, random numbers."""

__all__: list[str] = []
