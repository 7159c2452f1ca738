"""DataModules that stream edit requests, or text to compute statistics from."""

if __name__ != "rome_pl.data_modules":
    raise ImportError("import these data modules as rome_pl.data_modules: under two names each class would exist twice")

from rome_pl.data_modules.corpus import CorpusDataModule as CorpusDataModule
from rome_pl.data_modules.counterfact import CounterFactDataModule as CounterFactDataModule
from rome_pl.data_modules.facts import FactDataModule as FactDataModule
from rome_pl.data_modules.knowedit import KnowEditDataModule as KnowEditDataModule
from rome_pl.data_modules.request_data import RequestDataModule as RequestDataModule
from rome_pl.data_modules.zsre import ZsreDataModule as ZsreDataModule
