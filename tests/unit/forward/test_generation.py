"""What a checkpoint ships for its own generation has no part in what is written here."""

import copy
import json
from functools import cache

import pytest
import torch
from transformers import GenerationConfig

from rome_pl.forward.generation import Sampling, end_ids, generate, write_ids
from rome_pl.metrics.fluency import measure_fluency
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.context_templates import generate_contexts
from rome_pl.second_moments.generated_corpus import GeneratedCorpus, generated_texts
from tests.tiny import KeepFloat64, tiny_language_model, tiny_model

PROMPTS = ["The lighthouse of Korrin stands in", "It", "Miss Vane plays the"]
RECORD = EditRequest(
    prompt="Korrin is",
    subject="Korrin",
    target_new="x",
    case_id="a",
    generation_prompts=("Korrin is a", "We saw Korrin"),
)

SHIPPED = [
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    {"num_return_sequences": 2, "do_sample": True},
    {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1},
    {"temperature": 9.0, "top_h": 0.3},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"repetition_penalty": 4.0},
    {"encoder_repetition_penalty": 4.0},
    {"stop_strings": ["e", " "]},
    {"suppress_tokens": list(range(3, 250))},
    {"begin_suppress_tokens": list(range(3, 250))},
    {"bad_words_ids": [[token] for token in range(3, 250)]},
    {"sequence_bias": [[[token], 40.0] for token in range(40, 60)]},
    {"forced_bos_token_id": 9},
    {"forced_eos_token_id": 9},
    {"guidance_scale": 3.0},
    {"min_p": 0.9},
    {"typical_p": 0.01},
    {"epsilon_cutoff": 0.5},
    {"eta_cutoff": 0.5},
    {"max_time": 1e-9},
    {"max_length": 3},
    {"max_new_tokens": 1},
    {"min_length": 90},
    {"min_new_tokens": 90},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
    {"output_attentions": True},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    {"cache_implementation": "hybrid"},
    {"cache_implementation": "no such cache"},
    {"use_cache": False},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "low"},
    {"constraints": ["x"]},
    {"force_words_ids": [[5]]},
    {"token_healing": True},
    {"renormalize_logits": True},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": [1, 1.5]},
    {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"is_assistant": True, "assistant_confidence_threshold": 0.9},
    {"speculation_type": "dflash"},
    {"use_mtp": True},
    {"prefill_chunk_size": 2},
    {"low_memory": True},
    {"pad_token_id": 399},
    {"pad_token_id": 10**6},
    {"bos_token_id": 10**6, "decoder_start_token_id": 5},
    {"a_setting_of_its_own": 3},
]


@pytest.fixture(scope="module", autouse=True)
def float64_and_short_texts():
    with KeepFloat64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_ROWS", 3)
        patch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_LENGTH", 12)
        yield


def written(language_model):
    """All kinds of text that are written anywhere."""
    return (
        generate(language_model, PROMPTS, 6),
        generate(language_model, PROMPTS, 6, seed=3),
        measure_fluency(language_model, [RECORD], 6, seed=2).texts,
        generate_contexts(language_model, [[6, 10]], seed=1),
        list(generated_texts(language_model, 40, seed=1)),
    )


@cache
def shared():
    return tiny_language_model()


def with_settings(settings):
    """A model that ships settings, as they are read from its folder: some of them are no longer valid."""
    model = copy.copy(shared().model)
    model.generation_config = copy.deepcopy(model.generation_config)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return LanguageModel(model, shared().tokenizer)


@pytest.fixture(scope="module")
def bare():
    return written(with_settings({}))


@pytest.mark.parametrize("settings", SHIPPED, ids=lambda settings: " ".join(settings))
def test_no_shipped_setting_changes_what_is_written(settings, bare):
    language_model = with_settings(settings)
    own = language_model.model.generation_config
    before = dict(vars(own))
    assert written(language_model) == bare
    assert language_model.model.generation_config is own
    assert dict(vars(own)) == before


