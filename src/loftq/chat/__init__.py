"""Talking to a model: the conversation, its place in the model's context, and the answers."""

from loftq.chat.conversation import ContextError, Conversation
from loftq.chat.session import Reply, Session, open_session

__all__ = ["ContextError", "Conversation", "Reply", "Session", "open_session"]
