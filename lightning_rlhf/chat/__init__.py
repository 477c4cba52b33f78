"""``lightning-rlhf chat``: talk to models in a terminal."""
