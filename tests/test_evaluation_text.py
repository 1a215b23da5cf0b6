"""Slots of meaning representations in the words of people; BLEU and ROUGE-L on texts small enough to count."""

import math

import pytest

from instructgpt_jax.evaluation import text

MEANING = (
    "name[The Eagle], eatType[coffee shop], food[English], priceRange[cheap], customer rating[5 out of 5], "
    "area[riverside], familyFriendly[yes], near[Café Rouge]"
)


def test_slots_of_a_meaning_representation():
    assert text.slots(MEANING)[3:5] == [("priceRange", "cheap"), ("customer rating", "5 out of 5")]
    with pytest.raises(ValueError, match="must have the form 'name\\[X\\], area\\[Y\\]', got"):
        text.slots("Write a poem.")


def test_slot_coverage_counts_the_share():
    whole = (
        "Near Cafe Rouge by the river is The Eagle, a highly rated, inexpensive coffee-shop with British food. "
        "Children are welcome."
    )
    assert text.slot_coverage(MEANING, whole) == 1.0
    assert text.slot_coverage(MEANING, "The Eagle is a kid friendly coffee shop.") == pytest.approx(3 / 8)
    assert text.slot_coverage(MEANING, "") == 0.0


@pytest.mark.parametrize(
    "attribute, value, said, unsaid",
    [
        ("familyFriendly", "yes", "It is child-friendly.", "It is not child-friendly."),
        ("familyFriendly", "yes", "No smoking. Families like it.", "A pub."),
        ("familyFriendly", "no", "This non-family-friendly pub", "This family pub"),
        ("familyFriendly", "no", "Children aren’t allowed.", "Children are allowed."),
        ("familyFriendly", "no", "It is for adults only.", "It is not far."),
        ("customer rating", "5 out of 5", "It has a high customer rating.", "It has a low customer rating."),
        ("customer rating", "high", "customers rate it 5 out of 5", "customers rate it 1 out of 5"),
        ("customer rating", "1 out of 5", "a one star pub", "a five star pub"),
        ("customer rating", "3 out of 5", "with an average rating", "with average prices and a rating"),
        ("customer rating", "low", "is poorly rated", "has low prices"),
        ("priceRange", "less than £20", "It is cheap.", "It is expensive."),
        ("priceRange", "cheap", "for less than £20", "for more than £30"),
        ("priceRange", "£20-25", "moderately priced", "low-priced"),
        ("priceRange", "moderate", "The price range is £20-£25.", "The price range is less than £20."),
        ("priceRange", "more than £30", "high-priced", "highly rated"),
        ("priceRange", "high", "an expensive pub", "an inexpensive pub"),
        ("area", "city centre", "in the center of the city", "in the riverside area"),
        ("food", "Fast food", "It serves fast-food.", "It serves food fast, they say."),
        ("near", "Café Sicilia", "beside CAFE SICILIA", "beside Café Rouge"),
        ("eatType", "pub", "a pub", "a publisher's party"),
    ],
)
def test_says(attribute, value, said, unsaid):
    assert text.says(attribute, value, said)
    assert not text.says(attribute, value, unsaid)


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert text.bleu(["a b c d e"], [["a b c d e"]]) == pytest.approx(100)
    # Against two references: 1-grams 5/5, 2-grams 4/4, 3-grams 2/3, 4-grams 1/2; as long as the nearer one.
    found = text.bleu(["a b c d x"], [["a b c d", "c d x y z"]])
    assert found == pytest.approx(100 * math.exp((0 + 0 + math.log(3 / 3) + math.log(1 / 2)) / 4))
    # References may be of different number from text to text.
    assert text.bleu(["a b c d e", "f g h i j"], [["a b c d e"], ["k", "f g h i j"]]) == pytest.approx(100)


def test_rouge_l():
    pytest.importorskip("rouge_score")
    # Longest common subsequence "the cat sat" of 4 and 6 words: precision 3/4, recall 3/6, F1 0.6.
    assert text.rouge_l("the cat sat down", ["the black cat sat on mats"]) == pytest.approx(0.6)
    assert text.rouge_l("the cat sat down", ["a dog", "the cat sat down"]) == 1.0
