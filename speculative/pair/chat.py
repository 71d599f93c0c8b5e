"""The chat format of the pair: role marker, newline, content, end marker, newline.

`TEMPLATE` is what a server renders requests with (Jinja), `render` what the corpus is made with; a test holds
them equal.
"""

from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
PADDING = "<|pad|>"
ROLES = ("system", "user", "assistant")

#: In the order of their ids, which start at 0.
SPECIAL_TOKENS = (END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN, PADDING)

#: A role that the pair does not know (tool, developer) is read as the user's.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] if m['role'] in ['system', 'user', 'assistant'] else 'user' }}|>\n"
    "{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% endif %}"
)


def render(turns: Iterable[tuple[str, str]]) -> str:
    """(role, content) turns as text with markers."""
    return "".join(f"<|{role}|>\n{content}{END_OF_TURN}\n" for role, content in turns)
