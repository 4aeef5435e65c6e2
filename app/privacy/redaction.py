"""Pure: personal data and secrets in a text, found by their form and their check digits, and taken out.

The main rule: time grows with the length of the text and with nothing else, whoever wrote it. So no pattern can be
entered twice at the same place: quantifiers are possessive or bounded, and what needs context is looked at from an
anchor (an `@`, a run of digits) outwards. What has no form of its own - a name, a postal address - is not found here
(`names` asks a model for some of it).

Patterns begin with the characters that they can begin with, and only then look back at what must not stand before: `re`
leaps to such a character three times as fast as it tries a lookbehind at each.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Literal, NamedTuple, get_args

Kind = Literal["private_key", "jwt", "api_key", "email", "iban", "card", "national_id", "ip", "phone"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order of their claim on characters that two of them want."""


class Finding(NamedTuple):
    """Characters `start` to `end` of a text are of a kind."""

    kind: str
    start: int
    end: int


def find(text: str, kinds: Iterable[Kind] = KINDS) -> list[Finding]:
    """Find what is personal or secret, in the order of the text; findings do not overlap."""
    wanted = set(kinds)
    claimed: list[Finding] = []
    has_digits = _DIGIT.search(text) is not None
    for kind in KINDS:
        if kind in wanted and (has_digits or kind not in _NUMERIC):
            claimed = joined(claimed, _FINDERS[kind](text))
    return claimed


def redact(text: str, kinds: Iterable[Kind] = KINDS) -> str:
    """Put `[email]`, `[card]` ... where something was found."""
    return replaced(text, find(text, kinds))


def replaced(text: str, findings: Iterable[Finding]) -> str:
    """Put the kind of each finding, in brackets, in its place."""
    parts: list[str] = []
    at = 0
    for kind, start, end in findings:
        parts += (text[at:start], f"[{kind}]")
        at = end
    return "".join((*parts, text[at:])) if parts else text


def joined(claimed: list[Finding], more: Iterable[Finding]) -> list[Finding]:
    """Add what of `more` is free; both are in the order of the text."""
    out, at = [], 0
    for finding in more:
        while at < len(claimed) and claimed[at].end <= finding.start:
            out.append(claimed[at])
            at += 1
        if (at == len(claimed) or claimed[at].start >= finding.end) and (not out or out[-1].end <= finding.start):
            out.append(finding)
    return out + claimed[at:]


_DIGIT = re.compile(r"\d")
_NUMERIC = frozenset[Kind](("iban", "card", "national_id", "phone"))

# Secrets.

_PRIVATE_KEY = "PRIVATE KEY"
_KEY_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")


def _private_keys(text: str) -> Iterator[Finding]:
    """From the first line of a key to its last; to the end of the text where that was cut off."""
    if _PRIVATE_KEY not in text:
        return
    at = 0
    while begin := _KEY_BEGIN.search(text, at):
        end = _KEY_END.search(text, begin.end())
        at = end.end() if end else len(text)
        yield Finding("private_key", begin.start(), at)


_JWT = re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{5,}+\.[\w-]{5,}+\.[\w-]*+", re.ASCII)


def _jwts(text: str) -> Iterator[Finding]:
    if "eyJ" in text:
        yield from _all(_JWT, "jwt", text)


