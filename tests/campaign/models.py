"""Tiny models for the tokenizers, and what an edit of them wrote, by plain forward passes."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rome_pl import KnowledgeEditor
from tests.campaign.judge import Row
from tests.campaign.vocabularies import vocabulary

LAYER = 1
# Two steps are enough: it is looked at where something is written, not how well it holds. Without contexts the change
# has the direction of the bare prompt's key, whatever the value.
OPTIONS = {
    "layers": [LAYER], "preset": "easyedit", "v_num_grad_steps": 2, "v_lr": 0.5, "context_template_length_params": [],
}  # fmt: skip


def tiny_model(size: int, dtype: torch.dtype = torch.float64):
    """A random Llama with so many embeddings."""
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(size)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


@cache
def editor(name: str) -> KnowledgeEditor:
    """An editor of a model for one of the tokenizers."""
    made = vocabulary(name)
    return KnowledgeEditor.from_pretrained((tiny_model(made.size), made.tokenizer), **OPTIONS)


def weight(model) -> torch.Tensor:
    """The weight that is edited, as it is now."""
    return model.model.layers[LAYER].mlp.down_proj.weight.detach().clone()


def keys(model, ids: list[int]) -> torch.Tensor:
    """The keys of every token: what goes into the edited weight, ``[tokens, d_key]``."""
    seen = []
    hook = model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0]


def probability(model, row: Row) -> float:
    """Geometric mean of the probabilities of the target's tokens."""
    with torch.no_grad():
        log_probs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    start = len(row.ids) - len(row.target)
    return float(torch.stack([log_probs[start + t - 1, token] for t, token in enumerate(row.target)]).mean().exp())


def looked_up(change: torch.Tensor, all_keys: torch.Tensor) -> tuple[int, float]:
    """The token whose key has the direction of a change, and the cosine between the two."""
    _, _, right = torch.linalg.svd(change)
    cosines = (torch.nn.functional.normalize(all_keys, dim=-1) @ right[0]).abs()
    return int(cosines.argmax()), float(cosines.max())
