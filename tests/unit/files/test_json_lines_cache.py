import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from pydantic import TypeAdapter

from rome_pl.files.checksums import sealed
from rome_pl.files.json_lines_cache import JsonLinesCache

NUMBERS = TypeAdapter(list[float])
ENTRIES = {"a": [1.0, 2.5], "b": [-0.1]}


@pytest.fixture
def cache(tmp_path):
    return JsonLinesCache(tmp_path / "folder" / "cache.jsonl", NUMBERS)


def test_entries_come_back_and_the_last_of_a_key_counts(cache):
    assert cache.read() == {}
    cache.append(ENTRIES)
    cache.append({"b": [7.0], "c": []})
    assert JsonLinesCache(cache.path, NUMBERS).read() == ENTRIES | {"b": [7.0], "c": []}


def test_numbers_that_are_not_finite_come_back(cache):
    cache.append({"a": [math.nan, math.inf]})
    nan, inf = cache.read()["a"]
    assert math.isnan(nan)
    assert inf == math.inf


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "c", "val',
        "[]",
        "null",
        "5",
        "{}",
        '{"key": "c", "value": [1.0]}',
        json.dumps(sealed({"key": "c"})),
        json.dumps(sealed({"value": [1.0]})),
        json.dumps(sealed({"key": "c", "value": "text"})),
        json.dumps(sealed({"key": "c", "value": [1.0]})).replace("1.0", "2.0"),
        "\udcff\udcfe",
    ],
)
def test_a_damaged_line_costs_itself_alone(line, cache):
    cache.append(ENTRIES)
    with cache.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\n" + line)
    cache.append({"d": [3.0]})
    assert cache.read() == ENTRIES | {"d": [3.0]}


def test_a_folder_in_its_place_is_no_cache(cache):
    cache.path.mkdir(parents=True)
    assert cache.read() == {}


def _append(path, start):
    cache = JsonLinesCache(path, NUMBERS)
    for number in range(start, start + 40):
        cache.append({str(number): [float(number)] * 2000})  # longer than one write of the operating system


def test_processes_that_append_at_once_lose_nothing(cache):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_append, [cache.path] * 2, [0, 40]))
    found = cache.read()
    assert sorted(map(int, found)) == list(range(80))
    assert found["41"] == [41.0] * 2000