# By the prefixes that their makers give them. The tails are what GitHub, OpenAI, Anthropic, AWS, Google, Slack, Stripe,
# GitLab, Hugging Face, npm, PyPI and SendGrid document, with room for their next lengths.
_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        sk-[\w-]{16,}+ | (?:ghp|gho|ghu|ghs|ghr)_\w{30,}+ | github_pat_\w{30,}+
        | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]) | AIza[\w-]{35} | xox[abeoprs]-[\w-]{10,}+
        | [sr]k_(?:live|test)_\w{16,}+ | glpat-[\w-]{20,}+ | hf_[A-Za-z0-9]{30,}+ | npm_\w{36,}+
        | pypi-[\w-]{50,}+ | SG\.[\w-]{20,}+\.[\w-]{20,}+ | hm_[\w-]{20,}+
    )""",
    re.ASCII | re.VERBOSE,
)
_BEARER = re.compile(r"[bB](?<![^\W_].)(?i:earer)[ ]{1,3}([\w.~+/=-]{16,}+)")
# A value that its name calls a secret: eight characters or more, with no space in them.
_ASSIGNS = re.compile(r"[:=]")
_SECRET_NAME = re.compile(
    r"(?:(?:api|secret|access)[_-]?key|(?:access|auth)[_-]?token|client[_-]?secret|password|passwd)[\"']?[ \t]{0,3}\Z",
    re.IGNORECASE,
)
_SECRET_NAME_ENDS = ("key", "token", "secret", "password", "passwd")
_MAX_SECRET_NAME = 20
_SECRET = re.compile(r"""[:=][ \t]{0,3}["']?([^\s"',;<>]{8,}+)""")

# Without one of these no pattern can match: looking for a word is twenty times as fast as looking for a pattern.
_TOKEN_SIGNS = (
    "sk-", "AKIA", "ASIA", "AIza", "xox", "glpat-", "pypi-", "SG.",
    "hp_", "ho_", "hu_", "hs_", "hr_", "pat_", "live_", "test_", "hf_", "pm_", "hm_",
)  # fmt: skip
_NAME_SIGNS = ("key", "token", "secret", "passw")


def _api_keys(text: str) -> Iterator[Finding]:
    found = list(_all(_TOKEN, "api_key", text)) if any(sign in text for sign in _TOKEN_SIGNS) else []
    lower = text.lower()
    if "bearer" in lower:
        found += (Finding("api_key", *match.span(1)) for match in _BEARER.finditer(text))
    if any(sign in lower for sign in _NAME_SIGNS):
        found += _assigned(text)
    yield from sorted(found, key=_start)


def _assigned(text: str) -> Iterator[Finding]:
    ends = 0
    for sign in _ASSIGNS.finditer(text):
        at = sign.start()
        if at < ends:
            continue
        name = text[max(0, at - _MAX_SECRET_NAME) : at]
        if (
            name.rstrip(" \t\"'").lower().endswith(_SECRET_NAME_ENDS)
            and _SECRET_NAME.search(name)
            and (value := _SECRET.match(text, at))
        ):
            yield Finding("api_key", *value.span(1))
            ends = value.end()


# Addresses.

_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{|}~-")
_MAX_LOCAL = 64  # RFC 5321, 4.5.3.1.1
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![^\W_])")


def _emails(text: str) -> Iterator[Finding]:
    at = text.find("@")
    while at >= 0:
        start, first = at, max(0, at - _MAX_LOCAL)
        while start > first and (text[start - 1] in _LOCAL or (text[start - 1] > "\x7f" and text[start - 1].isalnum())):
            start -= 1
        while start < at and text[start] in "'`.*/=|{":
            start += 1
        domain = _DOMAIN.match(text, at + 1, at + 255) if start < at else None
        if domain:
            yield Finding("email", start, domain.end())
        at = text.find("@", domain.end() if domain else at + 1)


_IPV4 = re.compile(
    r"\d(?<![^\W_].)(?<!\..)(?<![A-Za-z]-.)\d{0,2}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?![^\W_]|-[A-Za-z]|\.\d)", re.ASCII
)
_MIN_IPV6 = 6
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(
    r"[0-9A-Fa-f:](?<![^\W_].)(?<![:.].)(?<![^\W_]_.)(?:(?<=:)|[0-9A-Fa-f]{0,3}:)(?:[0-9A-Fa-f]{0,4}:){1,7}+"
    r"(?:\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|[0-9A-Fa-f]{0,4})(?![^\W_]|:|_[^\W_])",
    re.ASCII,
)


def _ips(text: str) -> Iterator[Finding]:
    found = list(_all(_IPV4, "ip", text, _is_ip))
    if _COLONS.search(text):
        found += _all(_IPV6, "ip", text, _is_ip6)
    yield from sorted(found, key=_start)


def _is_ip6(text: str) -> bool:
    """Whether it is an address: `::` alone is an operator in some languages, and `12:30:15` is a time."""
    return len(text) >= _MIN_IPV6 and _is_ip(text)


def _is_ip(text: str) -> bool:
    try:
        return not ip_address(text).is_unspecified
    except ValueError:
        return False


# Numbers.

# The country's letters, its check digits, and groups of up to four: what ISO 13616 prints and people type.
_IBAN = re.compile(
    r"\d(?<=[A-Za-z].)\d(?<=[A-Za-z]{2}..)(?<![A-Za-z0-9].{4})(?:[ -]?[A-Za-z0-9]{1,4}+){3,8}(?![A-Za-z0-9])", re.ASCII
)
_MIN_IBAN, _MAX_IBAN = 15, 34
_AS_NUMBER = [str(int(chr(code), 36)) if chr(code).isalnum() else "" for code in range(128)]


