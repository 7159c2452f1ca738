"""ROME straight from the formulae: one row at a time, whole model, all logits, explicit inverses, no cache.

Slow on purpose and written apart from the package: it shares no code with it, only the tokenizer and the model.
"""

import numpy as np
import torch


def find_token(offsets, start, end):
    """Last token that overlaps the characters [start, end)."""
    return max(i for i, (a, b) in enumerate(offsets) if a < end and b > start)


def tokenise(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def oracle_value(model, tokenizer, module, request, contexts, *, steps, lr, kl_factor, decay, clamp, kl_at="subject"):
    """Keys, loss trajectory and value of one edit.

    ``module`` is the MLP's second projection; ``contexts`` are prefixes such as "It rains. ", the bare prompt is added;
    the divergence is taken at the subject's last token or, if ``kl_at`` is ``last``, at the end of "{subject} is a".
    """
    rows = []
    for context in ("", *contexts):
        text = context + request.prompt + " " + request.target_new
        ids, offsets = tokenise(tokenizer, text)
        subject_end = len(context) + request.prompt.index(request.subject) + len(request.subject)
        lookup = find_token(offsets, subject_end - 1, subject_end)
        first = next(i for i, (_, b) in enumerate(offsets) if b > len(context) + len(request.prompt))
        rows.append((ids, lookup, first))
    kl_ids, kl_offsets = tokenise(tokenizer, request.subject + " is a")
    kl_lookup = find_token(kl_offsets, len(request.subject) - 1, len(request.subject))
    kl_position = len(kl_ids) - 1 if kl_at == "last" else kl_lookup

    def forward(ids, lookup, delta):
        seen = {}

        def hook(_, inputs, output):
            shape = output.shape
            seen["key"] = inputs[0].reshape(-1, inputs[0].shape[-1])[lookup].detach()
            flat = output.reshape(-1, shape[-1])
            seen["output"] = flat[lookup].detach()
            change = torch.zeros_like(flat)
            change[lookup] = 1.0
            return (flat + change * delta).reshape(shape)

        handle = module.register_forward_hook(hook)
        logits = model(torch.tensor([ids])).logits[0]
        handle.remove()
        return torch.log_softmax(logits, -1), seen

    d_value = None
    keys, outputs = [], []
    with torch.no_grad():
        for ids, lookup, _ in rows:
            _, seen = forward(ids, lookup, torch.zeros(1, dtype=torch.float64))
            keys.append(seen["key"])
            outputs.append(seen["output"])
            d_value = len(seen["output"])
        base, _ = forward(kl_ids, kl_lookup, torch.zeros(1, dtype=torch.float64))
        base = base[kl_position]
    m_0 = outputs[0]
    delta = torch.zeros(d_value, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    losses = []
    for step in range(steps):
        nll = 0.0
        for ids, lookup, first in rows:
            log_probs, _ = forward(ids, lookup, delta)
            per_token = [log_probs[position - 1, ids[position]] for position in range(first, len(ids))]
            nll = nll - sum(per_token) / len(per_token)
        nll = nll / len(rows)
        now, _ = forward(kl_ids, kl_lookup, delta)
        now = now[kl_position]
        kl = kl_factor * (now.exp() * (now - base)).sum()
        norm_penalty = decay * delta.norm() / m_0.norm() ** 2
        loss = nll + kl + norm_penalty
        losses.append(loss.item())
        if step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = clamp * m_0.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    delta = delta.detach()
    return {
        "keys": torch.stack(keys),
        "outputs": torch.stack(outputs),
        "losses": losses,
        "delta": delta,
        "value": m_0 + delta,
    }


def oracle_update(preset, keys, outputs, value, weight, bias, second_moment):
    """ΔW by the published formula of each preset, with explicit inverses."""
    keys, outputs, value, weight = (np.asarray(a, dtype=np.float64) for a in (keys, outputs, value, weight))
    k_bare, k_mean, m_mean = keys[0], keys.mean(0), outputs.mean(0)
    bias = 0.0 if bias is None else np.asarray(bias, dtype=np.float64)
    inverse = np.eye(len(k_bare)) if preset == "easyedit" else np.linalg.inv(second_moment)
    u = inverse @ k_mean
    if preset == "r_rome":
        residual, at = value - m_mean, k_mean
    else:
        residual, at = value - (weight @ k_bare + bias), k_bare
    return np.outer(residual, u) / (at @ u)
