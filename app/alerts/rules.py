"""Pure: what people want to be told of, as rules that are set before a release serves.

The main rule: a rule says what is bad, never what is usual. One set holds for all releases of a name, or for one of
them; where there is none the usual rules hold. Sets are kept beside the releases and not in them: another threshold
must not make another release.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec

from app.errors import invalid_field

Kind = Literal["threshold", "absence", "drift", "burn_rate", "trial", "rollback", "outbox"]
"""What a rule looks at. The last three are built in: a canary's trial that cannot end, one that was rolled back, and
records that do not reach the shared database."""

SetKind = Literal["threshold", "absence", "drift", "burn_rate"]
Severity = Literal["page", "ticket"]
"""Whether somebody is woken, or has something to look at in the morning."""

Missing = Literal["answers", "labels", "figure"]
Shift = Literal["inputs", "outputs"]
BurnShare = Literal["failed", "refused", "abstained", "unsupported", "truncated", "slow"]

BURN_SHARES: tuple[BurnShare, ...] = get_args(BurnShare)
MAX_RULES = 50
MAX_WINDOW_SECONDS = 30 * 86_400.0

RuleName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
FigureName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=MAX_WINDOW_SECONDS)]
Pause = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class BadRules(ValueError):
    """Rules that could never be told true or false; the message names the field and the fix."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class BurnWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A long window that shows harm, a short one that shows that it goes on, and how fast the budget burns in both."""

    long_seconds: Seconds
    short_seconds: Seconds
    factor: Annotated[float, msgspec.Meta(gt=0, le=10_000)]


USUAL_WINDOWS = (BurnWindow(3_600, 300, 14.4), BurnWindow(21_600, 1_800, 6.0))
"""Two hours' and five days' worth of a month's budget, as Google's SRE workbook (2018, chapter 5) has it."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rule; which fields matter follows from its kind.

    Raises:
        BadRules: a field that its kind needs is missing, or one is set that means nothing there.
    """

    name: RuleName
    kind: SetKind
    severity: Severity = "ticket"
    for_seconds: Pause = 0.0
    """How long it must be bad before it fires; until then it is pending."""
    keep_seconds: Pause = 300.0
    """How long it must be good again before it is resolved."""
    window_seconds: Seconds = 3_600.0
    """The answers that are looked at: those made in the last so many seconds."""
    min_n: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 50
    """With fewer answers nothing is known."""
    figure: FigureName | None = None
    """Of the quality report, such as `refused`; for `threshold`, and for the `absence` of one."""
    class_name: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = msgspec.field(
        default=None, name="class"
    )
    above: float | None = None
    """Bad where the whole interval is above."""
    below: float | None = None
    missing: Missing | None = None
    """For `absence`: what has to be there within the window."""
    shifts: tuple[Shift, ...] = ("inputs", "outputs")
    """For `drift`."""
    share: BurnShare | None = None
    """For `burn_rate`: the bad share of answers that the objective bounds."""
    objective: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = None
    """The share of answers that must be good: 0.99 leaves a budget of 1 %."""
    slow_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 30.0
    """For the share `slow`: an answer that took longer."""
    windows: tuple[BurnWindow, ...] = USUAL_WINDOWS

    def __post_init__(self) -> None:
        """Check that the fields belong together."""
        needed = {"threshold": ("figure",), "absence": ("missing",), "burn_rate": ("share", "objective"), "drift": ()}
        for field in needed[self.kind]:
            if getattr(self, field) is None:
                raise BadRules(f"a rule of the kind {self.kind!r} needs `{field}`.", field)
        allowed = {"threshold": {"figure", "class_name", "above", "below"}, "absence": {"figure", "missing"}}
        allowed |= {"burn_rate": {"share", "objective"}, "drift": set()}
        for field in ("figure", "class_name", "above", "below", "missing", "share", "objective"):
            if getattr(self, field) is not None and field not in allowed[self.kind]:
                raise BadRules(f"`{field}` means nothing to a rule of the kind {self.kind!r}: leave it out.", field)
        if self.kind == "threshold" and (self.above is None) == (self.below is None):
            raise BadRules("a threshold is either `above` or `below`: give one of them.", "above")
        if self.kind == "absence" and (self.missing == "figure") != (self.figure is not None):
            raise BadRules('`figure` names what is missing, and goes with `missing = "figure"`.', "figure")
        if self.kind == "drift" and not self.shifts:
            raise BadRules("`shifts`: name inputs, outputs, or both.", "shifts")
        if self.kind == "burn_rate":
            _check_windows(self)


