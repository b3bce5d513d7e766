"""Training data formats: recognised by their columns and made into one internal form."""

from __future__ import annotations

import enum


class DataFormat(enum.Enum):
    """A recognised format of training data."""

    MESSAGES = "messages"  #: OpenAI: {"messages": [{"role": ..., "content": ...}], "tools": [...]}
    SHAREGPT = "sharegpt"  #: {"conversations": [{"from": "human", "value": ...}], "tools": "[...]"}
    ALPACA = "alpaca"  #: {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [...]}
    PROMPT_COMPLETION = "prompt-completion"  #: {"prompt": ..., "completion": ...}, text or messages
    TEXT = "text"  #: {"text": ...} or a .txt file

    @property
    def label(self) -> str:
        """The format in words."""
        return _LABELS[self]


_LABELS = {
    DataFormat.MESSAGES: "OpenAI messages",
    DataFormat.SHAREGPT: "ShareGPT conversations",
    DataFormat.ALPACA: "Alpaca instructions",
    DataFormat.PROMPT_COMPLETION: "prompt and completion",
    DataFormat.TEXT: "plain text",
}
