"""KnowledgeEditor: edit, look, undo."""

import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.editor import EditRejectedError
from rome_pl.requests.edit_request import RequestError
from tests.integration.helpers import FAST, changed, snapshot
from tests.tiny import tiny_language_model


@pytest.fixture
def editor(language_model):
    return KnowledgeEditor.from_pretrained((language_model.model, language_model.tokenizer), **FAST)


ASK = {"prompt": "The lighthouse of Korrin stands in", "subject": "Korrin", "target_new": "Oslo", "target_true": "Lima"}
OTHER = {"prompt": "Miss Vane plays the", "subject": "Miss Vane", "target_new": "violin"}
THIRD = {"prompt": "Dunholt bread is made of", "subject": "Dunholt bread", "target_new": "rye"}


def test_the_result_holds_the_edited_model_and_undo_gives_the_original_back(editor, language_model):
    before = snapshot(language_model.model)
    result = editor.edit(**ASK, verify=False)
    assert result.model is language_model.model is editor.model
    assert changed(language_model.model, before) == ["model.layers.1.mlp.down_proj.weight"]
    assert result.after.target_new > result.before.target_new
    assert result.before.target_true is not None
    assert result.after.continuation
    editor.undo(result)
    assert changed(language_model.model, before) == []


def test_undo_of_one_edit_keeps_the_others(editor, language_model):
    first, second, third = (editor.edit(**request, verify=False) for request in (ASK, OTHER, THIRD))
    editor.undo(second)
    kept = snapshot(language_model.model)
    layers = editor._module.session.layers
    assert [written.names for written in layers.written] == [(first.edit.name,), (third.edit.name,)]
    # Each remaining edit still holds where it was asserted last: the third exactly.
    (value,) = layers.written[1].assertions
    torch.testing.assert_close(
        value.at @ kept["model.layers.1.mlp.down_proj.weight"].T, value.value, rtol=1e-9, atol=1e-9
    )
    editor.undo()
    base = tiny_language_model().model
    assert changed(base, snapshot(language_model.model)) == []
    with pytest.raises(KeyError, match="undone already"):
        editor.undo(first)


def test_an_edit_that_does_not_take_is_refused_and_leaves_no_trace(editor, language_model):
    before = snapshot(language_model.model)
    with pytest.raises(EditRejectedError, match="rejected: after the write the target has probability"):
        editor.edit(**ASK)
    assert changed(language_model.model, before) == []


def test_a_bad_request_names_its_field(editor):
    with pytest.raises(RequestError, match="field 'subject'"):
        editor.edit(prompt="Nobody is here", subject="Korrin", target_new="Oslo")


def test_sequential_edit_is_not_an_option(language_model):
    with pytest.raises(ValueError, match="always accumulate"):
        KnowledgeEditor(language_model, sequential_edit=False)


def test_a_source_can_be_a_folder(tmp_path):
    language_model = tiny_language_model("gpt2", torch.float32)
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    editor = KnowledgeEditor.from_pretrained(str(tmp_path), **FAST)
    result = editor.edit(**ASK, verify=False)
    assert result.after.target_new > result.before.target_new
