"""What a campaign found, in figures, and its faults."""

from collections.abc import Sequence

from tests.campaign.facts import FORMS
from tests.campaign.trials import Outcome


def describe(outcomes: Sequence[Outcome]) -> str:
    """One line for each form, and one for each mutation that anything is wrong with."""
    lines = [f"{len(outcomes)} cases, {sum(bool(outcome.faults) for outcome in outcomes)} with faults"]
    forms = {form: [one for one in outcomes if one.name.split("/")[1] == form] for form in FORMS}
    kinds = ("right", "refused", "crash", "hang")
    for form, own in forms.items():
        counts = ", ".join(f"{kind} {sum(one.got == kind for one in own)}" for kind in kinds)
        lines.append(f"{form:12} {len(own):5} cases: {counts}, faults {sum(bool(one.faults) for one in own)}")
    by_mutation: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_mutation.setdefault(one.name.split("/")[2], []).append(one)
    for name, own in sorted(by_mutation.items()):
        counts = ", ".join(f"{kind} {number}" for kind in kinds if (number := sum(one.got == kind for one in own)))
        lines.append(f"  {name:40} {len(own):4}: {counts}, faults {sum(bool(one.faults) for one in own)}")
    return "\n".join(lines)


def complaints(outcomes: Sequence[Outcome], most: int = 20) -> str:
    """The first cases with faults, each with what it takes to repeat it."""
    bad = [outcome for outcome in outcomes if outcome.faults]
    return "\n".join(
        f"{one.name} (expected {one.verdict}, got {one.got})\n  " + "\n  ".join(one.faults) + f"\n  {one.case}"
        for one in bad[:most]
    )
