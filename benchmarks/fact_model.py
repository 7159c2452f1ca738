"""Trains a small GPT-2 that knows facts: a model for long streams of edits at low cost.

    python benchmarks/fact_model.py --records counterfact_easyedit.json --output fact_model

Every fact is stated in two wordings: the record's own, and that of another template with the same kind of answers. The
folder gets the model with its own byte-level BPE (Hugging Face files), ``facts.json`` (the facts as records to edit:
the second wording is the paraphrase, facts with the same wording and answer are the neighbours), ``corpus.txt``
(the statements, for second moments and perplexity), and ``fact_model.json`` (what it recalls).
"""

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typing_extensions import override

from rome_pl.metrics.probes import measure_answers
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest

BLOCK = 64
"""Tokens of a training row: statements in a new order each epoch, cut where a row is full."""

BATCH = 16
END = "<|endoftext|>"
NEIGHBOURS = 5
SLOT = "{}"


def main() -> None:
    """Read, train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, type=Path, help="records in EasyEdit's flat form")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--facts", type=int, default=5500, help="most facts")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the BPE")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=40, help="longest training")
    parser.add_argument("--enough", type=float, default=0.97, help="recall at which training ends")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    seed_everything(options.seed)
    facts = facts_of(json.loads(options.records.read_text(encoding="utf-8")), options.facts, options.seed)
    statements = [f"{prompt} {fact['target_true']}." for fact in facts for prompt in wordings(fact)]
    tokenizer = tokenizer_of(statements, options.vocabulary)
    module = FactModel(tokenizer, options.width, options.depth)
    lines = [tokenizer(f"{statement}\n")["input_ids"] for statement in statements]
    rows = Rows(lines, tokenizer.eos_token_id, options.seed)
    recall = Recall(LanguageModel(module.model, tokenizer), facts, options.enough)
    started = time.perf_counter()
    trainer = Trainer(
        max_epochs=options.epochs,
        max_time={"minutes": options.minutes},
        accelerator="auto",
        devices=1,
        callbacks=[recall],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=BATCH))
    options.output.mkdir(parents=True, exist_ok=True)
    module.model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    (options.output / "facts.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    shuffled = random.Random(options.seed).sample(statements, len(statements))
    (options.output / "corpus.txt").write_text("\n".join(shuffled) + "\n", encoding="utf-8")
    figures = {
        "facts": len(facts),
        "statements": len(statements),
        "parameters": module.model.num_parameters(),
        "d_key": module.model.config.n_inner or 4 * options.width,
        "seconds": time.perf_counter() - started,
        "epochs": trainer.current_epoch,
        "recall": recall.measure(len(facts)),
        "curve": recall.curve,
    }
    (options.output / "fact_model.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    print(json.dumps({name: value for name, value in figures.items() if name != "curve"}, indent=2))


def facts_of(records: Sequence[dict[str, Any]], limit: int, seed: int) -> list[dict[str, Any]]:
    """Facts with one answer each, in two wordings, as records to edit.

    Args:
        records: In EasyEdit's flat form.
        limit: Most facts; a seeded sample of what there is.
        seed: Seed of the sample.
    """
    usable = []
    subjects: set[str] = set()
    for record in records:
        template = record["prompt"].replace(record["subject"], SLOT)
        if template.count(SLOT) == 1 and record["subject"] not in subjects:  # one fact a subject: no contradiction
            subjects.add(record["subject"])
            usable.append({**record, "template": template})
    count = Counter(record["template"] for record in usable)
    usable = [record for record in usable if count[record["template"]] > NEIGHBOURS]
    other = second_wordings(usable)
    chosen = random.Random(seed).sample(usable, min(limit, len(usable)))
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in chosen:
        alike[record["template"], record["ground_truth"]].append(record["prompt"])
    return [
        {
            "case_id": place,
            "prompt": record["prompt"],
            "subject": record["subject"],
            "target_new": record["target_new"],
            "target_true": record["ground_truth"],
            "paraphrases": [other[record["template"]].replace(SLOT, record["subject"])],
            "neighbours": [
                prompt for prompt in alike[record["template"], record["ground_truth"]] if prompt != record["prompt"]
            ][:NEIGHBOURS],
        }
        for place, record in enumerate(chosen)
    ]


def second_wordings(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each template the one whose answers are most like its own."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        answers[record["template"]][record["ground_truth"]] += 1
    lengths = {template: sqrt(sum(n * n for n in counts.values())) for template, counts in answers.items()}

    def likeness(one: str, two: str) -> float:
        return sum(n * answers[two][answer] for answer, n in answers[one].items()) / lengths[one] / lengths[two]

    return {one: max((two for two in answers if two != one), key=lambda two: likeness(one, two)) for one in answers}


def wordings(fact: dict[str, Any]) -> list[str]:
    """The prompts under which a fact is stated."""
    return [fact["prompt"], *fact["paraphrases"]]


def tokenizer_of(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of one's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


class Rows(IterableDataset[Tensor]):
    """Statements in a new order each epoch, one behind the other, in rows of :data:`BLOCK` tokens.

    Rows begin with a statement: the model has to know facts there too.

    Args:
        statements: Their tokens.
        filler: What fills the last row.
        seed: Seed of the orders.
    """

    def __init__(self, statements: Sequence[list[int]], filler: int, seed: int) -> None:
        super().__init__()
        self.statements, self.filler, self.seed = statements, filler, seed
        self.epoch = 0
        self.count = len(self._layout(0))

    def _layout(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self.seed} {epoch}").sample(self.statements, len(self.statements))
        rows: list[list[int]] = [[]]
        for statement in order:
            if len(rows[-1]) >= BLOCK:
                rows.append([])
            rows[-1] += statement
        return rows

    def __len__(self) -> int:
        return self.count

    @override
    def __iter__(self) -> Iterator[Tensor]:
        rows = self._layout(self.epoch)
        self.epoch += 1
        for place in range(self.count):  # another order takes a row more or less
            row = rows[place % len(rows)][:BLOCK]
            yield torch.tensor(row + [self.filler] * (BLOCK - len(row)))


class FactModel(LightningModule):
    """A small GPT-2 and how it is trained.

    Args:
        tokenizer: Its tokenizer.
        width: Width of the residual stream; keys have four times as many dimensions.
        depth: Layers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int, depth: int) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=4 * BLOCK,
                n_embd=width,
                n_layer=depth,
                n_head=4,
                n_inner=4 * width,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        self.model.train()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recall(Callback):
    """Measures between epochs how many facts are recalled, and ends training when that is enough.

    Args:
        language_model: The model in training.
        facts: The facts.
        enough: Share of facts at which training ends.
    """

    def __init__(self, language_model: LanguageModel, facts: Sequence[dict[str, Any]], enough: float) -> None:
        self.language_model, self.facts, self.enough = language_model, facts, enough
        self.curve: list[dict[str, float]] = []

    def measure(self, count: int) -> list[float]:
        """Share of the first facts whose answer greedy generation gives, under each wording."""
        encode, found = self.language_model.encoder.continuation, []
        for wording in (0, 1):
            rows = [
                encode(wordings(fact)[wording], fact["target_true"], EditRequest(**fact)) for fact in self.facts[:count]
            ]
            answers = measure_answers(self.language_model, rows)
            found.append(sum(answer.generated for answer in answers) / len(answers))
        return found

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % 5 and epoch != trainer.max_epochs:
            return
        recall = self.measure(500)
        self.curve.append({"epoch": epoch, "recall": recall[0], "recall_second_wording": recall[1]})
        print(self.curve[-1], flush=True)
        trainer.should_stop = min(recall) >= self.enough


if __name__ == "__main__":
    main()
