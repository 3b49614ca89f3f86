"""Answers by the age of the evidence: how long ago what a question needs was last visible.

The probes and their right answers are those of `eval.tabletop.scores`.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moss_jax.eval.tabletop.scores import Probe, Ratio
from moss_jax.worlds.tabletop import TabletopStream
from moss_jax.worlds.tabletop.answers import evidence
from moss_jax.worlds.tabletop.language import LIVE, PAST

# Upper bounds in seconds: evidence that is on the last frame, and so on.
AGES = {"now": 0, "<= 10 s": 10, "<= 1 min": 60, "<= 10 min": 600, "<= 1 h": 3600}
OLDER, WHOLE = "> 1 h", "whole stream"
ALL_AGES = (*AGES, OLDER, WHOLE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question with evidence of one age: its probes, aggregated.

    Attributes:
      kind: kind of question.
      age: one of ALL_AGES.
      right: share of its probes that were answered right.
      values: the right answers, each with its share of the probes.
    """

    kind: str
    age: str
    right: float
    values: Mapping[Hashable, float]


def bucket(evidence: int | None, second: int) -> str:
    """The age of evidence at a second of the stream.

    Args:
      evidence: the last second at which it was visible; None if it is spread over the whole stream.
      second: second of the question.
    """
    if evidence is None:
        return WHOLE
    return next((name for name, most in AGES.items() if second - evidence <= most), OLDER)


def answers(stream: TabletopStream, probes: Iterable[Probe]) -> Iterator[Answer]:
    """Yields the answers of one stream.

    A question about the present has many probes. It counts once for each age that its evidence had at them.

    Args:
      stream: the stream that the questions are about.
      probes: probes of the stream, in order.
    """
    for number, asked in itertools.groupby(probes, key=lambda probe: probe.request):
        request = stream.requests[number]
        by_age = collections.defaultdict(list)
        for probe in asked:
            by_age[bucket(evidence(request, stream.world, probe.second), probe.second)].append(probe)
        for age, found in by_age.items():
            values = collections.Counter(probe.value for probe in found)
            yield Answer(
                request.kind,
                age,
                sum(probe.right for probe in found) / len(found),
                {value: count / len(found) for value, count in values.items()},
            )


def summary(found: Sequence[Answer]) -> dict[str, Any]:
    """Counts of right answers, JSON-ready: overall, by age, by kind of question, and by both."""
    return _counts(found, lambda answer: answer.right)


def constant_guess(found: Sequence[Answer]) -> dict[str, Any]:
    """The counts of always giving the one answer to each kind of question that is right most often.

    The answer is chosen in hindsight, the same for all ages.
    """
    values: dict[str, dict[Hashable, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for answer in found:
        for value, share in answer.values.items():
            values[answer.kind][value] += share
    best = {kind: max(of_kind, key=lambda value: of_kind[value]) for kind, of_kind in values.items()}
    return _counts(found, lambda answer: answer.values.get(best[answer.kind], 0.0))


def _counts(found: Sequence[Answer], right: Callable[[Answer], float]) -> dict[str, Any]:
    totals: dict[tuple[str, str], Ratio] = collections.defaultdict(Ratio)
    for answer in found:
        for key in itertools.product(("", answer.kind), ("", answer.age)):
            totals[key] += Ratio(right(answer), 1)

    def entry(kind: str = "", age: str = "") -> dict[str, float]:
        total = totals.get((kind, age), Ratio())
        # Shares of the probes of a question add up to nearly whole numbers.
        return {"right": round(total.hits, 6), "total": int(total.total)}

    def by_age(kind: str = "") -> dict[str, dict[str, float]]:
        return {age: entry(kind, age) for age in ALL_AGES if (kind, age) in totals}

    kinds = [kind for kind in (*LIVE, *PAST) if (kind, "") in totals]
    return {
        "all": entry(),
        "by_age": by_age(),
        "by_kind": {kind: entry(kind) for kind in kinds},
        "by_kind_and_age": {kind: by_age(kind) for kind in kinds},
    }