def _ibans(text: str) -> Iterator[Finding]:
    return _checked(_IBAN, "iban", text, is_iban, _MIN_IBAN, found_behind=2)


def is_iban(text: str) -> bool:
    """Whether the check digits are right: the whole as a number leaves 1 on division by 97 (ISO 7064)."""
    compact = text.encode().translate(None, b" -")
    if not _MIN_IBAN <= len(compact) <= _MAX_IBAN:
        return False
    return int("".join([_AS_NUMBER[code] for code in compact[4:] + compact[:4]])) % 97 == 1


_CARD = re.compile(r"[2-6](?<![^\W_].)(?<!\..)(?:[ -]?\d){11,18}(?![^\W_]|[.,]\d)", re.ASCII)
_CARD_BEHIND_NUMBERS = re.compile(r"\d{4}(?:[ -]\d{4}(?!\d)|[ -]\d{6}(?!\d)|\d{8})")
"""How it begins where numbers stand before it: as cards are printed, or a table of numbers had many by chance."""
_MIN_CARD = 12
_DOUBLED = bytes.maketrans(b"0123456789", b"0246813579")
"""A digit's double, and of a double that has two digits their sum."""


def _cards(text: str) -> Iterator[Finding]:
    return _checked(_CARD, "card", text, is_card, _MIN_CARD, inside=_CARD_BEHIND_NUMBERS)


def is_card(text: str) -> bool:
    """Whether the number begins as those of card issuers do and its check digit is right (Luhn, ISO/IEC 7812)."""
    digits = text.encode().translate(None, b" -")
    if digits[0] not in b"23456" or len(digits) < _MIN_CARD or len(set(digits)) < 3:
        return False
    return (sum(digits[-1::-2] + digits[-2::-2].translate(_DOUBLED)) - len(digits) * ord("0")) % 10 == 0


_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_SSN = re.compile(
    r"[0-8](?<![^\W_].)(?<![^\W_]-.)\d\d(?<!000)(?<!666)-(?!00)\d{2}-(?!0000)\d{4}(?![^\W_]|-[^\W_])", re.ASCII
)
_NINO = re.compile(
    r"[A-CEGHJ-PR-TW-Z](?<![^\W_].)[A-CEGHJ-NPR-TW-Z](?<!BG|GB|KN|NK|NT|TN|ZZ) ?\d{2} ?\d{2} ?\d{2} ?[A-D](?![^\W_])",
    re.ASCII,
)
_DNI = re.compile(r"[XYZ\d](?<![^\W_].)-?(?<!\d-)\d{7}-?[A-Z](?![^\W_])", re.ASCII)
_NIR = re.compile(
    r"[12](?<![^\W_].) ?\d{2} ?(?:0[1-9]|1[0-2]) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}(?![^\W_])", re.ASCII
)
_CODICE = re.compile(r"[A-Z](?<![^\W_].)[A-Z]{5}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z](?![^\W_])", re.ASCII)


def _is_dni(text: str) -> bool:
    compact = text.replace("-", "")
    number = compact[:-1].translate(str.maketrans("XYZ", "012"))
    return _DNI_LETTERS[int(number) % 23] == compact[-1]


def _is_nir(text: str) -> bool:
    """Whether the key is right: 97 less the rest of the number (INSEE); Corsica's letters count as 19 and 18."""
    compact = text.replace(" ", "")
    number = int(compact[:-2].replace("2A", "19").replace("2B", "18"))
    return 97 - number % 97 == int(compact[-2:])


def _always(_: str) -> bool:
    return True


# The United States, the United Kingdom, Spain, France and Italy; with a check digit wherever the number has one.
_NATIONAL: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = (
    (_SSN, _always),
    (_NINO, _always),
    (_DNI, _is_dni),
    (_NIR, _is_nir),
    (_CODICE, _always),
)


def _national_ids(text: str) -> Iterator[Finding]:
    found = [finding for pattern, is_right in _NATIONAL for finding in _all(pattern, "national_id", text, is_right)]
    yield from sorted(found, key=_start)


