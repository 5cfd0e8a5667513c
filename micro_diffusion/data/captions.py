"""Caption cleaning: named rules in one table."""

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

from micro_diffusion.data.records import Caption, Rejected


def light(text: str) -> str:
    """Undo HTML entities, drop control characters, make any run of white space one space; case, quotes and CJK stay."""
    text = html.unescape(text)
    return " ".join("".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text).split())


def first_line(text: str) -> str:
    """`light` of the first line that is not empty: for files that hold more than the caption."""
    return light(next((line for line in text.splitlines() if line.strip()), ""))


# In this order, on the lower-cased text: what is dropped, and by what it is replaced.
PAPER_DROPS = (
    (r"<[^>]*>", " "),  # tags
    (r"(?:https?:|www\.)\S+|\b[\w.-]+\.(?:com|co|org|net|edu|gov|ru|info|de|uk|io)\b(?:/\S*)?", " "),  # addresses
    (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", " "),
    (r"(?:^|(?<=\s))@\w+", " "),  # handles
    (r"\S+\.(?:png|jpe?g|bmp|webp|gif|svg|pdf|eps|mp4|html?)\b", " "),  # file names
    (r"[\u3000-\u30ff\u31c0-\u31ff\u3200-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\uff00-\uffef]+", " "),  # CJK
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"[\u201c\u201d\u00ab\u00bb`]", '"'),
    (r"[\u2018\u2019\u00b4]", "'"),
    (r"#?\b\d{5,}\b", " "),  # numbers that only a catalogue knows
    (r"\b(?=\w*\d\w*\d)(?=\w*[a-z])\w{7,}\b", " "),
    (r"\b\d+(?:\.\d+)?\s*x\s*\d+(?:\.\d+)?\b", " "),  # sizes
    (r"[^\w\s.,:;!?'\"&%$()/+-]|_", " "),  # most punctuation
    (r"([.,:;!?'\"-])\1+", r"\1"),
    (r"\s+(?=[.,:;!?])", ""),
    (r"^[\s.,:;!?'\"-]+|[\s,:;'\"-]+$", ""),
)


def paper(text: str) -> str:
    """What the paper's captions went through, told in the same order: lower case, and only words of a sentence stay."""
    text = light(html.unescape(text)).lower()
    if len(re.findall(r"(?<=\w)[-_](?=\w)", text)) > 3:  # words joined as in a file's name
        text = re.sub(r"[-_]", " ", text)
    for pattern, by in PAPER_DROPS:
        text = re.sub(pattern, by, text)
    return " ".join(text.split())


CAPTION_RULES: dict[str, Callable[[str], str]] = {"none": str, "light": light, "first-line": first_line, "paper": paper}


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
