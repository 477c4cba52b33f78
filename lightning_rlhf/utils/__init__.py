"""What several rooms use and none owns: files that are whole or not there, checkpoints, seeds."""

__all__: list[str] = []