def _check_windows(rule: Rule) -> None:
    if not 1 <= len(rule.windows) <= 4:
        raise BadRules("`windows`: give one to four.", "windows")
    budget = 1.0 - (rule.objective or 0.0)
    for window in rule.windows:
        if window.short_seconds >= window.long_seconds:
            raise BadRules("`windows`: `short_seconds` must be less than `long_seconds`.", "windows")
        if window.factor * budget >= 1:
            most = 1 / budget
            raise BadRules(
                f"`windows`: with that objective a factor of {window.factor:g} can never be reached; {most:.3g} is "
                "where every answer is bad.",
                "windows",
            )


DEFAULT_RULES = (
    Rule(name="errors", kind="burn_rate", severity="page", share="failed", objective=0.99),
    Rule(name="refusals", kind="threshold", severity="page", figure="refused", above=0.2),
    Rule(name="abstentions", kind="threshold", figure="abstained", above=0.8),
    Rule(name="empty_answers", kind="threshold", severity="page", figure="empty", above=0.05),
    Rule(name="cut_answers", kind="threshold", figure="truncated", above=0.3),
    Rule(name="disliked", kind="threshold", figure="thumbs_up", below=0.5, window_seconds=86_400.0),
    Rule(name="no_answers", kind="absence", missing="answers", window_seconds=86_400.0, keep_seconds=0.0),
    Rule(name="drift", kind="drift", keep_seconds=0.0),
)
"""What a team that sets nothing is told of: what hardly any release should do, whatever it is for."""


def read_rules(given: Sequence[Mapping[str, Any]], *, field: str = "alerts") -> tuple[Rule, ...]:
    """Make rules of what a file or the API says.

    Raises:
        BadRules: names the rule by its position, the field, and what it should be.
    """
    if len(given) > MAX_RULES:
        raise BadRules(f"`{field}`: there may be {MAX_RULES} rules.", field)
    made: list[Rule] = []
    for at, each in enumerate(given):
        where = f"{field}[{at}]"
        try:
            rule = msgspec.convert(each, Rule)
        except msgspec.ValidationError as error:
            # What __post_init__ raises comes wrapped, with its words.
            cause, problem = error.__cause__, invalid_field(error)
            inner = cause.field if isinstance(cause, BadRules) else problem.param
            path = f"{where}.{inner}" if inner else where
            raise BadRules(f"`{path}`: {problem.message.removeprefix(f'`{problem.param}`: ')}", path) from error
        if any(rule.name == other.name for other in made):
            raise BadRules(f"`{where}.name`: there is a rule {rule.name!r} already.", f"{where}.name")
        made.append(rule)
    return tuple(made)


def rules_in(content: Mapping[str, Any]) -> tuple[Rule, ...] | None:
    """The rules in a release's file, under `alerts`; None where it has none. Raises BadRules."""
    given = content.get("alerts")
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise BadRules("`alerts`: write each rule as a table of its own, [[alerts]].", "alerts")
    return read_rules(given)


def encode_rules(rules: Iterable[Rule]) -> str:
    """Rules as they are kept."""
    return msgspec.json.encode(list(rules)).decode()


def decode_rules(text: str) -> tuple[Rule, ...]:
    """Read rules as they are kept."""
    return msgspec.json.decode(text, type=tuple[Rule, ...])
