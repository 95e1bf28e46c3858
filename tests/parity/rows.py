"""The rows that TRL and prefloop both train on; imported by the fixture scripts: no prefloop."""

from __future__ import annotations

from typing import Any, NamedTuple


class Pair(NamedTuple):
    """One preference row."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


# No token merges over a boundary, lengths differ, and one prompt stands twice.
PAIRS = (
    Pair("Is the film good?", " The film is a quiet joy.", " no", 0.5),
    Pair("Name a tool:", " hammer", " a table is not a tool, but the saw is", 1.0),
    Pair("2 + 2 =", " 4", " 5", 0.0),
    Pair("Tell me about the moon.", " It goes about the earth.\nIt is far.", " the moon", 2.0),
    Pair("Is the film good?", " I liked it", " It is bad and the cook is too.", 0.25),
    Pair("Bonjour, ça va?", " Oui, très bien. 🙂", " the the the", 0.75),
)
DEMONSTRATIONS = tuple({"prompt": p.prompt, "completion": p.chosen} for p in PAIRS)
PREFERENCES = tuple({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS)
UNPAIRED = tuple(
    {"prompt": p.prompt, "completion": p.chosen if n % 3 else p.rejected, "label": bool(n % 3)}
    for n, p in enumerate(PAIRS)
)
PROMPTS = (
    *("Is the film good?", "Name a tool:", "2 + 2 =", "a", "Tell me about the moon.", "Hi."),
    *("Bonjour, ça va?", "the the the"),
)


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


CONVERSATIONS = tuple(
    {
        "messages": [
            *_turn("user", first.prompt),
            *_turn("assistant", first.chosen.strip()),
            *_turn("user", second.prompt),
            *_turn("assistant", second.chosen.strip()),
        ]
    }
    for first, second in zip(PAIRS, PAIRS[1:] + PAIRS[:1], strict=True)
)
CHATS: tuple[dict[str, Any], ...] = tuple(
    {
        "prompt": _turn("user", p.prompt),
        "chosen": _turn("assistant", p.chosen.strip()),
        "rejected": _turn("assistant", p.rejected.strip()),
    }
    for p in PAIRS
)
