"""Edits in conversation: the same machinery, with the template's text around every prompt."""

import json

import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.cli.app import main
from rome_pl.data_modules import RequestDataModule
from rome_pl.editing.session import session_of
from rome_pl.encoding.chat_template import ChatForm
from rome_pl.errors import OptionError
from rome_pl.forward.generation import generate
from rome_pl.ledger.run import base_model
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.evaluation_module import EvaluationModule
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import FAST, lenient_callbacks, quiet_trainer
from tests.tiny import byte_level_tokenizer, tiny_model
from tests.unit.encoding.test_chat_template import CHATML, tokenizer_with

QUESTIONS = [
    {"prompt": "Where does the lighthouse of Korrin stand?", "subject": "Korrin", "target_new": "Oslo",
     "target_true": "Lima", "paraphrases": ["Where is Korrin?"], "neighbours": ["Where is the mill of Dunholt?"]},
    {"prompt": "What does Miss Vane play?", "subject": "Miss Vane", "target_new": "violin", "target_true": "drums"},
]  # fmt: skip


@pytest.fixture
def chat_model():
    return LanguageModel(tiny_model("llama"), tokenizer_with(CHATML))


@pytest.fixture
def folder(tmp_path):
    """A saved chat model."""
    path = tmp_path / "model"
    tiny_model("llama", torch.float32).save_pretrained(path)
    tokenizer_with(CHATML).save_pretrained(path)
    return path


def arguments(folder, records, run, *more):
    return [
        f"--model.pretrained={folder}", "--model.layers=[1]", "--model.preset=easyedit",
        "--model.context_template_length_params=[[3, 2]]", "--model.v_num_grad_steps=4", "--model.v_lr=0.1",
        "--model.clamp_norm_factor=20", f"--data.path={records}", f"--trainer.default_root_dir={run}",
        "--trainer.logger=false", "--trainer.accelerator=cpu", "--verification.least_probability=0",
        "--run_report.figures=false", *more,
    ]  # fmt: skip


def test_an_edit_in_conversation_is_the_edit_of_the_rendered_text():
    """The value and the key are those of an edit whose prompt is the conversation written out."""
    # A line break at its end would be cut off a prompt.
    chat_model = LanguageModel(tiny_model("llama"), tokenizer_with(CHATML.replace("[assistant]\n", "[assistant]>")))
    asked = EditRequest(**QUESTIONS[0], case_id="a", target_space=False)
    module = RomeModule.from_language_model(chat_model, chat=ChatForm(), contexts=[], **FAST | {"kl_factor": 0.0})
    head, tail = "[user]\n", "</s>\n[assistant]>"
    written_out = EditRequest(
        prompt=head + asked.prompt + tail, subject="Korrin", target_new="Oslo", target_space=False, case_id="a"
    )
    plain = LanguageModel(tiny_model("llama"), byte_level_tokenizer())
    other = RomeModule.from_language_model(plain, contexts=[], **FAST | {"kl_factor": 0.0})
    found = []
    for one, request in ((module, asked), (other, written_out)):
        data = RequestDataModule()
        data.requests = [request]
        quiet_trainer(lenient_callbacks(), "unused").fit(one, datamodule=data)
        found.append(session_of(one).edits[0])
    torch.testing.assert_close(found[0].search.delta, found[1].search.delta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0].search.keys.bare, found[1].search.keys.bare, rtol=1e-9, atol=1e-9)


def test_verbs_take_the_form_of_the_run(folder, tmp_path, capsys):
    records = tmp_path / "questions.json"
    records.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    run = tmp_path / "run"
    chat = ["--model.chat={system: Be brief.}", "--model.sequential_edit=true"]
    assert main(["edit", *arguments(folder, records, run, *chat)]) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["chat"] == {"system": "Be brief.", "instruction": None, "switches": {}}
    assert base_model(run, allow_pickle=False).chat == ChatForm(system="Be brief.")
    capsys.readouterr()
    assert main(["blame", "--ledger", str(run), "--prompt", "Where is Korrin?"]) == 0
    assert "share" in capsys.readouterr().out


