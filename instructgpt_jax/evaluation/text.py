"""How well a text says what it should: slots of a meaning representation, BLEU and ROUGE-L against references.

A meaning representation is a prompt of the E2E data (Novikova et al. 2017): `name[Blue Spice], priceRange[cheap]`. A
slot counts as said when the text holds its value, whatever the case, the accents and the hyphens, or a way in which
people write it:

* `area`, `food`, `eatType`: other names of the same thing (`SYNONYMS`): "city center", "by the river", "British".
* `familyFriendly[yes]`: families, children or kids without a negation; `[no]`: with one, or "adults only".
* `customer rating`: its own words; or its level of three in words next to a word about ratings, or in stars. The data's
  writers turn "5 out of 5" into "high" and back, so the two count as the same, as do "1 out of 5" and "low".
* `priceRange`: its own words; or its level in an adjective of price, or in words next to a word about prices. "cheap",
  "low" and "less than £20" are one level, as are "moderate" and "£20-25", "high" and "more than £30".

These are patterns: an unforeseen wording counts as missing. Of the texts that people wrote for the data, 0.92 of the
slots are found.
"""

import re
import unicodedata
from collections.abc import Sequence

_SLOT = re.compile(r"\s*([\w ]+?)\s*\[([^\]]*)\]")

SYNONYMS = {
    "riverside": r"river ?side|river ?(?:bank|front)|(?:by|near|on|along|at|beside|of|to) (?:the |a )?river",
    "city centre": r"(?:city|town)'?s? ?cent(?:re|er)|cent(?:re|er) (?:of (?:the )?)?(?:city|town)|downtown",
    "english": r"english|british",
    "fast food": r"fast ?foods?",
    "coffee shop": r"coffee ?(?:shop|house|place|bar)s?",
    "pub": r"pubs?",
    "restaurant": r"restaurants?",
}  # fmt: skip

_FAMILY = r"(?:famil(?:y|ies)|child(?:ren)?|kids?)"
_NEGATION = r"(?:not?|non|never|without|un|unfriendly|unsuitable|isn't|aren't|doesn't|don't|dislikes?|nor)"
_UNFRIENDLY = re.compile(  # a negation before the family in its clause ("is not a family place"), or soon behind it
    rf"\b{_NEGATION}\b[^.;,!?]{{0,40}}\b{_FAMILY}\b|\b{_FAMILY}\b[^.;,!?]{{0,25}}\b{_NEGATION}\b|\badults?\b"
)

_GAP = r"(?:[^\w.;!?]+(?!{other})\w+){{0,3}}?[^\w.;!?]+"  # up to three words of the same sentence, not about the other
_RATING = r"(?:rat(?:ed|ings?|es?)|reviews?|reviewed|customers?|recommended|satisfaction|feedback|quality)"
_PRICE = r"(?:pric(?:e|es|ed|ing)|cost(?:s|ing)?)"
_RATING_LEVELS = {  # level: words, stars
    "low": ("low(?:ly|er|est)?|poor(?:ly)?|bad(?:ly)?|terrible", "1|one"),
    "average": ("average|moderate(?:ly)?|decent(?:ly)?|mediocre|middling|fair(?:ly)?|medium", "3|three"),
    "high": ("high(?:ly|er|est)?|excellent(?:ly)?|great|good|top|best|well|perfect|outstanding", "5|five"),
}
_PRICE_LEVELS = {  # level: adjectives of price, words that need a word about prices beside them
    "low": (
        "cheap(?:ly|er)?|inexpensive(?:ly)?|affordabl[ey]|low cost|(?:less|lower|under|below|up to)[^.;!?]{0,12}20",
        "low(?:er|est|ly)?|small|budget",
    ),
    "moderate": (
        "20 ?(?:to|and|£)? ?£?25",
        "moderate(?:ly)?|mid(?:dle)?|medium|average|reasonabl[ey]|fair(?:ly)?",
    ),
    "high": (
        "(?<!in)expensive(?:ly)?|pricey|costly|upscale|(?:more|over|above)[^.;!?]{0,12}30|30 or more",
        "high(?:er|est|ly)?|above average",
    ),
}
_LEVEL = {
    "rating": {"1 out of 5": "low", "3 out of 5": "average", "5 out of 5": "high"},
    "price": {"cheap": "low", "less than £20": "low", "£20 25": "moderate", "more than £30": "high"},
}


def slots(meaning: str) -> list[tuple[str, str]]:
    """The attributes and values of a meaning representation, in order.

    >>> slots("name[The Mill], customer rating[5 out of 5]")
    [('name', 'The Mill'), ('customer rating', '5 out of 5')]

    Raises:
      ValueError: a text without a slot.
    """
    found = [match.groups() for match in _SLOT.finditer(meaning)]
    if not found:
        raise ValueError(f"a meaning representation must have the form 'name[X], area[Y]', got {meaning[:80]!r}")
    return found


def slot_coverage(meaning: str, text: str) -> float:
    """The share of the slots of a meaning representation that a text says, 0 to 1.

    >>> slot_coverage("name[Cocum], eatType[pub], familyFriendly[no]", "The pub Cocum is child-friendly.")
    0.6666666666666666
    """
    said = [says(attribute, value, text) for attribute, value in slots(meaning)]
    return sum(said) / len(said)


def says(attribute: str, value: str, text: str) -> bool:
    """Whether a text says one slot, see the docstring of this module."""
    value, text, attribute = _plain(value), _plain(text), attribute.lower()
    if "family" in attribute:
        unfriendly = _UNFRIENDLY.search(text) is not None
        return unfriendly if value == "no" else not unfriendly and re.search(rf"\b{_FAMILY}\b", text) is not None
    if "rating" in attribute:
        level = _LEVEL["rating"].get(value, value)
        if level not in _RATING_LEVELS:
            return value in text
        words, stars = _RATING_LEVELS[level]
        counted = rf"\b(?:{stars}) ?(?:out )?(?:of|/) ?(?:5|five)\b|\b(?:{stars}) stars?\b"
        return re.search(f"{counted}|{_beside(words, _RATING, _PRICE)}", text) is not None
    if "price" in attribute:
        level = _LEVEL["price"].get(value, value)
        if level not in _PRICE_LEVELS:
            return value in text
        adjectives, words = _PRICE_LEVELS[level]
        return re.search(rf"\b(?:{adjectives})\b|{_beside(words, _PRICE, _RATING)}", text) is not None
    pattern = SYNONYMS.get(value, re.escape(value))
    return re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text) is not None


def _beside(words: str, about: str, other: str) -> str:
    """A pattern of one of `words` up to three words before or behind one of `about`, with none of `other` between."""
    gap = _GAP.format(other=other)
    return rf"\b(?:{words})\b{gap}{about}\b|\b{about}\b{gap}(?:{words})\b"


def _plain(text: str) -> str:
    """Lower case, no accents, hyphens as spaces, single spaces."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c)).replace("’", "'")
    return " ".join(re.sub(r"[-–—‐‑]", " ", text).split())


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of texts, 0 to 100, each against any number of references (sacrebleu, case-sensitive, 13a tokens)."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[given[k] if k < len(given) else None for given in references] for k in range(most)]
    return sacrebleu.corpus_bleu(list(texts), streams).score


def rouge_l(text: str, references: Sequence[str]) -> float:
    """The F1 of the longest common subsequence of words with the closest reference, 0 to 1 (rouge-score)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)
