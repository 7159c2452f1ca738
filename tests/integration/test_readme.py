"""What README promises exists; its blocks are run by ``test_documents``."""

import ast
import importlib
import re
from pathlib import Path

import yaml

import rome_pl.configs
from rome_pl.requests.record_forms import parse_records
from tests.documents import blocks_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return [block.code for block in blocks_of("README.md") if block.language == language]


def test_the_first_two_commands_set_up_and_run_and_test():
    first, second, *_ = blocks("bash")
    for command in (first, second):
        assert command.count("\n") == 1
        assert "python3 -m venv .venv" in command
        assert "-c constraints.txt" in command
    assert "rome-pl edit --config quickstart" in first
    assert "pytest" in second
    # CI runs the block after this mark.
    assert README.index("<!-- test command -->") < README.index(second)
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_configs_named_are_shipped():
    shipped = {path.stem for path in Path(rome_pl.configs.__file__).parent.glob("*.yaml")}
    assert set(re.findall(r"--config (\w[\w.-]*)", README)) <= shipped
    assert {"gpt2-xl", "gpt-j-6b", "llama-2-7b"} <= shipped


def test_the_example_file_is_valid():
    requests, invalid = parse_records(yaml.safe_load(blocks("yaml")[0]), "facts.yaml")
    assert len(requests) == 1
    assert invalid == []


def test_the_python_examples_import_what_exists():
    examples = blocks("python")
    assert len(examples) == 2
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_documents_linked_exist():
    for link in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / link).is_file(), link
