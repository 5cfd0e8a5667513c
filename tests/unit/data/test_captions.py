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


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red&nbsp;Apple &amp; a pear", "a red apple & a pear"),
        ("see https://example.org/a?b=c or www.shop.com/x now", "see or now"),
        ("sold at bestshop.com, by @someone", "sold at, by"),
        ("photo IMG_2041.JPG of a cat", "photo of a cat"),
        ("item 1234567 and #998877, in 1984", "item and, in 1984"),
        ("code ab12cd34ef here", "code here"),
        ("a poster 24 x 36 inches, 1920x1080", "a poster inches"),
        ("a dog 犬 and ネコ", "a dog and"),
        ("curly “quotes” – and ‘more’", 'curly "quotes" - and \'more'),
        ("what?!! wow...", "what?! wow."),
        ("a_b-c_d-e_f", "a b c d e f"),
        ("★ stars ~ {and} |pipes|", "stars and pipes"),
        ("<b>bold</b> idea", "bold idea"),
        ("naïve café", "naïve café"),
    ],
)
def test_rule_of_the_paper(text, cleaned):
    assert CAPTION_RULES["paper"](text) == cleaned


@given(st.text(max_size=60))
def test_rule_of_the_paper_gives_one_line_of_lower_case(text):
    once = CAPTION_RULES["paper"](text)
    assert once == once.lower() and once == " ".join(once.split())


def test_first_line():
    assert CAPTION_RULES["first-line"]("\n A red  kangaroo.\nach.utf8=Kangaru\n") == "A red kangaroo."
    assert CAPTION_RULES["first-line"]("") == ""
