import pytest
from hypothesis import given
from hypothesis import strategies as st

from micro_diffusion.data.captions import CAPTION_RULES, clean_captions, light
from micro_diffusion.data.records import Caption, Rejected


def test_light_keeps_case_digits_quotes_and_cjk():
    assert light('  A "Red"\tapple &amp; 3\n\x00林檎 ') == 'A "Red" apple & 3 林檎'


@given(st.text())
def test_light_leaves_no_white_space_to_clean(text):
    assert light(text) == light(light(text)) or "&" in text
    assert light(text) == " ".join(light(text).split())


def test_bytes_are_utf8_and_empty_captions_are_left_out():
    captions = [Caption("grün".encode(), 2.0), Caption("  "), Caption("b")]
    assert clean_captions(captions, CAPTION_RULES["light"]) == (["grün", "b"], [2.0, 1.0])


@pytest.mark.parametrize(
    ("captions", "reason"),
    [([], "no caption"), ([Caption(" "), Caption("")], "empty caption"), ([Caption(b"\xff")], "caption is not UTF-8")],
)
def test_rejects(captions, reason):
    with pytest.raises(Rejected) as error:
        clean_captions(captions, CAPTION_RULES["light"])
    assert error.value.reason == reason
