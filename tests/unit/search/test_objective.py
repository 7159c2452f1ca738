"""The losses of a batch of edits: those of each edit alone, and those of plain forwards of the whole model."""

from dataclasses import replace

import pytest
import torch

from rome_pl.encoding.encoded_rows import EncodedEdit, EncodedRow
from rome_pl.encoding.row_layout import RowLayout, row_layout
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import clamp_norm_
from tests.lively import CONTEXTS, REQUESTS, encode, lively_model, objective_of, prefix_of

KL_FACTOR, DECAY = 0.7, 0.3
OPENING = [  # the divergence is read off the bare prompt's row: always, if taken at the subject, or never
    EditRequest(prompt="Rome is a city in", subject="Rome", target_new="the north", case_id="f"),
    EditRequest(prompt="Dunholt bread is eaten with", subject="Dunholt bread", target_new="tea", case_id="g"),
]


def random_deltas(count, seed=1, scale=0.3):
    d_value = find_site(lively_model().model, 1).d_value
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, d_value, dtype=torch.float64, generator=generator)


def objective_with_reference(edits, layout=None, **options):
    """An objective whose divergences have their reference already, as after the first step of a search."""
    objective = objective_of(edits, layout, kl_factor=KL_FACTOR, decay=DECAY, **options)
    with torch.no_grad():
        objective(torch.zeros_like(objective.base_output))
    return objective


def plain_log_probs(row, delta):
    """Log-probabilities after every token of one row, from a forward of that row alone through the whole model."""
    model = lively_model().model
    site = find_site(model, 1)

    def hook(_, __, output):
        column = torch.zeros(output.shape[1], 1, dtype=output.dtype)
        column[row.lookup] = 1
        return output + column * delta

    handle = site.projection.register_forward_hook(hook)
    try:
        return model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        handle.remove()


def plain_losses(edit, delta, contexts=None):
    """Eq. 4 of Meng et al. 2022, written out."""
    model = lively_model().model
    site = find_site(model, 1)
    rows = edit.rows if contexts is None else [edit.rows[context] for context in contexts]
    nll, greedy = 0.0, True
    for row in rows:
        log_probs = plain_log_probs(row, delta)[row.first : row.first + len(row.target)]
        target = torch.tensor(row.target)
        nll = nll - log_probs[range(len(target)), target].mean() / len(rows)
        greedy = greedy and bool((log_probs.argmax(-1) == target).all())
    stays = torch.zeros((), dtype=torch.float64)
    for row in edit.kept:
        log_probs = plain_log_probs(row, delta)[row.first : row.first + len(row.target)]
        target = torch.tensor(row.target)
        stays = stays - log_probs[range(len(target)), target].mean() / len(edit.kept)
        greedy = greedy and bool((log_probs.argmax(-1) == target).all())
    now = plain_log_probs(edit.kl_row, delta)[edit.kl_row.first]
    with torch.no_grad():
        base = plain_log_probs(edit.kl_row, torch.zeros_like(delta))[edit.kl_row.first]
        kept = {}
        handle = site.projection.register_forward_hook(lambda _, __, output: kept.update(value=output[0]))
        model(torch.tensor([edit.rows[0].ids]), use_cache=False)
        handle.remove()
    kl = KL_FACTOR * (now.exp() * (now - base)).sum()
    decay = DECAY * delta.norm() / kept["value"][edit.rows[0].lookup].norm() ** 2
    return {"nll": nll, "kl": kl, "decay": decay, "kept": stays, "greedy": greedy}


def assert_plain(losses, place, expected):
    for name in ("nll", "kl", "decay", "kept"):
        got = getattr(losses, name)[place]
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    total = expected["nll"] + expected["kl"] + expected["decay"] + expected["kept"]
    torch.testing.assert_close(losses.total[place], total, rtol=1e-9, atol=0)
    assert losses.probability[place].item() == pytest.approx((-expected["nll"]).exp().item(), rel=1e-9)
    assert bool(losses.greedy[place]) == expected["greedy"]


