"""``lightning-rlhf chat``: talk to models in a terminal."""

from lightning_rlhf.chat.client import Answer, ChatError, Client
from lightning_rlhf.chat.conversation import Conversation
from lightning_rlhf.chat.terminal import Terminal

__all__ = ["Answer", "ChatError", "Client", "Conversation", "Terminal"]