# A run that could be dialled: an optional plus or bracket, then digits with single separators between them, and an
# extension behind them. What it is is decided by how it is grouped.
_DIALLED = re.compile(
    r"[+(\d](?<![^\W_].)(?:(?<=\+)|(?<![./#-].)(?<!\d[,:].))(?:(?<=\d)|(?<=[+(])\d)(?:[ .()/-]{0,2}\d){6,17}+"
    r"(?P<extension>[ ]?(?:x|ext\.?)[ ]?\d{1,6}+)?(?![^\W_]|[.,:/-]\d)",
    re.ASCII,
)
_DIGITS = re.compile(r"\d+")
_DATE = re.compile(r"(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})(?: ?\d{1,2})?", re.ASCII)
_AMOUNT = re.compile(r"[1-9]\d{0,2}(?:[ .]\d{3})+", re.ASCII)
_SAID_BEFORE = re.compile(
    r"(?:phone|tel|mobile|cell|fax|call|dial|ring|whatsapp|sms|reach)\W{0,3}[\w ]{0,24}\W{0,3}\Z", re.IGNORECASE
)
_SAID_BEHIND = re.compile(r"\W{0,3}(?:office|home|work|mobile|cell|phone|fax)\b", re.IGNORECASE)
_CONTEXT = 40


def _phones(text: str) -> Iterator[Finding]:
    for match in _DIALLED.finditer(text):
        if _is_phone(match):
            yield Finding("phone", *match.span())


def _is_phone(match: re.Match[str]) -> bool:
    number = match[0].removesuffix(extension := match["extension"] or "")
    groups = _DIGITS.findall(number)
    digits = sum(map(len, groups))
    if not 7 <= digits <= 15 or _DATE.fullmatch(number.lstrip("(")):
        return False
    if number[0] in "+(" or number.startswith("00") or extension:
        return True
    if len(groups) == 1:
        is_dialled = number[0] == "0" and digits >= 9
    else:
        is_dialled = 8 <= digits <= 12 and (number[0] == "0" or _is_grouped(groups, number))
        is_dialled = is_dialled and not _AMOUNT.fullmatch(number)
    return is_dialled or _is_said(match)


def _is_said(match: re.Match[str]) -> bool:
    """Whether a word beside it calls it a number to dial."""
    text, (start, end) = match.string, match.span()
    return bool(_SAID_BEHIND.match(text, end) or _SAID_BEFORE.search(text, max(0, start - _CONTEXT), start))


def _is_grouped(groups: list[str], number: str) -> bool:
    """Whether it is written as numbers are dialled: three or more groups of two to four, with one kind of separator."""
    separators = set(re.sub(r"\d", "", number))
    return len(groups) >= 3 and all(2 <= len(group) <= 4 for group in groups) and len(separators) == 1


def _checked(
    pattern: re.Pattern[str],
    kind: Kind,
    text: str,
    is_right: Callable[[str], bool],
    shortest: int,
    *,
    inside: re.Pattern[str] | None = None,
    found_behind: int = 0,
) -> Iterator[Finding]:
    """What has check digits. Words and numbers beside it look like its groups: without some of them it may be right.

    Numbers have `shortest` characters or more, and begin `found_behind` before what the pattern matches; behind groups
    that turned out to be none they look like `inside`.
    """
    at = tried = 0
    while match := pattern.search(text, at):
        start, at = match.start() - found_behind, match.end()
        end = at
        if inside and match.start() < tried and not inside.match(text, match.start()):
            end = start
        while end - start >= shortest and not is_right(text[start:end]):
            end = max(text.rfind(" ", start, end), text.rfind("-", start, end))
        if end - start >= shortest:
            yield Finding(kind, start, end)
            at = end
        elif group := _GROUP.match(text, match.start(), at):
            at, tried = group.end(), max(tried, at)


_GROUP = re.compile(r"[^ -]+")


def _all(
    pattern: re.Pattern[str], kind: Kind, text: str, is_right: Callable[[str], bool] = _always
) -> Iterator[Finding]:
    return (Finding(kind, *match.span()) for match in pattern.finditer(text) if is_right(match[0]))


def _start(finding: Finding) -> int:
    return finding.start


_FINDERS: dict[Kind, Callable[[str], Iterator[Finding]]] = {
    "private_key": _private_keys,
    "jwt": _jwts,
    "api_key": _api_keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "national_id": _national_ids,
    "ip": _ips,
    "phone": _phones,
}