def assert_alike(losses, expected):
    for name in ("nll", "kl", "decay", "total", "probability"):
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert torch.equal(losses.greedy, expected.greedy)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("kl_position", ["subject", "last"])
def test_losses_are_those_of_whole_forwards(kl_position, whole_rows):
    edits = encode(REQUESTS + OPENING, kl_position=kl_position)
    assert len({len(edit.rows[0].target) for edit in edits}) > 1
    objective = objective_with_reference(edits, whole_rows=whole_rows)
    deltas = random_deltas(len(edits)).requires_grad_()
    losses = objective(deltas)
    assert (losses.kl > 1e-3).all()
    (gradient,) = torch.autograd.grad(losses.total.sum(), deltas)
    for place, edit in enumerate(edits):
        delta = deltas[place].detach().requires_grad_()
        expected = plain_losses(edit, delta)
        assert_plain(losses, place, expected)
        (alone,) = torch.autograd.grad(expected["nll"] + expected["kl"] + expected["decay"], delta)
        torch.testing.assert_close(gradient[place], alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_earlier_facts_about_the_subject_count_beside_the_new_one(whole_rows):
    plain = encode(REQUESTS + OPENING)
    bare = [edit.rows[0] for edit in plain]
    edits = [replace(edit, kept=tuple(bare[:place])) for place, edit in enumerate(plain)]
    objective = objective_with_reference(edits, whole_rows=whole_rows)
    deltas = random_deltas(len(edits)).requires_grad_()
    losses = objective(deltas)
    assert losses.kept[0] == 0
    assert (losses.kept[1:] > losses.nll[1:]).any()
    assert (losses.kept[1:] < losses.nll[1:]).any()
    (gradient,) = torch.autograd.grad(losses.total.sum(), deltas)
    without = objective_with_reference(plain)(deltas.detach())
    for name in ("nll", "kl", "decay"):
        torch.testing.assert_close(getattr(losses, name).detach(), getattr(without, name), rtol=1e-9, atol=1e-12)
    for place, edit in enumerate(edits):
        delta = deltas[place].detach().requires_grad_()
        expected = plain_losses(edit, delta)
        assert_plain(losses, place, expected)
        (alone,) = torch.autograd.grad(sum(expected[name] for name in ("nll", "kl", "decay", "kept")), delta)
        torch.testing.assert_close(gradient[place], alone, rtol=1e-8, atol=1e-10)
    some = objective(deltas[[5, 2]], [5, 2], [[0, 2], [0, 1]])
    torch.testing.assert_close(some.kept, losses.kept[[5, 2]], rtol=1e-9, atol=1e-12)


def test_losses_of_a_batch_are_those_of_each_edit_alone():
    edits = encode(REQUESTS + OPENING)
    objective, deltas = objective_with_reference(edits), random_deltas(len(edits))
    losses = objective(deltas)
    for place, edit in enumerate(edits):
        alone = objective_with_reference([edit])(deltas[place : place + 1])
        for name in ("nll", "kl", "decay"):
            torch.testing.assert_close(getattr(losses, name)[place], getattr(alone, name)[0], rtol=1e-9, atol=1e-12)


def test_some_edits_of_an_objective():
    edits = encode(REQUESTS + OPENING)
    objective, deltas = objective_with_reference(edits), random_deltas(len(edits))
    everyone = objective(deltas)
    for members in ([3], [0, 2, 5], [1, 4, 6], [5, 2], range(7)):
        some = objective(deltas[list(members)], members)
        for name in ("nll", "kl", "decay", "greedy"):
            got, expected = getattr(some, name).double(), getattr(everyone, name)[list(members)].double()
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_all_edits_of_an_objective_in_another_order():
    edits = encode()
    objective, deltas = objective_with_reference(edits), random_deltas(len(edits))
    everyone, order = objective(deltas), [4, 2, 0, 3, 1]
    torch.testing.assert_close(objective(deltas[order], order).decay, everyone.decay[order], rtol=1e-9, atol=0)


def test_the_divergence_is_zero_without_offset_whenever_the_reference_was_taken():
    edits = encode()
    objective = objective_of(edits, kl_factor=KL_FACTOR, decay=DECAY)
    zeros, deltas = torch.zeros_like(objective.base_output), random_deltas(len(edits))
    # Edit 2 takes part later than the others, and each is asked again.
    objective(zeros[[0, 1, 3, 4]], [0, 1, 3, 4])
    objective(deltas[[0, 1]], [0, 1])
    objective(zeros[2:3], [2])
    at_zero, moved = objective(zeros), objective(deltas)
    assert at_zero.kl.abs().max() < 1e-12
    assert (at_zero.decay == 0).all()
    assert_alike(moved, objective_with_reference(edits)(deltas))


def test_the_reference_of_the_divergence_is_not_differentiated():
    objective = objective_of(encode(REQUESTS[:2]), kl_factor=KL_FACTOR, decay=0.0)
    first = torch.zeros_like(objective.base_output).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(first).kl.sum(), first)
    assert gradient.abs().max() < 1e-12  # the divergence is smallest there
    deltas = random_deltas(2).requires_grad_()
    objective(deltas).kl.sum().backward()
    assert deltas.grad.norm() > 1e-3
    assert first.grad is None


