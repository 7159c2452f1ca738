"""Prompts inside chat templates: positions, targets, and templates that do not suit."""

import pytest
import torch

from rome_pl.encoding.chat_template import ChatForm, TemplateError, frame_for
from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.errors import OptionError
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest, RequestError
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

# In the manner of ChatML, of Llama 2 (which trims, and joins the answer by a space), and of a model that thinks.
CHATML = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "[assistant]\n{% endif %}", "[assistant]\n{% if not enable_thinking %}<think></think>\n\n{% endif %}{% endif %}"
)
QUESTION = "Where is the lighthouse of Korrin, and who keeps Korrin clean?"
ASK = EditRequest(prompt=QUESTION, subject="Korrin", target_new="Oslo", target_true="Lima")
HALF = EditRequest(prompt="Korrin lies in", subject="Korrin", target_new="Oslo")
TOKENIZERS = {"byte level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


def tokenizer_with(template, kind="byte level"):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = template
    return tokenizer


def encoder_for(template, form=None, kind="byte level"):
    tokenizer = tokenizer_with(template, kind)
    return TextEncoder(tokenizer, 512, frame_for(tokenizer, form or ChatForm()))


def pieces(encoder, ids):
    return encoder.tokenizer.decode(list(ids))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        (CHATML, "[user]\n{}</s>\n[assistant]\n", "Oslo"),
        (SPACED, "<s>[INST] {} [/INST]", " Oslo"),
    ],
)
def test_ids_are_those_of_the_rendered_conversation_and_the_target_follows_as_the_template_joins_it(
    kind, template, text, answer
):
    encoder = encoder_for(template, kind=kind)
    row = encoder.edit(ASK).rows[0]
    whole = encoder.tokenizer(text.format(QUESTION) + answer, add_special_tokens=False)["input_ids"]
    assert list(row.ids + row.target[-1:]) == whole
    head = encoder.tokenizer(text.format(QUESTION), add_special_tokens=False)["input_ids"]
    assert list(row.ids[: row.first + 1]) == head  # what generation begins with
    assert pieces(encoder, row.target).strip() == "Oslo"
    assert encoder.prompt(QUESTION).ids == tuple(head)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, SPACED])
@pytest.mark.parametrize("fact_token", ["subject_last", "subject_first", "subject_first_after_last", "last"])
def test_the_lookup_token_covers_the_same_characters_as_without_a_template(kind, template, fact_token):
    chat, plain = encoder_for(template, kind=kind), TextEncoder(TOKENIZERS[kind](), 512)
    looked_up = []
    for encoder in (chat, plain):
        for context in (0, 1):
            edit = encoder.edit(ASK, ("", "A bell rings. "), fact_token)
            row = edit.rows[context]
            looked_up.append(pieces(encoder, row.ids[row.lookup : row.lookup + 1]).strip())
            # The second "Korrin" is the subject: everything up to it is there, and nothing of what follows its word.
            if fact_token == "subject_last":
                assert pieces(encoder, row.ids[: row.lookup + 1]).endswith("who keeps Korrin")
    if fact_token == "last":
        assert chat.edit(ASK, fact_token=fact_token).rows[0].lookup == chat.edit(ASK).rows[0].first
    else:
        assert len(set(looked_up)) == 1


def test_the_divergence_is_taken_inside_the_users_message():
    encoder = encoder_for(CHATML)
    assert pieces(encoder, encoder.edit(ASK).kl_row.ids) == "[user]\nKorrin"
    assert pieces(encoder, encoder.edit(ASK, kl_position="last").kl_row.ids) == "[user]\nKorrin is a"


def test_an_instruction_lets_the_reply_begin_with_the_prompt():
    encoder = encoder_for(CHATML, ChatForm(system="Be brief.", instruction="Finish the sentence."))
    row = encoder.edit(HALF, ("", "A bell rings. ")).rows[1]
    told = "[system]\nBe brief.</s>\n[user]\nFinish the sentence.</s>\n[assistant]\n"
    assert pieces(encoder, row.ids[: row.first + 1]) == told + "A bell rings. Korrin lies in"
    assert pieces(encoder, row.target) == " Oslo"
    assert pieces(encoder, row.ids[: row.lookup + 1]).endswith("Korrin")