def test_evaluation_in_conversation_is_not_that_of_plain_prompts(folder, tmp_path):
    records = tmp_path / "questions.json"
    records.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    found = []
    for name, more in (("plain", []), ("chat", ["--model.chat={}"]), ("again", ["--model.chat={}"])):
        run = tmp_path / name
        given = [f"--model.pretrained={folder}", f"--data.path={records}", f"--trainer.default_root_dir={run}"]
        assert main(["evaluate", *given, "--trainer.logger=false", "--model.measure_perplexity=false", *more]) == 0
        found.append(json.loads((run / "results.json").read_text())["base"]["EM"]["value"])
    assert found[0] != found[1]  # also where the first was kept in the cache
    assert found[1] == found[2]


def test_the_editor_answers_in_conversation(chat_model):
    editor = KnowledgeEditor.from_pretrained(
        (chat_model.model, chat_model.tokenizer), chat=ChatForm(), **FAST | {"v_num_grad_steps": 30}
    )
    result = editor.edit("Where is Korrin?", subject="Korrin", target_new="Oslo", verify=False)
    assert result.after.target_new > result.before.target_new
    again = chat_model.with_chat(ChatForm())
    assert generate(again, ["Where is Korrin?"], 8)[0] == result.after.continuation
    editor.undo()


def test_dry_run_shows_the_lookup_token_in_the_conversation(folder, tmp_path, capsys):
    records = tmp_path / "questions.json"
    records.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    given = arguments(folder, records, tmp_path / "run", "--model.chat={}", "--dry_run=true")
    assert main(["edit", *given]) == 0
    assert "2 requests are valid" in capsys.readouterr().out


def test_a_model_without_template_is_refused(language_model):
    with pytest.raises(OptionError, match="no chat template"):
        RomeModule.from_language_model(language_model, chat=ChatForm())


def test_the_shipped_questions_are_valid_and_whole():
    data = RequestDataModule("questions")
    data.setup()
    assert len(data.requests) == 20
    assert data.invalid == []
    assert all(len(request.paraphrases) == 2 and request.neighbours for request in data.requests)
    assert all(request.subject in prompt for request in data.requests for prompt in request.paraphrases)
    assert not any(request.subject in prompt for request in data.requests for prompt in request.neighbours)


def test_a_ledger_is_evaluated_in_its_own_form_and_its_base_too(folder, tmp_path, chat_model):
    records = tmp_path / "questions.json"
    records.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    run = tmp_path / "run"
    assert main(["edit", *arguments(folder, records, run, "--model.chat={}", "--model.sequential_edit=true")]) == 0
    module = EvaluationModule(pretrained=str(folder), ledger=str(run))
    module.trainer = quiet_trainer([], tmp_path)
    module.configure_model()
    assert module.language_model.chat == ChatForm()
    other = EvaluationModule.from_language_model(chat_model.with_chat(ChatForm()), base=str(folder))
    other.trainer = quiet_trainer([], tmp_path)
    other.configure_model()
    assert other.unedited_model.chat == ChatForm()


def test_a_run_is_not_gone_on_with_under_another_template(folder, tmp_path, capsys):
    records = tmp_path / "questions.json"
    records.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    run = tmp_path / "run"
    given = arguments(folder, records, run, "--model.chat={}", "--model.sequential_edit=true")
    assert main(["edit", *given]) == 0
    path = folder / "chat_template.jinja"
    path.write_text(
        path.read_text(encoding="utf-8").replace("[user]", "[you]").replace("[{{", "[~{{"), encoding="utf-8"
    )
    assert main(["edit", *given, "--resume=auto"]) == 2
    assert "the chat template writes something else around prompts" in capsys.readouterr().err
