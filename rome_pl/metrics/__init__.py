"""Measurements of a language model around its edits."""

from rome_pl.metrics.counterfact import CounterFactScores as CounterFactScores
from rome_pl.metrics.counterfact import RunningScores as RunningScores
from rome_pl.metrics.counterfact import summarise as summarise
from rome_pl.metrics.probes import ProbeScores as ProbeScores
from rome_pl.metrics.probes import perplexity as perplexity
from rome_pl.metrics.probes import probe_scores as probe_scores
