"""English sentences from a small grammar: text for synthetic speech without a download.

The words (`lexicon.txt`, under the project's licence) are everyday ones, about three thousand forms
with their inflections. Within a part of speech they are drawn with a Zipf-like weight, and function
words come from the templates, so word counts fall off as in real text. A sentence is a function of
its seed. The seed ranges mean the same as those of drawn scenes: nothing is ever trained on
`TEST_SEEDS`. A twelfth of the content words is reserved: `reserved_words()` occur in a sentence
only on request, so that an encoder can be measured on words that it never heard.
"""

import functools
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate

TEST_SEEDS = range(0, 100_000)
VALIDATION_SEEDS = range(100_000, 200_000)
TASK_SEEDS = range(200_000, 1_000_000)
PRETRAINING_SEEDS = range(1_000_000, 100_000_000)

# (weight, template). {slot?} is filled half of the time; `_fill` chooses the words of a slot.
TEMPLATES: tuple[tuple[int, str], ...] = (
    (8, "{det} {adj?} {noun} {past} {det} {adj?} {noun}"),
    (6, "{det} {adj?} {noun} {past} {prep} {det} {adj?} {noun} {time?}"),
    (6, "{name} {past} {det} {adj?} {noun} {adv?}"),
    (5, "{name} and {name} {past} {prep} {det} {noun}"),
    (5, "{pron} {modal} {base} {det} {adj?} {noun} {time?}"),
    (5, "i want to {base} {det} {adj?} {noun} {prep} {det} {noun}"),
    (4, "she {s} {det} {adj?} {noun} {conj} he {s} {det} {noun}"),
    (4, "{det} {noun} is {adj} {conj} {det} {noun} is {adj}"),
    (4, "there are {number} {adj?} {nouns} {prep} {det} {noun}"),
    (4, "did you {base} {det} {adj?} {noun} {time?}"),
    (4, "{question} did {name} {base} {det} {noun}"),
    (3, "{question} {modal} {pron} {base} {det} {adj?} {noun}"),
    (3, "where is {det} {adj?} {noun}"),
    (3, "how many {nouns} are there {prep} {det} {noun}"),
    (3, "please {base} {det} {adj?} {noun} {adv?}"),
    (3, "don't {base} {det} {adj?} {noun}"),
    (3, "they are {ing} {prep} {det} {adj?} {noun}"),
    (3, "{name} is {ing} {det} {noun} {conj} {pron} {past} {det} {noun}"),
    (3, "we have {participle} {det} {adj?} {noun} {time?}"),
    (3, "{det} {noun} was {participle} by {det} {adj?} {noun}"),
    (3, "it's {adj} {conj} {adj}"),
    (3, "{adj} {nouns} {base} {adv?} {prep} {det} {noun}"),
    (3, "{name} lives in {place} with {number} {nouns}"),
    (3, "{time} {name} {past} to {place}"),
    (3, "my phone number is {digits}"),
    (3, "call {digits} and ask {name}"),
    (3, "{digits}"),
    (3, "room {number} is {prep} {det} {noun}"),
    (3, "the {noun} costs {number} dollars and {number} cents"),
    (2, "it happened in {place} in {time}"),
    (2, "{pron} {past} {number} {nouns} {conj} {number} {nouns}"),
    (2, "yes {pron} {modal} {base} {adv?}"),
    (2, "no {pron} {modal} not {base} {det} {noun}"),
    (2, "turn {det} {noun} {prep} {det} {noun}"),
    (2, "{det} {noun} of {det} {noun} {s} {adv?}"),
)
_SLOT = re.compile(r"\{(\w+)(\?)?\}")
_RESERVED_SHARE = 12  # one of so many content words is reserved


@dataclass(frozen=True)
class Lexicon:
    """The words that each slot may take, from common to rare."""

    forms: dict[str, tuple[str, ...]]

    def draw(self, slot: str, rng: random.Random) -> str:
        """Draws one form. Rank r has weight 1 / (r + 30)^0.8: common words are about ten times as
        frequent as rare ones."""
        words = self.forms[slot]
        return rng.choices(words, cum_weights=_cumulative(len(words)))[0]


@functools.cache
def _cumulative(count: int) -> list[float]:
    return list(accumulate(1 / (rank + 30) ** 0.8 for rank in range(count)))


def _plural(noun: str) -> str:
    if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", noun) and noun not in ("piano", "photo"):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def _inflect(verb: str) -> tuple[str, str, str, str, str]:
    """Returns (base, third person, past, participle, -ing) of an entry
    `base[/past/participle[/ing]]`."""
    base, *irregular = verb.split("/")
    third = {"be": "is", "have": "has"}.get(base, _plural(base))
    # One final consonant after a short vowel is doubled: stop, stopped, stopping.
    doubled = re.search(r"^[^aeiou]*(?:qu)?[aeiou][bdfgklmnprt]$", base)
    stem = base + base[-1] if doubled else base
    if base.endswith("ie"):
        ing = base[:-2] + "ying"
    elif base.endswith("e") and not base.endswith(("ee", "oe", "ye")) and base != "be":
        ing = base[:-1] + "ing"
    else:
        ing = stem + "ing"
    if re.search(r"[^aeiou]y$", base):
        past = base[:-1] + "ied"
    else:
        past = base + "d" if base.endswith("e") else stem + "ed"
    past, participle, ing = (*irregular, *(past, past, ing)[len(irregular) :])
    return base, third, past, participle, ing


