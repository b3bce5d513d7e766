"""Convert tools and tool calls from various formats to OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.problems import BadRecordError, brief, brief_list
from autosft.profiles.dataset.text_values import as_json

SCHEMA_RENAMED = "tools give their parameters as {}: they are written as parameters"
ARGUMENTS_RENAMED = "calls give their arguments as {}: they are written as arguments"
NULLS_REMOVED = "nulls in tools or calls are left out: columnar files put them where another record has a key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The functions that a record declares."""

    listed: tuple[Mapping[str, Any], ...] = ()
    fills_nulls: bool = False  # from a columnar file: a null in an object is an absent key
    parameters: Mapping[str, frozenset[str]] = field(default_factory=dict)  # declared, by function


def read_tools(columns: Sequence[object], *, fills_nulls: bool, found: set[str]) -> Tools:
    """Read the columns with tools, as lists or JSON; each tool in OpenAI's form or just its function.

    Raises `BadRecordError` for anything but a list of objects, and if two columns differ.
    """
    given = [column for column in columns if _listed(column)]
    if any(_listed(column) != _listed(given[0]) for column in given[1:]):
        raise BadRecordError("two lists of tools that differ")
    are_filled = fills_nulls and not isinstance(next(iter(given), None), str)
    listed = tuple(_tool(tool, are_filled, found) for tool in (_listed(given[0]) if given else ()))
    parameters = {}
    for tool in listed:
        function = tool["function"]
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if isinstance(properties, Mapping):
            parameters[str(function.get("name"))] = frozenset(properties)
    return Tools(listed=listed, fills_nulls=fills_nulls, parameters=parameters)


def _listed(tools: object) -> list[Any]:
    value = parsed(tools) if tools else []
    if isinstance(value, Mapping) and value:
        value = _by_name(value) or [value]
    if not value:
        return []
    tools_in = [parsed(tool) for tool in value] if isinstance(value, list) else []
    if not tools_in or not all(isinstance(tool, Mapping) for tool in tools_in):
        raise BadRecordError("tools are not a JSON list of objects", brief(repr(tools)))
    return [inner for tool in tools_in for inner in _declared(tool)]