# --- rows -------------------------------------------------------------------------------------------------------------


def own_rows(edits):
    """A layout in which every divergence has a row of its own."""
    rows, contexts, kl = [], [], []
    for edit in edits:
        contexts.append(tuple(range(len(rows), len(rows) + len(edit.rows))))
        rows += [*edit.rows, edit.kl_row]
        kl.append(len(rows) - 1)
    offsets = tuple(edit.kl_row.first - edit.kl_row.lookup for edit in edits)
    return RowLayout(tuple(rows), tuple(contexts), tuple(kl), offsets, ((),) * len(contexts))


@pytest.mark.parametrize(("kl_position", "shared"), [("subject", {1, 4, 5, 6}), ("last", {5})])
def test_a_divergence_row_that_the_bare_prompt_begins_with_is_read_off_it(kl_position, shared):
    edits = encode(REQUESTS + OPENING, kl_position=kl_position)
    layout = row_layout(edits)
    assert {place for place in range(7) if layout.kl[place] == layout.contexts[place][0]} == shared
    assert len(layout.rows) == sum(len(edit.rows) for edit in edits) + 7 - len(shared)
    for place, edit in enumerate(edits):
        assert tuple(layout.rows[row] for row in layout.contexts[place]) == edit.rows
        row = layout.rows[layout.kl[place]]
        assert row.ids[: len(edit.kl_row.ids)] == edit.kl_row.ids
        assert row.lookup + layout.kl_offset[place] == edit.kl_row.first
    if kl_position == "last":
        assert min(layout.kl_offset) > 0

    deltas = random_deltas(7)
    expected = objective_with_reference(edits, own_rows(edits))
    losses = objective_with_reference(edits)(deltas)
    assert_alike(losses, expected(deltas))
    # On its own, or where the bare prompt takes no part, it is the same too.
    for contexts in ([[1]] * 7, [[0]] * 7, [[2, 1]] * 7):
        got = objective_with_reference(edits)(deltas, range(7), contexts)
        torch.testing.assert_close(got.kl, losses.kl, rtol=1e-9, atol=1e-12)


def test_a_bare_prompt_of_another_lookup_token_is_not_read():
    row = EncodedRow((5, 6, 7, 8), 2, (9,), 3)
    assert len(row_layout([EncodedEdit((row,), EncodedRow((5, 6, 7), 2, (), 2))]).rows) == 1
    assert len(row_layout([EncodedEdit((row,), EncodedRow((5, 6), 1, (), 1))]).rows) == 2
    assert len(row_layout([EncodedEdit((row,), EncodedRow((5, 5, 7), 2, (), 2))]).rows) == 2


@pytest.mark.parametrize(
    "contexts",
    [
        [[0, 1], [0, 2], [0], [0, 1, 2], [0, 1], [0], [0, 2]],
        [[1], [2], [1, 2], [1], [2], [2, 1], [1]],
        [[2, 0], [1, 0], [0, 2, 1], [0], [1], [2, 0], [0]],
    ],
)
def test_losses_under_some_contexts(contexts):
    edits = encode(REQUESTS + OPENING)
    objective, deltas = objective_with_reference(edits), random_deltas(7)
    losses = objective(deltas, range(7), contexts)
    for place, edit in enumerate(edits):
        assert_plain(losses, place, plain_losses(edit, deltas[place], contexts[place]))
    some = [6, 1, 4]
    again = objective(deltas[some], some, [contexts[place] for place in some])
    torch.testing.assert_close(again.total, losses.total[some], rtol=1e-9, atol=1e-12)


