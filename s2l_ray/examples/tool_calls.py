"""Tools, and the calls of them, in OpenAI's form, from the forms that corpora have.

tools    [{"type": "function", "function": {"name", "description", "parameters"}}], without the wrapper, or JSON text of it
calls    [{"id", "type": "function", "function": {"name", "arguments"}}], without the wrapper, one alone, or JSON text of it
"""

from __future__ import annotations

from typing import Any

from s2l_ray.examples.row_problems import RowProblem, from_json_text, kind_in_words, names_in_words

_ARGUMENTS = ("arguments", "parameters", "args", "input")
_SCHEMAS = ("parameters", "input_schema", "inputSchema")


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The tools in a value; empty for null, empty text and an empty list. Raises RowProblem."""
    return [_tool(item).copy() for item in _listed(value, "bad_tools", "tools are a list of objects")]


def _tool(value: Any) -> dict[str, Any]:
    tool = from_json_text(value) if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise RowProblem("bad_tools", f"a tool is an object, found {kind_in_words(tool)}. {_TOOL_REMEDY}")
    function = tool.get("function")
    if function is None:
        function = {key: inner for key, inner in tool.items() if key != "type" and key not in _SCHEMAS}
        schema = next((tool[key] for key in _SCHEMAS if tool.get(key) is not None), None)
        function |= {} if schema is None else {"parameters": schema}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad_tools", f"a tool has a name, found the keys {names_in_words(tool)}. {_TOOL_REMEDY}")
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": from_json_text(function["parameters"])}
    return {"type": "function", "function": function}


_TOOL_REMEDY = 'Write {"type": "function", "function": {"name": ..., "parameters": ...}}.'


def read_calls(value: Any) -> list[dict[str, Any]]:
    """The calls in a value; empty for null, empty text and an empty list. Raises RowProblem."""
    return [_call(item) for item in _listed(value, "bad_tool_call", "tool calls are a list of objects")]


def _call(value: Any) -> dict[str, Any]:
    call = from_json_text(value) if isinstance(value, str) else value
    if not isinstance(call, dict):
        raise RowProblem("bad_tool_call", f"a tool call is an object, found {kind_in_words(call)}. {_CALL_REMEDY}")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        found = names_in_words(call)
        raise RowProblem("bad_tool_call", f"a tool call names its function, found the keys {found}. {_CALL_REMEDY}")
    given = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), None)
    canonical = {"type": "function", "function": {"name": name, "arguments": _arguments(given)}}
    return canonical if call.get("id") is None else {"type": "function", "id": _id(call["id"])} | canonical


_CALL_REMEDY = 'Write {"type": "function", "function": {"name": ..., "arguments": {...}}}.'


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowProblem("bad_tool_call", f"the id of a tool call is text, found {kind_in_words(value)}. {_CALL_REMEDY}")
    return str(value)


def _arguments(value: Any) -> dict[str, Any] | str:
    """Arguments as an object where they are one or the JSON text of one; other text as it is."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = from_json_text(value)
        except RowProblem:
            return value
        return parsed if isinstance(parsed, dict) else value
    if not isinstance(value, dict):
        found = kind_in_words(value)
        raise RowProblem("bad_tool_call", f"arguments of a call are an object or its JSON text, found {found}. {_CALL_REMEDY}")
    return value


def _listed(value: Any, reason: str, needed: str) -> list[Any]:
    """The items of a list, of a single object, or of the JSON text of either."""
    if isinstance(value, str):
        value = from_json_text(value) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, dict):
        return [value] if value else []
    if not isinstance(value, list):
        raise RowProblem(reason, f"{needed}, found {kind_in_words(value)}. Fix or remove it.")
    return value
