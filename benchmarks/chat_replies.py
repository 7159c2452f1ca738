"""What a chat model replies before and after the edits of a run, in whole sentences.

    rome-pl edit --config smollm2-chat
    python benchmarks/chat_replies.py --ledger runs/smollm2-chat --json replies.json

Greedy replies to every question, paraphrase and neighbour of the run's requests. A reply gives an answer if the
answer's text is in it, whatever stands around it. Neighbours count where the unedited model gives their answer.
"""

import argparse
import json
from pathlib import Path

from rome_pl.encoding.chat_template import ChatForm
from rome_pl.forward.generation import generate
from rome_pl.ledger.replay import read_edits, read_manifest, replay
from rome_pl.model.loading import load_language_model

TOKENS = 40
"""Length of a reply."""


def main() -> None:
    """Measure, write and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ledger", type=Path, required=True, help="folder of the run")
    arguments.add_argument("--json", type=Path, help="file for the replies")
    options = arguments.parse_args()
    about, edits = read_manifest(options.ledger)["model"], read_edits(options.ledger)
    model = load_language_model(about["source"]).with_chat(ChatForm(**about["chat"]) if about.get("chat") else None)
    requests = [edit["request"] for edit in edits]
    asked = [
        (index, kind, question)
        for index, request in enumerate(requests)
        for kind, questions in (
            ("rewrite", [request["prompt"]]),
            ("paraphrase", request["paraphrases"]),
            ("neighbour", request["neighbours"]),
        )
        for question in questions
    ]
    questions = [question for _, _, question in asked]
    before = generate(model, questions, TOKENS)
    replay(model, options.ledger)
    after = generate(model, questions, TOKENS)
    replies = [
        {"record": index, "kind": kind, "question": question, "before": old, "after": new}
        | {"new": _in(requests[index]["target_new"], new), "true": _in(requests[index]["target_true"], new)}
        | {"known": _in(requests[index]["target_true"], old)}
        for (index, kind, question), old, new in zip(asked, before, after, strict=True)
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(replies, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("| question | before | after |\n|---|---|---|")
    for reply in replies:
        if reply["kind"] == "rewrite":
            print(f"| {reply['question']} | {_line(reply['before'])} | {_line(reply['after'])} |")
    for kind in ("rewrite", "paraphrase"):
        chosen = [reply for reply in replies if reply["kind"] == kind]
        known, new = (sum(bool(reply[name]) for reply in chosen) for name in ("known", "new"))
        print(f"{kind}: the true answer before {known} of {len(chosen)}, the new one after {new}")
    known = [reply for reply in replies if reply["kind"] == "neighbour" and reply["known"]]
    asked_about = sum(reply["kind"] == "neighbour" for reply in replies)
    same = sum(reply["before"] == reply["after"] for reply in replies if reply["kind"] == "neighbour")
    stay, false = (sum(bool(reply[name]) for reply in known) for name in ("true", "new"))
    print(
        f"neighbour: the true answer before {len(known)} of {asked_about}; of these {stay} after, and {false} give the "
        f"new one; {same} of {asked_about} replies are the same to the last token"
    )


def _in(answer: str, reply: str) -> bool:
    return answer.strip().lower().removeprefix("the ") in reply.lower()


def _line(reply: str) -> str:
    return " ".join(reply.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
