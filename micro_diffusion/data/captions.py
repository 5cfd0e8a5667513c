"""Caption cleaning: named rules in one table."""

import html
import unicodedata
from collections.abc import Callable, Sequence

from micro_diffusion.data.records import Caption, Rejected


def light(text: str) -> str:
    """Undo HTML entities, drop control characters, make any run of white space one space; case, quotes and CJK stay."""
    text = html.unescape(text)
    return " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text).split())


CAPTION_RULES: dict[str, Callable[[str], str]] = {"none": str, "light": light}


def clean_captions(captions: Sequence[Caption], rule: Callable[[str], str]) -> tuple[list[str], list[float]]:
    """Texts and weights after the rule, without the empty ones; raises `Rejected` when none is left."""
    if not captions:
        raise Rejected("no caption")
    try:
        texts = [rule(text if isinstance(text, str) else text.decode("utf-8")) for text, _ in captions]
    except UnicodeDecodeError as error:
        raise Rejected("caption is not UTF-8", str(error)) from error
    kept = [(text, float(caption.weight)) for text, caption in zip(texts, captions, strict=True) if text.strip()]
    if not kept:
        raise Rejected("empty caption")
    return [text for text, _ in kept], [weight for _, weight in kept]
