"""Measurements of a language model around its edits."""

from rome_pl.metrics.probes import Answer as Answer
from rome_pl.metrics.probes import ProbeScores as ProbeScores
from rome_pl.metrics.probes import probe_scores as probe_scores
from rome_pl.metrics.scores import SCORES as SCORES
from rome_pl.metrics.scores import EditScores as EditScores
from rome_pl.metrics.scores import RunningScores as RunningScores
from rome_pl.metrics.scores import summarise as summarise
from rome_pl.metrics.text import TextMeasure as TextMeasure
from rome_pl.metrics.text import held_out_text as held_out_text
from rome_pl.metrics.text import measure_text as measure_text
from rome_pl.metrics.text import perplexity as perplexity
