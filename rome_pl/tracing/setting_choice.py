"""Choosing among settings of edits by what trial edits of the same facts with each of them are worth."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rome_pl.metrics.intervals import Entry
from rome_pl.metrics.probes import ProbeScores
from rome_pl.metrics.scores import record_values, summarise
from rome_pl.utils.markdown import markdown_table

__all__ = ["RATES", "Choice", "SettingScores", "choose", "score_setting", "setting_table", "worth"]

RATES = ("ES", "PS", "NS")


@dataclass(frozen=True)
class SettingScores:
    """What trial edits with one setting are worth.

    Args:
        question: What the setting answers, such as ``layer``.
        name: The setting in words.
        options: Options of :class:`rome_pl.RomeModule` that it changes.
        scores: ES, PS and NS right after each edit, with intervals.
        worths: By record the mean of those of ES, PS and NS that it has probes for.
        divergence: Divergence of the next token of ordinary text for an edit, in nats; ``None``: not measured.
        longest: Longest offset of a search, in norms of the original value; ``None``: nothing was searched.
        evaluations: Evaluations of the loss for an edit.
        applied: Edits that were not rejected.
        seconds: What the trial took.
    """

    question: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Entry] = field(default_factory=dict)
    worths: Mapping[str, float] = field(default_factory=dict)
    divergence: float | None = None
    longest: float | None = None
    evaluations: float = 0.0
    applied: int = 0
    seconds: float = 0.0

    @property
    def worth(self) -> float:
        """The mean of its records' worths."""
        return statistics.fmean(self.worths.values()) if self.worths else math.nan


@dataclass(frozen=True)
class Choice:
    """What was chosen among settings.

    Args:
        chosen: The setting.
        tied: Names of all settings that these facts do not tell from the best one, the chosen one among them.
        tried: Number of settings that were compared.
    """

    chosen: SettingScores
    tied: tuple[str, ...]
    tried: int = 2

    @property
    def verdict(self) -> str:
        """The choice in words."""
        if self.tried == 1:
            return f"{self.chosen.question}: {self.chosen.name}, the only one tried"
        if len(self.tied) == 1:
            return f"{self.chosen.question}: {self.chosen.name} is best"
        others = ", ".join(name for name in self.tied if name != self.chosen.name)
        return f"{self.chosen.question}: {self.chosen.name}; a tie with {others}, of which it moves ordinary text least"


def worth(scores: ProbeScores, base: ProbeScores | None) -> float | None:
    """The mean of those of ES, PS and NS that a record has probes for; ``None`` if it has none."""
    values = record_values(scores, base)
    known = [values[name] for name in RATES if name in values]
    return statistics.fmean(known) if known else None


def score_setting(
    setting: SettingScores, measured: Mapping[str, ProbeScores], base: Mapping[str, ProbeScores], **found: Any
) -> SettingScores:
    """A setting with what was measured of it.

    Args:
        setting: The setting.
        measured: What was measured right after each edit, by name; all facts.
        base: The same on the unedited model.
        found: Its other fields.
    """
    worths = {name: worth(scores, base.get(name)) for name, scores in measured.items()}
    summary = summarise(dict(measured), dict(base))
    return SettingScores(
        setting.question,
        setting.name,
        setting.options,
        {name: summary[name] for name in RATES},
        {name: value for name, value in worths.items() if value is not None},
        **found,
    )


def choose(settings: Sequence[SettingScores]) -> Choice:
    """Choose a setting; all have edited the same facts.

    The best one has the highest mean worth. Others are tied with it if they are less than one standard error behind,
    that of the difference record by record: which one is better is then chance as much as merit. Of tied settings the
    one that moves ordinary text least is chosen, of equal ones the earlier.
    """
    best = max(settings, key=lambda found: -math.inf if math.isnan(found.worth) else found.worth)
    tied = [found for found in settings if found is best or _close(found, best)]
    chosen = min(tied, key=lambda found: math.inf if found.divergence is None else found.divergence)
    if chosen.divergence is None:
        chosen = best
    return Choice(chosen, tuple(found.name for found in tied), len(settings))


def _close(found: SettingScores, best: SettingScores) -> bool:
    """Whether the records do not tell a setting from the best one."""
    behind = [best.worths[name] - found.worths[name] for name in best.worths.keys() & found.worths.keys()]
    if not behind:
        return False
    error = statistics.stdev(behind) / math.sqrt(len(behind)) if len(behind) > 1 else math.inf
    return statistics.fmean(behind) <= error


def setting_table(settings: Sequence[Mapping[str, Any]], chosen: Mapping[str, str], base: Mapping[str, Entry]) -> str:
    """The trials as a table in Markdown; chosen settings are bold.

    Args:
        settings: The trials, as results.json holds them.
        chosen: The chosen setting's name, by question.
        base: Scores of the unedited model.
    """
    rows = [["", "unedited", *(_cell(base[name]) for name in RATES)]]
    for found in settings:
        name = found["name"]
        rows.append(
            [
                found["question"],
                f"**{name}**" if chosen.get(found["question"]) == name else name,
                *(_cell(found["scores"][rate]) for rate in RATES),
                "" if found["divergence"] is None else f"{found['divergence']:.4f}",
                f"{found['evaluations']:.1f}",
                str(found["applied"]),
                f"{found['seconds']:.0f}",
            ]
        )
    columns = ("question", "setting", *RATES, "KL, nats", "evaluations", "applied", "seconds")
    return markdown_table(columns, rows, numbers=len(columns) - 2, escape=str)


def _cell(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    return f"{found['value']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"