def _by_name(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tools of an object that has them by their names; none for one tool."""
    if not value.keys().isdisjoint(("name", "function", "type", *_DECLARATIONS)):
        return []
    functions = {name: parsed(tool) for name, tool in value.items()}
    if not all(isinstance(tool, Mapping) for tool in functions.values()):
        return []
    return [{"name": name, **tool} for name, tool in functions.items()]


def _declared(tool: Mapping[str, Any]) -> list[Any]:
    """Return the functions that a tool of Gemini's form declares; others as they are."""
    key = next((key for key in _DECLARATIONS if isinstance(tool.get(key), list)), None)
    return [tool] if key is None else [parsed(function) for function in tool[key]]


def _tool(tool: Mapping[str, Any], fills_nulls: bool, found: set[str]) -> Mapping[str, Any]:
    function = parsed(tool.get("function"))
    if not isinstance(function, Mapping):  # bare, or beside its type as in OpenAI's Responses API
        function = {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
        tool = {"type": "function"}
    if not isinstance(function.get("name"), str):
        raise BadRecordError("a tool without a name", brief(repr(tool if "function" in tool else function)))
    function = _with_parameters(function, found)
    kept = _without_nulls(function, keep=() if fills_nulls else _NULLABLE, found=found)
    rest = {key: value for key, value in tool.items() if key != "function" and value is not None}
    as_json(kept, "a tool")
    return {"type": "function", **rest, "function": kept}


def _with_parameters(function: Mapping[str, Any], found: set[str]) -> Mapping[str, Any]:
    """Give a function's schema OpenAI's name, under which chat templates look for it."""
    key = next((key for key in _SCHEMA_KEYS if function.get(key) is not None), None)
    if key is None or function.get("parameters") is not None:
        return function
    found.add(SCHEMA_RENAMED.format(key))
    return {("parameters" if name == key else name): value for name, value in function.items()
            if name != "parameters"}  # fmt: skip


def read_calls(calls: object, tools: Tools, found: set[str]) -> list[Mapping[str, Any]]:
    """Convert calls to OpenAI's form, with arguments as an object: chat templates write the JSON themselves.

    Raises `BadRecordError` for a call without a recognisable name or arguments.
    """
    tools, value = without_fills(tools, calls), parsed(calls)
    listed = value if isinstance(value, list) else [value]
    return [_call(parsed(call), without_fills(tools, call), found) for call in listed]


def without_fills(tools: Tools, value: object) -> Tools:
    """Return the tools for reading `value`: in JSON text, all nulls are the author's."""
    return replace(tools, fills_nulls=False) if isinstance(value, str) else tools


def _call(call: Any, tools: Tools, found: set[str]) -> Mapping[str, Any]:
    function = parsed(call.get("function")) if isinstance(call, Mapping) else None
    tools = without_fills(tools, call.get("function") if isinstance(call, Mapping) else None)
    if isinstance(function, str):  # {"function": "count", "arguments": ...}
        function = {**call, "name": function, "function": None}
    elif function is None:
        function = call
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise BadRecordError("a function call is not JSON with name and arguments", brief(repr(call)))
    if function is not call and isinstance(function, Mapping):
        function = _with_outer_arguments(function, call)
    name = function["name"]
    identity = next((item["id"] for item in (call, function) if isinstance(item.get("id"), str)), None)
    key, arguments = _arguments(function, found)
    arguments = _without_nulls_of_call(name, arguments, without_fills(tools, function.get(key)), found)
    as_json(arguments, "a function call's arguments")
    return {
        **({} if identity is None else {"id": identity}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _with_outer_arguments(function: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call's function with arguments that stand beside it instead of in it."""
    outside = {key: call[key] for key in _ARGUMENT_KEYS if call.get(key) not in _EMPTY}
    inside = {key: value for key, value in function.items() if key in _ARGUMENT_KEYS and value in _EMPTY}
    return (
        {**{key: value for key, value in function.items() if key not in inside}, **outside}
        if outside
        else function
    )


def _arguments(function: Mapping[str, Any], found: set[str]) -> tuple[str, Mapping[str, Any]]:
    """Return the key of a call's arguments, and the arguments as an object."""
    given = [key for key in _ARGUMENT_KEYS if function.get(key) is not None]
    if not given:
        unknown = [key for key in function if key not in _CALL_KEYS and function[key] is not None]
        if unknown:
            raise BadRecordError(
                "a function call without arguments", f"it has {brief_list(unknown)} in their place"
            )
        return "arguments", {}
    if len(given) > 1:
        raise BadRecordError("a function call with two sets of arguments", brief_list(given))
    if given[0] != "arguments":
        found.add(ARGUMENTS_RENAMED.format(given[0]))
    arguments = function[given[0]]
    if isinstance(arguments, str):
        arguments = parsed(_unquoted(arguments.strip() or "{}"))
    if not isinstance(arguments, Mapping):
        raise BadRecordError(
            "a function call's arguments are not a JSON object", brief(repr(function[given[0]]))
        )
    beside = [key for key in function if key not in _CALL_KEYS and function[key] not in _EMPTY]
    if beside and not arguments:
        raise BadRecordError(
            "a function call with empty arguments", f"it has {brief_list(beside)} beside them"
        )
    return given[0], arguments


def _unquoted(text: str) -> str:
    """Parse JSON that was encoded twice."""
    import json

    if not text.startswith('"'):
        return text
    try:
        inner = json.loads(text)
    except ValueError:
        return text
    return inner if isinstance(inner, str) else text


def _without_nulls_of_call(
    name: str, arguments: Mapping[str, Any], tools: Tools, found: set[str]
) -> dict[str, Any]:
    """Remove the nulls that mean absent keys.

    In a columnar file these are all nulls.  Another file may have been exported from one if there is a null
    for a parameter that the function does not declare; otherwise nulls are the author's.
    """
    declared = tools.parameters.get(name, arguments.keys())
    if tools.fills_nulls or any(arguments[key] is None for key in arguments.keys() - declared):
        kept: dict[str, Any] = _without_nulls(arguments, keep=(), found=found)
        return kept
    return dict(arguments)


def _without_nulls(value: Any, *, keep: tuple[str, ...], found: set[str]) -> Any:
    """Remove nulls from objects at any depth, except under the keys `keep`."""
    if isinstance(value, Mapping):
        if any(item is None and key not in keep for key, item in value.items()):
            found.add(NULLS_REMOVED)
        return {
            key: _without_nulls(item, keep=keep, found=found)
            for key, item in value.items()
            if item is not None or key in keep
        }
    if isinstance(value, list):
        return [_without_nulls(item, keep=keep, found=found) for item in value]
    return value


def with_call_ids(messages: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Give ids to calls without one, and each result the id of its call.

    Ids have nine letters and digits, as Mistral's templates require (mistral-common,
    InstructRequestNormalizer).
    """
    named: list[Mapping[str, Any]] = []
    open_ids: list[str] = []
    number = 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                calls.append({"id": f"call{number:05d}", **call})
                number += 1
            open_ids = [call["id"] for call in calls]
            named.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            call_id = open_ids.pop(0) if open_ids else f"call{max(0, number - 1):05d}"
            named.append({"tool_call_id": call_id, **message})
        else:
            named.append(message)
    return tuple(named)


_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "kwargs")
#: What says that there are none.
_EMPTY: tuple[object, ...] = (None, "", "{}", {})
#: Names that a function's schema has elsewhere: Anthropic's, the Model Context Protocol's, Gemini's.
_SCHEMA_KEYS = ("input_schema", "inputSchema", "parametersJsonSchema")
#: Under which Gemini lists the functions of a tool.
_DECLARATIONS = ("function_declarations", "functionDeclarations")
_CALL_KEYS = frozenset({"name", "type", "id", "index", "call_id", "function", *_ARGUMENT_KEYS})
#: Keywords of JSON Schema for which null is an ordinary value.
_NULLABLE = ("default", "const", "examples")