def test_settings_of_an_older_checkpoint_do_not_either(tmp_path, bare):
    """Its config.json carries them, and there is no file of their own."""
    language_model = with_settings({})
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_beams": 3, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.2, "max_length": 7}
    config |= {"use_cache": False, "top_k": 1, "repetition_penalty": 3.0, "task_specific_params": {"x": {"top_k": 2}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert written(load_language_model(str(tmp_path))) == bare


def test_settings_put_on_the_config_in_memory_do_not_either(bare):
    language_model = tiny_language_model()  # its config is changed
    for name, value in {"num_beams": 3, "max_length": 5, "use_cache": False, "no_repeat_ngram_size": 1}.items():
        setattr(language_model.model.config, name, value)
    assert written(language_model) == bare


def test_a_file_of_settings_does_not_either(tmp_path, bare):
    language_model = with_settings({})
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    shipped = {"num_beams": 4, "no_repeat_ngram_size": 2, "stop_strings": ["e"], "return_dict_in_generate": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | shipped))
    loaded = load_language_model(str(tmp_path))
    assert loaded.model.generation_config.num_beams == 4
    assert written(loaded) == bare


def test_the_models_own_settings_return_when_generation_fails(monkeypatch):
    language_model = with_settings({"num_beams": 3})
    own = language_model.model.generation_config

    def breaks(**_):
        assert language_model.model.generation_config is not own
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model.model, "generate", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_ids(language_model, [[5, 6]], 3)
    assert language_model.model.generation_config is own


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the two libraries' own
def test_an_adapter_around_a_model_leaves_its_settings_too(bare):
    peft = pytest.importorskip("peft")
    language_model = tiny_language_model()
    language_model.model.generation_config.num_beams = 3
    own = language_model.model.generation_config
    model = peft.get_peft_model(language_model.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert written(LanguageModel(model.eval(), language_model.tokenizer)) == bare
    assert own.num_beams == 3
    assert language_model.model.generation_config is own


def test_a_model_without_settings_writes_as_one_without_ends():
    language_model = with_settings({})
    language_model.model.generation_config = None
    assert end_ids(language_model) == []
    no_end = with_settings({"eos_token_id": None})
    assert written(language_model) == written(no_end)
    assert language_model.model.generation_config is None


def test_a_generated_corpus_is_told_apart_by_the_ids_that_end_a_text():
    names = [
        GeneratedCorpus.of(with_settings({"eos_token_id": ends}), 40, 0).source
        for ends in (2, [2], torch.tensor([2]), [2, 7], None)
    ]
    assert names[0] == names[1] == names[2]
    assert len(set(names)) == 3


# ---- the end of a text


@pytest.mark.parametrize(
    ("shipped", "ends"),
    [
        (2, [2]),
        ([2, 7], [2, 7]),
        (None, []),
        ([], []),
        (-1, []),
        (10**6, []),
        ([2, 400, -3, 10**9], [2]),
        (torch.tensor([2, 7]), [2, 7]),
    ],
    ids=str,
)
def test_ends_are_those_of_the_model_within_its_vocabulary(shipped, ends):
    language_model = with_settings({"eos_token_id": shipped})
    assert end_ids(language_model) == ends
    rows = [[5, 6, 7], [8]]
    free = write_ids(with_settings({"eos_token_id": None}), rows, 30, Sampling(seed=1)).rows
    assert all(len(row) == 30 for row in free)
    found = write_ids(language_model, rows, 30, Sampling(seed=1)).rows
    for row, whole in zip(found, free, strict=True):
        if not ends:
            assert row == whole
        assert not set(row) & set(ends)
    assert all(len(row) == 12 for row in write_ids(language_model, rows, 12, Sampling(seed=1), full_length=True).rows)


def test_what_fills_a_row_that_has_ended_is_no_text():
    language_model = tiny_language_model()
    language_model.encoder.pad_id = language_model.tokenizer.convert_tokens_to_ids("e")
    texts = generate(language_model, PROMPTS, 6)
    first = language_model.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    rows = write_ids(language_model, [language_model.encoder.prompt(prompt).ids for prompt in PROMPTS], 6).rows
    end = next(token for token in rows[0] if any(token not in row for row in rows[1:]))
    assert first
    language_model.model.generation_config.eos_token_id = end
    for text, row in zip(generate(language_model, PROMPTS, 6), rows, strict=True):
        cut = row[: row.index(end)] if end in row else row
        assert text == language_model.tokenizer.decode(cut, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_rows_of_several_lengths_are_written_as_each_alone(family):
    language_model = LanguageModel(tiny_model(family), shared().tokenizer)
    rows = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    together = write_ids(language_model, rows, 6).rows
    assert together == [write_ids(language_model, [row], 6).rows[0] for row in rows]


def test_writing_warns_of_nothing(caplog, recwarn):
    written(with_settings({"num_beams": 3, "max_length": 5, "top_k": 7}))
    assert not [record for record in caplog.records if record.name.startswith("transformers")]
    assert not [one for one in recwarn if "generat" in str(one.message)]


def test_bare_settings_are_what_the_library_makes_of_none():
    """The library fills gaps in what it is given from the model's own settings: they have to be away."""
    language_model = with_settings({"no_repeat_ngram_size": 1})
    filled, _ = language_model.model._prepare_generation_config(GenerationConfig(max_new_tokens=3))
    assert filled.no_repeat_ngram_size == 1