def test_switches_reach_the_template():
    for thinks in (True, False):
        encoder = encoder_for(THINKING, ChatForm(switches={"enable_thinking": thinks}))
        text = pieces(encoder, encoder.prompt(QUESTION).ids)
        assert text.endswith("[assistant]\n" if thinks else "[assistant]\n<think></think>\n\n")
        assert pieces(encoder, encoder.edit(ASK).rows[0].target) == "Oslo"


def test_a_request_decides_about_its_space_itself():
    forced = EditRequest(prompt=QUESTION, subject="Korrin", target_new="Oslo", target_space=True)
    assert pieces(encoder_for(CHATML), encoder_for(CHATML).edit(forced).rows[0].target) == " Oslo"
    own = EditRequest(prompt=QUESTION, subject="Korrin", target_new=" Oslo")
    assert pieces(encoder_for(CHATML), encoder_for(CHATML).edit(own).rows[0].target) == "Oslo"


@pytest.mark.parametrize(
    ("template", "form", "said"),
    [
        (None, ChatForm(), "has no chat template"),
        ("{{ 'Hello' }}", ChatForm(), "drops the user's message, so the subject is lost"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", ChatForm(), "more than once"),
        ("{{ raise_exception('no system here') }}", ChatForm(system="x"), "no system here"),
        ("{{ messages[0].content ", ChatForm(), "refuses"),
        ("{{ 'Hello' }}", ChatForm(instruction="Go on."), r"chat\.instruction.*drops"),
    ],
)
def test_templates_that_do_not_suit_are_refused_with_the_reason(template, form, said):
    with pytest.raises(OptionError, match=said):
        frame_for(tokenizer_with(template), form)


def test_a_template_that_changes_a_prompt_is_refused_for_that_record():
    shouting = CHATML.replace("m.content", "(m.content | replace('keeps', 'KEEPS'))")
    encoder = encoder_for(shouting)
    with pytest.raises(RequestError, match=r"record 7, field 'prompt': the chat template does not show"):
        encoder.edit(EditRequest(prompt=QUESTION, subject="Korrin", target_new="Oslo", case_id=7))
    probe = EditRequest(prompt="Where is Korrin?", subject="Korrin", target_new="Oslo", paraphrases=["Who keeps it?"])
    with pytest.raises(RequestError, match="field 'paraphrases'"):
        encoder.check_probes(probe)
    with pytest.raises(TemplateError):
        encoder.prompt("Who keeps it?")
    assert encoder.prompt("Where is it?")


def test_a_language_model_with_chat_is_the_same_model():
    model = LanguageModel(tiny_model("llama"), tokenizer_with(CHATML))
    chat = model.with_chat(ChatForm())
    assert chat.model is model.model
    assert model.chat is None
    assert chat.fingerprint == model.fingerprint
    assert chat.with_chat(ChatForm()) is chat
    assert chat.with_chat(None).encoder.prompt("x").ids == model.encoder.prompt("x").ids


def test_the_fingerprint_stays_that_of_the_model_as_first_seen():
    model = LanguageModel(tiny_model("llama"), tokenizer_with(CHATML))
    first = model.fingerprint
    with torch.no_grad():
        model.model.lm_head.weight.mul_(2)
    assert model.with_chat(ChatForm()).fingerprint == first


def test_generation_prompts_are_checked_with_the_probes():
    encoder = encoder_for(CHATML.replace("m.content", "(m.content | replace('where', 'WHERE'))"))
    request = EditRequest(prompt="Who is Korrin?", subject="Korrin", target_new="Oslo", generation_prompts=["where"])
    with pytest.raises(RequestError, match="field 'generation_prompts'"):
        encoder.check_probes(request)
