"""YAML of the user's, as plain values. A file of its own, because few need it and importing yaml takes its time."""

from __future__ import annotations

from reprlib import repr as told
from typing import Any

import yaml

from everydream.data.problems import Unfit


class _Loader(yaml.SafeLoader):
    """Dates are text, keys stand once, and whatever cannot be read is a YAMLError with its line."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # nested ones grow without bounds
            raise yaml.MarkedYAMLError(problem="an alias, or a text that begins with *", problem_mark=self._here())
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{told(key.value)} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # of !!int foo and its like
            raise yaml.MarkedYAMLError(
                problem=f"what stands there is no usable {node.tag.rpartition(':')[2]}", problem_mark=node.start_mark
            ) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        float(number)  # one of thousands of digits could not even be shown
        return number

    def as_text(self, node: yaml.ScalarNode) -> str:
        return self.construct_yaml_str(node)

    def _here(self) -> yaml.Mark:
        return self.peek_event().start_mark


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.as_text)

ADVICE = "write caption: … and values such as multiply: 2 (a text with colons in quotes), or use a .txt file"


def load(text: str) -> Any:
    """None, text, numbers, booleans, lists and mappings. Raises Unfit."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = f"not YAML{place}" + (f" ({problem})" if problem else "")
    except RecursionError:
        reason = "not YAML that can be read (nested too deeply)"
    raise Unfit(reason, ADVICE)
