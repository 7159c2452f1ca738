"""Which settings of a run have to be the same when it is resumed."""

import pytest

from rome_pl.cli.verbs import VERBS
from rome_pl.editing.resume import DECISIVE, TRAINER, check_settings
from rome_pl.ledger.edit_log import LedgerError

REPORTS = {
    "probe_evaluation", "damage_check", "commit", "retention_check", "tensorboard_report", "run_report",
}  # fmt: skip
"""Sections of ``rome-pl edit`` that measure, keep and report; no edit depends on them."""


@pytest.mark.parametrize("section", DECISIVE)
def test_another_setting_of_a_decisive_section_is_refused(section, tmp_path):
    name = TRAINER[0] if section == "trainer" else "option"
    with pytest.raises(LedgerError, match=rf"- {section}\.{name}: 1\n  \+ {section}\.{name}: 2"):
        check_settings(tmp_path, {section: {name: 1}}, {section: {name: 2}})
    check_settings(tmp_path, {section: {name: 1}}, {section: {name: 1}})


@pytest.mark.parametrize("section", sorted(REPORTS))
def test_settings_of_reports_may_differ(section, tmp_path):
    check_settings(tmp_path, {section: {"option": 1}}, {section: {"option": 2}})


def test_every_callback_of_the_command_line_is_one_or_the_other():
    names = {name for _, name in VERBS["edit"].callbacks}
    assert names <= set(DECISIVE) | REPORTS
    assert not set(DECISIVE) & REPORTS
