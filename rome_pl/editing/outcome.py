"""Whether an edit has taken: one rule for the verification, the retries, the state check and the reports."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rome_pl.metrics.probes import Answer, ProbeScores, TargetMeasure

__all__ = ["HELD_ALREADY", "Requirement", "held_already", "instead", "says_target"]

HELD_ALREADY = "the model gives this target already"
"""The note of an edit whose target greedy decoding gives before anything is written for it."""

SHOWN = 60
"""Most characters that a reason quotes of what the model says."""


@dataclass(frozen=True)
class Requirement:
    """What an edit has to reach to have taken. Without arguments any finite probability will do.

    Args:
        least_probability: Least probability of the target after the bare prompt, the geometric mean over its tokens.
        greedy: Whether greedy decoding after the bare prompt has to give the target.
    """

    least_probability: float = 0.0
    greedy: bool = False

    def objection(
        self, before: float | None, after: TargetMeasure, changed: bool, decode: Callable[[list[int]], str]
    ) -> str | None:
        """Why an edit that was written has not taken, if so.

        Where greedy decoding need not give the target, it has to give it or be likelier than before.

        Args:
            before: The target's probability before the write, if it is known.
            after: The target after it.
            changed: Whether the search has found an offset other than zero.
            decode: Turns tokens into text.
        """
        least, probability = self.least_probability, after.probability
        if not math.isfinite(probability):
            return f"after the write the target's probability is no number ({probability})"
        if probability < least:
            said = "" if after.greedy else f" (the model says {instead(after, decode)})"
            return f"after the write the target has probability {probability:.2g}{said}, below {least:g}"
        if after.greedy or (least == 0 and not self.greedy):
            return None
        if self.greedy:
            was = "" if before is None else f", before {before:.2g}"
            return (
                f"after the write the model says {instead(after, decode)}, not the target (probability "
                f"{probability:.2g}{was})"
            )
        if not changed:
            return f"the search has found no change, and the model says {instead(after, decode)}, not the target"
        if before is not None and not probability >= before:
            return f"after the write the target has probability {probability:.2g}, less than before ({before:.2g})"
        return None


def instead(measure: TargetMeasure, decode: Callable[[list[int]], str]) -> str:
    """What greedy decoding gives up to its first token that is not the target's, and which token that is.

    Args:
        measure: A target that greedy decoding does not give.
        decode: Turns tokens into text.
    """
    pairs = list(zip(measure.target, measure.predicted, strict=True))
    place = next((index for index, (wanted, given) in enumerate(pairs) if wanted != given), None)
    if place is None:  # nothing is known of its tokens
        return "something else"
    text = decode([*measure.target[:place], measure.predicted[place]])
    shown = json.dumps(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}", ensure_ascii=False)
    if len(pairs) == 1:
        return shown
    wanted = json.dumps(decode([measure.target[place]]), ensure_ascii=False)
    return f"{shown} (token {place + 1} of {len(pairs)} should be {wanted})"


def says_target(scores: ProbeScores | None) -> bool:
    """Whether measured scores say that greedy decoding gives the new answer after the rewrite prompt."""
    answers: Sequence[Answer] = scores.answers.get("rewrite", ()) if scores is not None else ()
    return bool(answers) and all(answer.generated for answer in answers)


def held_already(content: Mapping[str, Any]) -> str:
    """How many of a run's applied edits the model gave already, in words; empty if none.

    Args:
        content: What results.json holds.
    """
    return f"{content['n_held_already']} of them held already" if content.get("n_held_already") else ""
