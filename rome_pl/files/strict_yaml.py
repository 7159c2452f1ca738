"""Strict YAML: a repeated key, an alias that contains itself or fills the memory, and deep nesting are faults."""

import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

from rome_pl.errors import first_line
from rome_pl.files.strict_json import DEEPEST, LONGEST_NUMBER, Fault

__all__ = ["list_entries", "read_value"]

LARGEST = 100_000
"""Most values that aliases may make of an entry."""

_DEEP = f"lists and mappings stand in one another more than {DEEPEST} deep; flatten them"

_SURROGATE = re.compile("[\ud800-\udfff]")

# Besides ValueError, the library's constructors raise these for scalars that do not fit their tag.
_NO_SUCH_VALUE = (KeyError, IndexError, AttributeError, OverflowError, TypeError)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not accepted."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, message, mark)


class _Loader(yaml.SafeLoader):
    """Composes nodes to a depth, and constructs mappings whose keys occur once.

    Args:
        text: The text to read.
        remedy: What to do about a key that occurs twice.
    """

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy, self._depth = remedy, 0
        self._length = len(text)
        self._sizes: dict[int, tuple[int, int]] = {}
        self._checked: set[int] = set()

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        if self._depth > DEEPEST + 2:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _Refused(_DEEP, mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        node: ScalarNode = super().compose_scalar_node(anchor)
        if _SURROGATE.search(node.value):  # YAML includes JSON, which writes one character as two escapes
            node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, MappingNode):
            self._check_keys(node)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        if len(node.value) > LONGEST_NUMBER:
            number = f"the number {node.value[:20]}... has {len(node.value)} digits"
            raise _Refused(f"{number}; put it in quotes, or shorten it", node.start_mark)
        return super().construct_yaml_int(node)

    def entry(self, node: Node, above: frozenset[int]) -> Any:
        """The value of a node, or the fault in its place."""
        line = node.start_mark.line + 1
        # Reset what a fault in the previous entry has left.
        self.constructed_objects, self.recursive_objects, self.state_generators = {}, {}, []
        try:
            size, depth = self._measure(node, above)
            if depth > DEEPEST:
                return Fault(_DEEP, line)
            if size > LARGEST and size > 2 * self._length:
                return Fault(f"its aliases stand for more than {LARGEST} values; write them out, or fewer", line)
            return self.construct_document(node)
        except yaml.MarkedYAMLError as error:
            return _fault(error, line)
        except yaml.YAMLError as error:
            return Fault(f"malformed YAML: {first_line(error)}", line)
        except ValueError as error:  # such as a date that does not exist
            return Fault(f"malformed YAML: {first_line(error)[:200]}", line)
        except _NO_SUCH_VALUE:
            return Fault("malformed YAML: a value does not fit its tag (!!); put it in quotes, without the tag", line)

    def _measure(self, node: Node, above: frozenset[int]) -> tuple[int, int]:
        """Number of values and depth of a node with its aliases written out."""
        if not isinstance(node, CollectionNode):
            return 1 + len(node.value) // 64, 0
        if id(node) in above:
            raise _Refused("an alias stands for a value that holds itself; write it out", node.start_mark)
        if (known := self._sizes.get(id(node))) is not None:
            return known
        inside = above | {id(node)}
        children = node.value if isinstance(node, SequenceNode) else [part for pair in node.value for part in pair]
        parts = [self._measure(child, inside) for child in children]
        found = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
        self._sizes[id(node)] = found
        return found

    def _check_keys(self, node: MappingNode) -> None:
        if id(node) in self._checked:  # it may already contain the keys that were merged into it
            return
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            plain = key_node.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
            key = key_node.value if plain else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                return  # the library reports it
            if key in seen:
                raise _Refused(
                    f"the key {str(key)[:80]!r} occurs twice in one mapping; {self.remedy}", key_node.start_mark
                )
            seen.add(key)
        self._checked.add(id(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_value(text: str, remedy: str) -> Any:
    """Read a text that holds one document.

    Args:
        text: The text.
        remedy: What to do about a key that occurs twice.

    Returns:
        The value, or a :class:`Fault` in its place.
    """
    composed = _composed(text, remedy)
    if composed is None or isinstance(composed, Fault):
        return composed
    loader, node = composed
    return loader.entry(node, frozenset())


def list_entries(text: str, remedy: str) -> Iterator[Any] | Any:
    """Read a list entry by entry, so that a fault affects only its own entry.

    Args:
        text: The text.
        remedy: What to do about a key that occurs twice.

    Returns:
        An iterator over the entries, with a :class:`Fault` in place of each faulty one. If the text is not a list: its
        value, or a :class:`Fault` for all of it.
    """
    composed = _composed(text, remedy)
    if composed is None or isinstance(composed, Fault):
        return composed
    loader, node = composed
    if not isinstance(node, SequenceNode) or node.tag != "tag:yaml.org,2002:seq":
        return loader.entry(node, frozenset())
    return (loader.entry(child, frozenset({id(node)})) for child in node.value)


def _composed(text: str, remedy: str) -> tuple[_Loader, Node] | Fault | None:
    """A loader with the root node of the document. ``None``: the text is empty."""
    try:
        loader = _Loader(text, remedy)  # refuses characters that YAML does not have
        node = loader.get_single_node()
        return None if node is None else (loader, node)
    except yaml.MarkedYAMLError as error:
        return _fault(error, 1, whole=True)
    except yaml.YAMLError as error:
        return Fault(f"malformed YAML: {first_line(error)}", 1, whole=True)
    except RecursionError:
        return Fault(_DEEP, 1, whole=True)


def _fault(error: yaml.MarkedYAMLError, line: int, whole: bool = False) -> Fault:
    mark = error.problem_mark or error.context_mark
    said = ", ".join(part for part in (error.context, error.problem) if part)[:200]
    message = said if isinstance(error, _Refused) else f"malformed YAML: {said}"
    return Fault(message, mark.line + 1 if mark is not None else line, whole)