def test_the_same_members_under_other_contexts_are_not_mixed_up():
    edits = encode(REQUESTS[:2])
    objective, deltas = objective_with_reference(edits), random_deltas(2)
    first = objective(deltas, [0, 1], [[0, 1], [0, 1]])
    second = objective(deltas, [0, 1], [[0, 2], [0, 2]])
    assert (first.nll - second.nll).abs().min() > 1e-6
    assert_alike(objective(deltas, [0, 1], [[0, 1], [0, 1]]), first)
    assert_alike(objective(deltas), objective_with_reference(edits)(deltas))


def greedy_edit(right):
    """An edit whose one-token target is the likeliest one under the contexts in ``right`` and under no other."""
    rows = [EncodedRow((40 + 11 * context, 41, 42, 43 + context), 1, (0,), 3) for context in range(3)]
    zeros = torch.zeros(find_site(lively_model().model, 1).d_value, dtype=torch.float64)
    best = [int(plain_log_probs(row, zeros)[row.first].argmax()) for row in rows]
    rows = [
        EncodedRow(row.ids, row.lookup, (best[context] if context in right else (best[context] + 1) % 400,), row.first)
        for context, row in enumerate(rows)
    ]
    return EncodedEdit(tuple(rows), EncodedRow(rows[0].ids[:2], 1, (), 1))


def test_greedy_means_the_likeliest_token_under_every_context_that_counts():
    edits = [greedy_edit(right) for right in ({0, 1, 2}, {0, 1}, {0}, {1, 2}, ())]
    objective = objective_with_reference(edits)
    zeros = torch.zeros_like(objective.base_output)
    assert objective(zeros).greedy.tolist() == [True, False, False, False, False]
    assert objective(zeros, range(5), [[0, 1]] * 5).greedy.tolist() == [True, True, False, False, False]
    assert objective(zeros, range(5), [[0]] * 5).greedy.tolist() == [True, True, True, False, False]


def test_greedy_without_the_bare_prompt():
    edits = [greedy_edit(right) for right in ({0, 1, 2}, {1, 2}, {0, 2})]
    objective = objective_with_reference(edits)
    zeros = torch.zeros_like(objective.base_output)
    assert objective(zeros, range(3), [[1, 2]] * 3).greedy.tolist() == [True, True, False]


