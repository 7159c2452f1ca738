"""Variants of a test of which one or two are enough for the quick set; the slow set runs the others too."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """A variant for the slow set alone."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


QUICK_VARIANTS = {
    "test_bounds.py::test_every_value_gets_the_norm_that_was_asked_for": 3,
    "test_bounds.py::test_no_edit_changes_a_layer_by_more_than_is_allowed": 3,
    "test_configs.py::test_an_edit_with_the_config_s_own_settings": 4,
    "test_console.py::test_a_full_or_closed_output_leaves_the_exit_code": 0,
    "test_convert.py::test_every_kind_of_file_becomes_a_run": 4,
    "test_covariance.py::test_processes_that_lightning_starts_end_early_together": 0,
    "test_devices.py::test_a_sequential_stream_on_two_devices_is_refused": 0,
    "test_evaluate.py::test_two_processes_find_what_one_finds": 0,
    "test_generation.py::test_no_shipped_setting_changes_what_is_written": 19,
    "test_html_report.py::test_five_thousand_edits_are_one_page_in_time_in_proportion_to_them": 0,
    "test_identity.py::test_two_processes_that_undo_one_run_both_do": 0,
    "test_language_model.py::"
    "test_fingerprint_below_changes_with_the_weights_that_keys_depend_on_and_not_with_later_ones": 19,
    "test_moment_pass.py::test_one_pass_over_several_layers_equals_plain_forwards_of_each_document": 16,
    "test_oracle.py::test_agrees_with_the_oracle": 8,
    "test_record_forms.py::test_published_files_parse_without_loss": 1,
    "test_report.py::test_tensorboard_has_continuations_before_and_after": 2,
    "test_resume.py::test_what_cannot_be_resumed_is_refused_and_stays": 3,
    "test_resume.py::test_wherever_it_is_killed_a_run_ends_as_if_it_had_not_been": 3,
    "test_saving.py::test_a_configuration_of_another_kind_is_named": 2,
    "test_saving.py::test_a_link_or_pipe_in_a_run_folder_is_refused_before_anything_is_touched": 2,
    "test_saving.py::test_a_product_that_is_missing_is_made_again": 3,
    "test_scores_oracle.py::test_every_score_equals_the_slow_one": 2,
}
"""Tests that take long, and how many of their variants the quick set keeps (the last); the slow set has the others."""


def leave_to_the_slow_set(items: list[pytest.Item]) -> None:
    """Mark the variants that the quick set does not keep."""
    variants: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            variants.setdefault(f"{item.path.name}::{getattr(item, 'originalname', item.name)}", []).append(item)
    for name, kept in QUICK_VARIANTS.items():
        found = variants.get(name, [])
        for item in found[: max(0, len(found) - kept)]:
            item.add_marker(pytest.mark.slow)
