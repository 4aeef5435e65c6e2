"""Which sentences of a passage give a claim's number to something else than the claim speaks of.

The main rule: a row or sentence does not support a claim when another one like it says all of the claim's words that it
says and more of them, with another number: of "Basic costs 12 EUR" and "Pro costs 40 EUR" the first says nothing about
what Pro costs. Words alone do not tell, since the first has all of "Pro costs 12 EUR" but one.
"""

from collections.abc import Collection, Sequence

from retrieval.terms import Terms

_NONE: frozenset[int] = frozenset()


def of_others(
    claim: Terms, subject: frozenset[str], sentences: Sequence[Terms], under: Sequence[frozenset[str]]
) -> Collection[int]:
    """Return the sentences whose numbers are not the claim's; `under` holds the words of the headings over each.

    What a claim leaves out ("It costs 12 EUR") is looked for in `subject`, the words of what the question is about.
    """
    suspects = [place for place, said in enumerate(sentences) if not claim.numbers.isdisjoint(said.vocabulary)]
    if not suspects:
        return _NONE
    spoken = frozenset(claim.words) - claim.numbers
    contexts = [said.vocabulary - said.numbers | above for said, above in zip(sentences, under, strict=True)]
    others = [
        place
        for place, said in enumerate(sentences)
        # Without a number of its own it gives the claim none.
        if said.numbers - claim.numbers and not claim.numbers <= said.vocabulary
    ]
    return frozenset(
        here
        for here in suspects
        for there in others
        if here != there
        and _are_alike(contexts[here], contexts[there])
        and (claim.numbers & sentences[here].vocabulary) - sentences[there].vocabulary
        and any(_speaks_of(words, contexts[here], contexts[there]) for words in (spoken, spoken | subject))
    )


def _are_alike(one: frozenset[str], other: frozenset[str]) -> bool:
    """Tell whether two sentences share half of their words: rows, items and sentences that tell the same of many."""
    return 2 * len(one & other) >= min(len(one), len(other))


def _speaks_of(words: frozenset[str], here: frozenset[str], there: frozenset[str]) -> bool:
    """Tell whether words speak of what is `there`, and not of what only `here` is named."""
    return words & here < words & there and bool(here - there)
