"""JSON as this package reads and writes it: canonical when hashed, strict when it comes from outside."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from s2s_ray.errors import InputError, S2SRayError

MAX_JSON_BYTES = 256 * 2**20  # the largest published tokenizer.json files are about 40 MB
MAX_JSON_DEPTH = 64


def canonical_json(obj: Any) -> bytes:
    """The one spelling of `obj` that is hashed: sorted keys, no spaces, UTF-8, no NaN (raises ValueError)."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def strict_json(data: bytes, what: str, error: type[S2SRayError] = InputError) -> Any:
    """Parse untrusted JSON. `what` names it in the message.

    Raises `error` for malformed or over-large input, invalid UTF-8, duplicate keys, NaN or Infinity (both of which
    `json` accepts), numbers beyond a double, and nesting deeper than MAX_JSON_DEPTH.
    """

    def refuse(why: str) -> NoReturn:
        raise error(f"{what} must be plain JSON: {why}")

    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            refuse(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
        return result

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            refuse(f"number {text[:40]} does not fit a double")
        return value

    if len(data) > MAX_JSON_BYTES:
        refuse(f"{len(data)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        result = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_float=number,
            parse_constant=lambda name: refuse(f"{name} is not JSON"),
        )
    except error:
        raise
    except RecursionError:
        refuse(f"nested deeper than {MAX_JSON_DEPTH}")
    except ValueError as exc:  # JSONDecodeError, UnicodeDecodeError, over-long integers
        refuse(str(exc)[:200])
    if _depth_exceeds(result, MAX_JSON_DEPTH):
        refuse(f"nested deeper than {MAX_JSON_DEPTH}")
    return result


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