def is_reserved(lemma: str) -> bool:
    """Whether a content word is reserved, so that pretraining never hears it."""
    return zlib.crc32(lemma.encode()) % _RESERVED_SHARE == 0


@functools.cache
def _sections() -> dict[str, tuple[str, ...]]:
    sections: dict[str, list[str]] = {}
    name = ""
    for line in files(__package__).joinpath("lexicon.txt").read_text("utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = []
        elif line:
            sections[name].extend(line.split())
    return {name: tuple(dict.fromkeys(words)) for name, words in sections.items()}


@functools.cache
def lexicon(*, reserved: bool = False) -> Lexicon:
    """Returns the words that pretraining may hear, or only the reserved content words."""
    sections = _sections()

    def keep(section: str) -> list[str]:
        return [w for w in sections[section] if is_reserved(w.split("/")[0]) == reserved]

    nouns = [entry.split("/") for entry in keep("noun")]
    verbs = [_inflect(entry) for entry in keep("verb")]
    verb_slots = ("base", "s", "past", "participle", "ing")
    forms = {
        "noun": [entry[0] for entry in nouns],
        "nouns": [entry[1] if len(entry) > 1 else _plural(entry[0]) for entry in nouns],
        **dict(zip(verb_slots, zip(*verbs, strict=True), strict=True)),
        "adj": keep("adjective"),
        "adv": keep("adverb"),
        "name": keep("name"),
    }
    if not reserved:
        # Function and number words are too few to reserve some.
        forms |= {
            slot: sections[section]
            for slot, section in {
                **{"place": "place", "time": "time", "prep": "preposition", "pron": "pronoun"},
                **{"det": "determiner", "conj": "conjunction", "modal": "modal"},
                **{"question": "question", "digit": "digit", "teen": "teen", "tens": "tens"},
            }.items()
        }
    return Lexicon({slot: tuple(words) for slot, words in forms.items()})


@functools.cache
def heard_words() -> tuple[str, ...]:
    """Returns every form that a pretraining sentence may contain, sorted."""
    of_templates = " ".join(_SLOT.sub(" ", template) for _, template in TEMPLATES).split()
    return tuple(sorted({"an", *of_templates}.union(*lexicon().forms.values())))


@functools.cache
def reserved_words() -> frozenset[str]:
    """Returns the forms that no pretraining sentence contains, in any part of speech."""
    forms = lexicon(reserved=True).forms.values()
    return frozenset(word for words in forms for word in words) - frozenset(heard_words())


def number_words(number: int) -> str:
    """Returns a number from 0 to 99 in words: 42 is "forty two"."""
    forms = lexicon().forms
    if number < 10:
        return forms["digit"][number]
    if number < 20:
        return forms["teen"][number - 10]
    tens, ones = divmod(number, 10)
    return forms["tens"][tens - 2] + (f" {forms['digit'][ones]}" if ones else "")


def sentence(seed: int, *, reserved_share: float = 0.0) -> str:
    """Returns one sentence of lower-case letters, apostrophes and spaces.

    Args:
        seed: from one of the ranges above; the same seed gives the same sentence.
        reserved_share: the share of content words, 0 to 1, that are drawn from `reserved_words()`.
    """
    rng = random.Random(f"sentence {seed}")
    weights, templates = zip(*TEMPLATES, strict=True)
    template = rng.choices(templates, weights=weights)[0]
    text = _SLOT.sub(lambda slot: _fill(slot, rng, reserved_share), template)
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(text.split()))


def _fill(slot: re.Match[str], rng: random.Random, reserved_share: float) -> str:
    name, optional = slot.groups()
    if optional and rng.random() < 0.5:
        return ""
    if name == "digits":
        return " ".join(rng.choices(lexicon().forms["digit"], k=rng.randint(1, 7)))
    if name == "number":
        return number_words(rng.randint(2, 99) if rng.random() < 0.5 else rng.randint(2, 12))
    reserved = lexicon(reserved=True)
    if name in reserved.forms and rng.random() < reserved_share:
        return reserved.draw(name, rng)
    return lexicon().draw(name, rng)


def word_string(seed: int, *, words: Sequence[str] | None = None) -> str:
    """Returns one to six random words, each form equally likely, so that a recogniser cannot guess
    them from the grammar. `words` defaults to `heard_words()`."""
    rng = random.Random(f"word string {seed}")
    return " ".join(rng.choices(words or heard_words(), k=rng.randint(1, 6)))
