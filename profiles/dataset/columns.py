"""The names of columns by which training data is recognised and read."""

from __future__ import annotations

from typing import Final

#: Columns that hold a conversation: a list of turns.
TURNS: Final = ("messages", "conversations", "conversation")

#: Sets of columns that identify a format.
KEYS: Final = (
    *(frozenset({name}) for name in TURNS),
    frozenset({"instruction", "output"}),
    frozenset({"prompt", "completion"}),
    frozenset({"text"}),
)

#: Columns with a system prompt besides the turns, in order of precedence.
SYSTEM: Final = (
    "system", "system_prompt", "system_message", "system_instruction",
    "systemPrompt", "systemMessage", "systemInstruction",
)  # fmt: skip

#: Columns with a list of functions besides the turns; the second is OpenAI's name of 2023.
TOOLS: Final = ("tools", "functions", "available_tools", "tool_definitions", "available_functions")

#: Columns that mark whether a whole record is to be learned.
LEARNED: Final = ("weight", "train", "trainable", "learn", "label", "kto_tag")

#: Columns that say for each turn, or for each answer, whether it is learned, in a list.
LEARNED_TURNS: Final = (*LEARNED[:4], "weights", "loss", "loss_mask", "loss_weight", "loss_weights", "mask")

#: The split that a record belongs to; under the other names only where the value is a split's name alone.
SPLIT: Final = "split"
SPLITS: Final = (SPLIT, "Split", "data_split", "dataset_split", "partition", "subset", "set", "fold")

#: Columns with the better and the worse answer of preference data.
PREFERENCE: Final = ("chosen", "rejected")

#: Columns with what is not text, and what stands in a turn's text in its place.
MEDIA: Final = ("image", "images", "video", "videos", "audio", "audios")
MEDIA_MARKS: Final = ("<image>", "<video>", "<audio>")

#: All columns that any format reads; others are named in the remarks and not read.
READ: Final = frozenset(
    {
        *TURNS,
        *(name for columns in KEYS for name in columns),
        *SYSTEM,
        *TOOLS,
        *LEARNED,
        *LEARNED_TURNS,
        *PREFERENCE,
        *SPLITS,
        "input",
        "history",
    }
)

#: Placeholder for the value of a column that was not read.
NOT_READ: Final = "(not read)"