def test_every_token_of_a_target_has_to_be_the_likeliest():
    model = lively_model().model
    with torch.no_grad():
        ids = [40, 41, 42]
        for _ in range(2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    right = EncodedRow((*ids[:-1],), 1, tuple(ids[3:]), 2)
    wrong = EncodedRow((*ids[:-1],), 1, (ids[3], (ids[4] + 1) % 400), 2)
    edits = [EncodedEdit((row,), EncodedRow(row.ids[:2], 1, (), 1)) for row in (right, wrong)]
    objective = objective_of(edits)
    assert objective(torch.zeros_like(objective.base_output)).greedy.tolist() == [True, False]


def test_keys_and_outputs_are_those_of_each_row():
    edits = encode(REQUESTS + OPENING)
    objective = objective_of(edits)
    model = lively_model().model
    site = find_site(model, 1)
    for place, edit in enumerate(edits):
        keys = []
        for row in edit.rows:
            kept = {}
            handle = site.projection.register_forward_hook(
                lambda _, inputs, output, row=row, kept=kept: kept.update(
                    key=inputs[0][0, row.lookup], value=output[0, row.lookup]
                )
            )
            with torch.no_grad():
                model(torch.tensor([row.ids]), use_cache=False)
            handle.remove()
            keys.append(kept["key"])
            if row is edit.rows[0]:
                torch.testing.assert_close(objective.base_output[place], kept["value"], rtol=1e-9, atol=1e-12)
        found = objective.prefix.keys[list(objective.layout.contexts[place])]
        torch.testing.assert_close(found, torch.stack(keys), rtol=1e-9, atol=1e-12)
    assert torch.equal(objective.base_norm, objective.base_output.norm(dim=1))


# --- selecting rows of a prefix pass ----------------------------------------------------------------------------------


def answers(prefix, seed=3):
    """Logits from each row's lookup token on for a random offset, and the gradient, by row."""
    rows = prefix.rows.source
    deltas = [random_deltas(1, seed=seed + sum(row.ids))[0] for row in rows]
    delta = torch.stack(deltas).requires_grad_()
    pairs = [(i, prefix.rows.prefix + step) for i, row in enumerate(rows) for step in range(len(row.ids) - row.lookup)]
    index, column = torch.tensor(pairs).T
    logits = prefix.logits(delta, (index, column))
    (gradient,) = torch.autograd.grad(logits.square().sum(), delta)
    return logits.detach(), gradient


def cached_columns(prefix):
    return {part.shape[2] for pair in prefix.cache for part in pair if part.numel()}


def assert_same_pass(selected, fresh):
    assert selected.rows.source == fresh.rows.source
    for name in ("input_ids", "attention_mask", "position_ids", "predict_row", "predict_column", "labels"):
        assert torch.equal(getattr(selected.rows, name), getattr(fresh.rows, name)), name
    assert (selected.rows.prefix, selected.start) == (fresh.rows.prefix, fresh.start)
    assert selected.hidden.shape == fresh.hidden.shape
    assert cached_columns(selected) == cached_columns(fresh)
    torch.testing.assert_close(selected.keys, fresh.keys, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(selected.outputs, fresh.outputs, rtol=1e-9, atol=1e-12)
    for got, expected in zip(answers(selected), answers(fresh), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_selected_rows_are_those_of_a_pass_of_their_own(whole_rows):
    opened = (EncodedRow((40, 41, 42, 43), 0, (44,), 3), EncodedRow((45, 46), 0, (), 0))
    rows = (*row_layout(encode(REQUESTS + OPENING)).rows, *opened)
    whole = prefix_of(rows, whole_rows)
    first = [index for index, row in enumerate(rows) if row.lookup == 0]
    longest = max(range(len(rows)), key=lambda index: rows[index].lookup)
    tail = max(range(len(rows)), key=lambda index: len(rows[index].ids) - rows[index].lookup)
    assert len(first) == 2
    assert longest != tail
    trimmed = set()
    for chosen in (
        [0],
        [0, 1, 2],
        [5, 3, 1],
        [longest, 0],
        [tail, *first],
        first,
        [index for index in range(len(rows)) if index not in (longest, tail)],
        list(range(len(rows)))[::-1],
    ):
        selected = whole.select(chosen)
        assert_same_pass(selected, prefix_of([rows[index] for index in chosen], whole_rows))
        trimmed.add((selected.rows.prefix < whole.rows.prefix, selected.rows.suffix < whole.rows.suffix))
    assert len(trimmed) == 4  # on neither side, on either, on both
    assert prefix_of([rows[i] for i in first], whole_rows).rows.prefix == 0


@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_selection_may_be_selected_from(whole_rows):
    rows = row_layout(encode()).rows
    whole = prefix_of(rows, whole_rows)
    chosen = [9, 4, 0, 7]
    again = whole.select(chosen).select([2, 0])
    assert_same_pass(again, prefix_of([rows[0], rows[9]], whole_rows))
    assert whole.select(range(len(rows))) is whole


def test_a_selection_leaves_the_whole_as_it_was():
    rows = row_layout(encode()).rows
    whole = prefix_of(rows)
    before = answers(whole)
    answers(whole.select([3, 1]))
    for got, expected in zip(answers(whole), before, strict=True):
        assert torch.equal(got, expected)


# --- the clamp --------------------------------------------------------------------------------------------------------


def test_the_clamp_shortens_what_is_too_long_and_nothing_else():
    delta = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for largest, expected in ((10.0, [3.0, 4.0]), (5.0, [3.0, 4.0]), (2.5, [1.5, 2.0]), (0.0, [0.0, 0.0])):
        clamped = delta.clone()
        clamp_norm_(clamped, torch.tensor(largest, dtype=torch.float64))
        assert clamped.tolist() == pytest.approx(expected, rel=1e-15)
    nothing = torch.zeros(2)
    clamp_norm_(nothing, torch.tensor(0.0))
    assert nothing.tolist() == [0.0, 0.0]


def test_contexts_have_different_lengths_here():
    """Guards the tests above."""
    lookups = [row.lookup for row in encode()[0].rows]
    assert len(set(lookups)) == len(CONTEXTS)
