"""What workers run: light modules, which import neither torch nor anything that does."""
